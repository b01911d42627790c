"""Manage the run directory: which run to resume, its lock, how it ended, and its fingerprint.

status.json holds a run's state: {state: running | finished | stopped | failed, code, step,
examples, reason, time}.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from plumb.console import rank, rank0_print, redacted
from plumb.distributed import collectives
from plumb.distributed.progress import run_progress
from plumb.errors import PeerLost, ResumeMismatch, UserError
from plumb.paths import get_local_dir
from plumb.runs.checkpoints import listed
from plumb.runs.history import status

TIME_STAMP = re.compile(r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}")
LOGS = ("metrics.jsonl", "samples.jsonl", "samples.md")
LOCK_SECS = 10  # a launcher that was just killed takes its processes with it, but not at once


# ---- which run goes on ----


def find(config: DictConfig) -> str:
    """Return the directory to run in. With resume=auto or must, that is the newest run of this
    exp_name, unless a directory is given.

    Raises ResumeMismatch if resume=must finds none.
    """
    default = str(OmegaConf.to_container(config, resolve=False)["local_run_dir"]).startswith("${")  # type: ignore[index, call-overload]
    runs = []
    if default:
        here = get_local_dir(config.local_dirs)
        named = (
            p
            for p in here.glob(f"{config.exp_name}_*")
            if TIME_STAMP.fullmatch(p.name[len(config.exp_name) :])
        )
        runs = sorted(p for p in named if p.is_dir() and not p.is_symlink())
    elif Path(config.local_run_dir).is_dir():
        runs = [Path(config.local_run_dir)]
    if config.resume == "never":
        unfinished = [
            p for p in runs if status(p).get("state") not in (None, "finished") and listed(p)
        ]
        if unfinished and default:
            rank0_print(
                f"note: {unfinished[-1]} is not finished; resume=auto resumes it. This is a new run"
            )
        return str(config.local_run_dir)
    runs = [p for p in runs if listed(p)] or runs
    if config.resume == "must" and not any(listed(p) for p in runs[-1:]):
        where = (
            f"exp_name={config.exp_name}" if default else f"local_run_dir={config.local_run_dir}"
        )
        raise ResumeMismatch(
            f"resume=must: there is no checkpoint of {where}; resume=auto starts one"
        )
    return str(runs[-1]) if runs else str(config.local_run_dir)


class RunLock:
    """Hold the lock of a run directory, for one process group. Nothing is created before `claim` is
    called: at once if the directory exists, otherwise when everything else has been checked. The
    lock ends with the process, however it ends.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.handle = -1
        self.new = not collectives.from_rank0(run_dir.is_dir)
        if not self.new:
            self.claim()

    def claim(self) -> None:
        """Create the directory and lock it, on rank 0. Raise UserError if another process holds it
        or has used it since, or if it can't be created.
        """
        if self.handle < 0:
            self.handle = collectives.from_rank0(self._lock)

    def _lock(self) -> int:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(
                self.run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            )
        except OSError as error:
            raise UserError(
                f"local_run_dir={self.run_dir}: cannot be written ({error.strerror}); set"
                " local_dirs"
            ) from None
        for attempt in range(LOCK_SECS * 10 + 1):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == LOCK_SECS * 10:
                    owner = os.pread(handle, 20, 0).decode(errors="replace").strip()
                    raise UserError(
                        f"local_run_dir={self.run_dir}: in use by process {owner}; wait for it, or"
                        " stop it"
                    ) from None
                time.sleep(0.1)
        if self.new and (self.run_dir / "status.json").exists():
            raise UserError(
                f"local_run_dir={self.run_dir}: another process has used it in the meantime;"
                f" start again"
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        return handle

    def release(self) -> None:
        if self.handle >= 0 and rank() == 0:
            os.close(self.handle)


def write_status(run_dir: Path, state: str, code: int | None = None, reason: str = "") -> None:
    """Replace status.json. Only the launch that wrote "running" may write that the run stopped or
    failed; one that was refused leaves the file alone. A launch that finds the run finished may
    write that too, since a kill may have come before it was written.
    """
    launch = os.environ.get("PLUMB_LAUNCH", "")
    before = status(run_dir)
    if not run_dir.is_dir() or (state in ("stopped", "failed") and before.get("launch") != launch):
        return
    if code == PeerLost.exit_code and before.get("state") == "failed":
        return  # the process that was lost has reported why
    step, examples = run_progress.furthest_behind()
    content = {
        "state": state,
        "code": code,
        "step": step,
        "examples": examples,
        "reason": reason,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "launch": launch,
    }
    temporary = run_dir / f".status.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        temporary.replace(run_dir / "status.json")
    except OSError as error:  # a full disk must not hide what ended the run
        rank0_print(f"{run_dir}/status.json: not written ({error.strerror})")


def record(
    config: DictConfig, run_dir: Path, step: int | None, changed: Sequence[str], environment: str
) -> None:
    """Write the resolved config and the environment (JSON): env.json at the run's first start, a
    line in resumes.jsonl at later ones.
    """
    OmegaConf.save(redacted(config), run_dir / "config.yaml")
    if step is None:
        (run_dir / "env.json").write_text(environment)
        (run_dir / "resumes.jsonl").unlink(missing_ok=True)
    else:
        with open(run_dir / "resumes.jsonl", "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"step": step, "changed": list(changed), **json.loads(environment)})
                + "\n"
            )


def add_to_environment(run_dir: Path, more: Mapping[str, Any]) -> None:
    """Add entries to env.json."""
    path = run_dir / "env.json"
    before = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**before, **more}, indent=2) + "\n", encoding="utf-8")


def cut_logs(run_dir: Path, lengths: Mapping[str, int]) -> None:
    """Remove what was logged after the checkpoint that the run resumes from, since it will be
    logged again.
    """
    for name in LOGS:
        path, length = run_dir / name, lengths.get(name, 0)
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            rank0_print(
                f"{path}: {length - size:,} bytes that were logged before the checkpoint are"
                f" missing"
            )
        elif size > length:
            with open(path, "r+b") as file:
                file.truncate(length)
                os.fsync(file.fileno())
