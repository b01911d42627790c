"""Write, read back, rename, link and remove files of a checkpoint; each function returns once the
disk has the change.

Everything else is built from these (see runs/checkpoints.py), so that a test can record them, make
them fail one by one, and try every state that a power loss could leave.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from plumb.errors import StorageError
from plumb.paths import sync_directory


class Written(NamedTuple):
    """Record the size and digest a file must have when it is read again."""

    bytes: int
    sha256: str


class _Hashed:
    """Write a file from first byte to last and hash it on the way.

    An error is kept until the end: torch's zip writer, which may abort the process on an exception,
    never sees one.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.sha256()
        self.n = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = len(view) if self.error else 0
        try:
            while done < len(view):  # a file without a buffer may take a part only
                done += self.file.write(view[done:])
        except OSError as error:
            self.error = error
        self.digest.update(view)
        self.n += len(view)
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, fill: Callable[[BinaryIO], Any]) -> Written:
    """Create a file with what `fill(file)` writes into it; it is on the disk when this returns.
    Raises OSError.
    """
    with open(path, "xb", buffering=0) as raw:
        hashed = _Hashed(cast(BinaryIO, raw))
        fill(cast(BinaryIO, hashed))
        if hashed.error:
            raise hashed.error
        os.fsync(raw.fileno())
    return Written(hashed.n, hashed.digest.hexdigest())


def read_back(path: Path) -> Written:
    """Return the size and digest of a file's current contents. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Written(file.tell(), digest.hexdigest())


def begin(directory: Path) -> None:
    """Create an empty directory."""
    remove(directory)
    directory.mkdir(parents=True)


@contextmanager
def new_folder(out: Path, knob: str) -> Iterator[Path]:
    """Give an empty folder to write to. It becomes `out`, in place of what had that name, when the
    block has ended, and is removed if that raises.

    Raises StorageError, which names the knob, for an OSError within.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        begin(partial)
        yield partial
        if out.exists():
            remove(out)
        rename(partial, out)
    except OSError as error:
        raise StorageError(
            f"{knob} {out}: cannot be written ({error.strerror or error}); give another folder,"
            " or free some space"
        ) from None
    finally:
        with suppress(OSError):
            remove(partial)


def rename(old: Path, new: Path) -> None:
    """Rename within one directory, with the contents synced before and the directory after."""
    sync_directory(old)
    os.rename(old, new)
    sync_directory(new.parent)


def point(link: Path, target: str) -> None:
    """Make `link` a relative symbolic link to `target`, replacing an older link atomically."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync_directory(link.parent)


def remove(directory: Path) -> None:
    """Remove a directory and its contents. It is renamed first, so that no half of it has
    its name.
    """
    gone = directory.with_name(f".{directory.name.lstrip('.')}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    if directory.exists():
        os.rename(directory, gone)
        sync_directory(directory.parent)
        shutil.rmtree(gone, ignore_errors=True)


def free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free
