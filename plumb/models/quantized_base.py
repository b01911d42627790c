"""Quantize the linear layers under adapters (QLoRA, arXiv:2305.14314), with bitsandbytes.

A quantized layer keeps its weight in 4 or 8 bits, and computes with it as it is when it is spread
out again: y = x W'^T, for a W' that exists while the layer computes, forward or backward. What a
run starts from, its reference included, is the model of all W'.

nf4: 4 bits, in blocks of 64 numbers with one scale, which are quantized themselves (8 bits, in
blocks of 256): 0.516 bytes a number. int8: 8 bits of bitsandbytes' dynamic type, in blocks of 256
with one float32 scale: 1.016 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plumb.errors import UserError
from plumb.models.blocks import block_class
from plumb.models.sharded_load import Parts, WeightSource, Where

BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1 + 4 / 256}  # a number
BLOCK = {"nf4": 64, "int8": 256}  # numbers with one scale


def check_bitsandbytes(kind: str) -> None:
    """Raise UserError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantize={kind}: needs bitsandbytes, which is not installed; pip install -r"
            " requirements-quant.txt"
        )


class QuantizedLinear(nn.Linear):
    """Compute a linear layer whose frozen weight is quantized.

    `weight` is the weight that it computes with, spread out anew each time it is asked for.
    """

    def __init__(self, layer: nn.Linear, kind: str):
        """Quantize a layer's weight where it is."""
        nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.kind = kind
        self.shape = layer.weight.shape
        self.dtype = layer.weight.dtype
        packed, state = _quantized(layer.weight.detach(), kind)
        # no part of the state dict: they are no weights of the run
        self.register_buffer("packed", packed, persistent=False)
        for name, tensor in state.items():
            self.register_buffer(name, tensor, persistent=False)
        self.scales = tuple(state)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the weight, of the type that it had.  [out, in]"""
        state = {name: self.get_buffer(name) for name in self.scales}
        return _spread(self.get_buffer("packed"), state, self.kind, self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W'^T + b.  [..., in] -> [..., out]"""
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return what it keeps, by name."""
        return {name: self.get_buffer(name) for name in ("packed", *self.scales)}


class _Product(torch.autograd.Function):
    """Compute x W'^T, without keeping W' for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def _quantized(weight: Tensor, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weight's packed numbers and their scales, by name."""
    from bitsandbytes import functional as bnb

    if kind == "int8":
        packed, state = bnb.quantize_blockwise(weight, blocksize=BLOCK[kind])
        return packed, {"absmax": state.absmax, "code": state.code}
    packed, state = bnb.quantize_4bit(
        weight, blocksize=BLOCK[kind], quant_type=kind, compress_statistics=True
    )
    nested = state.state2
    return packed, {
        "absmax": state.absmax,
        "code": state.code,
        "offset": state.offset,
        "nested_absmax": nested.absmax,
        "nested_code": nested.code,
    }


def _spread(
    packed: Tensor, state: dict[str, Tensor], kind: str, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Return the weight that these numbers and scales stand for."""
    from bitsandbytes import functional as bnb

    if kind == "int8":
        made = bnb.QuantState(
            absmax=state["absmax"], code=state["code"], blocksize=BLOCK[kind], dtype=dtype
        )
        return bnb.dequantize_blockwise(packed, made).reshape(shape).to(dtype)
    nested = bnb.QuantState(
        absmax=state["nested_absmax"],
        code=state["nested_code"],
        blocksize=256,
        dtype=torch.float32,
    )
    made = bnb.QuantState(
        absmax=state["absmax"],
        shape=shape,
        code=state["code"],
        blocksize=BLOCK[kind],
        quant_type=kind,
        dtype=dtype,
        offset=state["offset"],
        state2=nested,
    )
    return bnb.dequantize_4bit(packed, made)


def rounded(weight: Tensor, kind: str) -> Tensor:
    """Return the weight that a quantized layer with this one computes with.  [out, in]"""
    packed, state = _quantized(weight, kind)
    return _spread(packed, state, kind, weight.shape, weight.dtype)


def layers_to_quantize(model: PreTrainedModel, block_name: str | None) -> list[str]:
    """Return the names of the linear layers of the blocks. Raise UserError if a matrix of them is
    of another kind.
    """
    kind = block_class(model, block_name)
    names = []
    for prefix, block in model.named_modules():
        if not isinstance(block, kind):
            continue
        for name, module in block.named_modules(prefix=prefix):
            if isinstance(module, Conv1D):
                raise UserError(
                    f"model.quantize: the layers of {type(model).__name__} are not linear layers,"
                    " but Conv1D, which are not quantized here; set model.quantize=null"
                )
            if type(module) is nn.Linear:
                names.append(name)
    return names


@torch.no_grad()
def quantize(model: PreTrainedModel, kind: str, block_name: str | None) -> None:
    """Quantize the linear layers of a model's blocks in place, one after another."""
    for name in layers_to_quantize(model, block_name):
        parent, _, own = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), own, QuantizedLinear(layer, kind))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized layers of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def quantized_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's quantized layers."""
    layers = quantized_layers(model).values()
    return sum(x.numel() * x.element_size() for layer in layers for x in layer.tensors().values())


def quantized_numbers(model: nn.Module) -> int:
    """Return how many weights of a model are quantized."""
    return sum(layer.shape.numel() for layer in quantized_layers(model).values())


@dataclass(frozen=True)
class Dequantized:
    """Give the weights of another source as quantized layers compute with them, at full size."""

    source: WeightSource
    kind: str
    block_name: str | None

    @torch.no_grad()
    def whole(self, device_map: Any = None) -> PreTrainedModel:
        model = self.source.whole(device_map)
        for name in layers_to_quantize(model, self.block_name):
            layer: Any = model.get_submodule(name)
            layer.weight.copy_(rounded(layer.weight, self.kind))
        return model

    def in_parts(self) -> Parts:
        parts = self.source.in_parts()
        model = parts.skeleton
        weights = {f"{name}.weight" for name in layers_to_quantize(model, self.block_name)}

        def part(name: str, where: Where) -> Tensor:
            if name not in weights:
                return parts.part(name, where)
            dtype = model.get_parameter(name).dtype
            return rounded(parts.part(name, ()).to(dtype).contiguous(), self.kind)[where or ...]

        return replace(parts, part=part)
