"""Train a policy: `python train.py exp_name=... model=... datasets=[...] loss=...`; every knob is in config/.

validate -> tokenizer and data -> policy and reference -> trainer -> train -> save. What goes wrong through the user's
hands ends in one line and exit code 2.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what it would print, and `main` says it in one line
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Threads that spin while they wait make a CPU run ten times slower as soon as something else wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

import parallel
import processes
import trainers
from archives import resolve_archive
from losses import build_loss
from metrics import TrainingLog, make_sinks
from models import describe, load_policy, load_reference, load_tokenizer
from preparation import load_examples
from reference import weights_digest
from report import draw_curves
from sizing import memory_at_hand, trained_bytes, weights_bytes
from utils import UserError, environment, get_local_run_dir, peak_memory_gb, plain, rank, rank0_print
from validation import import_plugins, validate

OmegaConf.register_new_resolver("get_local_run_dir", get_local_run_dir, use_cache=True, replace=True)


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def run(config: DictConfig) -> None:
    """Validate, then train in this process or in several. A UserError ends in its line and exit code."""
    try:
        validate(config)
        OmegaConf.resolve(config)
        if config.model.archive:  # the run's record then says which policy.pt a pattern or LATEST meant
            config.model.archive = str(resolve_archive(config.model.archive).resolve())
        if config.trainer == "BasicTrainer":
            train(config)
        else:
            processes.launch(work, (config,), config.n_cpu_processes, config.fsdp_port)
    except UserError as error:  # here, not in `main`: Hydra would write a line of its own before passing it on
        sys.exit(fail(error, error.exit_code) if rank() == 0 else error.exit_code)
    except InterpolationResolutionError as error:
        sys.exit(fail(in_one_line(error), 2))


def work(config: DictConfig) -> None:
    """`train` in one process of several. Every rank meets the same mistake; rank 0 says it."""
    try:
        train(config)
    except UserError as error:
        if rank() != 0:
            time.sleep(5)  # a rank that ends takes the others with it, so rank 0 goes first: it may not have spoken yet
        sys.exit(fail(error, error.exit_code))
    except KeyboardInterrupt:
        sys.exit(130)


def train(config: DictConfig) -> None:
    """One run, from data to the last checkpoint, in this process or in this rank's part of it."""
    start = time.monotonic()
    import_plugins(config.plugins)
    loss = build_loss(plain(config.loss))
    config.local_run_dir = parallel.same_everywhere(config.local_run_dir)
    tokenizer = load_tokenizer(config)
    train_examples, eval_examples = load_examples(config, tokenizer, pairs=loss.data == "pairs")
    layout = getattr(trainers, config.trainer).make_layout(config)
    several_gpus = config.trainer == "BasicTrainer" and config.device is None and torch.cuda.device_count() > 1
    policy = load_policy(config, device_map="balanced" if several_gpus else None, layout=layout)
    dtype = config.model.reference_dtype and getattr(torch, config.model.reference_dtype)
    describe(policy, config)
    reference, weights = None, None
    if loss.needs_reference:
        cached = cache_reference(config, policy, len(train_examples), layout)
        weights = weights_digest(policy) if cached else None
        if not cached or dtype not in (None, policy.dtype):  # otherwise the policy, before its first step, is the reference
            reference = load_reference(policy, dtype, config, layout)

    run_dir = make_run_dir(config)
    log = TrainingLog(make_sinks(plain(config), run_dir), config.minimum_log_interval_secs)
    failed, budget = True, config.tokens_per_microbatch
    try:
        trainer = getattr(trainers, config.trainer)(
            config, policy, reference, weights, loss, tokenizer, train_examples, eval_examples, run_dir, log, layout
        )
        del policy, reference  # the trainer's; one that was only run once is free
        budget = trainer.packing.budget
        if config.n_examples and config.n_examples > trainer.schedule.n_examples:
            rank0_print(f"n_examples={config.n_examples}: n_epochs={config.n_epochs} ends after {trainer.schedule.n_examples}; "
                        "set n_epochs=null to go on")  # fmt: skip
        rank0_print(f"{loss.name}: {trainer.schedule.n_examples:,} examples in {trainer.schedule.n_steps:,} steps -> {run_dir}")
        trainer.train()
        failed = False
    except torch.OutOfMemoryError:
        raise UserError(f"out of GPU memory: set tokens_per_microbatch below {budget or 'what is free'} (the result stays the "
                        "same), or activation_checkpointing=true or model.fsdp_policy_mp=bfloat16") from None  # fmt: skip
    finally:
        log.close(failed)
    if rank() == 0:
        secs = time.monotonic() - start
        print(f"done in {secs:,.0f} s, peak memory {peak_memory_gb():.1f} GB; curves: {draw_curves([run_dir])}")


def cache_reference(config: DictConfig, policy: torch.nn.Module, n: int, layout: parallel.Layout | None) -> bool:
    """Is the reference to be run once over the data, and not beside the policy? With reference=auto: if examples come more than
    once, or if a second model would take a quarter of the memory that the policy's training leaves. Says which."""
    several = trainers.make_schedule(config, n).n_examples > n
    # A sharded policy lies where it will be trained already.
    n_shards, here = (1, weights_bytes(policy)) if layout is None else (layout.n_shards, 0)
    room = memory_at_hand(trainers.pick_device(config)) - here - trained_bytes(policy) / n_shards
    tight = weights_bytes(policy) / n_shards > room / 4
    cached = parallel.same_everywhere({"auto": several or tight, "live": False, "cached": True}[config.reference])
    why = "examples come more than once" if several else "memory is short" if tight else "each example comes once"
    rank0_print(f"reference: {'cached' if cached else 'live'} ({why if config.reference == 'auto' else 'as set'})")
    return cached


def make_run_dir(config: DictConfig) -> Path:
    """The run directory with the resolved config and the environment record."""
    run_dir = Path(config.local_run_dir)
    if rank() != 0:
        return run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, run_dir / "config.yaml")
        (run_dir / "env.json").write_text(environment())
    except OSError as error:
        raise UserError(f"local_run_dir={run_dir}: cannot be written ({error.strerror}); set local_dirs") from None
    return run_dir


def main() -> None:
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(fail(in_one_line(error), 2))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted; the checkpoints written so far are whole", 130))


def fail(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def in_one_line(error: Exception) -> str:
    """What Hydra says of an override that does not compose, less its advice for programmers."""
    lines = [line.strip() for line in str(error).partition("Config search path")[0].splitlines() if line.strip()]
    if "To append to your config use +" in lines[-1]:  # Hydra's fix is not ours: validate refuses what + adds
        knob = lines[-1].partition("+")[2]
        return f"{knob}: no such knob, or not of this model or loss; see config/config.yaml, config/model and config/loss"
    if lines[0].startswith("In 'config': Could not find '"):
        group, _, name = lines[0].partition("Could not find '")[2].strip("'").rpartition("/")
        return f"{group}={name}: no such file in config/{group}; it has: {', '.join(lines[2:])}"
    said = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type", "See https"))]
    knob = next((line.partition(": ")[2] + ": " for line in lines if line.startswith("full_key")), "")
    return knob + "; ".join(said)


if __name__ == "__main__":
    main()
