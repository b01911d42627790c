"""Filling a sharded model part by part, so that no rank ever holds all of it: from files, from a policy.pt, from the seed.

A model is built with its parameters on the meta device, sharded, and given memory for this rank's part (parallel.Layout); what
fills it is a Source: a function from a parameter's name and a place in it to the values there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

import parallel

Where = tuple[slice, ...]
Source = Callable[[str, Where], Tensor]
LARGE = 1 << 16  # numbers; a smaller parameter may be kept as it is


class Misfit(Exception):
    """What a source holds is not what the model wants."""


@contextmanager
def parameters_on_meta(seen: Callable[[Tensor, Tensor], None] = lambda real, meta: None) -> Iterator[None]:
    """Within, parameters of new modules have no values. Buffers do: what a model computes from its config is as it should be."""
    register = nn.Module.register_parameter

    def register_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, p := param)
        if p is not None and not p.is_meta:
            meta = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
            module._parameters[name] = meta
            seen(p.detach(), meta.detach())

    nn.Module.register_parameter = register_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(model: nn.Module, source: Source) -> None:
    """Every parameter and persistent buffer of a sharded model: this rank's part of it."""
    done: set[int] = set()
    for name, part, where in parallel.parts(model):
        if part.numel() and part.data_ptr() not in done:
            done.add(part.data_ptr())
            part.copy_(source(name, where))


# ------------------------------------------------------------------------------------------------------------- the sources


def of_state(model: PreTrainedModel, state: Mapping[str, Any], read: Callable[[str, Where], Tensor], strict: bool) -> Source:
    """`state`: name in the file -> anything with a shape. transformers' own renaming is applied; raises Misfit."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}
    transforms = get_model_conversion_mapping(model)
    names = (
        [t for t in transforms if isinstance(t, WeightRenaming)], [t for t in transforms if isinstance(t, WeightConverter)],
        model.base_model_prefix, dict(wanted),
    )  # fmt: skip
    at: dict[str, str] = {}
    for key in state:
        name, merged = rename_source_key(key, *names)
        if merged is not None:
            raise NotImplementedError(f"{key} is stored in another form")
        at[name] = key
    for ours, theirs in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        for a, b in ((ours, theirs), (theirs, ours)):
            if a not in at and b in at:
                at[a] = at[b]

    def refuse(what: str, found: list[str]) -> None:
        if found:
            raise Misfit(f"{len(found)} {what}, e.g. {sorted(found)[0]}")

    refuse("tensors of another shape", [k for k, shape in wanted.items() if k in at and tuple(state[at[k]]) != tuple(shape)])
    refuse("missing keys", [k for k in wanted if k not in at])
    if strict:
        refuse("unexpected keys", [k for k in at if k not in wanted])
    return lambda name, where: read(at[name], where)


@contextmanager
def safetensors_source(model: PreTrainedModel, name: str, revision: str | None) -> Iterator[Source]:
    """Slices of a folder's or hub name's safetensors files, which stay open within.

    Raises FileNotFoundError where there are none, NotImplementedError where weights are stored in a form that has to be computed.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, "pt")) for path in _files(name, revision)]
        files = {key: file for file in opened for key in file.keys()}  # noqa: SIM118  a file is no mapping
        slices = {key: file.get_slice(key) for key, file in files.items()}
        shapes = {key: tuple(x.get_shape()) for key, x in slices.items()}

        def read(key: str, where: Where) -> Tensor:
            return slices[key][where] if where else files[key].get_tensor(key)

        yield of_state(model, shapes, read, strict=False)


