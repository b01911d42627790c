"""Compute the cost of a step in operations and bytes: for the MFU, the default token budget of a
microbatch, and plan=true.

Symbols: N parameters of the body (neither embeddings nor head), V vocabulary, d hidden size, L
layers, q = heads * head size.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from plumb.data.examples import Lengths
from plumb.models.quantized_base import count_weights

# Dense 16-bit operations per second of a card, by its full name, from its data sheet.
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


class Cost(NamedTuple):
    """Count the operations of one forward pass from a model's sizes; a backward pass takes twice as
    many.
    """

    body: int  # N
    head: int  # V * d
    attention: int  # q * L

    def forward(self, lengths: Lengths) -> float:
        """Return 2 N T + 2 V d H + 4 q L A, for T tokens, each prompt's once; H response tokens; A
        pairs of a query and a key it attends to.
        """
        p, c = lengths.prompts.astype(float), lengths.responses.astype(float)
        pairs = (p * p / 2 * lengths.roots + p * c + c * c / 2).sum()
        return float(
            2 * self.body * lengths.tokens().sum()
            + 2 * self.head * c.sum()
            + 4 * self.attention * pairs
        )


def cost_of(model: Any) -> Cost:
    """Return the cost of a causal language model of transformers that is not sharded yet."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    n = count_weights(model) - embedding.numel() - (head.numel() if head is not embedding else 0)
    return Cost(n, head.numel(), attention_width(model.config.get_text_config()))


def attention_width(spec: Any) -> int:
    """Return heads * head size, summed over the layers, which may differ; 0 for a model without
    heads (state-space).

    An entry of the config that is not a whole number counts as absent, since an estimate must not
    end a run.
    """
    apart = list(spec.per_layer_config) if getattr(spec, "is_heterogeneous", False) else []
    return sum(map(_width, apart)) or _width(spec) * _number(spec, "num_hidden_layers")


