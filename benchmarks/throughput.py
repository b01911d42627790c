"""Measure training throughput: Plumb against the padded computation of the 2023 DPO code and
against TRL, on equal work.

    # a CPU, one thread, under 6 minutes; --whole: without sampling, about an hour
    python benchmarks/throughput.py --tokens .cache/benchmarks/harmless.npz
    # one GPU, under 8 minutes
    python benchmarks/throughput.py --tokens .cache/benchmarks/harmless.npz --device cuda
    # every path at tiny shapes
    python benchmarks/throughput.py --smoke

Needs benchmarks/requirements.txt. benchmarks/make_tokens.py makes the ids; after that, no network
is needed.

Every contender runs in its own process (benchmarks/contenders.py defines a step), with the same
weights, ids, batches of 64 pairs, order, optimizer and precision. First, losses and gradient norms
must agree on a few pairs (within 1e-4 relative in float32; the 5e-2 in bfloat16 is only reported).
On a CPU the runs then alternate, one step each, round after round; on a GPU they run one after
another. Units: pairs per second; unique tokens (each prompt once); GB of 1e9 bytes.

Output in --out: throughput.jsonl (each step, as it comes), then throughput.md (tables) and
throughput.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import scenarios
from scenarios import Scenario
from settings import Setting

HERE = Path(__file__).resolve().parent
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, on loss and gradient norm


class Failed(Exception):
    """A contender ended, ran out of memory or out of time; the message says which."""


class Child:
    """Run a contender in its process, which waits between orders."""

    def __init__(self, setting: Setting, errors: IO[str]):
        self.setting = setting
        self.errors = errors
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "contenders.py"), setting.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer. Raises Failed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=self.setting.timeout)
        except queue.Empty:
            self.stop()
            raise Failed(f"no answer in {self.setting.timeout:.0f} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            raise Failed(
                "out of memory (killed)"
                if code == -9
                else f"ended with code {code}; see {self.errors.name}"
            )
        answer = json.loads(line)
        if answer["event"] == "error":
            self.process.wait()
            raise Failed(answer["error"])
        return answer

    def stop(self) -> None:
        """End the process: gracefully if it waits for an order, otherwise at once."""
        try:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(timeout=20)
        except (subprocess.TimeoutExpired, OSError):
            self.process.kill()
            self.process.wait()


class Run:
    """Hold the output folder, the clock, and the records of all steps."""

    def __init__(self, folder: Path, minutes: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.minutes = minutes
        self.started = time.monotonic()
        self.log = (folder / "throughput.jsonl").open("w")
        self.errors = (folder / "contenders.log").open("w")
        self.records: list[dict[str, Any]] = []

    def left(self) -> float:
        """Return the seconds until the time limit."""
        return self.minutes * 60 - (time.monotonic() - self.started)

    def record(self, scenario: Scenario, setting: Setting, label: str, **fields: Any) -> None:
        """Keep and write one record, and print it in a line."""
        shape = (
            {"microbatch": setting.microbatch}
            if setting.contender != "plumb"
            else {"budget": setting.budget}
        )
        record = {
            "scenario": scenario.name,
            "label": label,
            "contender": setting.contender,
            **fields,
            **shape,
        }
        self.records.append(record)
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()
        if fields["event"] == "step":
            what = (
                f"{fields['pairs_per_sec']:8.2f} pairs/s  {fields['secs']:7.2f} s  loss"
                f" {fields['loss']:.5f}"
            )
        elif fields["event"] == "check":
            what = f"check: loss {fields['loss']:.6f}, gradient norm {fields['grad_norm']:.5f}"
        else:
            what = " ".join(f"{k}={v}" for k, v in fields.items())
        print(
            f"[{time.monotonic() - self.started:5.0f} s] {scenario.name:9s} {label:28s} {what}",
            flush=True,
        )


def agree(run: Run, scenario: Scenario) -> None:
    """Compare the checks with the first contender's. Raises SystemExit in float32 if they differ by
    more than the tolerance.
    """
    checks = [r for r in run.records if r["scenario"] == scenario.name and r["event"] == "check"]
    dtype = scenario.settings[0].dtype
    for other in checks[1:]:
        if other["n_check"] != checks[0]["n_check"]:
            continue
        worst = max(abs(other[key] / checks[0][key] - 1) for key in ("loss", "grad_norm"))
        verdict = (
            f"{other['label']}: loss and gradient norm within {worst:.1e} of {checks[0]['label']}'s"
        )
        run.record(
            scenario,
            scenario.settings[0],
            other["label"],
            event="agrees",
            within=worst,
            tolerance=TOLERANCE[dtype],
        )
        if worst > TOLERANCE[dtype] and dtype == "float32":
            raise SystemExit(
                f"the contenders do not compute the same thing: {verdict} (tolerance"
                f" {TOLERANCE[dtype]:.0e})"
            )


def start(
    run: Run, scenario: Scenario, setting: Setting, child: Child | None = None
) -> tuple[Child, Setting] | None:
    """Start, build and check a contender, halving its microbatch when out of memory. Return None
    (recorded) if that does not help, or if the contender is not installed.
    """
    if setting.contender == "trl" and importlib.util.find_spec("trl") is None:
        why = "TRL is not installed (pip install -r benchmarks/requirements.txt)"
        run.record(scenario, setting, setting.label, event="skipped", why=why)
        return None
    while True:
        child = child or Child(setting, run.errors)
        try:
            check = child.ask()
            setting = replace(setting, budget=check.get("budget", setting.budget))
            run.record(scenario, setting, setting.label, n_check=setting.n_check, **check)
            return child, setting
        except Failed as failure:
            child.stop()
            child = None
            run.record(scenario, setting, setting.label, event="failed", error=str(failure))
            smaller = halved(setting)
            if "memory" not in str(failure) or smaller is None:
                return None
            setting = smaller


def halved(setting: Setting) -> Setting | None:
    """Return the setting with half the microbatch; None at one pair, or at 512 tokens, or if the
    contender chose it.
    """
    if setting.contender == "plumb":
        return replace(setting, budget=setting.budget // 2) if setting.budget > 512 else None
    return replace(setting, microbatch=setting.microbatch // 2) if setting.microbatch > 1 else None


def alternate(run: Run, scenario: Scenario, rounds: int) -> None:
    """Run all contenders at once, a step each in turn, for `rounds` rounds or until the scenario's
    share of the time is used.
    """
    deadline = time.monotonic() + scenario.share * run.minutes * 60
    started = [start(run, scenario, setting) for setting in scenario.settings]
    children = [pair for pair in started if pair is not None]
    try:
        agree(run, scenario)
        for child, setting in children:
            for change in setting.then:
                run.record(scenario, setting, setting.label, **child.ask(step=0, **change))
        longest = 0.0
        for i in range(min(rounds, scenario.settings[0].n_steps)):
            began = time.monotonic()
            if i >= 2 and began + longest > deadline:
                break
            for child, setting in children:
                run.record(scenario, setting, setting.label, **child.ask(step=i))
            longest = max(longest, time.monotonic() - began)
    except Failed as failure:
        run.record(
            scenario, scenario.settings[0], scenario.name, event="failed", error=str(failure)
        )
    finally:
        for child, _ in children:
            child.stop()


def in_turn(run: Run, scenario: Scenario) -> None:
    """Run one contender after another; the next one already imports, but builds nothing yet."""
    waiting: Child | None = None
    for i, setting in enumerate(scenario.settings):
        if run.left() < 20:
            run.record(scenario, setting, setting.label, event="failed", error="no time left")
            continue
        setting = replace(setting, microbatch=setting.microbatch or fastest(run, setting))
        child, waiting = waiting, None
        pair = start(
            run, scenario, replace(setting, timeout=min(setting.timeout, run.left())), child
        )
        if pair is None:
            continue
        if setting.device != "cpu" and i + 1 < len(scenario.settings):
            following = scenario.settings[i + 1]
            waiting = Child(
                replace(following, microbatch=following.microbatch or fastest(run, following)),
                run.errors,
            )
        child, setting = pair
        try:
            measure(run, scenario, setting, child)
        except Failed as failure:
            run.record(scenario, setting, setting.label, event="failed", error=str(failure))
        finally:
            child.stop()
    if waiting is not None:
        waiting.stop()
    agree(run, scenario)


def fastest(run: Run, setting: Setting) -> int:
    """Return the microbatch with which the tuned contender was fastest so far."""
    rates: dict[int, list[float]] = {}
    for r in run.records:
        if (
            r["event"] == "step"
            and r["contender"] == setting.contender
            and "default" not in r["label"]
        ):
            rates.setdefault(r["microbatch"], []).append(r["pairs_per_sec"])
    return max(rates, key=lambda size: statistics.median(rates[size]), default=4)


def check_device(run: Run, device: str) -> None:
    """Record the results of checks.py."""
    done = subprocess.run(
        [sys.executable, str(HERE / "checks.py"), "--device", device],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in done.stdout.splitlines():
        run.log.write(json.dumps({"event": "device", **json.loads(line)}) + "\n")
        print(f"          {line}", flush=True)
    if done.returncode:
        print(
            "          THE DEVICE'S CHECKS FAILED: Plumb computes wrong results on it",
            flush=True,
        )


def measure(run: Run, scenario: Scenario, setting: Setting, child: Child) -> None:
    """Run warm-up steps and counted steps, then the same for each variant, and, where `trace` says
    so, one more of the last under the profiler.
    """
    for change in [{}, *setting.then]:
        label = (
            ", ".join(x for x in (setting.label, change.get("label")) if x)
            if scenario.name != "sweep"
            else ""
        )
        label = label or change.get("label", setting.label)
        if change:
            run.record(
                scenario,
                setting,
                label,
                **child.ask(step=0, **{k: v for k, v in change.items() if k != "label"}),
            )
            setting = replace(setting, **{k: v for k, v in change.items() if k != "label"})
        for i in range(setting.n_warm + setting.n_measured):
            answer = child.ask(step=i)
            if i >= setting.n_warm:
                run.record(scenario, setting, label, **answer)
    if setting.trace:  # last, since a profiler that fails must not take a figure with it
        name = "".join(c if c.isalnum() else "-" for c in f"{scenario.name} {label}")
        child.ask(step=0, trace=str(run.folder / f"trace-{name}.txt"))


def versions() -> Iterator[str]:
    """Yield the versions of the libraries."""
    for name in ("torch", "transformers", "trl"):
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"no {name}"
    yield f"Python {platform.python_version()}"


def hardware(device: str) -> str:
    """Return the name of the processor or the GPU."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.strip() or "unknown GPU"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.environ['OMP_NUM_THREADS']} thread"


