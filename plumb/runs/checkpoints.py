"""Checkpoints: written so that a kill at any moment loses nothing, checked before they are
believed, pruned afterwards.

A checkpoint is a directory, step-N where it was evaluated and interim-N where it was not, N the
training examples seen:

    policy.pt, scheduler.pt                 the original format, {step_idx, state, metrics}, whole
    optimizer.pt                            the same, with save_optimizer_pt
    state-<rank>-of-<ranks>.safetensors     what else training goes on from: this rank's part of the
                                            optimizer state, and weights that policy.pt lacks
    manifest.json                           every file's size and sha256, how far the run is, and
                                            what it is made of

Written under another name, every file synced, the manifest last, the directory renamed, all read
back: only then is LATEST moved and are older ones removed. What has no manifest that fits is no
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plumb.console import rank0_print
from plumb.distributed import collectives, sharding
from plumb.errors import NonFinite, StorageError, UnsafeFile, UserError
from plumb.runs import durable_files
from plumb.runs.durable_files import Written
from plumb.runs.state_files import Part, parts_of, write_tensors

FORMAT = 1
# Fields that have another name in manifest.json: those of format 1, so that runs of all versions
# resume.
ON_DISK = {"fingerprint": "recipe", "decisions": "found"}
NAME = re.compile(r"(step|interim)-(\d{1,15})")
REHEARSAL = ".rehearsal"
MANIFEST_LIMIT = 1 << 26  # bytes


@dataclass
class Manifest:
    """Describe a checkpoint. `step` counts optimizer steps, `examples` the training
    examples seen.
    """

    step: int
    examples: int
    finished: bool  # the run's last
    evaluation_due: bool  # stopped before the evaluation that belongs here
    metrics: dict[str, float]  # of the evaluation
    fingerprint: dict[str, Any]  # what the run is made of: see runs/directory.py
    # what the run decided by itself, and would perhaps decide otherwise today
    decisions: dict[str, Any]
    logs: dict[str, int]  # bytes of each log at this moment
    order: str  # a digest of the indices of all examples seen, in their order
    wandb: str | None = None
    # whether a step has trained the policy and passed the checks of the first one; it had, before
    # this was recorded
    checked: bool = True
    # of the optimizer's state, what is no tensor
    values: dict[str, Any] = field(default_factory=dict)
    save_secs: float = 0.0  # that a save took
    ranks: int = 1
    files: dict[str, Written] = field(default_factory=dict)
    saved: str = ""
    format: int = FORMAT


class Damaged(ValueError):
    """Report why a directory is not a checkpoint to resume from."""


# ---- writing ----


def save(
    run_dir: Path,
    name: str,
    parts: Mapping[str, Callable[[], Any]],
    state: Mapping[str, Part],
    manifest: Manifest,
    group: collectives.ObjectGroup,
    needed: int,
) -> Path:
    """Write and verify one checkpoint, all ranks together. Return its directory.

    `parts` are the original's files; each is made by all ranks in turn, written by rank 0, and then
    dropped. `needed` is the number of bytes it will take, for the error message. Raises
    StorageError on all ranks if the disk is full or not writable; earlier checkpoints stay valid in
    any case.
    """
    final = run_dir / name
    temporary = run_dir / f".{name}.partial"
    problems = list[str]()
    file = f"state-{group.rank}-of-{group.ranks}.safetensors"

    def trying(write: Callable[[], Written | None]) -> Written | None:
        try:
            return None if problems else write()
        except OSError as error:
            problems.append(error.strerror or str(error))
        except RuntimeError as error:  # torch's own writer
            problems.append(str(error).splitlines()[0])
        return None

    def write_part(part: str, content: Any) -> Written:
        archive = {"step_idx": manifest.examples, "state": content, "metrics": manifest.metrics}
        return durable_files.write(temporary / f"{part}.pt", lambda f: torch.save(archive, f))

    if group.rank == 0:
        trying(lambda: durable_files.begin(temporary))
    if any(gathered := group.gather(problems)):
        raise _cannot_write(run_dir, name, gathered, needed)
    written: dict[str, Written | None] = {}
    for part, make in parts.items():
        content = make()
        if group.rank == 0:
            written[f"{part}.pt"] = trying(partial(write_part, part, content))
        del content
        # all ranks make the next part in groups with a shorter timeout, so they wait here
        group.gather(None)
    written[file] = trying(lambda: write_tensors(temporary / file, state))
    everything = group.gather((written, problems))

    def commit() -> list[str]:
        try:
            manifest.files = {k: v for files, _ in everything for k, v in files.items() if v}
            manifest.ranks = group.ranks
            manifest.saved = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            durable_files.write(temporary / "manifest.json", lambda f: f.write(_dump(manifest)))
            durable_files.rename(temporary, final)
            verify(final)
        except OSError as error:
            return [error.strerror or str(error)]
        except Damaged as error:
            _clear(final)
            return [f"what was written does not read back the same: {error}"]
        return []

    problems = [p for _, problems in everything for p in problems] or group.from_rank0(commit)
    if problems:
        if group.rank == 0:
            _clear(temporary)
        raise _cannot_write(run_dir, name, [problems], needed)
    return final


def _clear(directory: Path) -> None:
    """Remove what a failed save left. A disk that fails here too must not hide the first error; the
    next start removes the rest.
    """
    with suppress(OSError):
        durable_files.remove(directory)


def _cannot_write(
    run_dir: Path, name: str, problems: Iterable[list[str]], needed: int
) -> StorageError:
    reason = next(p for some in problems for p in some)
    free = durable_files.free_bytes(run_dir) if run_dir.exists() else 0
    return StorageError(
        f"local_run_dir={run_dir}: {name} could not be written ({reason}); it takes {_gb(needed)},"
        f" and {_gb(free)} are free; older checkpoints are valid; free some space and resume with"
        " resume=auto"
    )


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n > 1e7 else f"{n / 1e6:.2f} MB"


def _dump(manifest: Manifest) -> bytes:
    """Return the manifest as JSON that contains a digest of itself."""
    content = asdict(manifest) | {"files": {k: list(v) for k, v in manifest.files.items()}}
    return _sealed({ON_DISK.get(name, name): value for name, value in content.items()})


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return JSON that contains a digest of itself, in a canonical form."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-2]},\n "this": "{digest}"\n}}\n'.encode()


# ---- reading ----


class Checkpoint(NamedTuple):
    path: Path
    manifest: Manifest

    def state_files(self) -> list[Path]:
        return [
            self.path / name for name in sorted(self.manifest.files) if name.startswith("state-")
        ]


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest. Raise Damaged, with the reason, if it is missing or has changed."""
    path = directory / "manifest.json"
    try:
        if directory.is_symlink() or path.is_symlink() or path.stat().st_size > MANIFEST_LIMIT:
            raise Damaged("manifest.json is a link, or too large")
        text = path.read_bytes()
        content = json.loads(text)
        del content["this"]
        if content["format"] != FORMAT:
            raise Damaged(f"it is of format {content['format']}, and this version reads {FORMAT}")
        names = {on_disk: name for name, on_disk in ON_DISK.items()}
        manifest = Manifest(**{names.get(name, name): value for name, value in content.items()})
        manifest.files = {
            name: Written(*size_and_sum) for name, size_and_sum in manifest.files.items()
        }
        # of what the file holds: one of an earlier version lacks fields that came later
        if _sealed(content) != text or any(Path(name).name != name for name in manifest.files):
            raise Damaged("manifest.json has changed since it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        why = f": {error.strerror}" if isinstance(error, OSError) else " is not what was written"
        raise Damaged(f"manifest.json{why}") from None
    return manifest


def verify(directory: Path) -> Manifest:
    """Check that every file exists with the size and sha256 in the manifest. Raise Damaged. About 1
    GB/s per core.
    """
    manifest = read_manifest(directory)

    def check(item: tuple[str, Written]) -> str | None:
        name, expected = item
        path = directory / name
        try:
            if path.is_symlink() or path.stat().st_size != expected.bytes:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected.bytes:,}"
            return (
                None
                if durable_files.read_back(path) == expected
                else f"{name} has changed since it was written"
            )
        except OSError as error:
            return f"{name}: {error.strerror}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problem = next((p for p in pool.map(check, manifest.files.items()) if p), None)
    if problem:
        raise Damaged(problem)
    return manifest


