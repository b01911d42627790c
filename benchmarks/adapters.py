"""Compare DPO of all weights with DPO of an adapter: `python benchmarks/adapters.py`.

Trains the demo's model by SFT, then from its policy.pt by DPO: all weights, LoRA, rsLoRA, PiSSA,
DoRA, and LoRA on quantized weights if bitsandbytes is installed, each in a process of its own.
`--model PATH --data FILE` takes another model, as it is, and other pairs instead. Prints a table of
the loss of the first step, held-out accuracy and margin, trained weights, seconds of CPU time,
those of the start included, peak memory and the size of a checkpoint. `--only KIND` (as often as
needed) leaves out the others; `--trl` adds TRL's DPOTrainer with peft (see trl_adapter.py).
`--out FILE` also writes the table to a file; `--smoke`: smaller.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plumb.runs.history import read_metrics  # noqa: E402
from plumb.runs.policy_file import load_policy_state  # noqa: E402

# An adapter's learning rate is ten times that of all weights.
KINDS = {
    "all weights": (1, ["adapter=none"]),
    "LoRA": (10, ["adapter=lora"]),
    "LoRA, rank 64, rsLoRA": (
        10,
        ["adapter=lora", "adapter_rank=64", "adapter_alpha=16", "adapter_rslora=true"],
    ),
    "LoRA, PiSSA": (10, ["adapter=lora", "adapter_init=pissa"]),
    "DoRA": (10, ["adapter=dora"]),
    "LoRA on nf4": (10, ["adapter=lora", "model.quantize=nf4"]),
    "LoRA on int8": (10, ["adapter=lora", "model.quantize=int8"]),
}
TRL = "LoRA by TRL and peft"


class Row(NamedTuple):
    """Hold what one run shows."""

    kind: str
    lr: float
    first_loss: float  # log 2 if the reference is the model that the run starts from
    accuracy: float
    margin: float
    trained: int  # numbers that a checkpoint holds of the model
    secs: float
    memory_gb: float
    checkpoint_mb: float


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--model", type=Path, help="folder or .gguf file (default: the demo's)")
    parser.add_argument("--data", type=Path, help="pairs (default: the demo's)")
    parser.add_argument("--lr", type=float, default=3e-5, help="of all weights")
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=256, help="most held-out pairs")
    parser.add_argument("--only", action="append", choices=KINDS, help="kinds of runs")
    parser.add_argument("--trl", action="store_true", help="needs --model, --data, and trl")
    parser.add_argument("--out", type=Path)
    at = parser.parse_args()
    kinds = at.only or (["all weights", "LoRA"] if at.smoke else kinds_here())
    with tempfile.TemporaryDirectory() as folder:
        start = start_of(at.model, Path(folder), at.smoke)
        if at.data is not None:
            start += [f"datasets=['{at.data}']", "eval_datasets=null"]
        n = at.pairs
        if at.smoke:
            n = 16
            start.append("n_eval_examples=16")
        else:
            start.append(f"n_eval_examples={at.held_out}")
        warmup = min(10, n // at.batch_size // 4)
        start += [f"batch_size={at.batch_size}", f"warmup_steps={warmup}"]
        rows = [measure(kind, at.lr, start, n, Path(folder)) for kind in kinds]
        if at.trl:
            factor, _ = KINDS["LoRA"]
            rows.append(by_trl(factor * at.lr, start, n, Path(folder)))
    text = table(rows, n)
    print(text)
    if at.out:
        at.out.write_text(text + "\n", encoding="utf-8")


def kinds_here() -> list[str]:
    """Return the kinds of runs, without quantized ones where bitsandbytes is not installed."""
    can = importlib.util.find_spec("bitsandbytes") is not None
    return [kind for kind, (_, options) in KINDS.items() if can or "quantize" not in str(options)]


def start_of(model: Path | None, folder: Path, smoke: bool) -> list[str]:
    """Return the options of the model that DPO starts from; the demo's is trained first."""
    if model is not None:
        return ["model=blank_model", f"model.name_or_path='{model}'", "model.archive=null"]
    train("demo_sft", folder / "sft", ["n_epochs=null", "n_examples=64"] if smoke else [])
    return [f"model.archive='{folder}/sft'"]


def train(experiment: str, run_dir: Path, options: Sequence[str]) -> None:
    """Run train.py. Raise CalledProcessError if it fails."""
    quiet = ["sample_during_eval=false", f"local_run_dir='{run_dir}'"]
    command = [sys.executable, "train.py", f"exp={experiment}", *quiet, *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def measure(kind: str, lr: float, start: Sequence[str], n: int, folder: Path) -> Row:
    """Train and return what the run shows."""
    factor, options = KINDS[kind]
    run_dir = folder / kind.replace(" ", "_").replace(",", "")
    options = [*start, *options, f"lr={factor * lr:g}", f"n_examples={n}", f"eval_every={n}"]
    options += ["do_first_eval=false", "reference=live"]
    secs, _ = timed(lambda: train("demo_dpo", run_dir, options))
    metrics = read_metrics(run_dir)
    last = [record for record in metrics if "loss/eval" in record][-1]
    files = [file for file in (run_dir / "LATEST").iterdir() if file.is_file()]
    return Row(
        kind=kind,
        lr=factor * lr,
        first_loss=next(r["loss/train"] for r in metrics if "loss/train" in r),
        accuracy=last["rewards_eval/accuracies"],
        margin=last["rewards_eval/margins"],
        trained=sum(x.numel() for x in load_policy_state(str(run_dir)).values()),
        secs=secs,
        memory_gb=max(record.get("peak_memory_gb", 0) for record in metrics),
        checkpoint_mb=sum(file.stat().st_size for file in files) / 1e6,
    )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of CPU time of the processes that `work` starts and waits for, which what
    else runs on the machine hardly changes, and what it returns.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def by_trl(lr: float, start: Sequence[str], n: int, folder: Path) -> Row:
    """Train with TRL and peft on the examples of such a run, and return what that shows."""
    overrides = [*start, f"lr={lr:g}", f"n_examples={n}", f"local_run_dir='{folder}/by_trl'"]
    command = [sys.executable, "benchmarks/trl_adapter.py", str(folder), *overrides]
    secs, done = timed(
        lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    )
    return Row(kind=TRL, lr=lr, secs=secs, **json.loads(done.stdout.splitlines()[-1]))


def table(rows: Sequence[Row], n: int) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"DPO on {n:,} pairs, live reference",
        "",
        "| trained | lr | loss of the first step | held-out accuracy | margin | numbers saved |"
        " CPU seconds | peak GB | checkpoint, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.kind} | {row.lr:g} | {row.first_loss:.6f} | {row.accuracy:.3f} |"
        f" {row.margin:.2f} | {row.trained:,} | {row.secs:.0f} | {row.memory_gb:.2f} |"
        f" {row.checkpoint_mb:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
