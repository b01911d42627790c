"""Compare float32 weights with bfloat16 weights, rounded to the nearest and stochastically:
`python benchmarks/rounding.py`.

Trains the demo's model by SFT three times, and a fourth time with the optimizer's state in bfloat16
as well, at a learning rate whose updates bfloat16 mostly loses. Prints the held-out loss after each
part of the run. `--out FILE` also writes the table to a file; `--smoke`: smaller.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plumb.runs.history import read_metrics  # noqa: E402

BF16 = "model.policy_dtype=bfloat16"
KINDS = {
    "float32": [],
    "bfloat16, to the nearest": [BF16],
    "bfloat16, stochastically": [BF16, "stochastic_rounding=true"],
    "and the state": [BF16, "stochastic_rounding=true", "optimizer_state=bfloat16"],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--examples", type=int, default=1280)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", type=Path)
    at = parser.parse_args()
    n = 32 if at.smoke else at.examples
    more = ["n_eval_examples=8"] if at.smoke else []
    with tempfile.TemporaryDirectory() as folder:
        losses = {
            kind: curve(Path(folder) / str(i), n, [*options, *more, f"lr={at.lr:g}"])
            for i, (kind, options) in enumerate(KINDS.items())
        }
    text = table(losses, n, at.lr)
    print(text)
    if at.out:
        at.out.write_text(text + "\n", encoding="utf-8")


def curve(run_dir: Path, n: int, options: Sequence[str]) -> list[float]:
    """Train, and return the held-out loss before, after each quarter, and at the end."""
    command = [sys.executable, "train.py", "exp=demo_sft", f"local_run_dir='{run_dir}'"]
    fixed = [f"n_examples={n}", f"eval_every={n // 4}", "n_epochs=null", "warmup_steps=0"]
    command += ["sample_during_eval=false", *fixed, *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [record["loss/eval"] for record in read_metrics(run_dir) if "loss/eval" in record]


def table(losses: dict[str, list[float]], n: int, lr: float) -> str:
    """Return the curves as Markdown."""
    parts = len(next(iter(losses.values())))
    seen = [n * i // (parts - 1) for i in range(parts)]
    rows = [
        f"SFT of the demo's model, lr {lr:g}: held-out loss by the number of training examples",
        "",
        f"| weights | {' | '.join(f'{k:,}' for k in seen)} |",
        f"|---|{'---|' * parts}",
    ]
    rows += [
        f"| {kind} | {' | '.join(f'{x:.3f}' for x in curve)} |" for kind, curve in losses.items()
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
