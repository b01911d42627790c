"""Checkpoints: policy.pt, optimizer.pt and scheduler.pt in their 2023 form, written so that a kill loses nothing.

A checkpoint is a directory step-N with those three files, N the number of training examples seen. It is written under
another name, synced to disk and renamed; LATEST is a link that is moved, in one step, to the newest one.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import UserError, sync_directory


def save(run_dir: Path, step: int, parts: Mapping[str, Any], metrics: Mapping[str, float] | None) -> Path:
    """Write `{name}.pt = {step_idx, state, metrics}` for each part into run_dir/step-<step>, and point LATEST at it.

    `step` counts examples, as the 2023 repository's step_idx does. Raises UserError when the disk is full or cannot be
    written; the checkpoints written before are whole in any case.
    """
    final, temporary = run_dir / f"step-{step}", run_dir / f".step-{step}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, state in parts.items():
            with open(temporary / f"{name}.pt", "wb") as file:
                torch.save({"step_idx": step, "state": state, "metrics": dict(metrics or {})}, file)
                file.flush()
                os.fsync(file.fileno())
        sync_directory(temporary)
        temporary.rename(final)
        sync_directory(run_dir)
        _point(run_dir / "LATEST", final.name)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else "the disk is full, or a file-size limit is reached"
        raise UserError(f"local_run_dir={run_dir}: step-{step} could not be written ({reason}); free some space, "
                        "or set local_dirs; older checkpoints are whole") from None  # fmt: skip
    return final


def _point(link: Path, target: str) -> None:
    """Make `link` a relative symbolic link to `target`; the rename replaces an older link in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    sync_directory(link.parent)


def resolve_archive(archive: str) -> Path:
    """The policy.pt that `model.archive` names: a file, a run or step directory, or a pattern, whose newest match counts.

    Raises UserError when nothing matches.
    """
    matches = [Path(archive)] if Path(archive).exists() else [Path(m) for m in glob(os.path.expanduser(archive))]
    files = [f for f in (_policy_file(m) for m in matches) if f is not None]
    if not files:
        raise UserError(f"model.archive={archive}: no such file, run directory or pattern with a policy.pt in it")
    return max(files, key=lambda f: f.stat().st_mtime)


def _policy_file(path: Path) -> Path | None:
    """The newest policy.pt of a run directory (LATEST, else its highest step), of a step directory, or the file itself."""
    if path.is_file():
        return path if path.suffix == ".pt" else None
    steps = sorted(path.glob("step-*/policy.pt"), key=lambda f: int(f.parent.name[5:]) if f.parent.name[5:].isdigit() else -1)
    candidates = [path / "policy.pt", path / "LATEST" / "policy.pt", *reversed(steps)]
    return next((c for c in candidates if c.is_file()), None)


def load_policy_state(archive: str) -> dict[str, Tensor]:
    """The state dict of a policy.pt, ours or the 2023 repository's, on the CPU, memory-mapped.

    Only tensors and plain values are read (`weights_only`): a pickle that would run code is refused with a UserError, as
    is a file that is damaged or is no checkpoint.
    """
    path = resolve_archive(archive)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"model.archive={path}: refused: it holds more than tensors and plain values, and loading it would run "
                        "code from the file; save {step_idx, state, metrics} with tensors only") from None  # fmt: skip
    except Exception as error:
        first = str(error).splitlines()[0][:120]
        raise UserError(f"model.archive={path}: not a readable checkpoint ({first}); is it damaged or cut short?") from None
    state = content.get("state") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"model.archive={path}: not a policy.pt; expected {{step_idx, state, metrics}}, state a dict of tensors")
    return dict(state)
