"""Find the policy.pt that `model.archive` names. Imports no torch."""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path

from plumb.errors import UserError

PEFT_FOLDER = (
    "a PEFT folder, which export.py writes and nothing here reads; give the run that it came from,"
    " or merge it into its base with peft's merge_and_unload and give the folder of that"
)


def resolve_archive(archive: str) -> Path:
    """Return the policy.pt that `model.archive` names: a file, a run or step directory, or a
    pattern, whose newest match is used.

    Raises UserError if nothing matches.
    """
    matches = (
        [Path(archive)]
        if Path(archive).exists()
        else [Path(m) for m in glob(os.path.expanduser(archive))]
    )
    files = [f for f in (_policy_file(m) for m in matches) if f is not None]
    if not files:
        if any(map(is_peft_folder, matches)):
            raise UserError(f"model.archive={archive}: {PEFT_FOLDER}")
        raise UserError(
            f"model.archive={archive}: no such file, run directory or pattern with a policy.pt"
            " in it"
        )
    return max(files, key=lambda f: f.stat().st_mtime)


def is_peft_folder(path: Path) -> bool:
    """Return whether this is a folder that peft reads, and holds no model."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").exists()


def _policy_file(path: Path) -> Path | None:
    """Return the newest policy.pt of a run directory (LATEST, otherwise its highest step) or of a
    step directory, or the file itself.
    """
    if path.is_file():
        return path if path.suffix == ".pt" else None
    steps = sorted(
        path.glob("step-*/policy.pt"),
        key=lambda f: int(f.parent.name[5:]) if f.parent.name[5:].isdigit() else -1,
    )
    candidates = [path / "policy.pt", path / "LATEST" / "policy.pt", *reversed(steps)]
    return next((c for c in candidates if c.is_file()), None)