def listed(run_dir: Path) -> list[Path]:
    """Return everything with a checkpoint's name, newest first, whether valid or not."""
    checkpoints = [
        (int(m[2]), m[1] == "step", p)
        for p in run_dir.glob("*-*")
        if (m := NAME.fullmatch(p.name)) and p.is_dir()
    ]
    return [path for *_, path in sorted(checkpoints, reverse=True)]


def latest_valid(run_dir: Path) -> Checkpoint | None:
    """Return the newest valid checkpoint and one line for each newer invalid one; None if there are
    no checkpoints.

    Raises UnsafeFile if there are checkpoints and none is valid.
    """
    paths = listed(run_dir)
    for path in paths:
        try:
            return Checkpoint(path, verify(path))
        except Damaged as problem:
            rank0_print(f"{path}: not used: {problem}")
    if paths:
        raise UnsafeFile(
            f"local_run_dir={run_dir}: none of its {len(paths)} checkpoints can be resumed (see"
            " above); start a new run, from a policy.pt that you trust if there is one:"
            f" model.archive={paths[0]}/policy.pt"
        )
    return None


def quarantine_newer(run_dir: Path, checkpoint: Checkpoint | None) -> None:
    """Rename damaged checkpoints newer than `checkpoint`, so that their names are free. Remove
    what a kill left half written, and point LATEST to `checkpoint` if a kill came between.
    """
    for path in listed(run_dir):
        if checkpoint is not None and path == checkpoint.path:
            break
        durable_files.rename(path, path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
    remove_leftovers(run_dir)
    if checkpoint is not None:
        durable_files.point(run_dir / "LATEST", checkpoint.path.name)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a kill left half written or half removed. Nobody may be saving."""
    for path in (*run_dir.glob(".*.partial"), *run_dir.glob(".*.removed"), run_dir / REHEARSAL):
        durable_files.remove(path)
    for path in (*run_dir.glob(".LATEST.*"), *run_dir.glob(".status.*")):
        path.unlink()


# ---- pruning ----


def finish_save(run_dir: Path, name: str, keep: int | None, best_by: str | None) -> None:
    """Point LATEST to a checkpoint that has been verified, and remove those no longer needed."""
    try:
        durable_files.point(run_dir / "LATEST", name)
        prune(run_dir, keep, best_by)
    except OSError as error:
        raise StorageError(
            f"local_run_dir={run_dir}: {name} is written; {error.strerror or error}"
        ) from None


def prune(run_dir: Path, keep: int | None, best_by: str | None) -> None:
    """Remove checkpoints that are no longer needed: interim ones that a newer one has replaced, and
    all evaluated ones except the newest `keep` (None: keep all) and the best. At least two are
    kept, or one if keep = 1. Called once the newest has been verified.
    """
    checkpoints = []
    for path in listed(run_dir):
        try:
            checkpoints.append(Checkpoint(path, read_manifest(path)))
        except Damaged:  # not ours to remove
            continue
    evaluated = [f for f in checkpoints if f.path.name.startswith("step-")]
    kept = {f.path for f in [*checkpoints[: min(2, keep or 2)], *evaluated[:keep]]}
    scores = [
        (_score(best_by, f.manifest.metrics), f.path)
        for f in evaluated
        if best_by and best_by in f.manifest.metrics
    ]
    if scores:
        kept.add(max(scores, key=lambda s: (not math.isnan(s[0]), s[0]))[1])
    for f in checkpoints:
        if f.path not in kept:
            durable_files.remove(f.path)


def _score(name: str, metrics: Mapping[str, float]) -> float:
    """Return the metric with the sign that makes higher better: losses are negated."""
    return -metrics[name] if name.startswith("loss") else metrics[name]


# ---- when and how often ----


class Saver:
    """Save checkpoints one after another, either at once or in a thread, so that training waits
    only for the copy.

    After each save, LATEST points to it, and checkpoints no longer needed are removed. An error in
    the thread is raised by the next call.
    """

    def __init__(
        self, run_dir: Path, *, in_background: bool, keep: int | None, best_by: str | None
    ):
        self.run_dir = run_dir
        self.keep = keep
        self.best_by = best_by
        self.group = collectives.ObjectGroup()  # its own, for the thread
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="save") if in_background else None
        self.going: Future[None] | None = None
        self.secs = 0.0  # that the last save took

    def save(
        self,
        name: str,
        parts: Mapping[str, Callable[[], Any]],
        state: Mapping[str, Tensor],
        manifest: Manifest,
        needed: int,
        in_parts: Container[str] = (),
    ) -> None:
        """Save; see the function `save`. Every rank must call it. `in_parts`: the names of tensors
        that a part holds, which are not stored again.

        Raises NonFinite, before anything is written, if a weight is NaN or infinite.
        """
        self.wait()
        if bad := sharding.not_finite(
            (n, tensor) for n, tensor in state.items() if n.startswith("policy.")
        ):
            raise NonFinite(
                f"local_run_dir={self.run_dir}: {name} is not written, since"
                f" {bad.removeprefix('policy.')} holds NaN or infinity; older checkpoints are"
                " valid; lower lr, and resume with resume=auto"
            )
        state = {name: tensor for name, tensor in state.items() if name not in in_parts}
        if self.thread is None:
            return self._save(name, parts, parts_of(state, copied=False), manifest, needed)
        made = {part: copied(make()) for part, make in parts.items()}
        later = {part: lambda content=content: content for part, content in made.items()}
        self.going = self.thread.submit(
            self._save, name, later, parts_of(state, copied=True), manifest, needed
        )

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raise UserError if keep_best names none of these metrics."""
        if self.keep and self.best_by and self.best_by not in metrics:
            known = ", ".join(metrics)
            raise UserError(
                f"keep_best={self.best_by}: none of the metrics ({known}); null keeps none for"
                " being best"
            )

    def wait(self) -> None:
        """Wait until the save in progress is done. Raise its error, if any."""
        if self.going is not None:
            going = self.going
            self.going = None
            going.result()

    def failed(self) -> bool:
        return self.going is not None and self.going.done() and self.going.exception() is not None

    def _save(
        self,
        name: str,
        parts: Mapping[str, Callable[[], Any]],
        state: Mapping[str, Part],
        manifest: Manifest,
        needed: int,
    ) -> None:
        start = time.monotonic()
        path = save(self.run_dir, name, parts, state, manifest, self.group, needed)
        self.group.from_rank0(partial(finish_save, self.run_dir, name, self.keep, self.best_by))
        self.secs = time.monotonic() - start
        rank0_print(f"saved {path}")

    def rehearse(
        self,
        parts: Mapping[str, Callable[[], Any]],
        state: Mapping[str, Tensor],
        manifest: Manifest,
        n_saves: int,
        in_parts: Container[str] = (),
    ) -> int:
        """Write, verify and delete a checkpoint before there is anything to lose. Return the bytes
        it takes. `in_parts` as for `save`.

        Raises StorageError if that fails, or if there is no room for `n_saves` of them, or for two,
        since one is removed only once the next has been verified.
        """
        mine = parts_of({n: x for n, x in state.items() if n not in in_parts}, copied=False)
        needed = sum(
            self.group.gather(sum(p.local.numel() * p.local.element_size() for p in mine.values()))
        )
        start = time.monotonic()
        path = save(self.run_dir, REHEARSAL, parts, mine, manifest, self.group, needed)
        self.secs = time.monotonic() - start

        def measure() -> tuple[int, int]:
            size = sum(f.stat().st_size for f in path.iterdir())
            durable_files.remove(path)
            return size, durable_files.free_bytes(self.run_dir)

        size, free = self.group.from_rank0(measure)
        wanted = n_saves if self.keep is None else min(n_saves, self.keep + 2)
        if free < 1.1 * size * min(2, n_saves):
            raise StorageError(
                f"local_run_dir={self.run_dir}: a checkpoint takes {_gb(size)}, two must fit,"
                f" and {_gb(free)} are free; free some space, or set local_dirs"
            )
        rank0_print(
            f"a checkpoint takes {_gb(size)} and {self.secs:.1f} s; written, verified and deleted"
        )
        if free < size * wanted:
            # the newest, the best, and one that is removed once the next has been verified
            keep = max(int(free / size) - 2, 1)
            rank0_print(
                f"note: the {wanted} checkpoints to come take {_gb(size * wanted)}, and"
                f" {_gb(free)} are free; set keep_checkpoints={keep}"
            )
        return size


def copied(content: Any) -> Any:
    """Return a copy on the CPU of tensors in dicts and lists, which training does not change."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, Mapping):
        return {key: copied(value) for key, value in content.items()}
    return [copied(value) for value in content] if isinstance(content, list) else content
