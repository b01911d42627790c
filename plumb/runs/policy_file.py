"""Weights to start from: reading a policy.pt without trusting it.

The only way by which a pickle is read. First the file is held to the form that torch.save gives a
state dict, for what torch's own weights_only lets through is more than weights need:
bytearray(10**12), or 300 MB packed into 300 KB. Then torch reads it, with weights_only, and each
tensor is looked at before anything is copied.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plumb.errors import UnsafeFile, UserError
from plumb.runs.policy_path import resolve_archive

# Buffers that the transformers of 2023 wrote into state dicts and today's recompute.
STALE_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What torch.save writes, and the only functions and classes that a state dict is made of.
RECORD = re.compile(
    r"[^/]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+)"
)
GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
} | {
    f"torch {kind}Storage"
    for kind in (
        "Float",
        "BFloat16",
        "Half",
        "Double",
        "Bool",
        "Byte",
        "Char",
        "Short",
        "Int",
        "Long",
    )
}
# GLOBAL is the one way in
OTHER_CALLS = {
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "EXT1",
    "EXT2",
    "EXT4",
    "PERSID",
}


def load_policy_state(archive: str) -> dict[str, Tensor]:
    """Return the state dict of a policy.pt, ours or the original repository's, on the CPU and
    memory-mapped.

    Each tensor is plain, floating-point, and no larger than its data in the file; whether its
    values are finite is checked where they are copied. Raises UnsafeFile for a file that would run
    code or is damaged, UserError for another kind of file.
    """
    path = resolve_archive(archive)
    what = f"model.archive={path}"
    content = _load_pickle(path, what, "policy.pt")
    if type(content) is dict and "state" not in content:
        keys = ", ".join(str(key)[:40] for key in [*content][:3]) or "nothing"
        raise UserError(
            f"{what}: not a policy.pt, which holds {{step_idx, state, metrics}}; it holds {keys}"
        )
    tensors = _tensors(content["state"] if type(content) is dict else content, what, "policy.pt")
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and not name.endswith(STALE_BUFFERS):
            raise UnsafeFile(
                f"{what}: not a policy.pt: {name[:80]!r} is of type {str(tensor.dtype)[6:]};"
                f" weights are {', '.join(str(d)[6:] for d in FLOATS)}"
            )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(STALE_BUFFERS)}


def load_pickled_tensors(path: Path, what: str, of_policy: bool = False) -> dict[str, Tensor]:
    """Return the state dict of a model folder's pickle, or of a policy.pt (`of_policy`),
    memory-mapped; its buffers may be of any type. `what` is how to call the file.

    Raises UnsafeFile for a file that would run code, is damaged, or holds anything but plain
    tensors.
    """
    content = _load_pickle(path, what, "state dict")
    if of_policy and type(content) is dict:
        content = content.get("state")
    return _tensors(content, what, "state dict")


def _load_pickle(path: Path, what: str, kind: str) -> Any:
    check_pickled_tensors(path, what)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise _refusal(what, kind, error) from None


def _refusal(what: str, kind: str, error: Exception) -> UnsafeFile:
    first = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
    return UnsafeFile(f"{what}: not a {kind} ({first}); is it damaged?")


def _tensors(state: Any, what: str, kind: str) -> dict[str, Tensor]:
    """Return a state dict as a plain dict, after checking that each entry is a tensor stored in
    full.
    """
    try:
        # not state.items: a pickle may give an OrderedDict attributes of any name
        tensors = dict(dict.items(state))
    except Exception as error:
        raise _refusal(what, kind, error) from None
    for name, tensor in tensors.items():
        if problem := _problem(name, tensor):
            raise UnsafeFile(f"{what}: not a {kind}: {str(name)[:80]!r} {problem}")
    return tensors


def _problem(name: object, tensor: object) -> str:
    """Return why this is not an entry of a state dict; "" if it is one."""
    if type(name) is not str:
        return f"is a name of type {type(name).__name__}"
    if not isinstance(tensor, Tensor):
        return f"is of type {type(tensor).__name__}, not a tensor"
    is_plain = (
        tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    )
    # expand() makes such a tensor
    if not is_plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        return f"of shape {list(tensor.shape)} is not stored whole, so it could fill any memory"
    return ""


def check_pickled_tensors(path: Path, what: str) -> None:
    """Raise UnsafeFile unless `path` is a file of torch.save with tensors and plain values only.
    Reads its table of contents and its pickle, opcode by opcode, and executes nothing. `what` is
    how to call the file in the error.
    """
    damaged = f"{what}: not a readable checkpoint (%s); is it damaged or cut short?"
    try:
        with zipfile.ZipFile(path) as file:
            entries = {entry.filename: entry for entry in file.infolist()}
            records = [name for name in entries if name.endswith("/data.pkl")]
            if len(entries) < len(file.infolist()) or any(
                e.compress_type or e.flag_bits & 1 for e in entries.values()
            ):
                raise UnsafeFile(
                    damaged
                    % "entries that are compressed or there twice, which torch.save does not write"
                )
            if len(records) != 1 or (
                other := next((n for n in entries if not RECORD.fullmatch(n)), "")
            ):
                raise UnsafeFile(
                    damaged
                    % (
                        f"{other!r} is no part of a state dict"
                        if records
                        else "it holds no data.pkl"
                    )
                )
            # some 200 bytes for each tensor
            if entries[records[0]].file_size > 2**20 + 1024 * len(entries):
                raise UnsafeFile(damaged % "its pickle is far too large for its tensors")
            pickled = file.read(records[0])
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UnsafeFile(damaged % str(error).partition("\n")[0][:120]) from None
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in OTHER_CALLS or (opcode.name == "GLOBAL" and argument not in GLOBALS):
                named = str(argument or opcode.name).replace(" ", ".")[:80]
                raise UnsafeFile(
                    f"{what}: refused: it holds more than tensors and plain values ({named}), and"
                    " loading it could run code from the file; save tensors only"
                )
    except (ValueError, UnicodeError) as error:
        raise UnsafeFile(damaged % f"its pickle: {str(error)[:80]}") from None


def as_in_2023(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict as transformers 4.29 has it: with the names used in the model's files on
    the hub, and the buffers it kept.

    transformers 5 renamed parameters in memory (GPT-NeoX: embed_out became lm_head) and recomputes
    those buffers. This covers the model classes that the original repository names: GPT-NeoX,
    GPT-2, Llama; GPT-J kept no buffers.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = revert_weight_conversion(model, dict(state))
    spec = model.config
    n = spec.max_position_embeddings
    # one tensor for all layers: stored once
    causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    # detached, for transformers leaves marks on a buffer that torch.save would write
    frequencies = next(
        (b.detach() for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq")),
        None,
    )
    kept: dict[str, tuple[str, dict[str, Any]]] = {
        "gpt_neox": (
            "gpt_neox.layers.{}.attention.",
            {"bias": causal, "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": frequencies},
        ),
        "gpt2": ("transformer.h.{}.attn.", {"bias": causal, "masked_bias": torch.tensor(-1e4)}),
        "llama": ("model.layers.{}.self_attn.", {"rotary_emb.inv_freq": frequencies}),
    }
    prefix, buffers = kept.get(spec.model_type, ("", {}))
    for layer in range(spec.num_hidden_layers):
        state |= {prefix.format(layer) + name: buffer for name, buffer in buffers.items()}
    return state
