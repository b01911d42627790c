"""Quantize the linear layers under adapters (QLoRA, arXiv:2305.14314), with bitsandbytes.

A quantized layer keeps its weight in 4 or 8 bits, and computes with it dequantized:
y = x W'^T, for a W' that exists while the layer computes, forward or backward. What a
run starts from, its reference included, is the model of all W'.

nf4: 4 bits, in blocks of 64 numbers with one scale, which are quantized themselves (8 bits, in
blocks of 256): 0.516 bytes a number. int8: 8 bits of bitsandbytes' dynamic type, in blocks of 256
with one float32 scale: 1.016 bytes.

Packed numbers and scales are frozen integer parameters. FSDP shards and gathers these as they are,
with the other parameters of their block; floating-point ones it would round to the precision of its
computation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plumb.distributed import sharding
from plumb.errors import UnsafeFile, UserError
from plumb.models.blocks import block_class
from plumb.models.sharded_load import Parts, WeightSource, Where

BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1 + 4 / 256}  # a number
BLOCK = {"nf4": 64, "int8": 256}  # numbers with one scale
SHARDS_INTEGERS = "2.13"  # the first torch whose FSDP was seen to; that of 2.11 does not
TABLES = ("code", "nested_code")  # what packed numbers stand for: the same for every weight

# on import, and peft imports it for every adapter: a kernel for CPUs is missing that no run calls
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in record.getMessage()
)


def check_bitsandbytes(kind: str) -> None:
    """Raise UserError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantize={kind}: needs bitsandbytes, which is not installed; pip install -r"
            " requirements-quant.txt"
        )


def check_torch(kind: str) -> None:
    """Raise UserError if this version of torch shards floating-point parameters only."""
    if torch.__version__ < SHARDS_INTEGERS:
        raise UserError(
            f"model.quantize={kind}: trainer=FSDPTrainer: torch {torch.__version__} shards no"
            f" quantized weights; install torch {SHARDS_INTEGERS} or later, or set"
            " BasicTrainer"
        )


class QuantizedLinear(nn.Linear):
    """Compute a linear layer whose frozen weight is quantized.

    `weight` is the weight that it computes with, dequantized anew each time it is asked for.
    """

    def __init__(self, layer: nn.Linear, kind: str, name: str = "a layer"):
        """Quantize a layer's weight where it is; what is on the meta device stays there."""
        nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.kind = kind
        self.shape = layer.weight.shape
        self.dtype = layer.weight.dtype
        # first, since bitsandbytes keeps the tables of its first call where that was
        tables = quantized(torch.zeros(BLOCK[kind]), kind) if layer.weight.is_meta else {}
        kept = quantized(layer.weight.detach(), kind, f"{name}.weight")
        kept |= {name: table for name, table in tables.items() if name in TABLES}
        self.names = tuple(kept)
        for name, tensor in kept.items():
            if name in TABLES:
                self.register_buffer(name, tensor, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(_bits(tensor), requires_grad=False))
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the weight, of the type that it had.  [out, in]"""
        return _dequantize(self.tensors(), self.kind, self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W'^T + b.  [..., in] -> [..., out]"""
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def kept(self) -> dict[str, Tensor]:
        """Return what it keeps, by name: packed numbers, scales and tables."""
        return {name: getattr(self, name) for name in self.names}

    def tensors(self) -> dict[str, Tensor]:
        """Return what it keeps as bitsandbytes has it, sharded as it is. Every rank must call it
        for a layer that is sharded.
        """
        tensors = {name: _values(x) for name, x in self.kept().items()}
        if "offset" in tensors:  # one number has no dimension that could be sharded
            tensors["offset"] = sharding.full_tensor(tensors["offset"]).reshape(())
        return tensors


def _bits(values: Tensor) -> Tensor:
    """Return floating-point numbers as integers of the same bits, in a row; others as they are."""
    return values.reshape(-1).view(torch.int32) if values.is_floating_point() else values


def _values(bits: Tensor) -> Tensor:
    """Return what `_bits` was given, in a row."""
    return bits.detach().view(torch.float32) if bits.dtype == torch.int32 else bits.detach()


