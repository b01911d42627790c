"""Say at the start of a run what it is, and at its end what to do with it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from plumb.data.order import BlockSchedule
from plumb.losses.bound import Loss
from plumb.models.adapters import count_trained
from plumb.models.quantized_base import count_weights, quantized_bytes, quantized_numbers
from plumb.training.rollouts import samples_responses
from plumb.training.run_console import learning_rate, unit_of
from plumb.training.setup import Run


def start_summary(
    config: DictConfig, run: Run, policy: nn.Module, schedule: BlockSchedule, n_steps: int
) -> str:
    """Return a table of what a run trains, on what, and how; `n_steps`: those to its end, with the
    steps before a resumption.
    """
    loss = run.loss
    unit = unit_of(loss, samples_responses(config, loss))
    examples = run.data.train
    n = schedule.n_examples
    rows = {
        "run": shown_path(run.run_dir),
        "model": f"{model_name(config)}: {sizes(policy, config.model.quantize)}",
        "data": f"{len(examples):,} {unit} of {', '.join(map(name_or_path, config.datasets))};"
        f" {len(run.data.evaluation):,} held out",
        "steps": f"{n_steps:,} of {config.batch_size:,} {unit}; {n:,} in all,"
        f" {n / len(examples):.3g} epochs",
        "loss": ", ".join([loss.name, *(f"{k}={v}" for k, v in plain_knobs(loss).items())]),
        "lr": rate_of(config, n_steps),
        "precision": precision_of(config, policy),
    }
    if run.plan.reference is not None:
        rows["reference"] = f"the policy as it starts, {run.plan.reference} ({run.plan.why})"
    return "\n".join(f"{label:<10} {text}" for label, text in rows.items())


def model_name(config: DictConfig) -> str:
    """Return where the policy's weights come from: a path, a name, or random values."""
    spec = config.model
    if spec.archive:
        return shown_path(Path(spec.archive))
    if spec.architecture:
        return f"random weights (seed={config.seed})"
    return name_or_path(spec.name_or_path)


def name_or_path(name: str) -> str:
    return shown_path(Path(name)) if Path(name).exists() else name


def sizes(policy: nn.Module, quantize: str | None) -> str:
    """Return the class of a model and its parameters, in millions, with those that are kept in
    fewer bits (`quantize`).
    """
    n_quantized = quantized_numbers(policy)
    n = count_weights(policy)
    n_trained = count_trained(policy)
    share = f" ({n_trained / n:.2g} of them trained)" if n_trained < n else ""
    if n_quantized:
        size = f"{quantized_bytes(policy) / 1e6:,.1f} MB"
        share += f", {n_quantized / n:.0%} of them as {quantize}, in {size}"
    kind = type(policy).__name__.removeprefix("FSDP")
    return f"{kind}, {n / 1e6:,.1f} M parameters{share}"


def plain_knobs(loss: Loss) -> dict[str, Any]:
    """Return the knobs of a loss that are numbers other than 0."""
    return {k: v for k, v in loss.knobs.items() if isinstance(v, int | float) and v}


def rate_of(config: DictConfig, n_steps: int) -> str:
    after = "constant" if config.lr_schedule == "constant" else f"{config.lr_schedule} to the end"
    warmup = min(config.warmup_steps, n_steps)
    how = f"{warmup:,} steps of warm-up, then {after}" if warmup < n_steps else "all of it warm-up"
    return f"{learning_rate(config.lr)} ({config.optimizer}), {how if warmup else after}"


def precision_of(config: DictConfig, policy: nn.Module) -> str:
    parameter = next(policy.parameters())
    weights = str(parameter.dtype)[6:]
    on_gpu = config.fsdp_cpu_offload and torch.cuda.is_available()  # and the weights are in RAM
    device = "cuda" if on_gpu else parameter.device.type
    return (
        f"weights in {weights}, computed in {config.model.fsdp_policy_mp or weights}"
        f" on {device} by {config.trainer}"
    )


def notes(config: DictConfig, run: Run, n_steps: int) -> list[str]:
    """Return what a run that begins will probably not do as meant, each with its fix."""
    found = []
    if config.warmup_steps >= n_steps > 0:
        found.append(
            f"the run ends within its warmup, at {n_steps / (config.warmup_steps + 1):.0%} of lr;"
            f" warmup_steps={n_steps // 10} would be a tenth of its steps"
        )
    spec = config.model
    untaught = spec.architecture or run.data.tokenizer.chat_template is None
    if run.loss.needs_reference and not spec.archive and untaught:
        what = "random weights" if spec.architecture else "a model without a chat template"
        found.append(
            f"loss={run.loss.name} starts from {what}, and compares answers that this model may"
            " never give: train it with loss=sft first, and start from that run with"
            " model.archive=RUN"
        )
    return found


def next_commands(config: DictConfig, loss: Loss, run_dir: Path) -> str:
    """Return what one does with a finished run, as commands that can be copied."""
    run = shlex.quote(shown_path(run_dir))
    commands = [f"report.py {run}"]
    if not config.debug and loss.reads == "scores":
        commands = [f"eval.py {run}", f"score.py answers {run} FILE --out SCORED", *commands]
    elif not config.debug:  # which leaves no checkpoint
        commands = [
            f"eval.py {run}",
            f"sample.py {run} --chat",
            *commands,
            f"export.py {run} --out FOLDER",
        ]
    return "\n  python ".join(["next:", *commands])


def shown_path(path: Path) -> str:
    """Return a path as it is shortest to type: relative, if it is below the current directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
