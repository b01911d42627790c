"""Measure how long commands take to answer, and a run to start training.

    python benchmarks/startup.py --baseline WORKTREE    # beside an older commit, checked out there
    python benchmarks/startup.py --smoke    # one round, without a run: seconds

Each round runs every case once in each checkout, this one and the baseline in turn; an uncounted
round warms the file caches. The table, written to --out as Markdown, shows the median and the range
of the wall time and the median CPU time (user + system) of the process, which depends less on other
work of the machine. "first step" is the time until the run of one step prints that it starts.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DEMO = ["exp=demo_sft", "n_epochs=null", "n_examples=16", "do_first_eval=false"]
NO_EVALUATION = ["do_last_eval=false", "sample_during_eval=false"]


class Case(NamedTuple):
    """Hold a command.

    Example: Case("a refused knob", ["train.py", "lr=-1"], code=2)
    """

    name: str
    command: list[str]
    code: int = 0  # the expected exit code
    until: str = ""  # measure until the line with this text; "": until the end


class Time(NamedTuple):
    """Hold the time of a command."""

    wall: float  # seconds
    cpu: float  # seconds, user + system, of the whole process


REFUSED = ["train.py", "exp_name=x", "model=demo"]
CASES = [
    *(
        Case(f"`{name}.py --help`", [f"{name}.py", "--help"])
        for name in ("train", "eval", "sample", "score", "report", "export")
    ),
    Case("`train.py`, `lr=-1`", [*REFUSED, "lr=-1"], 2),
    Case("`train.py`, an unknown option", [*REFUSED, "learning_rate=1"], 2),
    Case("`train.py`, an unknown data set", [*REFUSED, "max_length=64", "datasets=[hhh]"], 2),
]


def measure(case: Case, checkout: Path) -> Time:
    """Run the command once. Raises RuntimeError if it ends with another code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-u", *case.command],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    lines = []
    reached = 0.0
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if case.until and case.until in line and not reached:
            reached = time.monotonic() - start
    code = process.wait()
    wall = time.monotonic() - start
    if code != case.code or (case.until and not reached):
        raise RuntimeError(f"{checkout}: {case.name} ended with {code}:\n{''.join(lines[-5:])}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Time(reached or wall, cpu)


def table(times: dict[tuple[str, str], list[Time]], sides: Sequence[str]) -> str:
    """Return a row per case, with the median, the range and the CPU time of each side."""
    head = "".join(f" {side}: wall, s | range | CPU, s |" for side in sides)
    rows = [f"| |{head}", "|---|" + "---|" * 3 * len(sides)]
    for name in dict.fromkeys(name for name, _ in times):
        cells = []
        for side in sides:
            walls = [one.wall for one in times[name, side]]
            cpu = median(one.cpu for one in times[name, side])
            cells.append(f"{median(walls):.2f} | {min(walls):.2f}-{max(walls):.2f} | {cpu:.2f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def commit_of(checkout: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--baseline", type=Path, help="checkout of an older commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    parser.add_argument("--smoke", action="store_true", help="one round, without a run")
    options = parser.parse_args()
    checkouts = {"now": ROOT}
    if options.baseline:
        checkouts = {"before": options.baseline.resolve()} | checkouts
    with tempfile.TemporaryDirectory() as folder:
        run = Case(
            "first step of the demo's model",
            ["train.py", *DEMO, *NO_EVALUATION, f"local_dirs=[{folder}]"],
            until=" steps -> ",
        )
        cases = CASES if options.smoke else [*CASES, run]
        times: dict[tuple[str, str], list[Time]] = {}
        for i in range(1 if options.smoke else options.rounds + 1):
            for case in cases:
                for side, checkout in checkouts.items():
                    one = measure(case, checkout)
                    if i or options.smoke:
                        times.setdefault((case.name, side), []).append(one)
    commits = ", ".join(f"{side} {commit_of(path)}" for side, path in checkouts.items())
    about = (
        f"Python {platform.python_version()}, torch {version('torch')}, transformers"
        f" {version('transformers')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the"
        f" end; {options.rounds if not options.smoke else 1} rounds; {commits}"
    )
    text = f"{table(times, list(checkouts))}\n{about}\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
