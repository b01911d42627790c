"""Run the parts of gpu.py: each in a process group of its own, with a time limit; look which
libraries are here; write the summary.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# module -> distribution; what Plumb needs to train, and then what a part compares with
NEEDED = {
    "omegaconf": "omegaconf",
    "hydra": "hydra-core",
    "datasets": "datasets",
    "psutil": "psutil",
    "selectolax": "selectolax",
    "jinja2": "jinja2",
    "peft": "peft",
    "matplotlib": "matplotlib",
    "trl": "trl",
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
}
TRAINING = ("hydra", "psutil", "trainers")  # modules
# imported once for all parts; not peft, whose bitsandbytes calls CUDA, which forbids forks
SHARED = ("contenders", "plumb.models.logps", "train", "trainers")
Row = dict[str, Any]


class Place(NamedTuple):
    """Hold where a part computes and writes."""

    folder: Path  # of this part
    device: str
    smoke: bool
    tokens: str  # ids for the throughput, as throughput.py takes them
    secs: float = 60.0  # time limit


class Part(NamedTuple):
    """Hold one part: what computes it, and what reads its files afterwards, however it ended."""

    title: str
    secs: float  # time limit
    run: Callable[[Place], None]
    rows: Callable[[Place], list[Row]]
    needs: Sequence[str] = TRAINING  # modules


# ---- processes ----


def start(function: Callable[..., None], *arguments: Any) -> Any:
    """Start function(*arguments) in a process of its own: a fork, which waits for no imports, or a
    new one where a fork could not use CUDA.
    """
    context: Any = multiprocessing.get_context("fork" if forks_can_use_cuda() else "spawn")
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def forks_can_use_cuda() -> bool:
    """Return whether CUDA works in a process forked from this one; it doesn't once this one has
    called it, and a library may do so on import. Asks a fork.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return True
    pid = os.fork()
    if pid == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(pid, 0)[1] == 0


# ---- running the parts ----


def run_part(part: Part, at: Place, lacking: Mapping[str, str]) -> tuple[str, str]:
    """Run a part in a process group of its own, of which nothing is left afterwards. Return how it
    ended, and why. `lacking`: modules that cannot be imported, and why.
    """
    if missing := [f"{name} ({lacking[name]})" for name in part.needs if name in lacking]:
        return "skipped", f"without {', '.join(missing)}"
    at.folder.mkdir(parents=True)
    process = start(_in_group, part.run, at)
    try:
        process.join(at.secs)
        code = process.exitcode
    except KeyboardInterrupt:
        return "stopped", "by Ctrl-C or SIGTERM"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if code is None:
        return "out of time", f"after {at.secs:.0f} s"
    return ("ok", "") if code == 0 else ("failed", why(at.folder / "log.txt", code))


def _in_group(run: Callable[[Place], None], at: Place) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (at.folder / "log.txt").open("w", buffering=1) as log:
        os.dup2(log.fileno(), 1)  # of the processes that it starts
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        try:
            run(at)
        except SystemExit as ended:
            print(ended.code, file=sys.stderr)
            raise SystemExit(1) from None


