"""Torture runs with kills at any moment and at each system call of a save, with failing and full
disks: `make torture`.

One process imports torch, transformers and Plumb, and forks a child for each start of a run, which
then is like `python train.py` after its imports. So a start takes a fraction of a second, and
hundreds of kills a minute or two.

    python tests/support/torture.py --seed 1 --kills 300 --report benchmarks/results/torture.md

The children get SIGKILL after a random time, or during a save; SIGKILL by strace at the entry of
the k-th write, fsync, rename, ... of a save; errors in place of these calls; a full file system.
After each, the newest checkpoint that verifies (by separate code) must be no older than before, and
in the end the run must equal the undisturbed run: weights, optimizer, metrics, samples, order of
examples.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runs import DPO, FAST, OF_THE_MACHINE, ROWS  # noqa: E402
from warm import import_all  # noqa: E402

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # no thread before a fork
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "HYDRA_MAIN_MODULE": "__main__",  # config/ is beside train.py
}
SFT = [
    "loss=sft",
    "lr=1e-3",
    "warmup_steps=2",
    "batch_size=4",
    "optimizer=AdamW",
    "lr_schedule=cosine",
]
# save after every step, evaluate after every third
EACH = [
    "n_epochs=2",
    "save_every=4",
    "eval_every=12",
]
KINDS = {
    "sft": [*SFT, *EACH],
    "sft, saved in a thread, samples": [
        *SFT,
        *EACH,
        "async_save=true",
        "sample_during_eval=true",
        "n_eval_model_samples=2",
        "sample_max_new_tokens=4",
    ],
    "dpo, live reference": [*DPO, *EACH, "reference=live"],
    "dpo, cached reference, one checkpoint kept": [
        *DPO,
        *EACH,
        "reference=cached",
        "keep_checkpoints=1",
        "keep_best=null",
    ],
}
CALLS = (
    "write",
    "fsync",
    "rename",
    "renameat",
    "renameat2",
    "symlink",
    "symlinkat",
    "mkdir",
    "unlink",
    "unlinkat",
    "rmdir",
)
ERRORS = [
    ("write", "ENOSPC"),
    ("write", "EDQUOT"),
    ("write", "EIO"),
    ("fsync", "EIO"),
    ("fsync", "ENOSPC"),
    ("rename", "EIO"),
    ("rename", "EXDEV"),
    ("mkdir", "EROFS"),
    ("mkdir", "ENOSPC"),
    ("symlink", "ENOSPC"),
]
TIMEOUT = 120


# ---- starts ----


class Gauge:
    """Share a child's state with its parent: whether it is in a save, how many it has begun, how
    long they took.

    `hold`: the child waits at the start of its first save until the parent releases it.
    """

    def __init__(self, hold: bool = False):
        self.memory = mmap.mmap(-1, 4096)
        self.hold = hold
        self.began, self.announce = os.pipe()
        self.wait, self.go = os.pipe()

    def install(self) -> None:
        """Wrap, in the child, the function that writes a checkpoint, moves LATEST and prunes."""
        from plumb.runs import checkpoints

        save = checkpoints.Saver._save

        def gauged(*arguments: Any) -> None:
            self.memory[0] = 1
            self.memory[1] = min(255, self.memory[1] + 1)
            os.write(self.announce, b"s")
            if self.hold and self.memory[1] == 1:
                os.read(self.wait, 1)
            start = time.monotonic()
            save(*arguments)
            self.memory[8:16] = int(1e6 * (time.monotonic() - start)).to_bytes(8, "little")
            self.memory[0] = 0

        checkpoints.Saver._save = gauged  # type: ignore[method-assign]

    def in_save(self) -> bool:
        return self.memory[0] == 1

    def secs(self) -> float:
        return int.from_bytes(self.memory[8:16], "little") / 1e6

    def await_save(self, n: int, secs: float) -> bool:
        """Wait until the n-th save has begun. Return False if it did not in time, or if the child
        is gone.
        """
        end = time.monotonic() + secs
        while n:
            ready, _, _ = select.select([self.began], [], [], max(0, end - time.monotonic()))
            if not ready or not os.read(self.began, 1):
                return False
            n -= 1
        return True

    def close(self) -> None:
        for handle in (self.began, self.wait, self.go):
            os.close(handle)
        self.memory.close()


class Child:
    """One start of `python train.py <overrides>`, in its own process group."""

    def __init__(
        self, overrides: list[str], log: Path, gauge: Gauge, spoil: Callable[[], None] | None
    ):
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            self._be(overrides, gauge, spoil)
        # both processes do it, since either may be first; OSError: it is done, or the child is gone
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)
        os.close(gauge.announce)  # so that its end is noticed when the child is gone

    def _be(self, overrides: list[str], gauge: Gauge, spoil: Callable[[], None] | None) -> None:
        code: Any = 70
        try:
            os.setpgid(0, 0)
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for handle in (1, 2):
                os.dup2(out, handle)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(ROOT)
            import train
            from plumb.reports import curves

            # it comes after the last save, and takes longer than all before it
            curves.draw_all = lambda runs, further=True: b""
            gauge.install()
            if spoil is not None:
                spoil()
            sys.argv = ["train.py", *overrides]
            train.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)

    def ended(self, secs: float = TIMEOUT) -> int:
        """Return its exit code, negative for a signal. Kill it and raise TimeoutError if late."""
        end = time.monotonic() + secs
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                self.kill()
                os.waitpid(self.pid, 0)
                raise TimeoutError(
                    f"a run did not end within {secs} s: {self.log.read_text()[-2000:]}"
                )
            time.sleep(0.001)


# ---- the comparison ----


def complete_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return {examples: directory} of the checkpoints whose files match their manifests; the code
    is independent of Plumb's.
    """
    complete = {}
    for directory in run_dir.glob("*-*"):
        if re.fullmatch(r"(step|interim)-\d+", directory.name) and is_complete(directory):
            complete[int(directory.name.rpartition("-")[2])] = directory
    return complete