def cache_bytes(model_config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one token in all layers, as sampling keeps them;
    sliding windows, which keep less, are not considered.
    """
    spec = model_config.get_text_config()
    apart = list(spec.per_layer_config) if getattr(spec, "is_heterogeneous", False) else []
    width = sum(map(_key_width, apart)) or _key_width(spec) * _number(spec, "num_hidden_layers")
    return 2 * dtype.itemsize * width


def _key_width(layer: Any) -> int:
    heads = _number(layer, "num_attention_heads")
    return _width(layer) // max(heads, 1) * (_number(layer, "num_key_value_heads") or heads)


def _width(layer: Any) -> int:
    heads = _number(layer, "num_attention_heads")
    return heads * (_number(layer, "head_dim") or _number(layer, "hidden_size") // max(heads, 1))


def _number(spec: Any, name: str) -> int:
    """Return an entry of a transformers config, or 0: it may be absent or, if layers differ, a list
    or an error.
    """
    try:
        value = getattr(spec, name, None)
    except Exception:
        return 0
    return value if isinstance(value, int) else 0


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the operations per second that MFU is relative to: a known GPU's data sheet for 16-bit
    types, otherwise the best of several matrix products on this GPU, in this type (about 0.1 s).
    None for a CPU, whose speed varies by a factor of two from one second to the next, with other
    processes, its clock and its memory.
    """
    if device.type != "cuda":
        return None
    if dtype.itemsize == 2 and torch.cuda.get_device_name(device) in PEAK:
        return PEAK[torch.cuda.get_device_name(device)]
    n = 4096
    x, best = torch.randn(n, n, device=device).to(dtype), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        _ = x @ x
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def memory_at_hand(device: torch.device) -> int:
    """Return the number of free bytes."""
    return (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights, of which some may be quantized."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def trained_bytes(policy: nn.Module) -> int:
    """Return the bytes of the weights that are trained."""
    return sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)


def short_for_reference(reference: float, policy: float, memory: float) -> bool:
    """Return whether a live reference would take more than a quarter of the memory that the
    policy's training leaves free, in bytes of one process. `policy`: what its weights, gradients
    and optimizer state take.
    """
    return reference > (memory - policy) / 4


def sums_each(config: Any, n_weights: float, memory: float) -> bool:
    """Return whether gradients are summed over processes after each microbatch. With
    fsdp_reduce=auto they are if all of them, in float32, would take more than an eighth of
    `memory`, the bytes of one process.
    """
    return {"auto": 4 * n_weights > memory / 8, "last": False, "each": True}[config.fsdp_reduce]


def kept(config: Any) -> float:
    """Return the share of activations that is kept for the backward pass; the others are
    recomputed.
    """
    recompute = config.activation_checkpointing  # all, none, or all but a share
    return float(not recompute) if isinstance(recompute, bool) else recompute


def activation_bytes(model_config: Any, dtype: torch.dtype, kept: float) -> float:
    """Return the bytes per token: 48 d numbers per layer, of which a share is kept, plus those of
    the layer that is being computed.

    This is generous. Counted in 16 bits by planning/activations.py: GPT-NeoX 16, Llama 23,
    Qwen3-0.6B 40; under autocast up to 7 more.
    """
    spec = model_config.get_text_config()
    return (spec.num_hidden_layers * kept + 1) * 48 * spec.hidden_size * dtype.itemsize


def default_budget(
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    free: float,
    kept: float,
    plain_head: bool,
) -> int:
    """Return the tokens of a microbatch whose activations take half of the `free` bytes, capped
    where more tokens gain little.

    For a head that is not computed in chunks, logits and their gradient are added, in float32 for
    half of the tokens. More than 1,024 tokens gain a CPU only a few percent, and more than 16,384
    gain a GPU nothing.
    """
    per_token = activation_bytes(config, dtype, kept) + (
        0 if plain_head else 2 * 4 * config.get_text_config().vocab_size
    )
    return min(16384 if device.type == "cuda" else 1024, int(free / 2 / per_token) // 256 * 256)


def token_budget(
    config: Any,
    model_config: Any,
    device: torch.device,
    dtype: torch.dtype,
    free: float,
    plain_head: bool,
    mean: float,
    longest: int,
    ranks: int,
) -> int:
    """Return the tokens of a microbatch: as configured, or chosen from the `free` bytes, but enough
    for two examples.

    Compiled blocks need rows of one length, so with compile=true the rows are no longer than a step
    needs, and long enough for any example: `mean` and `longest` are the mean and the largest length
    of one.
    """
    least = max(2 * config.max_length, longest if config.compile else 0)
    default = default_budget(model_config, device, dtype, free, kept(config), plain_head)
    budget = config.tokens_per_microbatch or max(default, least)
    if config.compile:
        parts = ranks * config.gradient_accumulation_steps
        needed = math.ceil(1.25 * mean * config.batch_size / parts / 256) * 256
        budget = min(budget, max(least, needed))
    return budget


# ---- the memory of one GPU, as plan=true computes it ----


@dataclass(frozen=True)
class ClusterShape:
    """Describe the ranks a model is laid out over: n_gpus = tp_size x shard_size x replicas."""

    n_gpus: int = 1
    n_nodes: int = 1
    shard_size: int | None = (
        None  # ranks that share one copy (FSDP); None: all; BasicTrainer has 1 rank
    )
    tp_size: int = 1  # GPUs that split each matrix of a block
    offload: bool = False  # shards lie in the host's RAM

    @property
    def ranks(self) -> int:
        """Return the number of ranks that have their own part of a batch."""
        return self.n_gpus // self.tp_size

    @property
    def shards(self) -> int:
        return self.shard_size or self.ranks

    def part(self, shape: torch.Size, split: int = 1) -> int:
        """Return how many numbers of a tensor a rank keeps. Sharding cuts along the first dimension
        and pads the last part to the length of the others; `split`: over how many ranks tensor
        parallelism splits it.
        """
        if not shape:
            return 1
        return -(-shape[0] // (split * self.shards)) * (shape.numel() // shape[0])


class Weights(NamedTuple):
    """Hold the shapes of all parameters; a tied one counts once."""

    # embeddings, head, final norm: FSDP gathers these together, and keeps them during a step
    root: list[torch.Size]
    blocks: list[list[torch.Size]]
    adapters: int = 0  # numbers of adapters, in float32 or wider; which are not among the shapes
    trained: int | None = None  # how many are trained; None: all

    @property
    def n(self) -> int:
        return sum(shape.numel() for part in (self.root, *self.blocks) for shape in part)

    def on_one(self, layout: ClusterShape) -> int:
        """Return how many numbers a rank keeps. Tensor parallelism splits the matrices of blocks,
        whatever its plan does with the head.
        """
        blocks = sum(
            layout.part(s, layout.tp_size if len(s) > 1 else 1)
            for block in self.blocks
            for s in block
        )
        return blocks + sum(map(layout.part, self.root))

    def gathered(self, layout: ClusterShape) -> tuple[int, int]:
        """Return how many numbers of the root, and of the largest block, undoing the sharding would
        gather on one rank.
        """
        size = lambda s: s.numel() // (layout.tp_size if len(s) > 1 else 1)
        return sum(s.numel() for s in self.root), max(
            (sum(map(size, block)) for block in self.blocks), default=0
        )


@dataclass(frozen=True)
class Precision:
    """Hold the bytes per number of each kind."""

    weights: float  # and of gradients; the mean, where some are quantized
    compute: int  # of gathered weights, and of gradients before they are summed
    reference: int
    state: float  # of the optimizer's state per weight
    average: int = 0  # of the moving average of the weights, if there is one
    # of a block's gathered weights: the mean, where some are quantized; None: as `compute`
    in_blocks: float | None = None

    @property
    def gathered(self) -> float:
        """Return the bytes of a block's gathered weight."""
        return self.compute if self.in_blocks is None else self.in_blocks


class Memory(NamedTuple):
    """Hold the bytes of one GPU, by kind, at the peak moments: as a backward pass starts, as it
    ends, and as the optimizer steps.
    """

    kinds: dict[str, tuple[float, ...]]
    host: float  # of one node's RAM, for what is offloaded
    titles: tuple[str, ...] = ("backward starts", "backward ends", "optimizer steps")

    @property
    def moments(self) -> tuple[float, ...]:
        return tuple(map(sum, zip(*self.kinds.values(), strict=True)))

    @property
    def peak(self) -> float:
        return max(self.moments)


def memory(
    weights: Weights,
    layout: ClusterShape,
    precision: Precision,
    *,
    sharded: bool,
    live: bool,
    activations: float,
    head: float,
    foreach: bool,
    stand_ins: float = 0.0,
    dequantized: float = 0.0,
    kept_whole: bool = False,
) -> Memory:
    """Return the memory of a training step. n: the numbers of a rank (all of them in BasicTrainer);
    w, c, r, s: the bytes of `precision`, in its order.

    Always: weights n w, gradients n w, optimizer n s, live reference n r, and n times the bytes of
    the moving average. `foreach` optimizers hold one temporary of the weights' size while they step
    (PyTorch's documentation): n w; those that step through stand-ins hold `stand_ins` bytes. With
    adapters only these have gradients and an optimizer state, and the live reference has no weights
    of its own. `dequantized`: the largest weight that is quantized, as it is computed with.

    With FSDP, N0 being the numbers of the root and Nb those of the largest block:
    - gathered weights, (N0 + 2 Nb) c, where quantized ones have their own bytes in place of c: the
      root during the whole pass, the block that is computed, and the next one, which is prefetched;
      and N0 c for the root of a live reference, which nothing frees after its forward pass;
    - gradients on their way: a block's gradients Nb c and a copy to be summed, in float32 or wider,
      of which each rank gets its part. The root's come last, when the embedding's exist, and take
      the same with N0 (until then the head's gradient counts with the head).

    `kept_whole`: all gradients are kept, in float32 or wider, from one microbatch to the next.
    """
    n = weights.on_one(layout) if sharded else weights.n
    w, c = precision.weights, precision.compute
    root, block = weights.gathered(layout) if sharded else (0, 0)
    each = c + (max(4, w) if c != w else w)
    on_host = layout.offload and sharded
    at = 0 if on_host else n
    t, each_trained, extra, share = n, w, 0.0, 1.0
    if weights.trained is not None:
        shards = layout.shards if sharded else 1
        t = -(-weights.trained // shards)
        each_trained = max(4, w)
        extra = weights.adapters / shards * each_trained
        share = weights.trained / weights.n
    trained = 0 if on_host else t
    own = live and weights.trained is None  # the reference's weights
    kinds: dict[str, tuple[float, ...]] = {
        "weights": (at * w + (0 if on_host else extra),) * 3,
        "gradients": (trained * each_trained,) * 3,
        "optimizer state": (trained * precision.state,) * 3,
        "reference": (at * precision.reference * own,) * 3,
        "moving average": (trained * precision.average,) * 3,
        "activations": (activations, 0, 0),
        "head and loss": (head, 0, 0),
        "a dequantized weight": (dequantized, 0, 0),
        "gathered weights": (
            root * (1 + own) * c + 2 * block * precision.gathered,
            root * (1 + own) * c,
            root * own * c,
        ),
        "gradients on their way": (share * block * each, share * root * each, 0),
        "gradients not yet summed": (
            (share * weights.n / layout.tp_size * max(4, w) * (kept_whole and sharded),) * 2 + (0,)
        ),
        "optimizer's temporaries": (
            0,
            0,
            trained * each_trained * foreach + (0 if on_host else stand_ins),
        ),
    }
    per_node = layout.n_gpus // layout.n_nodes
    kept = n * (w + precision.reference * own) + extra
    learned = t * (each_trained + precision.state + precision.average)
    host = (kept + learned) * per_node if on_host else 0.0
    return Memory({kind: moments for kind, moments in kinds.items() if any(moments)}, host)


def traffic(
    weights: Weights,
    layout: ClusterShape,
    precision: Precision,
    *,
    n_micro: float,
    live: bool,
    each: bool,
) -> float:
    """Return the bytes that a GPU sends in one step, with ring collectives: if s ranks share a
    copy, each sends (s - 1) / s of what is gathered or scattered. Each microbatch gathers all
    blocks twice (forward, backward), and those of a live reference once; gradients of what is
    trained are scattered once per step, or with `each` after every microbatch; r replicas of a copy
    then sum their shards once, 2 (r - 1) / r of a shard.
    """
    s = layout.shards
    w = precision.weights
    c = precision.compute
    replicas = layout.ranks // s
    root = sum(shape.numel() for shape in weights.root)
    copy = (root * c + (weights.n - root) * precision.gathered) / layout.tp_size
    trained = weights.n if weights.trained is None else weights.trained
    sums = trained / layout.tp_size * (max(4, w) if c != w else w)
    gathered, scattered = n_micro * (2 + live) * copy, (n_micro if each else 1) * sums
    return (s - 1) / s * (gathered + scattered) + 2 * (replicas - 1) / replicas / s * sums
