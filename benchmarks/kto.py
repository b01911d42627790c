"""Train KTO on the same batches, split in different ways: `python benchmarks/kto.py`.

Makes the same steps with microbatches of 1, 2, 8 and all examples, and on two processes, and also
with TRL's KTOTrainer if it is installed (benchmarks/requirements.txt). All start from the same
weights, with the same rows in the same order. At the first step policy and reference are the same;
from the second on, the reference point z0 is above 0, and loss and gradient depend on it.

Prints a table of loss, gradient norm and z0 of the last step, with the largest relative difference
in loss and gradient norm from Plumb's first row over all steps. `--out FILE` also writes it to a
file. `--smoke`: smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
BETA = 0.1
LR = 0.05


class StepValues(NamedTuple):
    """Hold what a trainer logged for a step."""

    loss: float
    grad_norm: float
    z0: float


class Setting(NamedTuple):
    """Hold what all runs have in common."""

    folder: Path  # for all output
    model: Path
    rows: Path
    batch_size: int
    n_steps: int
    sizes: Sequence[int]  # of microbatches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    at = parser.parse_args()
    batch_size, n_steps = (4, 2) if at.smoke else (16, 4)
    sizes = (4, 1) if at.smoke else (16, 8, 2, 1)
    with tempfile.TemporaryDirectory() as folder:
        setting = make_setting(Path(folder), batch_size, n_steps, sizes)
        runs = [*of_plumb(setting), *of_trl(setting)]
    text = table(runs, f"{batch_size} examples in a batch, step {n_steps}")
    print(text)
    if at.out:
        at.out.write_text(text + "\n", encoding="utf-8")


def make_setting(folder: Path, batch_size: int, n_steps: int, sizes: Sequence[int]) -> Setting:
    """Write a small random model, and rows of single responses with a label, one response of each
    demo pair.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = (ROOT / "demo/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for i, line in enumerate(lines[: batch_size * n_steps]):
            pair = json.loads(line)
            text = pair["rejected" if i % 3 == 0 else "chosen"]
            row = {"prompt": pair["prompt"], "completion": text, "label": i % 3 != 0}
            file.write(json.dumps(row) + "\n")
    return Setting(
        folder=folder,
        model=folder / "model",
        rows=rows,
        batch_size=batch_size,
        n_steps=n_steps,
        sizes=sizes,
    )


def of_plumb(setting: Setting) -> Iterator[tuple[str, list[StepValues] | str]]:
    """Yield (name, the steps) of each way to split Plumb's batch."""
    n = setting.batch_size
    for size in setting.sizes:
        more = [f"gradient_accumulation_steps={n // size}"]
        yield f"Plumb, microbatches of {size}", plumb_run(setting, f"of{size}", more)
    two = ["trainer=FSDPTrainer", "n_cpu_processes=2"]
    yield "Plumb, 2 processes", plumb_run(setting, "two", two)
    ones = [*two, f"gradient_accumulation_steps={n // 2}"]
    yield "Plumb, 2 processes, microbatches of 1", plumb_run(setting, "two_of1", ones)


def plumb_run(setting: Setting, name: str, more: Sequence[str]) -> list[StepValues]:
    """Return the steps of `train.py` with these options."""
    run_dir = setting.folder / name
    options = [
        f"exp_name={name}",
        f"local_run_dir={run_dir}",
        f"local_dirs=[{setting.folder}]",
        f"model.name_or_path={setting.model}",
        f"datasets=[{setting.rows}]",
        "loss=kto",
        f"loss.beta={BETA}",
        f"batch_size={setting.batch_size}",
        f"n_examples={setting.batch_size * setting.n_steps}",
        "n_epochs=null",
        "optimizer=SGD",
        f"lr={LR}",
        "warmup_steps=0",
        "max_grad_norm=1e9",
        "max_length=256",
        "max_prompt_length=128",
        "shuffle=false",
        "eval_share=0",
        "reference=live",
        "sample_during_eval=false",
        "wandb.enabled=false",
        "debug=true",
        *more,
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    steps = [row for row in records if "loss/train" in row]
    names = ("loss/train", "grad_norm", "kl_train/z0")
    return [StepValues(*(row[name] for name in names)) for row in steps]


def of_trl(setting: Setting) -> Iterator[tuple[str, list[StepValues] | str]]:
    """Yield (name, the steps or why there are none) for each of TRL's microbatch sizes."""
    if find_spec("trl") is None:
        yield "TRL", "TRL is not installed"
        return
    for size in setting.sizes:
        yield f"TRL, per_device_train_batch_size={size}", trl_run(setting, size)


def trl_run(setting: Setting, size: int) -> list[StepValues] | str:
    """Return the steps of KTOTrainer, or the first line of its error."""
    from datasets import load_dataset
    from trl import KTOConfig, KTOTrainer

    cache = str(setting.folder / "cache")
    rows = load_dataset("json", data_files=str(setting.rows), split="train", cache_dir=cache)
    arguments: dict[str, Any] = {
        "output_dir": str(setting.folder / f"trl{size}"),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": setting.batch_size // size,
        "max_steps": setting.n_steps,
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "beta": BETA,
        "max_length": 256,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    try:
        trainer = KTOTrainer(
            model=LlamaForCausalLM.from_pretrained(setting.model),
            ref_model=LlamaForCausalLM.from_pretrained(setting.model),
            args=KTOConfig(**arguments),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(setting.model),
        )
    except ValueError as error:
        return f"refused: {str(error).splitlines()[0]}"
    trainer.train()
    steps = [row for row in trainer.state.log_history if "grad_norm" in row]
    return [StepValues(row["loss"], row["grad_norm"], row.get("kl", 0.0)) for row in steps]


def table(runs: Sequence[tuple[str, list[StepValues] | str]], title: str) -> str:
    """Return the runs as a table in Markdown."""
    first = runs[0][1]
    lines = [
        f"| {title} | loss | gradient norm | z0 | largest relative difference |",
        "|---|---|---|---|---|",
    ]
    for name, steps in runs:
        if isinstance(steps, str):
            lines.append(f"| {name} | {steps} | | | |")
            continue
        apart = max(
            abs(getattr(ours, value) / getattr(other, value) - 1)
            for ours, other in zip(steps, first, strict=True)
            for value in ("loss", "grad_norm")
        )
        last = steps[-1]
        lines.append(
            f"| {name} | {last.loss:.6f} | {last.grad_norm:.6f} | {last.z0:.6f} | {apart:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
