"""A power loss at any moment of a save, whatever the disk kept of it: the newest verified checkpoint is the old or the new one.

And the controls: without any one fsync of a save, without the rename, without reading back, the same check fails.
"""

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
from crash_states import Entries, Promise, Recorder, State, Sync, Tree, read_tree, states, write_tree

import storage
from utils import StorageError, UserError

KEEP = 1
FILES = ("policy.pt", "optimizer.pt", "scheduler.pt", "state-0-of-1.safetensors", "state.json")


def save(run_dir: Path, step: int) -> None:
    """A stand-in for checkpoints.save."""
    final, partial = run_dir / f"step-{step}", run_dir / f".step-{step}.partial"
    storage.remove(partial)
    storage.make_directory(partial)
    files = {}
    for name in FILES:
        parts = [f"{name} {step} {i} ".encode() * 9 for i in range(3)]
        files[name] = storage.write(partial / name, lambda file, parts=parts: [file.write(part) for part in parts])
    manifest = json.dumps({"step": step, "files": files}).encode()
    storage.write(partial / "manifest.json", lambda file: file.write(manifest))
    storage.rename(partial, final)
    for name, written in files.items():
        if storage.read_back(final / name) != written:
            shutil.rmtree(final)
            raise StorageError(f"{final / name}: not what was written")
    storage.point(run_dir / "LATEST", final.name)
    for old in sorted(run_dir.glob("step-*"), key=lambda p: int(p.name[5:]))[:-KEEP]:
        storage.remove(old)


def newest(run_dir: Path) -> Path | None:
    """A stand-in for the reader of checkpoints.py."""
    for step in sorted(run_dir.glob("step-*"), key=lambda p: -int(p.name[5:])):
        try:
            files = json.loads((step / "manifest.json").read_bytes())["files"]
            if all(list(storage.read_back(step / name)) == written for name, written in files.items()):
                return step
        except (OSError, ValueError):
            pass
    return None


@pytest.fixture
def folder(tmp_path):
    """In memory where that is possible: thousands of directories come and go."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        yield Path(memory)


def recorded(folder: Path, control: Callable[[], AbstractContextManager] = nullcontext) -> tuple[Recorder, dict[int, Tree]]:
    """Three saves from nothing on: what they did, and what each checkpoint holds."""
    run_dir = folder / "run"
    run_dir.mkdir()
    recorder, known = Recorder(run_dir), {}
    with recorder.recording():
        for step in (1, 2, 3):
            with control():
                save(run_dir, step)
            recorder.promise(step)
            known[step] = read_tree(run_dir / f"step-{step}") if (run_dir / f"step-{step}").is_dir() else {}
    return recorder, known


def problem(run_dir: Path, known: dict[int, Tree], promised: int) -> str | None:
    """What is wrong with what a power loss left after the save of step `promised` had returned; None: nothing."""
    found, link = newest(run_dir), run_dir / "LATEST"
    if found is None and not promised:
        return None
    if found is None or step_of(found) not in (promised, promised + 1):
        return f"{found and found.name} instead of step-{promised}"
    if read_tree(found) != known[step_of(found)]:
        return f"{found.name} passes for whole and is not"
    if promised and (not link.is_dir() or read_tree(link.resolve()) != known[step_of(link.resolve())]):
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
    began = time.monotonic()
    recorder, known = recorded(folder)
    every = list(states(recorder))
    assert not list(problems(every, known, folder))
    assert len(every) >= 1000
    assert time.monotonic() - began < 20


def test_a_save_works_on_what_a_power_loss_left(folder):
    recorder, _ = recorded(folder)
    for state in random.Random(0).sample(list(states(recorder)), 60):
        run_dir = folder / "left"
        write_tree(state.tree, run_dir)
        save(run_dir, 4)
        assert newest(run_dir) == run_dir / "step-4"
        shutil.rmtree(run_dir)


def test_without_any_one_fsync_the_check_fails(folder):
    """But for one: an old checkpoint whose removal is forgotten does no harm."""
    recorder, known = recorded(folder)
    operations = recorder.operations
    last = operations[: next(i for i, o in enumerate(operations) if o == Promise(2))]  # the second save is like all later ones
    first = next(i for i, o in enumerate(operations) if o == Promise(1))
    fsyncs = [i for i, o in enumerate(last) if isinstance(o, Sync) and i > first]
    assert len(fsyncs) >= 9
    removed = next(i for i, o in enumerate(last) if isinstance(o, Entries) and o.changes.get("step-1", o) is None)
    for i in fsyncs:
        harm = next(problems(states(recorder, without=i, after=1), known, folder), None)
        assert harm or i > removed, f"without the fsync of {operations[i].label} nothing is lost"


def no_fsync_of_files(patch):
    real = os.fsync
    patch.setattr(os, "fsync", lambda fd: real(fd) if os.path.isdir(f"/proc/self/fd/{fd}") else None)


CONTROLS = {
    "files are not fsynced": no_fsync_of_files,
    "directories are not fsynced": lambda patch: patch.setattr(storage, "sync_directory", lambda directory: None),
    "nothing is renamed": lambda patch: patch.setattr(storage, "rename", lambda old, new: None),
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
    """One bit of a file is not what was written. Reading back finds it before the older checkpoint goes; else all is lost."""
    write, read_back = storage.write, storage.read_back

    def worn(path, fill):
        written = write(path, fill)
        if path.name == worn.name:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content)
        return written

    for i, worn.name in enumerate(FILES):
        run_dir = folder / f"{i}"
        run_dir.mkdir()
        save(run_dir, 1)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write", worn)
            with pytest.raises(StorageError, match=worn.name):
                save(run_dir, 2)
            assert newest(run_dir) == (run_dir / "LATEST").resolve() == run_dir / "step-1"
            patch.setattr(storage, "read_back", lambda path: Anything())
            save(run_dir, 2)
        assert storage.read_back is read_back and newest(run_dir) is None


class Anything:
    """Equal to all."""

    def __eq__(self, other: object) -> bool:
        return True
