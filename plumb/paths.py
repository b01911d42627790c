"""Locate the checkout with its config tree and the directory of a user's runs and caches, and write
new files.
"""

from __future__ import annotations

import errno
import getpass
import os
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plumb.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # the checkout
CONFIG = ROOT / "config"


def version() -> str:
    """Return Plumb's version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return f"Plumb {project['version']}"


def get_local_dir(local_dirs: Sequence[str]) -> Path:
    """Return `<first of local_dirs that exists>/<user>`; if none exists, the last one is used.
    Creates nothing.
    """
    return local_root(local_dirs) / getpass.getuser()


def local_root(local_dirs: Sequence[str]) -> Path:
    """Return the first of local_dirs that exists, otherwise the last one."""
    return Path(next((d for d in local_dirs if Path(d).is_dir()), local_dirs[-1]))


def sync_directory(directory: Path) -> None:
    """Sync a directory, so that a new file or a rename in it is on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(path: Path, option: str, mode: str = "w") -> Iterator[Any]:
    """Open a file that gets its name once it is complete, replacing an older one. Raise UserError
    if it can't be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        if path.is_dir():  # said now, not when all is written
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{option}={path}: cannot be written ({error.strerror}); give another file"
        ) from None
    finally:
        with suppress(OSError):  # not there, or its folder is none
            temporary.unlink()
