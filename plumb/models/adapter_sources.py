"""Where the weights of a model with adapters come from: a base with adapters merged into it, or
with adapters beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumb.errors import UserError
from plumb.models import adapters as low_rank
from plumb.models.adapters import START, Adapter, AdapterKnobs, Factors
from plumb.models.quantized_base import quantize, quantized_parts
from plumb.models.scalar_head import head_name, put_scalar_head, scores
from plumb.models.sharded_load import Parts, ReadPart, WeightSource, Where


@dataclass(frozen=True)
class Merged:
    """Add adapters to the weights of another source."""

    source: WeightSource
    adapters: Sequence[Adapter]
    origin: str  # how to call the adapters' file in an error

    @torch.no_grad()
    def whole(self, device_map: Any = None) -> PreTrainedModel:
        model = self.source.whole(device_map)
        for name, adapters in self._by_module(model).items():
            module: Any = model.get_submodule(name)
            weight = low_rank.as_matrix(module, module.weight)
            module.weight.copy_(low_rank.as_matrix(module, self._merged(name, weight, adapters)))
        return model

    def in_parts(self) -> Parts:
        parts = self.source.in_parts()
        model = parts.skeleton
        by_module = self._by_module(model)
        by_weight = {f"{name}.weight": name for name in by_module}
        modules: dict[str, Any] = dict(model.named_modules())  # before others take their places

        def part(name: str, where: Where) -> Tensor:
            if name not in by_weight:
                return parts.part(name, where)
            of_module = by_weight[name]
            module = modules[of_module]
            weight = low_rank.as_matrix(module, parts.part(name, ()).to(module.weight.dtype))
            made = self._merged(of_module, weight, by_module[of_module])
            return low_rank.as_matrix(module, made)[where or ...]

        return replace(parts, part=part)

    def _by_module(self, model: PreTrainedModel) -> dict[str, list[Adapter]]:
        """Return the adapters of each module. Raise UserError for a module that the model has
        not.
        """
        by_module: dict[str, list[Adapter]] = {}
        modules = dict(model.named_modules())
        for adapter in self.adapters:
            for name in adapter.modules:
                if name not in modules:
                    raise _not_of_this_model(self.origin, model, name)
                by_module.setdefault(name, []).append(adapter)
        return by_module

    def _merged(self, name: str, weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
        factors = [(adapter.scaling, adapter.factors(name)) for adapter in adapters]
        for _, own in factors:
            if (own.b.shape[0], own.a.shape[1]) != tuple(weight.shape):
                raise UserError(
                    f"{self.origin}: its adapter of {name} is for a matrix of"
                    f" {own.b.shape[0]} x {own.a.shape[1]}, and the model's is"
                    f" {' x '.join(map(str, weight.shape))}; give the model it was trained from"
                )
        return low_rank.merged(weight, factors)


def _not_of_this_model(origin: str, model: PreTrainedModel, name: str) -> UserError:
    return UserError(
        f"{origin}: it has an adapter of {name}, which this {type(model).__name__} has not; give"
        " the model it was trained from"
    )


@dataclass(frozen=True)
class SameBase:
    """Refuse another source than the one that adapters were trained on."""

    source: WeightSource
    adapters: Sequence[Adapter]
    expected: Tensor  # what `sampled` gave for that one
    origin: str  # how to call the adapters' file in an error
    base: str  # how to call the source

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        model = self.source.whole(device_map)
        self._check(model, _present(model))
        return model

    def in_parts(self) -> Parts:
        parts = self.source.in_parts()
        self._check(parts.skeleton, parts.part)
        return parts

    def _check(self, model: PreTrainedModel, read: ReadPart) -> None:
        modules = dict(model.named_modules())
        if any(name not in modules for each in self.adapters for name in each.modules):
            return  # which one is missing is said where the adapters are put on
        shapes = low_rank.shapes_of_base(model)
        found = low_rank.sampled(shapes, self.expected.dtype, read)
        if found.shape != self.expected.shape:
            raise UserError(
                f"{self.origin}: its adapter belongs to a model of {len(self.expected)} weights,"
                f" and {self.base} has {len(found)}; give the model it was trained from, or, if a"
                " version of Plumb before 30 November 2026 wrote the file, train it again"
            )
        if not low_rank.of_one_model(found, self.expected):
            raise UserError(
                f"{self.origin}: its adapter was trained on other weights than those of"
                f" {self.base}; give the model it was trained from"
            )


def _present(model: PreTrainedModel) -> ReadPart:
    """Return the function that reads parts of the weights that a model has, or that its quantized
    layers compute with.
    """

    def read(name: str, where: Where) -> Tensor:
        owner, _, own = name.rpartition(".")
        return getattr(model.get_submodule(owner), own)[where or ...]

    return read


@dataclass(frozen=True)
class Rounded:
    """Give the weights of another source in another type; those that have a type of their own keep
    it.
    """

    source: WeightSource
    dtype: torch.dtype

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        model = self.source.whole(device_map)
        self._round(model)
        return model

    def in_parts(self) -> Parts:
        parts = self.source.in_parts()
        # that of the source stays: its parts are made in the types that it has
        model = copy.deepcopy(parts.skeleton)
        self._round(model)
        types = {
            name: (p.dtype, made.dtype)
            for (name, p), made in zip(
                parts.skeleton.named_parameters(remove_duplicate=False),
                (made for _, made in model.named_parameters(remove_duplicate=False)),
                strict=True,
            )
        }

        def part(name: str, where: Where) -> Tensor:
            tensor = parts.part(name, where)
            for dtype in types.get(name, ()):
                tensor = tensor.to(dtype)
            return tensor

        return Parts(model, part)

    def _round(self, model: PreTrainedModel) -> None:
        before = model.dtype
        for p in model.parameters():
            if p.dtype == before:
                p.data = p.data.to(self.dtype)
        model.config.dtype = self.dtype


@dataclass(frozen=True)
class WithHead:
    """Put a scalar head with these values on a model, or give its own these values."""

    source: WeightSource
    weight: Tensor  # [1, d]

    @torch.no_grad()
    def whole(self, device_map: Any = None) -> PreTrainedModel:
        model: Any = self.source.whole(device_map)
        if not scores(model):
            put_scalar_head(model)
        model.get_output_embeddings().weight.copy_(self.weight)
        return model

    def in_parts(self) -> Parts:
        parts = self.source.in_parts()
        model = parts.skeleton
        head = head_name(model) if scores(model) else put_scalar_head(model)
        part: ReadPart = lambda name, where: (
            self.weight[where or ...] if name == head else parts.part(name, where)
        )
        return replace(parts, part=part)


@dataclass(frozen=True)
class Adapted:
    """Put adapters on a model: those of `previous`, frozen or continued, and a new one."""

    source: WeightSource
    knobs: AdapterKnobs
    block_name: str | None
    seed: int  # of the new adapter's values
    previous: Sequence[Adapter] = ()

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        model = self.source.whole(device_map)
        modules: dict[str, Any] = {}

        def weight(name: str) -> Tensor:
            module = modules[name]
            return low_rank.as_matrix(module, module.weight.detach())

        adapters = self._adapters(model, weight)
        shapes, dtype = low_rank.shapes_of_base(model), model.dtype
        if self.knobs.quantize is not None:
            if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
                raise UserError(
                    f"model.quantize={self.knobs.quantize}: is for one GPU, and this model is"
                    " spread over several; choose one by device=cuda:0"
                )
            quantize(model, self.knobs.quantize, self.block_name)
        base = low_rank.sampled(shapes, dtype, _present(model))
        modules |= model.named_modules()  # before peft wraps them
        low_rank.inject(model, adapters)
        low_rank.fill_adapters(model, adapters)
        model.adapter_base = base  # type: ignore[assignment]
        return model

    def in_parts(self) -> Parts:
        parts = self.source.in_parts()
        model = parts.skeleton
        modules: dict[str, Any] = dict(model.named_modules())  # before others take their places

        def weight(name: str) -> Tensor:
            module = modules[name]
            read = parts.part(f"{name}.weight", ()).to(module.weight.dtype)
            return low_rank.as_matrix(module, read)

        adapters = self._adapters(model, weight)
        shapes, dtype = low_rank.shapes_of_base(model), model.dtype
        if self.knobs.quantize is not None:
            parts = quantized_parts(parts, self.knobs.quantize, self.block_name)
        base = low_rank.sampled(shapes, dtype, parts.part)
        model.adapter_base = base  # type: ignore[assignment]
        low_rank.inject(model, adapters)
        value = low_rank.values_of(adapters)

        def part(name: str, where: Where) -> Tensor:
            first = value(name)
            if first is not None:
                return first[where or ...]
            return parts.part(low_rank.base_name(name), where)

        return replace(parts, part=part)

    def _adapters(self, model: PreTrainedModel, weight: Any) -> list[Adapter]:
        """Return the adapters in the order of their numbers; the policy's last one is trained."""
        for adapter in self.previous:
            for name in adapter.modules:
                if name not in dict(model.named_modules()):
                    raise _not_of_this_model("model.archive", model, name)
        if self.knobs.previous == "continue":
            *frozen, last = self.previous
            return [
                *frozen,
                replace(last, trained=True, in_start=False),
                replace(last, name=START, in_policy=False),
            ]
        modules = low_rank.target_modules(model, self.knobs.targets, self.block_name)

        def first(name: str) -> Factors:
            return low_rank.first_factors(self.knobs, self.seed, name, weight(name))

        made = [*self.previous]

        def add(scaling: float, trained: bool) -> None:
            made.append(
                Adapter(
                    name=str(len(made)),
                    rank=self.knobs.rank,
                    scaling=scaling,
                    dora=self.knobs.kind == "dora",
                    modules=modules,
                    factors=first,
                    trained=trained,
                    in_start=False,
                )
            )

        # What pissa and olora put into the adapter is taken off again by its frozen copy with a
        # negative scaling, so that the base weights stay what they were.
        if self.knobs.init != "default":
            add(-self.knobs.scaling, trained=False)
        add(self.knobs.scaling, trained=True)
        return made
