"""Store the tensors a run resumes from, one safetensors file per rank: written by any number of
ranks, read by any other number. The policy's weights are not stored again if policy.pt has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from plumb.distributed import sharding
from plumb.errors import ResumeMismatch, UnsafeFile
from plumb.runs import durable_files
from plumb.runs.durable_files import Written
from plumb.runs.policy_file import load_pickled_tensors

# safetensors' names
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


POLICY = "policy."  # what the names of the policy's weights and buffers begin with
OF_NAME = {name: dtype for dtype, name in DTYPES.items()}


class Place(NamedTuple):
    """Say where a part of a tensor is stored."""

    file: Any  # open
    shape: list[int]  # of the full tensor
    offset: list[int]  # where the part begins in it


class Part(NamedTuple):
    """Describe what this rank writes of a tensor."""

    shape: list[int]  # of the full tensor
    offset: list[int]  # where the part begins in it
    local: Tensor


def parts_of(state: Mapping[str, Tensor], copied: bool) -> dict[str, Part]:
    """Return this rank's part of each tensor of which it has one to write; `copied` to the CPU, or
    as it is.
    """
    parts = {name: (tensor, sharding.local_part(tensor)) for name, tensor in state.items()}
    kept = lambda x: x.detach().to("cpu", copy=True) if copied else x.detach()
    return {
        name: Part(list(tensor.shape), list(part[0]), kept(part[1]))
        for name, (tensor, part) in parts.items()
        if part is not None and part[1].numel()
    }


def write_tensors(path: Path, parts: Mapping[str, Part]) -> Written:
    """Write the parts as safetensors; the metadata say where each part lies in the full tensor."""
    metadata = {name: json.dumps([part.shape, part.offset]) for name, part in parts.items()}
    contents = {name: (part.local.dtype, list(part.local.shape)) for name, part in parts.items()}
    return write_safetensors(path, contents, (part.local for part in parts.values()), metadata)


def write_safetensors(
    path: Path,
    contents: Mapping[str, tuple[torch.dtype, list[int]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> Written:
    """Write safetensors one tensor at a time. `contents` maps a name to the type and shape of each
    of the `tensors`, which are asked for one after another.

    The library's own writer takes a path and all tensors; this one writes through a file that is
    hashed, with one tensor at a time on the CPU.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in contents.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def fill(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return durable_files.write(path, fill)


def tensors_of(
    policy: nn.Module, optimizer: torch.optim.Optimizer, own: Container[str]
) -> dict[str, Tensor]:
    """Return all tensors a run resumes from, by name; sharded ones as they are, tied
    weights once. `own`: the names of the parameters that belong to the run.
    """
    sharding.reshard(policy)
    state: dict[str, Tensor] = {
        f"policy.{name}": p for name, p in policy.named_parameters() if name in own
    }
    kept = policy.state_dict()
    state |= {f"policy.{name}": b for name, b in policy.named_buffers() if name in kept}
    for name, p in policy.named_parameters():
        state |= {
            f"optimizer.{name}.{k}": v
            for k, v in optimizer.state.get(p, {}).items()
            if torch.is_tensor(v)
        }
    return state


# What optimizers count for a group of parameters: steps, and the sums of AdamW schedule-free.
COUNTERS = ("n_steps", "k", "weight_sum", "lr_max")
GROUPS = "groups."  # what the names of the groups begin with, before their numbers


def values_of(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the optimizer state of each parameter that is not a tensor, and what it counts for
    each group of parameters.
    """
    values = {
        name: {
            k: v for k, v in optimizer.state[p].items() if v is not None and not torch.is_tensor(v)
        }
        for name, p in policy.named_parameters()
        if p in optimizer.state
    }
    for i, group in enumerate(optimizer.param_groups):
        values[f"{GROUPS}{i}"] = {key: group[key] for key in COUNTERS if key in group}
    return {name: of_p for name, of_p in values.items() if of_p}


def restore(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    own: Container[str],
    files: Sequence[Path],
    values: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, Tensor],
) -> None:
    """Load the weights in `own`, optimizer state and `others` (by name) from the files; weights
    that these lack come from the policy.pt beside them. The optimizer state is created by a step
    without gradients, so that it has the right type and place, and then overwritten, as the weights
    are. Raises what `load_state` raises.
    """
    sharding.reshard(policy)
    parameters, stored = dict(policy.named_parameters()), names(files)
    for name, p in parameters.items():
        if name in values or any(key.startswith(f"optimizer.{name}.") for key in stored):
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    targets = tensors_of(policy, optimizer, own) | dict(others)
    in_policy = {
        name.removeprefix(POLICY): targets.pop(name)
        for name in [*targets]
        if name.startswith(POLICY) and name not in stored
    }
    load_state(files, targets)
    if in_policy:
        _load_weights(files[0].parent / "policy.pt", in_policy)
    counted = [
        {n for n in some if n.startswith(GROUPS)} for some in (values, values_of(policy, optimizer))
    ]
    if counted[1] and counted[0] != counted[1]:
        raise ResumeMismatch(
            f"{files[0].parent}: the optimizer counts the steps of {len(counted[0])} groups of"
            f" parameters, and here it has {len(counted[1])}; resume with the weight_decay_on,"
            " head_lr and trainer that the run had"
        )
    groups = {f"{GROUPS}{i}": group for i, group in enumerate(optimizer.param_groups)}
    for name, of_p in values.items():
        (groups[name] if name in groups else optimizer.state[parameters[name]]).update(of_p)


def _load_weights(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill each tensor (if sharded, this rank's part of it) from a policy.pt. Raises what
    `load_state` raises.
    """
    if not path.is_file():
        raise ResumeMismatch(
            f"{path.parent}: has neither {POLICY}{next(iter(targets))} nor a policy.pt; is it of"
            " another model?"
        )
    weights = load_pickled_tensors(path, str(path), of_policy=True)
    for name, target in targets.items():
        offset, local = sharding.region(target)
        full = weights.get(name)
        if full is None or full.shape != target.shape or full.dtype != local.dtype:
            what = "none" if full is None else f"{list(full.shape)} {DTYPES.get(full.dtype)}"
            raise ResumeMismatch(
                f"{path}: {name} is {what}, and here {list(target.shape)} {DTYPES[local.dtype]}; is"
                " it of another model?"
            )
        there = tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))
        with torch.no_grad():
            local.copy_(full[there])