def why(log: Path, code: int) -> str:
    """Return a log's last line, and its last error before that."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    if code < 0:
        lines.append(f"ended by signal {-code}")
    errors = [line for line in lines[:-1] if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return "; ".join(line[:200] for line in (*lines[-1:], *errors[-1:])) or f"code {code}"


def measured(part: Part, at: Place, state: str) -> tuple[str, list[Row]]:
    """Return how the part ended, now that its numbers are known, and these."""
    try:
        rows = part.rows(at)
    except Exception as error:  # a cut file must not take the other parts' summary with it
        return "failed", [{"note": f"its files cannot be read: {error!r}"}]
    wrong = any(row.get("ok") is False for row in rows)
    return "failed" if state == "ok" and (wrong or not rows) else state, rows


def import_once() -> None:
    """Import what most parts need, so that none of them waits for it."""
    for name in SHARED:
        with contextlib.suppress(ImportError):  # then the parts that need it say so
            importlib.import_module(name)


# ---- libraries ----


def find_lacking(modules: Sequence[str], file: Path) -> None:
    """Write which of these modules cannot be imported, and why."""
    logging.disable()
    with file.open("w", buffering=1) as found:
        for name in dict.fromkeys(modules):
            try:
                importlib.import_module(name)
            except Exception as error:  # bitsandbytes raises others, too
                reason = str(error).splitlines()[0] if str(error) else repr(error)
                print(json.dumps({name: reason}), file=found)


def install(wheels: Path, folder: Path) -> None:
    """Install the wheels of the folder whose libraries are not here, for this run only: those that
    were asked for and what they need, but never another torch.
    """
    files = []
    for file in sorted(wheels.glob("*.whl")):
        name = file.name.split("-")[0]
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            if not re.match(r"(torch|triton|nvidia|cuda)(_|$)", name):
                files.append(str(file))
    if files:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), *files], check=False)
        sys.path.append(str(folder))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before, str(folder)]))
        importlib.invalidate_caches()


def missing_line(lacking: Mapping[str, str], wheels: Path) -> str | None:
    """Return which libraries are missing, and how to bring them; None if none is."""
    missing = {NEEDED[name]: reason for name, reason in lacking.items() if name in NEEDED}
    if not missing:
        return None
    pins: dict[str, str] = {}
    for file in (*ROOT.glob("requirements*.txt"), HERE / "requirements.txt"):
        pins |= dict(re.findall(r"^([\w-]+)==([\w.]+)", file.read_text(), re.M))
    wanted = " ".join(f"{d}=={pins[d]}" if d in pins else d for d in missing)
    named = ", ".join(f"{d} ({reason})" for d, reason in missing.items())
    return (
        f"missing here: {named}. On a machine with a network and the same Python,"
        f" `pip wheel -w {wheels} {wanted}`; carry that folder, without torch, triton, nvidia and"
        " cuda if it should be small, and give it as --wheels"
    )


# ---- the summary ----


def output_of(*command: str) -> str:
    """Return what a command prints, without the last line's end; nothing if it isn't here."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def gpu_name() -> str:
    """Return the name of the first GPU; an empty text without one."""
    return output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")[0]


def environment(at: argparse.Namespace) -> Iterator[str]:
    """Yield the lines that say where and with what the numbers came about."""
    arguments = " ".join(sys.argv[1:])
    yield f"`bash benchmarks/gpu.sh {arguments}`".replace(" `", "`")
    commit = output_of("git", "rev-parse", "--short", "HEAD") or "unknown"
    versions = []
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    where = "a CPU, with tiny shapes: the numbers mean nothing" if at.smoke else gpu_name()
    yield f"{where}; {', '.join(versions)}; Python {platform.python_version()}; commit {commit}"
    if not at.smoke:
        yield f"throughput on {at.tokens}"


def shown(value: Any) -> str:
    """Return a cell of a table.

    >>> shown(0.6931471), shown(12345.6), shown(3e-7), shown(None), shown(True)
    ('0.6931', '12,346', '3e-07', '', 'yes')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def table(rows: Sequence[Row]) -> list[str]:
    """Return rows as Markdown, with the columns that any of them has and a value is in."""
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if any(shown(row.get(key)) for row in rows)
    ]
    lines = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    return lines + [f"| {' | '.join(shown(row.get(key)) for key in keys)} |" for row in rows]


def write_summary(folder: Path, head: Sequence[str], ended: Sequence[Row]) -> None:
    """Write summary.md and summary.jsonl: a line for each part, then its numbers."""
    overview = [{key: part[key] for key in ("part", "result", "seconds", "why")} for part in ended]
    lines = ["# One GPU", "", *(f"{line}  " for line in head), "", *table(overview)]
    for part in ended:
        lines += ["", f"## {part['title']}", "", f"{part['result']}. {part['why']}".strip(), ""]
        lines += table(part["rows"]) if part["rows"] else []
    (folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = [{"head": [*head]}, *ended]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "summary.jsonl").write_text(text, encoding="utf-8")


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a file of JSON lines, without a cut last one; none without the file."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
