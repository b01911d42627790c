"""Fill a sharded model part by part, so that no rank ever holds all of it.

A model is built with its parameters on the meta device, sharded, and given memory for this rank's
part (sharding.Layout). What fills it is a ReadPart: a function from a parameter's name and a place
in it to the values there. Those for files, for random weights and for another model are made here;
weight_sources.py chooses among them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from plumb.distributed import sharding
from plumb.models.weight_files import Weights

Where = tuple[slice, ...]
ReadPart = Callable[[str, Where], Tensor]  # (name, place in it) -> the values there
LARGE = 1 << 16  # numbers; a smaller parameter may be kept as it is


class WeightMismatch(Exception):
    """Report that a source does not hold what the model needs."""


@dataclass(frozen=True)
class Parts:
    """Hold a model without values, and the function that reads them: `part(name, where)` returns
    the values at `where` in the parameter or persistent buffer `name` of the skeleton.
    """

    skeleton: PreTrainedModel
    part: ReadPart


class WeightSource(Protocol):
    """Give the weights of one model, all at once or part by part; both have the same values."""

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        """Return the model with its values. Raise UserError for weights of another model."""

    def in_parts(self) -> Parts:
        """Return the model without values, and what reads them: no more than each part.

        Raises UserError for weights of another model; NotImplementedError, with the reason, if the
        weights can only be computed as a whole (see CutFromWhole).
        """


@contextmanager
def parameters_on_meta(
    seen: Callable[[Tensor, Tensor], None] = lambda real, meta: None,
) -> Iterator[None]:
    """Create the parameters of new modules without values, within the context. Buffers do get
    values: what a model computes from its config is as it should be.
    """
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


def fill(model: nn.Module, read: ReadPart) -> None:
    """Fill this rank's part of every parameter and persistent buffer of a sharded model."""
    done: set[int] = set()
    for name, part, where in sharding.parts(model):
        if part.numel() and part.data_ptr() not in done:
            done.add(part.data_ptr())
            part.copy_(read(name, where))


# ---- from files ----


def blank(
    hf_config: Any, weights: Weights, build: Callable[[Any], PreTrainedModel]
) -> PreTrainedModel:
    """Return `build(config)` for these weights, without values, with the head tied to the embedding
    only if both have the same values.

    If the values differ, `hf_config` is corrected, so that anything else built or saved with it has
    them separate, too.
    """
    model = _built(hf_config, build)
    if _head_apart(model, weights):
        for config in (hf_config, hf_config.get_text_config()):
            config.tie_word_embeddings = False
        model = _built(hf_config, build)
    return model


def _built(hf_config: Any, build: Callable[[Any], PreTrainedModel]) -> PreTrainedModel:
    with parameters_on_meta():
        return build(copy.deepcopy(hf_config))


def _head_apart(model: PreTrainedModel, weights: Weights) -> bool:
    """Return whether the files hold different values for the head and the embedding, to which the
    config ties it.
    """
    head = model.get_output_embeddings()
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [
        pair
        for pair in ties.items()
        if any(model.get_submodule(name.rpartition(".")[0]) is head for name in pair)
    ]
    at = _keys(model, weights)[0] if pairs else {}
    return any(a in at and b in at and not weights.equal(at[a], at[b]) for a, b in pairs)


