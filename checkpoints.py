"""Checkpoints: policy.pt, optimizer.pt and scheduler.pt in their 2023 form, written so that a kill loses nothing.

A checkpoint is a directory step-N with those three files, N the number of training examples seen. It is written under
another name, synced to disk and renamed; LATEST is a link that is moved, in one step, to the newest one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
