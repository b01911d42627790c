"""Models: turn a Batch into log-probabilities, in the fastest way that is this model's own.

Shapes: R rows of T tokens, N scored positions (those that predict a response token), d hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from plumb.batching.layout import Batch, Padded, unfold
from plumb.data.examples import ranges
from plumb.distributed import sharding
from plumb.losses.bound import Entropy, Reads
from plumb.losses.contract import Logps, LogpsAndKL, LogpsAndSquares, Scores, TokenLogps
from plumb.models import tree_attention
from plumb.models.chunked_head import (
    Head,
    at_temperature,
    entropy_of,
    kl_between,
    linear_logps,
    linear_logps_and_entropy,
    linear_logps_and_kl,
    linear_logps_and_squares,
    log_softmax,
    log_squares,
    token_logps,
)
from plumb.models.forward_path import ForwardPath

# what a model computes for the R responses of a batch
Outputs = Logps | LogpsAndSquares | LogpsAndKL | TokenLogps | Scores


def read_responses(
    reads: Reads,
    model: Any,
    batch: Batch,
    forward_path: ForwardPath,
    reference: Any = None,
    temperature: float = 1.0,
    entropy: Entropy | None = None,
) -> Outputs:
    """Return what a loss reads of a model, for the R responses of a batch. `reference`: the model
    from which the divergence is, where that is read. `temperature`: that of the samples, for
    losses on token log-probabilities; `entropy`: with what entropies these come, if with any.
    """
    by_token: Callable[..., Outputs] = response_token_logps
    if entropy is not None:
        by_token = partial(response_token_logps_and_entropy, entropy=entropy)
    if reads == "logps_and_kl":
        return response_logps_and_kl(model, reference, batch, forward_path)
    read: dict[str, Callable[[Any, Batch, ForwardPath], Outputs]] = {
        "logps": response_logps,
        "logps_and_squares": response_logps_and_squares,
        "token_logps": partial(by_token, temperature=temperature),
        "scores": response_scores,
    }
    return read[reads](model, batch, forward_path)


def response_logps(model: Any, batch: Batch, forward_path: ForwardPath) -> Logps:
    """Return the sum of log pi(y_t | x, y_<t) over each response's tokens.  -> Logps of [R]"""
    return sums_of(head_values(model, batch, forward_path, LOGPS), batch)


def response_logps_and_squares(
    model: Any, batch: Batch, forward_path: ForwardPath
) -> LogpsAndSquares:
    """Return the sums of response_logps, and those of log sum_v p_v^2 at the same positions.  ->
    [R] each
    """
    each = head_values(model, batch, forward_path, SQUARES)  # [N, 2]
    return LogpsAndSquares(
        *sums_of(each[:, 0], batch), sums_by_response(each[:, 1].detach(), batch)
    )


def response_logps_and_kl(
    policy: Any, reference: Any, batch: Batch, forward_path: ForwardPath
) -> LogpsAndKL:
    """Return the policy's sums of response_logps, and those of KL(reference || policy) at the same
    positions.  -> [R] each

    The reference runs first, up to its head; without a plain head, the logits of both models exist
    at once.
    """
    with torch.no_grad():
        raw = head_values(reference, batch, forward_path, RAW)
    # weights that autocast has cast without a gradient; those of an adapter's reference are the
    # policy's own
    torch.clear_autocast_cache()
    if forward_path.plain_head:
        head = reference.get_output_embeddings()
        weight, bias = (
            None if x is None else sharding.full_tensor(x.detach())
            for x in (head.weight, head.bias)
        )
        other = Head(raw, weight, bias)  # type: ignore[arg-type]  # a head has a weight
        read = HeadRead(partial(linear_logps_and_kl, reference=other), no_logits)
    else:
        read = HeadRead(no_logits, partial(_logps_and_kl, reference=raw))
    each = head_values(policy, batch, forward_path, read)  # [N, 2]
    return LogpsAndKL(*sums_of(each[:, 0], batch), sums_by_response(each[:, 1], batch))


def response_token_logps(
    model: Any, batch: Batch, forward_path: ForwardPath, temperature: float = 1.0
) -> TokenLogps:
    """Return log pi(y_t | x, y_<t) of every response token; with a temperature, that of the
    distribution which responses are sampled from.  -> TokenLogps of R responses
    """
    each = head_values(model, batch, forward_path, logps_at(temperature))
    return TokenLogps(each, batch.response.to(each.device), len(batch.spans))