class Conversion(NamedTuple):
    """Convert several tensors of the files to one of the model's, or the other way round, as
    transformers does.
    """

    name: str  # in the model, of the first that it gives
    converter: WeightConverter
    keys: dict[str, list[str]]  # pattern of the converter -> names in the files, in order

    def run(
        self, model: PreTrainedModel, read: Callable[[str], Tensor], rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """Return {name in the model: tensor}. `rows` selects from each pattern's list of names."""
        converter = copy.deepcopy(self.converter)
        for pattern, keys in self.keys.items():
            for key in keys[rows]:
                converter.add_tensor(self.name, key, pattern, read(key))  # type: ignore[arg-type]
        made = converter.convert(self.name, model=model, config=model.config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()
        }

    def part(
        self, model: PreTrainedModel, weights: Weights, name: str, where: Where, n_rows: int
    ) -> Tensor:
        """Return the values at `where` in the model's tensor `name` of `n_rows`. No more than that
        is read if rows are independent, as those of experts are, each of which has its own tensor
        in the files.
        """
        if where and all(map(_keeps_rows, self.converter.operations)):
            listed = isinstance(self.converter.operations[0], MergeModulelist)
            if listed and {len(keys) for keys in self.keys.values()} == {n_rows}:
                return self.run(model, weights.read, where[0])[name][(slice(None), *where[1:])]
            if not listed and all(
                len(keys) == 1 and weights.shape(keys[0])[0] == n_rows
                for keys in self.keys.values()
            ):
                return self.run(model, lambda key: weights.read(key, where[:1]))[name][
                    (slice(None), *where[1:])
                ]
        return self.run(model, weights.read)[name][where]


def _keeps_rows(operation: ConversionOps) -> bool:
    """Return whether each output row (index of the first dimension) comes from the same row of the
    input.
    """
    if isinstance(operation, Transpose):
        return min(operation.dim0, operation.dim1) > 0 and not operation.check_dims
    if isinstance(operation, MergeModulelist):
        return operation.dim == 0
    return isinstance(operation, Concatenate | Chunk) and operation.dim > 0


def _keys(model: PreTrainedModel, weights: Weights) -> tuple[dict[str, str], list[Conversion]]:
    """Return where the files have what: name in the model -> name in the files, and what has to be
    computed.

    By transformers' own renamings. Names that the model does not have stand for themselves.
    """
    wanted = dict.fromkeys(model.state_dict(keep_vars=True), True)
    if weights.archive and wanted.keys() == weights.keys():
        return {name: name for name in weights}, []
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    of_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    prefix = model.base_model_prefix
    at = dict[str, str]()
    computed = dict[str, Conversion]()
    for key in sorted(weights, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if pattern is None:
            at[name] = key
        else:
            conversion = computed.setdefault(name, Conversion(name, of_pattern[pattern], {}))
            conversion.keys.setdefault(pattern, []).append(key)
    return at, [*computed.values()]


def stored_parts(
    model: PreTrainedModel, weights: Weights, strict: bool, apart: Collection[str] = ()
) -> ReadPart:
    """Return the function that reads parts of a model's tensors from its files, renamed and
    converted as transformers does.

    `strict`: the files may hold nothing else. `apart`: names that are filled from elsewhere. Raises
    WeightMismatch.
    """
    at, conversions = _keys(model, weights)
    shapes = {name: weights.shape(key) for name, key in at.items()}
    computed: dict[str, Conversion] = {}
    present = model.state_dict(keep_vars=True)
    for conversion in conversions:
        if conversion.name not in present:
            shapes[conversion.name] = ()
            continue
        try:
            made = conversion.run(model, lambda key: torch.empty(weights.shape(key), device="meta"))
        except Exception as error:  # any error of an operation that gets unexpected tensors
            raise WeightMismatch(
                f"not the weights of this {type(model).__name__} ({conversion.name} cannot be made"
                f" of what is stored: {str(error).partition(chr(10))[0][:80]})"
            ) from None
        shapes |= {name: tuple(tensor.shape) for name, tensor in made.items()}
        computed |= dict.fromkeys(made, conversion)
    wanted = {name: tuple(tensor.shape) for name, tensor in present.items() if name not in apart}
    same = {name: name for name in shapes}
    for ours, theirs in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        for a, b in ((ours, theirs), (theirs, ours)):
            if a not in same and b in same:
                same[a] = same[b]

    def refuse(what: str, names: list[str]) -> None:
        if names:
            raise WeightMismatch(
                f"not the weights of this {type(model).__name__} ({len(names)} {what}, e.g."
                f" {sorted(names)[0]})"
            )

    refuse(
        "tensors of another shape",
        [name for name, shape in wanted.items() if name in same and shapes[same[name]] != shape],
    )
    refuse("missing keys", [name for name in wanted if name not in same])
    if strict:
        refuse(
            "unexpected keys", [name for name in shapes if name not in wanted and name not in apart]
        )

    def read(name: str, where: Where) -> Tensor:
        name = same[name]
        if name in computed:
            return computed[name].part(model, weights, name, where, shapes[name][0])
        return weights.read(at[name], where)

    return read


def sharded_parts(model: nn.Module) -> ReadPart:
    """Return the function that reads the parts of another model, which is sharded in the same way,
    possibly to another precision.
    """
    mine = {name: part for name, part, _ in sharding.parts(model)}
    return lambda name, where: mine[name]


# ---- random weights ----


class ScratchBuffer:
    """Reuse memory for one tensor at a time: memory allocated anew for each would be fragmented by
    small tensors.
    """

    def __init__(self) -> None:
        self.held = torch.empty(0)

    def of(self, like: Tensor) -> Tensor:
        """Return a tensor of this shape and type; the previous one is overwritten."""
        if self.held.numel() < like.numel() or self.held.dtype != like.dtype:
            self.held = torch.empty(like.numel(), dtype=like.dtype, device="cpu")
        return self.held[: like.numel()].view(like.shape)


class Initialisation(TorchDispatchMode):
    """Record what a model's construction does to parameters on the meta device, and draw what it
    would draw, one at a time.

    What was done to one parameter can be repeated later (`seeded_parts`): the same numbers as if
    all had been kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[
            int, list[tuple[Any, ...]]
        ] = {}  # storage -> (what, view, arguments, random state before)
        self.room = ScratchBuffer()
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
        if (
            target is None
            or not target.is_meta
            or not what._schema.is_mutable
            or _storage(target) not in self.notes
        ):
            return out
        arguments = args[1:]
        state = None
        notes = self.notes[_storage(target)]
        # its values are not used; the draws after it depend on it
        if torch.Tag.nondeterministic_seeded in what.tags:
            state = torch.get_rng_state()
            what(self.room.of(target), *arguments, **(kwargs or {}))
        if (
            what.overloadpacket.__name__ in ("normal_", "uniform_", "zero_", "fill_")
            and target.is_contiguous()
            and (target.numel() * target.element_size() == target.untyped_storage().nbytes())
        ):
            notes.clear()  # all that was there before is overwritten
        notes.append((what, _view(target), (arguments, kwargs or {}), state))
        return out

    def of(self, model: nn.Module) -> dict[str, list[tuple[Any, ...]]]:
        """Return the records of each parameter. Raise NotImplementedError if a large one was
        created with values of its own.
        """
        notes = {
            name: self.notes.get(_storage(p), [])
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        if unknown := [name for name, records in notes.items() if not records]:
            raise NotImplementedError(f"{unknown[0]} is made in a way that cannot be repeated")
        return notes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def seeded_parts(model: PreTrainedModel, notes: Mapping[str, list[tuple[Any, ...]]]) -> ReadPart:
    """Return the function that reads the values that construction would have drawn: it draws them
    again for one parameter at a time and keeps a part.
    """
    tensors, room = dict(model.state_dict(keep_vars=True)), ScratchBuffer()

    def read(name: str, where: Where) -> Tensor:
        if name not in notes:
            return tensors[name].detach()[where]  # a buffer, which has its values
        made = room.of(tensors[name])
        for what, view, arguments, state in notes[name]:
            target = made.as_strided(*view)
            if what == "copy":
                target.copy_(arguments[0])
                continue
            if state is not None:
                torch.set_rng_state(state)
            what(target, *arguments[0], **arguments[1])
        return made[where]

    return read