class _Product(torch.autograd.Function):
    """Compute x W'^T, without keeping W' for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def quantized(weight: Tensor, kind: str, name: str = "a weight") -> dict[str, Tensor]:
    """Return a weight's packed numbers, their scales and the tables of both, by name. Raise
    UnsafeFile for NaN and infinity; int8 would make a number of NaN. `name`: of the weight.
    """
    from bitsandbytes import functional as bnb

    if not weight.is_meta and not weight.isfinite().all():
        raise UnsafeFile(
            f"model.quantize={kind}: {name} holds NaN or infinity; is the model's file damaged, or"
            " had its training diverged?"
        )
    if kind == "int8":
        packed, state = bnb.quantize_blockwise(weight, blocksize=BLOCK[kind])
        return {"packed": packed, "absmax": state.absmax, "code": state.code}
    packed, state = bnb.quantize_4bit(
        weight, blocksize=BLOCK[kind], quant_type=kind, compress_statistics=True
    )
    nested = state.state2
    return {
        "packed": packed,
        "absmax": state.absmax,
        "code": state.code,
        "offset": state.offset,
        "nested_absmax": nested.absmax,
        "nested_code": nested.code,
    }


def _dequantize(
    kept: Mapping[str, Tensor], kind: str, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Return the weight that these numbers and scales stand for."""
    from bitsandbytes import functional as bnb

    if kind == "int8":
        made = bnb.QuantState(
            absmax=kept["absmax"], code=kept["code"], blocksize=BLOCK[kind], dtype=dtype
        )
        return bnb.dequantize_blockwise(kept["packed"], made).reshape(shape).to(dtype)
    nested = bnb.QuantState(
        absmax=kept["nested_absmax"],
        code=kept["nested_code"],
        blocksize=256,
        dtype=torch.float32,
    )
    made = bnb.QuantState(
        absmax=kept["absmax"],
        shape=shape,
        code=kept["code"],
        blocksize=BLOCK[kind],
        quant_type=kind,
        dtype=dtype,
        offset=kept["offset"],
        state2=nested,
    )
    return bnb.dequantize_4bit(kept["packed"], made)


def rounded(weight: Tensor, kind: str) -> Tensor:
    """Return the weight that a quantized layer with this one computes with.  [out, in]"""
    return _dequantize(quantized(weight, kind), kind, weight.shape, weight.dtype)


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
        quantize_layer(model, name, kind)


def quantize_layer(model: nn.Module, name: str, kind: str) -> QuantizedLinear:
    """Quantize a linear layer of a model in place, and return what it has become."""
    layer: Any = model.get_submodule(name)
    made = QuantizedLinear(layer, kind, name)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, made)
    return made


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized layers of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def quantized_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's quantized layers, on all ranks together if it is sharded."""
    layers = quantized_layers(model).values()
    return sum(x.numel() * x.element_size() for layer in layers for x in layer.kept().values())


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of the packed numbers and scales of a model, on all ranks together."""
    packed = [p for p in model.parameters() if not p.is_floating_point()]
    return sum(p.numel() * p.element_size() for p in packed)


def quantized_numbers(model: nn.Module) -> int:
    """Return how many weights of a model are quantized."""
    return sum(layer.shape.numel() for layer in quantized_layers(model).values())


def count_weights(model: nn.Module) -> int:
    """Return the number of a model's weights, of which some may be quantized."""
    floating = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    return floating + quantized_numbers(model)


def quantized_parts(parts: Parts, kind: str, block_name: str | None) -> Parts:
    """Quantize the linear layers of the blocks of a model without values, and what reads it: the
    weight of one layer after another is read in full, and kept until the next.

    A quantized layer's `weight` can be read as well.
    """
    model = parts.skeleton
    quantize(model, kind, block_name)
    layers = quantized_layers(model)
    last: dict[str, dict[str, Tensor]] = {}

    def part(name: str, where: Where) -> Tensor:
        owner, _, own = name.rpartition(".")
        if owner not in layers or own == "bias":
            return parts.part(name, where)
        layer = layers[owner]
        if owner not in last:
            last.clear()
            weight = parts.part(f"{owner}.weight", ()).to(layer.dtype).contiguous()
            last[owner] = quantized(weight, kind, f"{owner}.weight")
        if own == "weight":
            return _dequantize(last[owner], kind, layer.shape, layer.dtype)[where or ...]
        return _bits(last[owner][own])[where or ...]

    return replace(parts, part=part)


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
        names = [f"{name}.weight" for name in layers_to_quantize(model, self.block_name)]
        # before others take the layers' places
        dtypes = {name: model.get_parameter(name).dtype for name in names}

        def part(name: str, where: Where) -> Tensor:
            if name not in dtypes:
                return parts.part(name, where)
            dtype = dtypes[name]
            return rounded(parts.part(name, ()).to(dtype).contiguous(), self.kind)[where or ...]

        return replace(parts, part=part)