def response_token_logps_and_entropy(
    model: Any,
    batch: Batch,
    forward_path: ForwardPath,
    temperature: float = 1.0,
    entropy: Entropy = "shown",
) -> TokenLogps:
    """Return response_token_logps with the entropy of the distribution that each token is drawn
    from, through which a gradient flows if it is trained.
    """
    read = with_entropy(temperature, gradient=entropy == "trained")
    logps, entropies = head_values(model, batch, forward_path, read).unbind(1)  # [N] each
    if entropy == "shown":
        entropies = entropies.detach()
    return TokenLogps(logps, batch.response.to(logps.device), len(batch.spans), entropies)


def sums_of(logps: Tensor, batch: Batch) -> Logps:
    """Return the sums of [N] log-probabilities over responses, and how many they sum.  [R]"""
    tokens = torch.from_numpy(batch.n_scored_each()).to(logps.device, non_blocking=True)
    return Logps(sums_by_response(logps, batch), tokens)


class HeadRead(NamedTuple):
    """Hold the two functions that compute a number at each scored position, [N], or m, [N, m]."""

    linear: Callable[..., Tensor]  # from hidden, weight, bias, targets, and the bytes of a chunk
    logits: Callable[..., Tensor]  # from logits, targets


def no_logits(*_: Any, **__: Any) -> NoReturn:
    """Raise AssertionError: the other of the two functions of a HeadRead must be called."""
    raise AssertionError("internal error: a head is read in another way than it was decided")


def _logps_and_squares(logits: Tensor, targets: Tensor) -> Tensor:
    logps = log_softmax(logits)
    return torch.stack([token_logps(logits, targets), log_squares(logps.detach())], 1)