def is_complete(directory: Path) -> bool:
    try:
        files = json.loads((directory / "manifest.json").read_bytes())["files"]
        contents = {name: (directory / name).read_bytes() for name in files}
        expected = {"policy.pt", "scheduler.pt", "state-0-of-1.safetensors"}
        return files.keys() == expected and all(
            [len(content), hashlib.sha256(content).hexdigest()] == files[name]
            for name, content in contents.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return digests of all that must be the same however often a run was interrupted."""
    import torch

    last = (run_dir / "LATEST").resolve()
    manifest = json.loads((last / "manifest.json").read_text())
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [
        {k: v for k, v in json.loads(line).items() if k not in OF_THE_MACHINE} for line in lines
    ]
    samples = run_dir / "samples.jsonl"
    result = {
        "checkpoint": last.name,
        "order": manifest["order"],
        "position": [manifest[k] for k in ("step", "examples", "finished")],
        "metrics": rows,
        "samples": samples.read_text() if samples.exists() else "",
        "optimizer": hashlib.sha256((last / "state-0-of-1.safetensors").read_bytes()).hexdigest(),
        "status": {
            k: v
            for k, v in json.loads((run_dir / "status.json").read_text()).items()
            if k in ("state", "code", "step")
        },
        "leftovers": sorted(
            p.name
            for p in run_dir.iterdir()
            if re.search("partial|removed|damaged|rehearsal", p.name)
        ),
        "checkpoints": sorted(p.name for p in run_dir.glob("*-*") if p.is_dir()),
    }
    weights = torch.load(last / "policy.pt", weights_only=True)["state"]
    result["policy"] = hashlib.sha256(b"".join(_bytes(weights))).hexdigest()
    return result


def _bytes(content: Any) -> Iterator[bytes]:
    """Yield the bytes of everything in a state dict, in order."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield repr(key).encode()
            yield from _bytes(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _bytes(value)
    else:
        yield content.numpy().tobytes() if hasattr(content, "numpy") else repr(content).encode()


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [key for key in a if a[key] != b[key]]


# ---- torture ----


class Tally(NamedTuple):
    """Hold the counts and the failures of one kind of torture."""

    name: str
    counts: Counter[str]
    wrong: list[str]
    secs: list[float]


class Torture:
    """Torture runs of one configuration, in one folder."""

    def __init__(self, kind: str, folder: Path, seed: int):
        self.kind = kind
        self.folder = folder
        self.rng = random.Random(f"{kind} {seed}")
        self.spoil: Callable[[], None] | None = None  # for a control: breaks each child
        folder.mkdir(parents=True)
        data = folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self.common = [
            "exp_name=torture",
            f"model.name_or_path={tiny_model(folder.parent / 'model')}",
            f"datasets=[{data}]",
            f"local_dirs=[{folder}]",
            "wandb.enabled=false",
            "resume=auto",
            *FAST,
            *KINDS[kind],
        ]
        undisturbed = folder / "undisturbed"
        gauge, start = Gauge(), time.monotonic()
        code = self.start(undisturbed, gauge).ended()
        self.secs = time.monotonic() - start
        self.save_secs = gauge.secs()
        if code:
            raise SystemExit(
                f"{kind}: the undisturbed run ended with {code}: {self.log.read_text()[-3000:]}"
            )
        self.expected = outcome(undisturbed)
        self.n_saves = gauge.memory[1]
        gauge.close()

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self, run_dir: Path, gauge: Gauge) -> Child:
        return Child([*self.common, f"local_run_dir={run_dir}"], self.log, gauge, self.spoil)

    def problem_after(self, run_dir: Path, before: int) -> str | None:
        """Return what is wrong with a run that was killed: its newest complete checkpoint must be
        no older than before, and LATEST must point to a complete one.
        """
        complete = complete_checkpoints(run_dir)
        link = run_dir / "LATEST"
        if max(complete, default=0) < before:
            return (
                f"the checkpoint of {before} examples was complete and is gone; there are"
                f" {sorted(complete)}"
            )
        if link.is_symlink() and link.resolve() not in [p.resolve() for p in complete.values()]:
            return (
                f"LATEST is {os.readlink(link)}, which is not a complete checkpoint; there are"
                f" {sorted(complete)}"
            )
        return None

    def finish(self, run_dir: Path) -> str | None:
        """Start it again, let it end by itself, and compare. Return what is wrong."""
        gauge = Gauge()
        code = self.start(run_dir, gauge).ended()
        gauge.close()
        if code:
            return f"started again it ended with {code}: {self.log.read_text()[-500:]}"
        differing = differences(self.expected, outcome(run_dir))
        return f"it ended with other {', '.join(differing)}" if differing else None

    # ---- random kills ----

    def kills(self, n: int) -> Tally:
        """Kill runs again and again until each finishes; about half of the kills are aimed at a
        save.
        """
        tally = Tally(f"{self.kind}: SIGKILL at random", Counter(), [], [])
        start, number = time.monotonic(), 0
        while tally.counts["kills"] < n:
            number += 1
            run_dir = self.folder / f"run-{number}"
            problem = self.killed_until_done(run_dir, tally.counts)
            tally.counts["runs"] += 1
            if problem:
                tally.wrong.append(f"run {number}: {problem}")
            else:
                shutil.rmtree(run_dir)
        tally.secs.append(time.monotonic() - start)
        return tally

    def killed_until_done(self, run_dir: Path, counts: Counter[str]) -> str | None:
        for _ in range(200):
            before = max(complete_checkpoints(run_dir), default=0) if run_dir.exists() else 0
            gauge = Gauge()
            child = self.start(run_dir, gauge)
            if self.rng.random() < 0.5:
                gauge.await_save(self.rng.randint(1, 3), TIMEOUT)
                time.sleep(self.rng.uniform(0, 1.2 * self.save_secs))
            else:
                time.sleep(self.rng.uniform(0, self.secs))
            child.kill()
            code = child.ended()
            counts["kills in a save"] += code == -signal.SIGKILL and gauge.in_save()
            gauge.close()
            if code == 0:
                differing = differences(self.expected, outcome(run_dir))
                return f"it ended with other {', '.join(differing)}" if differing else None
            if code != -signal.SIGKILL:
                return f"it ended with {code}: {self.log.read_text()[-500:]}"
            counts["kills"] += 1
            if problem := self.problem_after(run_dir, before):
                return problem
        return "it did not finish in 200 starts"

    def control(self) -> Tally:
        """Check that random kills detect a resumed run that forgets its position in the data;
        otherwise they show nothing.
        """
        self.spoil = forget_position
        for _ in range(6):  # by chance, none of the kills may come after a checkpoint
            tally = self.kills(4)
            if tally.wrong:
                break
        self.spoil = None
        problems = [] if tally.wrong else ["it was not noticed"]
        return Tally(
            f"{self.kind}: control, the position forgotten (must fail)",
            tally.counts,
            problems,
            tally.secs,
        )

    # ---- each system call of a save ----

    def base(self) -> Path:
        """Return a run that was killed when its third save was about to begin."""
        base = self.folder / "base"
        if not base.exists():
            gauge = Gauge()
            child = self.start(base, gauge)
            gauge.await_save(3, TIMEOUT)
            child.kill()
            child.ended()
            gauge.close()
        return base

    def traced(self, run_dir: Path, *inject: str) -> tuple[int, list[str]]:
        """Continue a copy of the base, with strace attached for the first save. Return the exit
        code and the calls that strace recorded.
        """
        shutil.copytree(self.base(), run_dir, symlinks=True)
        gauge = Gauge(hold=True)
        child = self.start(run_dir, gauge)
        if not gauge.await_save(1, TIMEOUT):
            raise RuntimeError(f"no save: {self.log.read_text()[-2000:]}")
        trace = self.folder / "strace.log"
        line = [
            "strace",
            "-f",
            "-y",
            "-o",
            str(trace),
            "-e",
            f"trace={','.join(CALLS)}",
            *inject,
            "-p",
            str(child.pid),
        ]
        tracer = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        while "attached" not in (answer := tracer.stderr.readline()):
            if not answer:
                raise RuntimeError("strace does not attach")
        os.write(gauge.go, b"g")
        if not inject:  # the first save only
            gauge.await_save(1, TIMEOUT)
            child.kill()
        code = child.ended()
        gauge.close()
        tracer.communicate(timeout=TIMEOUT)
        return code, trace.read_text().splitlines()

    def calls(self) -> list[tuple[str, int, str]]:
        """Return (name, k, line) of each call in the first save of a resumed run, in order; k
        counts calls of that name.
        """
        run_dir = self.folder / "traced"
        _, lines = self.traced(run_dir)
        shutil.rmtree(run_dir)
        counts: Counter[str] = Counter()
        calls = []
        for line in lines:
            if match := re.match(r"\d+ +(\w+)\((.*)", line):
                counts[match[1]] += 1
                calls.append((match[1], counts[match[1]], match[2]))
                if match[1].startswith("symlink"):
                    linked = len(calls)
        return [call for i, call in enumerate(calls) if str(run_dir) in call[2] or i < linked]

    def each_call(self, sample: int | None) -> Tally:
        """Send SIGKILL at the entry of each call (or of a sample), and continue to the end."""
        tally = Tally(f"{self.kind}: SIGKILL at each system call of a save", Counter(), [], [])
        start, calls = time.monotonic(), self.calls()
        tally.counts["system calls of a save"] = len(calls)
        for name, k, line in (
            calls if sample is None else self.rng.sample(calls, min(sample, len(calls)))
        ):
            tally.counts["kills"] += 1
            # a save makes hundreds of writes
            through = sample is not None or name != "write" or k % 8 == 0
            inject = f"inject={name}:signal=KILL:when={k}"
            self.injected(tally, f"{name} {k} ({line[:80]})", inject, {-signal.SIGKILL}, through)
        tally.secs.append(time.monotonic() - start)
        return tally

    def errors(self, n: int) -> Tally:
        """Inject an error in place of a call: the run must end with exit code 5 and one line, or,
        if the call was not needed, unharmed; then continue.
        """
        tally = Tally(f"{self.kind}: an error in place of a system call", Counter(), [], [])
        start = time.monotonic()
        calls = [c for c in self.calls() if str(self.folder / "traced") in c[2]]
        cases = [
            (name, k, line, error)
            for name, k, line in calls
            for wanted, error in ERRORS
            if name == wanted
        ]
        for name, k, line, error in self.rng.sample(cases, min(n, len(cases))):
            tally.counts[error] += 1
            self.injected(
                tally,
                f"{error} of {name} {k} ({line[:80]})",
                f"inject={name}:error={error}:when={k}",
                {0, 5},
            )
        tally.secs.append(time.monotonic() - start)
        return tally

    def injected(
        self, tally: Tally, what: str, inject: str, codes: set[int], through: bool = True
    ) -> None:
        """Run with this injection and record what is wrong. `through`: continue to the end, and
        compare.
        """
        run_dir = self.folder / "traced"
        code, _ = self.traced(run_dir, "-e", inject)
        output = self.log.read_text()
        problem = None if code in codes else f"it ended with {code}: {output[-500:]}"
        if code == 5:
            errors = [line for line in output.splitlines() if line.startswith("error: ")]
            if "Traceback" in output or len(errors) != 1 or str(run_dir) not in errors[0]:
                problem = f"it does not say in one line what went wrong: {output[-500:]}"
            tally.counts["exit 5"] += 1
        problem = problem or self.problem_after(run_dir, 8)
        if through and not problem:
            tally.counts["continued to the end"] += 1
            problem = self.finish(run_dir)
        if problem:
            tally.wrong.append(f"{what}: {problem}")
        shutil.rmtree(run_dir)

    # ---- a full disk ----

    def full_disks(self, n: int) -> Tally:
        """Begin a save with less space than it needs; then free some, and start the run again."""
        tally = Tally(f"{self.kind}: a full disk", Counter(), [], [])
        start = time.monotonic()
        one = sum(f.stat().st_size for f in next(self.folder.glob("undisturbed/step-*")).iterdir())
        for _ in range(n):
            free = self.rng.randrange(one)
            tally.counts["full disks"] += 1
            if problem := self.on_a_disk_of_its_own(
                lambda disk, free=free: self.filled(disk, free)
            ):
                tally.wrong.append(f"{free} bytes free of {one}: {problem}")
        tally.secs.append(time.monotonic() - start)
        return tally

    def filled(self, disk: Path, free: int) -> str | None:
        run_dir, filler = disk / "run", disk / "filler"
        gauge = Gauge(hold=True)
        child = self.start(run_dir, gauge)
        gauge.await_save(1, TIMEOUT)
        there = os.statvfs(disk)
        filler.write_bytes(bytes(max(0, there.f_bavail * there.f_frsize - free)))
        os.write(gauge.go, b"g")
        code = child.ended()
        output = self.log.read_text()
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        if (
            code != 5
            or "Traceback" in output
            or len(errors) != 1
            or "free" not in errors[0]
            or str(run_dir) not in errors[0]
        ):
            return f"it ended with {code}: {output[-700:]}"
        if list(run_dir.glob(".*.partial")):
            return "half a checkpoint takes the space that is needed"
        filler.unlink()
        return self.finish(run_dir)

    def on_a_disk_of_its_own(self, do: Callable[[Path], str | None]) -> str | None:
        """Call `do` in a child with its own namespaces and 64 MB of memory mounted as a disk.
        Return its result.
        """
        disk = self.folder / "disk"
        disk.mkdir(exist_ok=True)
        answer, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                mount_memory(disk, "64m")
                problem = do(disk) or ""
            except BaseException:
                problem = traceback.format_exc()
            os.write(send, problem.encode()[-4000:])
            os._exit(0)
        os.close(send)
        with open(answer, "rb") as file:
            problem = file.read().decode()
        os.waitpid(pid, 0)
        return problem or None


def forget_position() -> None:
    """Break the resuming of a run: it forgets its position in the data."""
    import trainers

    restore = trainers.BasicTrainer.restore

    def forgetting(self: Any, *arguments: Any) -> None:
        restore(self, *arguments)
        self.state.position.n_seen = 0

    trainers.BasicTrainer.restore = forgetting  # type: ignore[method-assign]


def mount_memory(folder: Path, size: str) -> None:
    """Mount a file system in memory for this process and its children. Raises OSError if users may
    not do this.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts = 0x20000
    new_user = 0x10000000
    private = 1 << 18
    recursive = 1 << 14
    user, group = os.getuid(), os.getgid()

    def call(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    call(libc.unshare(new_user | new_mounts))
    for name, text in {
        "uid_map": f"0 {user} 1",
        "setgroups": "deny",
        "gid_map": f"0 {group} 1",
    }.items():
        Path("/proc/self", name).write_text(text)
    call(libc.mount(b"none", b"/", None, recursive | private, None))
    call(libc.mount(b"none", bytes(folder), b"tmpfs", 0, f"size={size}".encode()))


def tiny_model(folder: Path) -> Path:
    """Write a tiny model in a child, since torch must not have computed anything here."""
    if not folder.exists():
        pid = os.fork()
        if pid == 0:
            from tiny import save_tiny_llama

            save_tiny_llama(folder)
            os._exit(0)
        os.waitpid(pid, 0)
    return folder


# ---- report ----


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument(
        "--kills", type=int, default=300, help="random kills, over all kinds of runs"
    )
    parser.add_argument(
        "--calls",
        type=int,
        default=None,
        help="number of system calls of a save at which to kill (default: all)",
    )
    parser.add_argument("--errors", type=int, default=60)
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path)
    at = parser.parse_args()
    start = time.monotonic()
    os.environ |= ENVIRONMENT
    sys.path.insert(0, str(ROOT))
    import_all()
    print(f"seed {at.seed}; imported in {time.monotonic() - start:.1f} s", flush=True)
    tallies = []
    # kills need no real disk
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for i, kind in enumerate(KINDS):
            torture = Torture(kind, Path(folder) / str(i), at.seed)
            print(
                f"{kind}: undisturbed {torture.secs:.2f} s, {torture.n_saves} saves of"
                f" {torture.save_secs:.3f} s",
                flush=True,
            )
            parts: list[Callable[[], Tally]] = [
                lambda t=torture: t.kills(-(-at.kills // len(KINDS)))
            ]
            parts += [torture.control] if i == 0 else []
            if "kept" in kind and shutil.which("strace"):
                parts += [
                    lambda t=torture: t.each_call(at.calls),
                    lambda t=torture: t.errors(at.errors),
                ]
            if "kept" in kind and may_mount():
                parts += [lambda t=torture: t.full_disks(at.disks)]
            for part in parts:
                tallies.append(tally := part())
                counts = ", ".join(f"{n} {name}" for name, n in tally.counts.items())
                print(
                    f"{tally.name}: {counts}; {len(tally.wrong)} wrong; {tally.secs[0]:.0f} s",
                    flush=True,
                )
                print(*tally.wrong[:5], sep="\n", end="\n" * bool(tally.wrong), flush=True)
    if at.json:
        at.json.write_text(json.dumps([t._asdict() for t in tallies]))
    if at.report:
        write_report(at.report, at, tallies, time.monotonic() - start)
    sys.exit(any(t.wrong for t in tallies))


def may_mount() -> bool:
    done = (
        subprocess.run(["unshare", "-rm", "true"], capture_output=True)
        if shutil.which("unshare")
        else None
    )
    return done is not None and done.returncode == 0


def write_report(path: Path, at: argparse.Namespace, tallies: list[Tally], secs: float) -> None:
    import platform
    from importlib.metadata import version

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    kills = sum(t.counts["kills"] for t in tallies if "at random" in t.name)
    inside = sum(t.counts["kills in a save"] for t in tallies)
    machine = f"{versions}, Python {platform.python_version()}, {os.cpu_count()} CPU cores"
    lines = [
        "# Torture",
        "",
        (
            "Command: `make torture`, which is `python tests/support/torture.py"
            f" --seed {at.seed} --report ...`; commit"
        ),
        f"{commit}, {machine}; {secs / 60:.1f} minutes.",
        "",
        (
            f"{kills} random SIGKILLs, {inside} of them ({inside / max(1, kills):.0%}) inside a"
            " save. After each, the newest"
        ),
        (
            "checkpoint that verifies was no older than before; each run was started again until it"
            " finished, and then had the"
        ),
        (
            "weights, the optimizer state, the metrics, the samples and the order of examples of"
            " the undisturbed run, to the bit,"
        ),
        "except for what is counted as wrong.",
        "",
        "| what | how often | wrong | seconds |",
        "|---|---|---|---|",
    ]
    for tally in tallies:
        counts = ", ".join(f"{n} {name}" for name, n in tally.counts.items())
        lines.append(f"| {tally.name} | {counts} | {len(tally.wrong)} | {tally.secs[0]:.0f} |")
    lines += ["", *[f"- {t.name}: {w[:300]}" for t in tallies for w in t.wrong]]
    path.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
