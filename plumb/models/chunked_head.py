"""Compute log-probabilities from hidden states, without a tensor of all logits.

Shapes: N scored positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plumb.losses.bound import Entropy

# Bytes of float32 logits that are computed at once. On a CPU 64 MB was fastest of 16, 64 and 128
# (V = 49,152); a GPU's matrix products want thousands of rows.
STANDARD_CHUNK = {"cpu": 1 << 26, "cuda": 1 << 29}
LEAST_CHUNK = 1 << 24
# Softmax of so many chunks is kept for the backward pass; more of it is computed again there, which
# is a third more work in the head.
KEPT_CHUNKS = 4


def standard_chunk(device: torch.device) -> int:
    """Return the bytes of a chunk where memory is no matter."""
    return STANDARD_CHUNK.get(device.type, STANDARD_CHUNK["cpu"])


def chunk_for(free: float, device: torch.device) -> int:
    """Return the bytes of a chunk where so many are `free`: a 64th of them, as a power of two, but
    no more than is standard. With what is kept, the head then takes a tenth of them at most.

    >>> chunk_for(3e9, torch.device("cuda")) // 2**20
    32
    """
    share = 2 ** int(math.log2(max(free, 64) / 64))
    return min(standard_chunk(device), max(LEAST_CHUNK, share))


def held_bytes(chunk: int) -> int:
    """Return the most that linear_logps holds beside its inputs and gradients, with entropies."""
    return (2 + KEPT_CHUNKS) * chunk


def step_bytes(  # noqa: PLR0913
    n: int,
    width: int,
    vocab: int,
    itemsize: int,
    chunk: int,
    trained: bool = True,
    entropy: Entropy | None = None,
) -> int:
    """Return what linear_logps holds when its backward pass begins, for [n] positions and the
    head's weight [vocab, width] of `itemsize` bytes.

    Softmax of all positions if that may be kept, otherwise two chunks (one is made while the
    previous one still has a name); the gradient of the weight in float32, and of hidden states; in
    16 bits one chunk and that gradient a second time, rounded. `trained`: false for a weight that
    gets no gradient; `entropy`: which takes two chunks as long as it, or its gradient, is made.
    """
    rows = min(n, _rows(chunk, vocab))
    full, one = 4 * n * vocab, 4 * rows * vocab
    kept = full <= KEPT_CHUNKS * chunk
    held = full if kept else 2 * one
    of_weight = max(4, itemsize) * vocab * width
    rounded = itemsize * (rows + width) * vocab if itemsize < 4 else 0
    if not trained:
        of_weight = 0
        rounded = itemsize * rows * vocab if itemsize < 4 else 0
    held += of_weight + rounded + 2 * n * width * itemsize
    if entropy == "trained":
        held += 2 * one
    if entropy == "shown":  # forward, where there are no gradients yet
        held = max(held, (full if kept else one) + 2 * one)
    return held


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(logits)[target], in float32 at least.  [N, V], [N] -> [N], nats"""
    return -F.cross_entropy(_wide(logits), targets.to(logits.device), reduction="none")


def log_softmax(logits: Tensor) -> Tensor:
    """Return log softmax(logits), in float32 at least.  [N, V]"""
    return torch.log_softmax(_wide(logits), 1)


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature, in float32 at least. Sampling and training both divide here, so
    that the probabilities that are trained are those that tokens are drawn from.  [N, V]
    """
    return _wide(logits) if temperature == 1 else _wide(logits) / temperature


class Beside(NamedTuple):
    """Describe a number of each distribution that is computed beside a log-probability."""

    value: Callable[[Tensor], Tensor]  # from log-probabilities over the vocabulary.  [N, V] -> [N]
    # from both, d value / d logits; None: no gradient flows through it.  [N, V], [N] -> [N, V]
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    beside: Beside | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return log softmax((hidden @ weight.T + bias) / temperature)[target], with the softmax in
    float32.  [N, d], [V, d], [V], [N] -> [N], nats

    Computed in chunks of rows, so that no more than `chunk` bytes of logits exist at a time (None:
    what is standard for the device). The backward pass computes them again, unless the softmax of
    all is no more than KEPT_CHUNKS of them. With `beside`, the result is [N, 2].
    """
    hidden, weight = _autocast(hidden, weight)
    chunk = chunk or standard_chunk(hidden.device)
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = differentiated and 4 * len(hidden) * len(weight) <= KEPT_CHUNKS * chunk
    rows = _rows(chunk, len(weight))
    return _LinearLogps.apply(hidden, weight, bias, targets, temperature, rows, keep, beside)