def stored(files: Sequence[Path], prefix: str) -> dict[str, Tensor]:
    """Return the full tensors whose names begin with `prefix`, on the CPU. Raises what
    `load_state` raises.
    """
    directory = files[0].parent
    tensors = {}
    try:
        for name, places in _places(files).items():
            if name.startswith(prefix):
                file, shape, _ = places[0]
                dtype = OF_NAME[file.get_slice(name).get_dtype()]
                tensors[name] = torch.empty(shape, dtype=dtype)
                _fill(tensors[name], name, places, directory)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UnsafeFile(f"{directory}: cannot be read ({str(error).splitlines()[0]})") from None
    return tensors


def names(files: Sequence[Path]) -> set[str]:
    """Return the names of all tensors in the files."""
    return {name for file in _opened(files) for name in file.metadata() or {}}


def _opened(files: Sequence[Path]) -> list[Any]:
    try:
        return [safe_open(file, "pt") for file in files]
    except (SafetensorError, OSError) as error:
        raise UnsafeFile(
            f"{files[0].parent}: cannot be read ({str(error).splitlines()[0]})"
        ) from None


def load_state(files: Sequence[Path], targets: Mapping[str, Tensor]) -> None:
    """Fill each tensor (if sharded, this rank's part of it) from these files, however many ranks
    wrote them.

    Raises ResumeMismatch if names, shapes or types differ, and UnsafeFile if a file is not valid.
    """
    directory = files[0].parent
    try:
        places = _places(files)
        missing = sorted(targets.keys() - places.keys()) or sorted(places.keys() - targets.keys())
        if missing:
            what = "lacks" if missing[0] in targets else "has, and this run does not,"
            raise ResumeMismatch(
                f"{directory}: {what} {missing[0]} ({len(missing)} such); is it of another model or"
                " optimizer? restore the options of its run, or start another one from it with"
                f" model.archive={directory}"
            )
        with torch.no_grad():
            for name, target in targets.items():
                _fill(target, name, places[name], directory)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UnsafeFile(f"{directory}: cannot be read ({str(error).splitlines()[0]})") from None


def copy_stored(files: Sequence[Path], stored: str, targets: Mapping[str, Tensor]) -> bool:
    """Copy into each of these full tensors the stored tensor called `stored` followed by its name,
    whatever its type. Return whether the files have any such tensor.

    Raises what `load_state` raises.
    """
    directory = files[0].parent
    try:
        places = _places(files)
        if not any(name.startswith(stored) for name in places):
            return False
        with torch.no_grad():
            for name, target in targets.items():
                if stored + name not in places:
                    raise ResumeMismatch(
                        f"{directory}: lacks {stored}{name}; is it from another model?"
                    )
                file, *_ = places[stored + name][0]
                dtype = OF_NAME[file.get_slice(stored + name).get_dtype()]
                whole = torch.empty(target.shape, dtype=dtype)
                _fill(whole, stored + name, places[stored + name], directory)
                target.copy_(whole)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UnsafeFile(f"{directory}: cannot be read ({str(error).splitlines()[0]})") from None
    return True


def _places(files: Sequence[Path]) -> dict[str, list[Place]]:
    """Return the parts of each tensor, by its name."""
    places: dict[str, list[Place]] = {}
    for file in _opened(files):
        for name, place in file.metadata().items():
            shape, offset = json.loads(place)
            places.setdefault(name, []).append(Place(file, shape, offset))
    return places


def _fill(target: Tensor, name: str, places: Sequence[Place], path: Path) -> None:
    offset, local = sharding.region(target)
    filled = 0
    for file, shape, begin in places:
        piece = file.get_slice(name)
        kind, size = piece.get_dtype(), piece.get_shape()
        if tuple(shape) != tuple(target.shape) or kind != DTYPES[local.dtype]:
            raise ResumeMismatch(
                f"{path}: {name} is {shape} {kind}, and here {list(target.shape)}"
                f" {DTYPES[local.dtype]}"
            )
        # the overlap of what is here and what is there
        low = [max(a, b) for a, b in zip(offset, begin, strict=True)]
        high = [
            min(a + n, b + m) for a, n, b, m in zip(offset, local.shape, begin, size, strict=True)
        ]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        there = tuple(slice(a - b, c - b) for a, b, c in zip(low, begin, high, strict=True))
        here = tuple(slice(a - b, c - b) for a, b, c in zip(low, offset, high, strict=True))
        local[here].copy_(piece[there] if there else file.get_tensor(name))
        filled += math.prod(b - a for a, b in zip(low, high, strict=True))
    if filled != local.numel():
        raise UnsafeFile(f"{path}: {name}: {filled:,} of {local.numel():,} numbers are there")
