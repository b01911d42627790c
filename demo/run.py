"""Show a model learning a preference: SFT from random weights, then DPO from its policy.pt, on the
preference set in this folder.

Runs `train.py exp=demo_sft` and `train.py exp=demo_dpo` as a user would, then compares: held-out
accuracies before and after DPO, samples of the same prompts, and the curves of both stages as a
PNG.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plumb.paths import get_local_dir  # noqa: E402
from plumb.reports.curves import draw_curves  # noqa: E402
from plumb.runs.history import read_metrics  # noqa: E402

BY_LIKELIHOOD = "logps_eval/accuracies"
BY_REWARD = "rewards_eval/accuracies"
MARGIN = "rewards_eval/margins"


def main() -> None:
    start = time.monotonic()
    folder = get_local_dir([str(ROOT / ".cache")]) / f"demo_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    sft, dpo = folder / "sft", folder / "dpo"
    stage("1/2  SFT from random weights: imitate both styles of answers", "exp=demo_sft", sft)
    stage(
        "2/2  DPO from the SFT policy: prefer the courteous, concrete answer",
        "exp=demo_dpo",
        dpo,
        f"model.archive='{sft}'",
    )
    summary(sft, dpo, draw_curves([sft, dpo], folder / "curves.png"))
    print(f"\ndone in {time.monotonic() - start:.0f} s")


def stage(title: str, experiment: str, run_dir: Path, *overrides: str) -> None:
    print(f"\n=== {title}", flush=True)
    command = [sys.executable, "train.py", experiment, f"local_run_dir='{run_dir}'", *overrides]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def summary(sft: Path, dpo: Path, curves: Path) -> None:
    evaluations = [r for r in read_metrics(dpo) if "loss/eval" in r]
    before, after = evaluations[0], evaluations[-1]
    held_out = len((ROOT / "demo/test.jsonl").read_text().splitlines())
    print(
        f"\n=== What the policy learned, on {held_out} held-out pairs whose prompts training never"
        " saw\n"
    )
    print(f"{'':<58}{'before DPO':>12}{'after':>8}")
    rows = {
        "chosen is more likely than rejected (share of pairs)": BY_LIKELIHOOD,
        "reward accuracy: chosen's reward above rejected's": BY_REWARD,
        "mean reward margin (beta * nats)": MARGIN,
    }
    for label, key in rows.items():
        print(f"{label:<58}{before[key]:>12.2f}{after[key]:>8.2f}")
    print(
        "Before DPO policy and reference are the same model: all rewards are 0, every pair is a"
        " tie, and ties do not count."
    )
    print(
        "The SFT targets were half chosen, half rejected, so likelihood alone should start near"
        " 0.5.\n"
    )
    print("=== The same prompts, before and after DPO (sampled at temperature 0.5)\n")
    samples = [json.loads(line) for line in (dpo / "samples.jsonl").read_text().splitlines()]
    policy = [s for s in samples if s["table"] == "policy_samples"]
    n = sum(s["step"] == 0 for s in policy)
    for first, last in zip(policy[:n], policy[-n:], strict=True):
        question = first["prompt"].strip().splitlines()[0]
        print(
            f"prompt  {question}\nbefore  {first['sample'].strip()}\nafter  "
            f" {last['sample'].strip()}\n"
        )
    print("=== Files\n")
    print(
        f"curves    {curves}\nSFT run   {sft}\nDPO run   {dpo}\npolicy   "
        f" {dpo / 'LATEST' / 'policy.pt'}"
    )
    print(f"report    make one with: python report.py {sft} {dpo}")


if __name__ == "__main__":
    main()