def linear_logps_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    gradient: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Return the log-probabilities of linear_logps beside the entropy of the distribution that they
    are of. `gradient`: whether one flows through the entropy.  -> [N, 2] nats
    """
    beside = Beside(entropy_of, entropy_gradient if gradient else None)
    return linear_logps(hidden, weight, bias, targets, temperature, beside, chunk)


def entropy_of(logps: Tensor) -> Tensor:
    """Return -sum_v p_v log p_v of log-probabilities over the vocabulary; a token that cannot come
    has no part in it.  [N, V] -> [N] nats

    >>> entropy_of(torch.tensor([[0.5, 0.5, 0.0]]).log()).exp().tolist()
    [2.0]
    """
    return torch.special.entr(_finite(logps).exp()).sum(1)


def entropy_gradient(logps: Tensor, entropies: Tensor) -> Tensor:
    """Return dH / d logits_v = -p_v (log p_v + H) of distributions with the entropies H.  [N, V],
    [N] -> [N, V]

    >>> logps = torch.tensor([[0.25, 0.75, 0.0]]).log()
    >>> entropy_gradient(logps, entropy_of(logps))
    tensor([[ 0.2060, -0.2060,  0.0000]])
    """
    return _finite(logps).add_(entropies[:, None]).mul_(logps.exp()).neg_()


def _finite(logps: Tensor) -> Tensor:
    """Return log-probabilities of which none is below that of the smallest number: p log p and its
    gradient are 0 where p is.
    """
    return logps.clamp(min=math.log(torch.finfo(logps.dtype).tiny))


def log_squares(logps: Tensor) -> Tensor:
    """Return log sum_v p_v^2 of log-probabilities over the vocabulary: what the log-probability of
    a token drawn from p is compared with, exp of it being its expected probability.  [N, V] -> [N]
    """
    return (2 * logps).logsumexp(1)


def linear_logps_and_squares(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Return the log-probabilities of linear_logps beside log_squares of the same positions, which
    no gradient flows through.  -> [N, 2]
    """
    return linear_logps(hidden, weight, bias, targets, 1.0, Beside(log_squares), chunk)


class Head(NamedTuple):
    """Hold the input and the weight of a model's head: logits that are not yet computed."""

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]


def linear_logps_and_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    reference: Head,
    chunk: int | None = None,
) -> Tensor:
    """Return the log-probabilities of linear_logps beside KL(reference || policy) at the same
    positions, in nats.  -> [N, 2]

    In chunks of rows, so that the logits of neither model exist as a whole; the backward pass
    computes them again.
    """
    hidden, weight = _autocast(hidden, weight)
    other = reference._replace(
        hidden=reference.hidden.to(hidden.dtype), weight=reference.weight.to(weight.dtype)
    )
    rows = _rows(chunk or standard_chunk(hidden.device), len(weight))
    return _LinearKL.apply(hidden, weight, bias, targets, other, rows)


def kl_between(reference: Tensor, policy: Tensor) -> Tensor:
    """Return KL(reference || policy) of log-probabilities over the vocabulary.  [N, V] -> [N]"""
    return (reference.exp() * (reference - policy)).sum(1)


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the type that autocast computes in, where it is on."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype)