def _logps_and_kl(logits: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
    kl = kl_between(log_softmax(reference), log_softmax(logits))
    return torch.stack([token_logps(logits, targets), kl], 1)


def logps_at(temperature: float) -> HeadRead:
    """Return how log-probabilities at this temperature are read."""
    return HeadRead(
        partial(linear_logps, temperature=temperature),
        lambda logits, targets: token_logps(at_temperature(logits, temperature), targets),
    )


def with_entropy(temperature: float, gradient: bool) -> HeadRead:
    """Return how log-probabilities and entropies at this temperature are read. `gradient`: whether
    one flows through the entropies.
    """

    def of_logits(logits: Tensor, targets: Tensor) -> Tensor:
        scaled = at_temperature(logits, temperature)
        entropies = entropy_of(log_softmax(scaled if gradient else scaled.detach()))
        return torch.stack([token_logps(scaled, targets), entropies], 1)

    linear = partial(linear_logps_and_entropy, temperature=temperature, gradient=gradient)
    return HeadRead(linear, of_logits)


LOGPS = HeadRead(linear_logps, token_logps)
SQUARES = HeadRead(linear_logps_and_squares, _logps_and_squares)
# what enters, or leaves, it
RAW = HeadRead(lambda hidden, *_, **__: hidden, lambda logits, _: logits)


def head_values(model: Any, batch: Batch, forward_path: ForwardPath, read: HeadRead) -> Tensor:
    """Run the model on a batch, and return what `read` computes at the N scored positions.  [N], or
    [N, m]

    The head runs on their positions only, so that no [T, V] tensor exists.
    """
    inputs, padded = _inputs(batch, forward_path)
    positions = batch.scored if padded is None else padded.scored
    plain = forward_path.plain_head
    targets = batch.targets if plain else None
    linear = partial(read.linear, chunk=forward_path.chunk)
    with lm_head_at_positions(model, positions, targets, linear=linear):
        values = model(**inputs, use_cache=False).logits[0]  # [N, 1 or m], or [N, V]
    return values.squeeze(1) if plain else read.logits(values, batch.targets)


def sums_by_response(logps: Tensor, batch: Batch) -> Tensor:
    """Sum the scored positions' log-probabilities over each response.  [N] -> [R], nats, of the
    same type

    In a fixed order, so that the same log-probabilities always have the same sums: a scattered
    addition (`index_add`) takes the order in which a GPU's threads happen to arrive. Each
    response's positions stand together, and are laid out as a row, padded with zeros; in float64,
    except on a device that has none (MPS).
    """
    count = batch.n_scored_each()  # [R]
    order, longest = batch.spans[:, 2].argsort(kind="stable"), max(int(count.max(initial=0)), 1)
    # [N] in [R * L]
    place = torch.from_numpy(ranges(order * longest, count[order])).to(
        logps.device, non_blocking=True
    )
    wide = torch.float32 if logps.device.type == "mps" else torch.float64
    rows = torch.zeros(len(count) * longest, dtype=wide, device=logps.device).index_copy(
        0, place, logps.to(wide)
    )
    return rows.view(-1, longest).sum(1).to(logps.dtype)


def response_scores(model: Any, batch: Batch, forward_path: ForwardPath) -> Scores:
    """Return the scores of a model with a scalar head (models/scalar_head.py) at all response
    tokens.  -> Scores of [R]

    The end of a response is known from its length: no token id is searched for, and PAD may be EOS.
    A response without a token has the score of its prompt.
    """
    inputs, padded = _inputs(batch, forward_path)
    device, (start, n_prompt, own, n) = batch.input_ids.device, batch.spans.T  # [R] each
    if padded is not None:
        start = np.arange(len(n)) * padded.input_ids.shape[1]
        own = start + n_prompt
    own, count = np.where(n > 0, own, start + n_prompt - 1), np.maximum(n, 1)
    with lm_head_at_positions(model, torch.from_numpy(ranges(own, count)).to(device), None):
        values = model(**inputs, use_cache=False).logits[0, :, 0]  # [sum of counts]
    first = count.cumsum() - count
    at = first[:, None] + np.minimum(np.arange(count.max()), count[:, None] - 1)  # [R, L]
    each = values[torch.from_numpy(at).to(values.device)]
    return Scores(each[:, -1], each, torch.from_numpy(n).to(values.device))


def response_token_values(model: Any, batch: Batch, forward_path: ForwardPath) -> Tensor:
    """Return the output of a model with a scalar head before each scored token: at the prompt's
    last token for a response's first, at that one for its second, and so on.  [N]
    """
    inputs, padded = _inputs(batch, forward_path)
    positions = batch.scored if padded is None else padded.scored
    with lm_head_at_positions(model, positions, None):
        return model(**inputs, use_cache=False).logits[0, :, 0]


def packed_inputs(batch: Batch) -> dict[str, Any]:
    """Return what a model is given to compute trees in one row."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "segments": batch.segments,
        "attention_mask": tree_attention.no_mask(batch.input_ids.device),
    }


def read_hidden(model: Any, batch: Batch, forward_path: ForwardPath, read: str) -> Tensor:
    """Return what a scalar head reads at each response's last token, or with `read` "mean" the mean
    over its tokens.  -> [R, d]
    """
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda head, inputs, score: seen.append(inputs[0][0])
    )
    try:
        response_scores(model, batch, forward_path)
    finally:
        handle.remove()
    (hidden,) = seen  # [N, d], all tokens of one response after the other's
    count = torch.from_numpy(np.maximum(batch.spans[:, 3], 1))
    if read == "mean":
        return torch.stack([own.mean(0) for own in hidden.split(count.tolist())])
    return hidden[(count.cumsum(0) - 1).to(hidden.device)]


def _inputs(batch: Batch, forward_path: ForwardPath) -> tuple[dict[str, Any], Padded | None]:
    """Return the model's inputs, and the padded rows if it is given those."""
    if forward_path.packed:
        return packed_inputs(batch), None
    padded = unfold(batch, 0)
    return {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}, padded


@contextmanager
def lm_head_at_positions(
    model: Any,
    positions: Tensor,
    targets: Tensor | None,
    forward: Callable[[Tensor], Tensor] | None = None,
    linear: Callable[..., Tensor] = linear_logps,
) -> Iterator[None]:
    """Show the LM head of `model`, within the context, only the hidden states at `positions`, [N]
    of the R * W tokens.

    With `targets`, it returns what `linear` computes of hidden states, weight, bias and targets
    instead of logits: their log-probabilities, [1, N, 1], or m numbers for each, [1, N, m].
    Without, it returns all their logits, [1, N, V]. This happens in the head, not after it: there
    FSDP has gathered its weight; and what the model does to logits afterwards (soft-capping,
    scaling) is unchanged. `forward` [1, N, d] -> [1, N, V] replaces the head's own computation.
    """
    head = model.get_output_embeddings()

    def gather(_, inputs):
        (hidden,) = inputs  # [R, W, d]
        # [1, N, d]
        return (hidden.flatten(0, 1).index_select(0, positions.to(hidden.device)).unsqueeze(0),)

    def logps(hidden):  # [1, N, d] -> [1, N, m]; a copy, since FSDP wants no view
        device = head.weight.device
        values = linear(hidden[0].to(device), head.weight, head.bias, targets.to(device))
        return (values[:, None] if values.dim() == 1 else values)[None].clone()

    handle = head.register_forward_pre_hook(gather)
    own = vars(head).get("forward")  # accelerate's, where it spreads a model
    if targets is not None:
        forward = logps
    if forward is not None:
        head.forward = forward
    try:
        yield
    finally:
        handle.remove()
        vars(head).pop("forward", None)
        if own is not None:
            head.forward = own