def _files(name: str, revision: str | None) -> list[str]:
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        single = cached_file(name, SAFE_WEIGHTS_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        if single is None:
            raise FileNotFoundError("it has no safetensors")
        return [single]
    found = {cached_file(name, file, revision=revision) for file in json.loads(Path(index).read_text())["weight_map"].values()}
    return sorted(str(file) for file in found)


def state_source(model: PreTrainedModel, state: Mapping[str, Tensor], strict: bool = True) -> Source:
    """Slices of a state dict, which may be mapped from a file: then only what is copied is read."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    return of_state(model, shapes, lambda key, where: state[key][where], strict)


def shards_source(model: nn.Module) -> Source:
    """The parts that another model has, sharded in the same way. They may be wanted in another precision."""
    mine = {name: part for name, part, _ in parallel.parts(model)}
    return lambda name, where: mine[name]


# -------------------------------------------------------------------------------------------------------- random weights


class Room:
    """Memory for one tensor at a time: taken anew for each, the pieces that small things leave would never fit the next."""

    def __init__(self) -> None:
        self.held = torch.empty(0)

    def of(self, like: Tensor) -> Tensor:
        """Of this shape and type; what was asked for before is gone."""
        if self.held.numel() < like.numel() or self.held.dtype != like.dtype:
            self.held = torch.empty(like.numel(), dtype=like.dtype, device="cpu")
        return self.held[: like.numel()].view(like.shape)


class Initialisation(TorchDispatchMode):
    """Notes what a model's construction does to parameters on the meta device, and draws what it would draw, one at a time.

    What was done to one parameter can be done again later (`source`): the same numbers as if all had been kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[int, list[tuple[Any, ...]]] = {}  # storage -> (what, view, arguments, random state before)
        self.room = Room()
        self.alive: list[Tensor] = []  # or a storage's number might come again

    def __enter__(self):
        self.on_meta = parameters_on_meta(self.registered)
        self.on_meta.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.on_meta.__exit__(*error)

    def registered(self, real: Tensor, meta: Tensor) -> None:
        self.alive.append(meta)
        small = real.numel() <= LARGE
        self.notes[_storage(meta)] = [("copy", _view(meta), (real.clone(),), None)] if small else []

    def __torch_dispatch__(self, what, types, args=(), kwargs=None):
        out = what(*args, **(kwargs or {}))
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is None or not target.is_meta or not what._schema.is_mutable or _storage(target) not in self.notes:
            return out
        arguments, state, notes = args[1:], None, self.notes[_storage(target)]
        if torch.Tag.nondeterministic_seeded in what.tags:  # drawn for nothing, but for the draws after it
            state = torch.get_rng_state()
            what(self.room.of(target), *arguments, **(kwargs or {}))
        if what.overloadpacket.__name__ in ("normal_", "uniform_", "zero_", "fill_") and target.is_contiguous() and (
            target.numel() * target.element_size() == target.untyped_storage().nbytes()
        ):  # fmt: skip
            notes.clear()  # all that was there before is overwritten
        notes.append((what, _view(target), (arguments, kwargs or {}), state))
        return out

    def of(self, model: nn.Module) -> dict[str, list[tuple[Any, ...]]]:
        """The notes of each parameter. Raises NotImplementedError where a large one was made with values of its own."""
        notes = {name: self.notes.get(_storage(p), []) for name, p in model.named_parameters(remove_duplicate=False)}
        if unknown := [name for name, found in notes.items() if not found]:
            raise NotImplementedError(f"{unknown[0]} is made in a way that cannot be repeated")
        return notes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def seeded_source(model: PreTrainedModel, notes: Mapping[str, list[tuple[Any, ...]]]) -> Source:
    """What construction would have put there: drawn again for one parameter at a time, of which a part is kept."""
    wholes, room = dict(model.state_dict(keep_vars=True)), Room()

    def source(name: str, where: Where) -> Tensor:
        if name not in notes:
            return wholes[name].detach()[where]  # a buffer, which has its values
        made = room.of(wholes[name])
        for what, view, arguments, state in notes[name]:
            target = made.as_strided(*view)
            if what == "copy":
                target.copy_(arguments[0])
                continue
            if state is not None:
                torch.set_rng_state(state)
            what(target, *arguments[0], **arguments[1])
        return made[where]

    return source