def _rows(chunk: int, vocab: int) -> int:
    """Return the number of positions that are computed at one time."""
    return max(1, chunk // (4 * vocab))


class _LinearKL(torch.autograd.Function):
    """Compute log-probabilities and KL(reference || policy), with d logp / d logits =
    onehot(target) - p and d KL / d logits = p - p_reference.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, reference, rows):
        ctx.rows, ctx.reference = rows, reference
        ctx.save_for_backward(hidden, weight, bias, targets)
        chunks = []
        for h, t, r in zip(
            hidden.split(rows), targets.split(rows), reference.hidden.split(rows), strict=True
        ):
            ours = _log_softmax(h, weight, bias)
            theirs = _log_softmax(r, reference.weight, reference.bias)
            chunks.append(
                torch.stack([ours.gather(1, t[:, None])[:, 0], kl_between(theirs, ours)], 1)
            )
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx, grad):  # [N, 2]
        hidden, weight, bias, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = None
        if ctx.needs_input_grad[1]:  # a head beside adapters is frozen
            d_weight = torch.zeros_like(weight, dtype=grad.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            of_logp, of_kl = grad[part].split(1, dim=1)
            d = _log_softmax(hidden[part], weight, bias).exp_().mul_(of_kl - of_logp)
            d.scatter_add_(1, targets[part, None], of_logp.contiguous())
            other = _log_softmax(ctx.reference.hidden[part], *ctx.reference[1:])
            d -= other.exp_().mul_(of_kl)
            if d_bias is not None:
                d_bias += d.sum(0)
            d = d.to(weight.dtype)
            torch.mm(d, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight += d.T @ hidden[part]
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


class _LinearLogps(torch.autograd.Function):
    """Compute log-probabilities with d logp / d logits = (onehot(target) - p) / temperature, and
    perhaps a number beside each.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, rows, keep, beside):
        ctx.rows, ctx.temperature = rows, temperature
        ctx.gradient = None if beside is None else beside.gradient
        kept = []
        logps = []
        others = []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            of_chunk = _log_softmax(h, weight, bias, temperature)
            kept = [*kept, of_chunk] if keep else [of_chunk]
            logps.append(kept[-1].gather(1, t[:, None])[:, 0])
            others += [] if beside is None else [beside.value(kept[-1])]
        each, *other = (torch.cat(x) for x in (logps, others) if x)  # [N] each
        needed = other if ctx.gradient else []
        needed = [*needed, *kept] if keep else needed
        ctx.save_for_backward(hidden, weight, bias, targets, *needed)
        return torch.stack([each, *other], 1) if other else each

    @staticmethod
    def backward(ctx, grad):  # [N], or [N, 2]
        hidden, weight, bias, targets, *kept = ctx.saved_tensors
        others = kept.pop(0) if ctx.gradient else None
        grad, of_others = grad.unbind(1) if grad.dim() == 2 else (grad, None)
        d_hidden = torch.empty_like(hidden)
        d_weight = None
        if ctx.needs_input_grad[1]:  # a head beside adapters is frozen
            d_weight = torch.zeros_like(weight, dtype=grad.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        for i, start in enumerate(range(0, len(hidden), ctx.rows)):
            part = slice(start, start + ctx.rows)
            h, g = hidden[part], grad[part, None] / ctx.temperature
            d = kept[i] if kept else _log_softmax(h, weight, bias, ctx.temperature)
            other = None if others is None else ctx.gradient(d, others[part])
            d.exp_().mul_(-g).scatter_add_(1, targets[part, None], g)  # [rows, V]
            if other is not None:
                d += other.mul_(of_others[part, None] / ctx.temperature)
            if d_bias is not None:
                d_bias += d.sum(0)
            d = d.to(weight.dtype)
            torch.mm(d, weight, out=d_hidden[part])
            if d_weight is not None and d.dtype == d_weight.dtype:
                d_weight.addmm_(d.T, h)
            elif d_weight is not None:
                d_weight += d.T @ h
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """Return log softmax((hidden @ weight.T + bias) / temperature): [rows, V], a new tensor,
    float32 at least.

    A GPU's matrix units sum in float32, and need not round the result to 16 bits.
    """
    if hidden.is_cuda and hidden.element_size() < 4:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        logits = logits if bias is None else logits.add_(bias)
    else:
        logits = _wide(F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)))
    logits = at_temperature(logits, temperature)
    # in place: a second tensor of this size costs as much time as the softmax
    return torch.log_softmax(logits, 1, out=logits)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
