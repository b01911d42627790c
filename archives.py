"""Weights to start from: finding the policy.pt that `model.archive` names, and reading it without trusting it.

The only way by which a pickle is read: torch.load with weights_only=True, and what comes out is checked.
"""

from __future__ import annotations

import os
import pickle
from glob import glob
from pathlib import Path

import torch
from torch import Tensor

from utils import UserError


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
