"""Find the weight files of a model's folder or hub name, and read their tensors on demand.

transformers gets these tensors and no folder, so that it opens no other file: no pickle that was
not checked, no distributed checkpoint (whose metadata is a pickle), no adapter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from plumb.errors import UnsafeFile, UserError
from plumb.runs.policy_file import load_pickled_tensors
from plumb.runs.policy_path import PEFT_FOLDER, is_peft_folder

INDEX = ".index.json"


class Weights(dict[str, Any]):
    """Map a name in the files to a tensor, or to a slice of a safetensors file, which is read when
    indexed.

    `archive`: they are a policy.pt's, with the names that the model has in memory, or had in 2023.
    """

    def __init__(self, tensors: Mapping[str, Any] | None = None, archive: bool = False):
        super().__init__(tensors or {})
        self.archive = archive

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape without reading values."""
        stored = self[name]
        return tuple(stored.shape if isinstance(stored, Tensor) else stored.get_shape())

    def read(self, name: str, where: tuple[slice, ...] = ()) -> Tensor:
        """Return the part at `where`; without it, everything."""
        return self[name][where or ...]

    def equal(self, a: str, b: str) -> bool:
        """Return whether two names stand for the same values, compared in pieces of about 64 MB, up
        to the first difference.
        """
        shape = self.shape(a)
        if self[a] is self[b] or shape != self.shape(b):
            return shape == self.shape(b)
        rows = max(1, (1 << 24) // max(1, torch.Size(shape[1:]).numel())) if shape else 1
        pieces = [(slice(i, i + rows),) for i in range(0, shape[0], rows)] if shape else [()]
        return all(torch.equal(self.read(a, piece), self.read(b, piece)) for piece in pieces)


def locate(name: str) -> dict[str, Any]:
    """Return the arguments that make transformers read `name`: a hub name, a folder, or a GGUF file
    (or a folder with only that). Raise UserError for a path that does not exist.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.name_or_path={name}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if is_peft_folder(path):
        raise UserError(f"model.name_or_path={name}: {PEFT_FOLDER}")
    if (
        path.is_dir()
        and not (path / "config.json").exists()
        and not (path / "tokenizer_config.json").exists()
    ):
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(
                f"model.name_or_path={name}: a folder with neither config.json nor exactly one"
                " .gguf file"
            )
        return {"pretrained_model_name_or_path": str(path), "gguf_file": files[0].name}
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"model.name_or_path={name}: no such folder")
    return {"pretrained_model_name_or_path": str(path) if path.exists() else name}


@contextmanager
def open_weights(name: str, revision: str | None, explicit: str | None) -> Iterator[Weights]:
    """Open the tensors of a folder or hub name within the context.

    `explicit`: the file that its config names (`transformers_weights`). Otherwise, as transformers
    chooses: model.safetensors, its index, pytorch_model.bin, its index. Raises UserError if there
    is none of them, UnsafeFile for one that does not match its name, or a pickle with more than
    tensors.
    """
    with ExitStack() as stack:
        weights = Weights()
        for path in _files(name, revision, explicit):
            if path.endswith(".safetensors"):
                file = stack.enter_context(safe_open(path, "pt"))
                weights |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  a file is no mapping
            else:
                weights |= load_pickled_tensors(
                    Path(path), f"model.name_or_path={name}: {Path(path).name}"
                )
        yield weights


def _files(name: str, revision: str | None, explicit: str | None) -> list[str]:
    """Return local paths; files on the hub are downloaded."""

    def find(file: str) -> str | None:
        return cached_file(
            name, file, revision=revision, _raise_exceptions_for_missing_entries=False
        )

    if explicit is not None and (
        not _is_plain(explicit) or not explicit.removesuffix(INDEX).endswith(".safetensors")
    ):
        raise UnsafeFile(
            f"model.name_or_path={name}: its config.json asks for the weights in {explicit!r};"
            " remove transformers_weights, or name a safetensors file of this folder"
        )
    choice = (
        [explicit]
        if explicit
        else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    )
    path = next((path for path in map(find, choice) if path is not None), None)
    if path is None:
        raise UserError(f"model.name_or_path={name}: holds no weights ({', '.join(choice)})")
    if not path.endswith(INDEX):
        return [path]
    what = f"model.name_or_path={name}: {Path(path).name}"
    kind = ".bin" if Path(path).name == WEIGHTS_INDEX_NAME else ".safetensors"
    paths: dict[str, str] = {}
    for file in _weight_map(path, what).values():
        if not isinstance(file, str) or not _is_plain(file) or not file.endswith(kind):
            raise UnsafeFile(
                f"{what} names {file!r}, which is no {kind} file of this folder; is it damaged?"
            )
        if file not in paths:
            if (there := find(file)) is None:
                raise UserError(f"{what} names {file}, which is not there; copy it into the folder")
            paths[file] = there
    return sorted(paths.values())


def _weight_map(path: str, what: str) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(path).read_text("utf-8"))["weight_map"]
        return dict(content.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{what}: no index of weights ({type(error).__name__}: {str(error)[:80]}); is it"
            " damaged?"
        ) from None


def _is_plain(file: str) -> bool:
    return file not in ("", ".", "..") and os.path.basename(file) == file and "\\" not in file
