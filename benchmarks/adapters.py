"""Compare DPO of all weights with DPO of an adapter: `python benchmarks/adapters.py`.

Trains the demo's model by SFT, then from its policy.pt by DPO: all weights, LoRA, rsLoRA, PiSSA and
DoRA, each in a process of its own. `--model PATH --data FILE` takes another model, as it is, and
other pairs instead. Prints a table of held-out accuracy and margin, trained weights, seconds, peak
memory and the size of a checkpoint. `--out FILE` also writes it to a file; `--smoke`: smaller.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
}


class Row(NamedTuple):
    """Hold what one run shows."""

    kind: str
    lr: float
    accuracy: float
    margin: float
    trained: int  # numbers in policy.pt
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
    parser.add_argument("--out", type=Path)
    at = parser.parse_args()
    kinds = ["all weights", "LoRA"] if at.smoke else [*KINDS]
    with tempfile.TemporaryDirectory() as folder:
        start = start_of(at.model, Path(folder), at.smoke)
        if at.data is not None:
            start += [f"datasets=['{at.data}']", "eval_datasets=null"]
        n = at.pairs
        if at.smoke:
            n = 16
            start.append("n_eval_examples=16")
        rows = [measure(kind, at.lr, start, n, Path(folder)) for kind in kinds]
    text = table(rows, n)
    print(text)
    if at.out:
        at.out.write_text(text + "\n", encoding="utf-8")


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
    began = time.monotonic()
    train("demo_dpo", run_dir, [*options, "do_first_eval=false", "reference=live"])
    secs = time.monotonic() - began
    metrics = read_metrics(run_dir)
    last = [record for record in metrics if "loss/eval" in record][-1]
    files = [file for file in (run_dir / "LATEST").iterdir() if file.is_file()]
    return Row(
        kind=kind,
        lr=factor * lr,
        accuracy=last["rewards_eval/accuracies"],
        margin=last["rewards_eval/margins"],
        trained=sum(x.numel() for x in load_policy_state(str(run_dir)).values()),
        secs=secs,
        memory_gb=max(record.get("peak_memory_gb", 0) for record in metrics),
        checkpoint_mb=sum(file.stat().st_size for file in files) / 1e6,
    )


def table(rows: Sequence[Row], n: int) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"DPO on {n:,} pairs, live reference",
        "",
        "| trained | lr | held-out accuracy | margin | numbers in policy.pt | seconds | peak GB |"
        " checkpoint, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.kind} | {row.lr:g} | {row.accuracy:.3f} | {row.margin:.2f} | {row.trained:,} |"
        f" {row.secs:.0f} | {row.memory_gb:.2f} | {row.checkpoint_mb:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
