"""Compute log-probabilities from hidden states, without a tensor of all logits.

Shapes: N scored positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of float32 logits on a CPU; a GPU takes eight times as much, for its matrix products want
# thousands of rows.
CHUNK_BYTES = 1 << 26  # computed at one time; 64 MB was fastest of 16, 64 and 128 (V = 49,152)
KEPT_BYTES = (
    1 << 28
    # softmax kept for the backward pass, which is otherwise computed again: a third more work in
    # the
    # head
)


def held_bytes(device: torch.device) -> int:
    """Return the most that linear_logps holds beside its inputs and gradients."""
    return (8 if device.type == "cuda" else 1) * (KEPT_BYTES + CHUNK_BYTES)


def step_bytes(n: int, width: int, vocab: int, itemsize: int, device: torch.device) -> int:
    """Return what linear_logps holds when its backward pass begins, for [n] positions and the
    head's weight [vocab, width] of `itemsize` bytes.

    Softmax of all positions if that may be kept, otherwise two chunks (one is made while the
    previous one still has a name); the gradient of the weight in float32, and of hidden states; in
    16 bits one chunk and that gradient a second time, rounded.
    """
    scale = 8 if device.type == "cuda" else 1
    whole, rows = 4 * n * vocab, min(n, max(1, scale * CHUNK_BYTES // (4 * vocab)))
    held = whole if whole <= scale * KEPT_BYTES else 2 * 4 * rows * vocab
    rounded = itemsize * (rows + width) * vocab if itemsize < 4 else 0
    return held + max(4, itemsize) * vocab * width + rounded + 2 * n * width * itemsize


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(logits)[target], in float32 at least.  [N, V], [N] -> [N], nats"""
    return -F.cross_entropy(_wide(logits), targets.to(logits.device), reduction="none")


def linear_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return log softmax(hidden @ weight.T + bias)[target], with the softmax in float32.  [N, d],
    [V, d], [V], [N] -> [N], nats

    Computed in chunks of rows, so that no more than CHUNK_BYTES of logits exist at a time. The
    backward pass computes them again, unless their softmax fits in KEPT_BYTES.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = (
            x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight)
        )
    scale = 8 if hidden.is_cuda else 1
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = differentiated and 4 * len(hidden) * len(weight) <= scale * KEPT_BYTES
    return _LinearLogps.apply(
        hidden, weight, bias, targets, max(1, scale * CHUNK_BYTES // (4 * len(weight))), keep
    )


class _LinearLogps(torch.autograd.Function):
    """Compute log-probabilities with d logp / d logits = onehot(target) - softmax(logits)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, keep):
        ctx.rows = rows
        kept = []
        logps = []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            kept = (
                [*kept, _log_softmax(h, weight, bias)] if keep else [_log_softmax(h, weight, bias)]
            )
            logps.append(kept[-1].gather(1, t[:, None])[:, 0])
        ctx.save_for_backward(hidden, weight, bias, targets, *(kept if keep else []))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, targets, *kept = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=grad.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        for i, start in enumerate(range(0, len(hidden), ctx.rows)):
            part = slice(start, start + ctx.rows)
            h, g = hidden[part], grad[part, None]
            d = kept[i] if kept else _log_softmax(h, weight, bias)
            d.exp_().mul_(-g).scatter_add_(1, targets[part, None], g)  # [rows, V]
            if d_bias is not None:
                d_bias += d.sum(0)
            d = d.to(weight.dtype)
            torch.mm(d, weight, out=d_hidden[part])
            if d.dtype == d_weight.dtype:
                d_weight.addmm_(d.T, h)
            else:
                d_weight += d.T @ h
        return (
            d_hidden,
            d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return log softmax(hidden @ weight.T + bias): [rows, V], a new tensor, float32 at least.

    A GPU's matrix units sum in float32, and need not round the result to 16 bits.
    """
    if hidden.is_cuda and hidden.element_size() < 4:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        logits = logits if bias is None else logits.add_(bias)
    else:
        logits = _wide(F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)))
    # in place: a second tensor of this size costs as much time as the softmax
    return torch.log_softmax(logits, 1, out=logits)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
