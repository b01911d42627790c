"""A power loss at any moment of a save, whatever the disk kept of it: the newest verified
checkpoint is the old or the new one.

And the controls: without any one fsync of a save, without the rename, without reading back, the
same check fails.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import torch
from crash_states import (
    Entries,
    Promise,
    Recorder,
    State,
    Sync,
    Tree,
    read_tree,
    states,
    write_tree,
)

from plumb.errors import StorageError, UnsafeFile, UserError
from plumb.runs import checkpoints, durable_files

FILES = ("policy.pt", "optimizer.pt", "scheduler.pt", "state-0-of-1.safetensors")


def save(run_dir: Path, step: int) -> None:
    """As a trainer does, with keep_checkpoints=1: no older checkpoint will help if this one is not
    whole.
    """
    state = {"weight": torch.arange(12.0).view(3, 4) * step, "bias": torch.ones(4) * step}
    parts = {name: (lambda: dict(state)) for name in ("policy", "optimizer", "scheduler")}
    manifest = checkpoints.Manifest(
        step=step,
        examples=4 * step,
        finished=False,
        evaluation_due=False,
        metrics={},
        fingerprint={},
        decisions={},
        logs={},
        order="00",
    )
    checkpoints.Saver(run_dir, in_background=False, keep=1, best_by="loss/eval").save(
        f"step-{step}", parts, state, manifest, 0
    )


def newest(run_dir: Path) -> Path | None:
    try:
        checkpoint = checkpoints.latest_valid(run_dir)
    except UnsafeFile:  # some, and none whole
        return None
    return checkpoint and checkpoint.path


@pytest.fixture
def folder(tmp_path):
    """In memory where that is possible: thousands of directories come and go."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        yield Path(memory)


def recorded(
    folder: Path, control: Callable[[], AbstractContextManager] = nullcontext
) -> tuple[Recorder, dict[int, Tree]]:
    """Three saves from nothing on: what they did, and what each checkpoint holds."""
    run_dir = folder / "run"
    run_dir.mkdir()
    recorder, known = Recorder(run_dir), {}
    with recorder.recording():
        for step in (1, 2, 3):
            with control():
                save(run_dir, step)
            recorder.promise(step)
            known[step] = (
                read_tree(run_dir / f"step-{step}") if (run_dir / f"step-{step}").is_dir() else {}
            )
    return recorder, known


def problem(run_dir: Path, known: dict[int, Tree], promised: int) -> str | None:
    """What is wrong with what a power loss left after the save of step `promised` had returned;
    None: nothing.
    """
    found, link = newest(run_dir), run_dir / "LATEST"
    if found is None and not promised:
        return None
    if found is None or step_of(found) not in (promised, promised + 1):
        return f"{found and found.name} instead of step-{promised}"
    if read_tree(found) != known[step_of(found)]:
        return f"{found.name} passes for whole and is not"
    if promised and (
        not link.is_dir() or read_tree(link.resolve()) != known[step_of(link.resolve())]
    ):
        return "LATEST leads nowhere, or to what is not whole"
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def problems(every: Iterable[State], known: dict[int, Tree], folder: Path) -> Iterator[str]:
    for i, state in enumerate(every):
        here = folder / f"state-{i}"
        write_tree(state.tree, here)
        said = problem(here, known, state.promised)
        shutil.rmtree(here)
        if said:
            yield said


def test_every_state_of_a_power_loss_has_a_whole_checkpoint(folder):
    recorder, known = recorded(folder)
    every = list(states(recorder))
    assert not list(problems(every, known, folder))
    assert len(every) >= 1000


def test_a_save_works_on_what_a_power_loss_left(folder):
    recorder, _ = recorded(folder)
    for state in random.Random(0).sample(list(states(recorder)), 150):
        run_dir = folder / "left"
        write_tree(state.tree, run_dir)
        checkpoints.quarantine_newer(run_dir, checkpoints.latest_valid(run_dir))
        save(run_dir, 4)
        assert newest(run_dir) == run_dir / "step-4"
        assert sorted(p.name for p in run_dir.iterdir()) == ["LATEST", "step-4"]
        shutil.rmtree(run_dir)


def test_without_any_one_fsync_the_check_fails(folder):
    """But for that after a removal: an old checkpoint that comes back does no harm."""
    recorder, known = recorded(folder)
    operations = recorder.operations
    first = operations.index(Promise(1))  # the second save is like all later ones
    removal = next(
        i
        for i, o in enumerate(operations)
        if isinstance(o, Entries) and o.changes.get("step-1", o) is None
    )
    fsyncs = [i for i, o in enumerate(operations) if isinstance(o, Sync) and first < i < removal]
    assert len(fsyncs) == len(FILES) + len(
        ["manifest", "the checkpoint", "the run directory: its name", "LATEST"]
    )
    for i in fsyncs:
        harm = next(problems(states(recorder, without=i, after=1), known, folder), None)
        assert harm, f"without the fsync of {operations[i].label} nothing is lost"


def no_fsync_of_files(patch):
    real = os.fsync
    patch.setattr(
        os, "fsync", lambda fd: real(fd) if os.path.isdir(f"/proc/self/fd/{fd}") else None
    )


CONTROLS = {
    "files are not fsynced": no_fsync_of_files,
    "directories are not fsynced": lambda patch: patch.setattr(
        durable_files, "sync_directory", lambda directory: None
    ),
    "nothing is renamed": lambda patch: patch.setattr(
        durable_files, "rename", lambda old, new: None
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls(name, folder, monkeypatch):
    """A piece of the real code is patched out, and the check must notice."""

    @contextmanager
    def control():
        with monkeypatch.context() as patch, suppress(OSError, UserError):
            CONTROLS[name](patch)
            yield

    recorder, known = recorded(folder, control)
    assert next(problems(states(recorder, after=1), known, folder), None)


def test_a_disk_that_keeps_something_else(folder, monkeypatch):
    """One bit of a file is not what was written. Reading back finds it before the older checkpoint
    goes; else all is lost.
    """
    write = durable_files.write

    def worn(path, fill):
        written = write(path, fill)
        if path.name == worn.name:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content)
        return written

    for worn.name in FILES:
        run_dir = folder / worn.name
        save(run_dir, 1)
        with monkeypatch.context() as patch:
            patch.setattr(durable_files, "write", worn)
            with pytest.raises(StorageError, match=f"does not read back the same: {worn.name}"):
                save(run_dir, 2)
            assert newest(run_dir) == (run_dir / "LATEST").resolve() == run_dir / "step-1"
            patch.setattr(checkpoints, "verify", lambda directory: None)
            save(run_dir, 2)
        assert newest(run_dir) is None
