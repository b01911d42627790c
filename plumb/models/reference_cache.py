"""The reference's log-probabilities, computed once: by response, on disk, found again by what was
computed from what.

A file belongs to one reference (a digest of its weights), precision and layout; within it, a
response is found by a digest of the token ids of prompt and response, so that another order,
selection or mixture of data sets finds what it shares with earlier runs. Tokenizer, template and
truncation need no place in the key: they decide nothing but the ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from plumb.console import rank
from plumb.data.examples import ids_of, lengths_of, select
from plumb.data.tokenization import Example
from plumb.distributed import collectives, sharding
from plumb.errors import UserError
from plumb.paths import sync_directory

CHUNK = 1024  # examples whose ids are hashed together

# Of our own computation of log-probabilities, from token ids to the sum over a response. Raise it
# with every change of models/logps.py, models/chunked_head.py, models/tree_attention.py or
# batching/layout.py that makes other numbers of the same ids, be it in their rounding; files of
# other versions are then not found. test_the_version_of_log_probabilities holds the numbers that
# belong to it.
VERSION = 1


def weights_digest(model: nn.Module) -> str:
    """Return the digest of everything in a model's state dict. Every rank must call it."""
    return state_digest(model.state_dict(keep_vars=True))


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of the name, type, shape and bytes of all these tensors, however they are
    sharded; 1 to 2 GB/s per core.

    One parameter is gathered at a time, while each rank hashes its share. Every rank must call it.
    """

    def one(name: str, tensor: torch.Tensor) -> tuple[str, bytes]:
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return name, digest.digest()

    world = collectives.world_size()
    me = rank()
    n_threads = 1 if collectives.world_size() > 1 else os.cpu_count() or 1
    hashing: deque[Future[tuple[str, bytes]]] = deque()
    digests: list[tuple[str, bytes]] = []
    with ThreadPoolExecutor(n_threads) as pool:  # hashing lets other threads run
        for i, (name, tensor) in enumerate(sorted(state.items())):
            full = sharding.full_tensor(tensor.detach())
            if i % world == me:
                if len(hashing) == n_threads:
                    digests.append(hashing.popleft().result())
                hashing.append(pool.submit(one, name, full))
            del full
    digests += [waiting.result() for waiting in hashing]
    of_all = sorted(digest for part in collectives.all_gather_object(digests) for digest in part)
    return hashlib.blake2b(b"".join(digest for _, digest in of_all)).hexdigest()[:32]


@dataclass(frozen=True)
class Computation:
    """Describe how the log-probabilities are computed: what changes any of them, even by rounding,
    besides the model.
    """

    weights_dtype: str  # of the reference's weights
    dtype: str  # of the computation
    cast_by: (
        str | None
        # the trainer, where it casts weights to another type: autocast and FSDP round in other
        # places
    )
    layout: str  # the ForwardPath, as text
    compile: bool
    device: str  # its kind


def described(
    model: Any, weights: str, revision: str | None, computation: Computation
) -> dict[str, Any]:
    """Return everything that a cache file depends on: the model, with `weights` the digest of its
    own, how it is computed, and by which code.

    `revision`: the commit that was requested, for a model on the hub; otherwise the one that
    transformers found there. Config and weights do not determine the code of a repository that
    brings its own.
    """
    hf_config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    return vars(computation) | {
        "version": VERSION,
        "weights": weights,
        "model": json.dumps(hf_config, sort_keys=True, default=str),
        "revision": revision or getattr(model.config, "_commit_hash", None),
        "attention": str(model.config._attn_implementation),
        "libraries": [torch.__version__, transformers.__version__],
    }


def response_digests(examples: Sequence[Example]) -> np.ndarray:
    """Return a digest of the ids of each prompt with each of its responses.  [n, k] uint64"""
    return np.concatenate(
        [np.empty((0, lengths_of(examples).k), np.uint64)]
        + [_digests(examples[i : i + CHUNK]) for i in range(0, len(examples), CHUNK)]
    )


def _digests(examples: Sequence[Example]) -> np.ndarray:
    """Return blake2b, 8 bytes long, of 4 bytes per id of the prompt, "|", and 4 bytes per id of the
    response.
    """
    lengths, text = lengths_of(examples), ids_of(examples).view(np.uint8).data
    digests, at = [], 0
    empty = begun = hashlib.blake2b(digest_size=8)
    for prompt, response, root in zip(
        (4 * lengths.prompts).ravel().tolist(),
        (4 * lengths.responses).ravel().tolist(),
        lengths.roots.ravel().tolist(),
        strict=True,
    ):
        if root:
            begun = empty.copy()
            begun.update(text[at : at + prompt])
            begun.update(b"|")
            at += prompt
        digest = begun.copy()
        digest.update(text[at : at + response])
        at += response
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint64).reshape(lengths.prompts.shape)


def digests_of_all(examples: Sequence[Example], indices: np.ndarray) -> np.ndarray:
    """Return the digests of these examples' responses, [n, k], on every rank. Each rank computes a
    share; every rank must call it.
    """
    share = np.array_split(indices, collectives.world_size())[rank()]
    return np.concatenate(collectives.all_gather_object(response_digests(select(examples, share))))


class ReferenceCache:
    """Keep one file of (digest, log-probability), sorted by digest. `made_of` says what it depends
    on; its digest is the file's name.

    A file that is damaged, or does not match its name, is not used (`problem` says why) and is
    replaced.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any]):
        self.made_of = json.dumps(made_of, sort_keys=True)
        self.path = (
            folder / f"{hashlib.blake2b(self.made_of.encode()).hexdigest()[:24]}.safetensors"
        )
        self.problem = ""
        self.digests, self.logps = self._read()

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        if self.path.exists():
            try:
                return self._checked()
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                self.problem = f"{self.path}: not used, and replaced ({str(error).splitlines()[0]})"
        return np.empty(0, np.uint64), np.empty(0)

    def _checked(self) -> tuple[np.ndarray, np.ndarray]:
        with safe_open(self.path, "np") as file:
            metadata = file.metadata() or {}
            digests, logps = file.get_tensor("digests"), file.get_tensor("logps")
        if metadata.get("made_of") != self.made_of:
            raise ValueError("it belongs to another reference")
        if metadata.get("sum") != _checksum(digests, logps):
            raise ValueError("its contents have changed since it was written")
        return digests, logps

    def find(self, digests: np.ndarray) -> np.ndarray:
        """Return log-probabilities in nats, NaN if unknown, in the shape of `digests`."""
        if not len(self.digests):
            return np.full(digests.shape, np.nan)
        at = np.searchsorted(self.digests, digests).clip(max=len(self.digests) - 1)
        return np.where(self.digests[at] == digests, self.logps[at], np.nan)

    def add(self, digests: np.ndarray, logps: np.ndarray) -> None:
        """Add these and what another run has written meanwhile, and write the file atomically.

        Raises UserError if it can't be written.
        """
        known, values = self._read()
        self.digests, first = np.unique(np.concatenate([digests.ravel(), known]), return_index=True)
        self.logps = np.concatenate([logps.ravel(), values])[first]
        metadata = {"made_of": self.made_of, "sum": _checksum(self.digests, self.logps)}
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"digests": self.digests, "logps": self.logps}, temporary, metadata)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            sync_directory(self.path.parent)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise UserError(
                f"{self.path}: cannot be written ({str(error).splitlines()[0]}); set local_dirs to"
                " a place with room, or reference=live"
            ) from None


def _checksum(digests: np.ndarray, logps: np.ndarray) -> str:
    return hashlib.blake2b(digests.tobytes() + logps.tobytes()).hexdigest()