def chosen(options: argparse.Namespace) -> list[Scenario]:
    """Return the scenarios that the command line selects."""
    if options.smoke:
        every = scenarios.smoke()
    elif options.device == "cuda":
        every = scenarios.gpu(
            options.tokens, scenarios.PYTHIA_1B, scenarios.PYTHIA_3B, "cuda", "bfloat16", (8, 4, 16)
        )
    else:
        every = scenarios.cpu(options.tokens, options.whole)
    short = options.device == "cpu" and not options.smoke and not options.whole
    wanted = (
        options.scenarios or ("dpo,sft,reward" if short else ",".join(s.name for s in every))
    ).split(",")
    unknown = set(wanted) - {s.name for s in every}
    if unknown:
        raise SystemExit(
            f"--scenarios {','.join(sorted(unknown))}: expected some of"
            f" {','.join(s.name for s in every)}"
        )
    by_name = {s.name: s for s in every}
    return [by_name[name] for name in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens",
        default="synthetic:1",
        help="ids written by make_tokens.py (default: random ids of similar lengths)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="CPU: whole steps for all contenders, all scenarios, no time limit",
    )
    parser.add_argument(
        "--scenarios",
        help="comma-separated, in the order wanted (default: dpo,sft,reward; with --whole, --smoke"
        " or a GPU: all)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="CPU: steps per contender, if time allows (default %(default)s)",
    )
    parser.add_argument(
        "--minutes", type=float, help="time limit (default: 5.5 on a CPU, 7.5 on a GPU)"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="tiny shapes on a CPU: tests the code, measures nothing",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".cache/benchmarks/throughput"),
        help="folder (default %(default)s)",
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    limit = 1e6 if options.whole or options.smoke else 7.5 if options.device == "cuda" else 5.5
    run = Run(options.out, options.minutes or limit)
    if options.smoke or options.device == "cuda":
        check_device(run, options.device)
    for scenario in chosen(options):
        if scenario.in_turn:
            in_turn(run, scenario)
        else:
            alternate(run, scenario, options.rounds)
    import charts

    head = [
        f"`python benchmarks/throughput.py {' '.join(sys.argv[1:])}`",
        f"{hardware(options.device)}; {', '.join(versions())}",
    ]
    table = charts.tables(run.records, chosen(options))
    (run.folder / "throughput.md").write_text("\n\n".join([*head, table]) + "\n")
    if importlib.util.find_spec("matplotlib"):
        charts.bars(run.records, chosen(options), run.folder / "throughput.png")
    print(
        f"\n{table}\n\n{time.monotonic() - run.started:.0f} s; {run.folder}/throughput.jsonl, .md"
        " and .png"
    )
    if options.smoke and any(record["event"] == "failed" for record in run.records):
        sys.exit(1)


if __name__ == "__main__":
    main()
