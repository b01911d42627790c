"""How examples lie in a row of tokens.

A *tree* (prompt-shared row) is a prompt followed by its k responses, positions restarting after the
prompt for each; trees stand one after the other in a row without padding. A token sees its own
tree's prompt and its own response, up to itself, and nothing else.

Shapes: B examples in a microbatch, of k responses each (1 for SFT, 2 for pairs; k may differ from
example to example), together R responses; T tokens in the row, of which N predict a response token
("scored"); S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from plumb.data.examples import ranges
from plumb.data.extras import Extras
from plumb.data.tokenization import Example, trees_of


@dataclass(frozen=True, eq=False)
class Segments:
    """Hold which tokens of a row attend to which: each segment's queries are consecutive tokens,
    its keys the tree's prompt and these tokens.

    Queries `[P+C], [R]`, keys `[P+C], [P, R]`: the prompt is computed once, its keys and values are
    gathered once per response. Not a tuple, so that code that walks over a module's inputs (FSDP,
    checkpointing) treats it as one object.
    """

    query_lengths: list[int]  # S numbers, together T
    key_lengths: list[int]  # S numbers, together Tk
    gather: Tensor  # [Tk] int64: the row's position of each key
    query_ends: Tensor  # [S + 1] int32: 0, then where each segment's queries end
    key_ends: Tensor  # [S + 1] int32
    longest: (
        int  # no segment has more keys; a constant of the run, so that nothing is compiled twice
    )
    masks: dict = field(default_factory=dict)

    def mask(self, n_queries: int, n_keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """Return a mask [n_queries, n_keys] to be added to scores: 0 or -inf, causal from the
        bottom right, `window` keys back at most.

        None if plain causal attention is all that is needed. Made once per shape, with `like`'s
        type and device; all layers share it.

        >>> Segments([2], [3], *[torch.empty(0)] * 3, 3).mask(2, 3, 2, torch.empty(0))
        tensor([[0., 0., -inf],
                [-inf, 0., 0.]])
        """
        if window is not None and n_keys <= window:
            window = None
        if n_queries == n_keys and window is None:
            return None
        shape = (n_queries, n_keys, window, like.dtype, like.device)
        if shape not in self.masks:
            seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=like.device).tril(
                n_keys - n_queries
            )
            if window is not None:
                seen = seen.triu(n_keys - n_queries - window + 1)
            self.masks[shape] = like.new_zeros(n_queries, n_keys).masked_fill(~seen, float("-inf"))
        return self.masks[shape]


@dataclass(frozen=True)
class Batch:
    """Hold a microbatch: B trees in one row. Responses are numbered with all first ones before all
    second ones: example b's j-th comes after every response j' < j, and after the j-th of the
    examples before b that have one.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64
    segments: Segments
    # [N] int64: the row's positions that predict a response token (the prompt's last stands k
    # times)
    scored: Tensor
    targets: Tensor  # [N] int64: the token each predicts
    response: Tensor  # [N] int64: the response it belongs to, 0 .. R - 1
    # [R, 4] on the CPU: where the prompt begins in the row, its length, and the same of the
    # response
    spans: np.ndarray
    n_responses: np.ndarray  # [B] k of each example, on the CPU
    n_tokens: int  # T less the padding at the end of the row
    extras: Extras = Extras()  # float64: [B], [R] and [N]; see `pack`

    @property
    def n_scored(self) -> int:
        return len(self.targets)

    def n_scored_each(self) -> np.ndarray:
        """Count the scored positions of each response: its tokens, less the first where no prompt
        predicts it.  [R]
        """
        return np.maximum(self.spans[:, 3] - (self.spans[:, 1] == 0), 0)

    def n_processed(self, packed: bool) -> int:
        """Return the number of tokens a model is given: the row, or the padded rows that it is
        unfolded to.
        """
        return (
            self.input_ids.numel()
            if packed
            else len(self.spans) * int((self.spans[:, 1] + self.spans[:, 3]).max())
        )

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """Return a copy in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            name: f(x) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        s = self.segments
        segments = replace(
            s, gather=f(s.gather), query_ends=f(s.query_ends), key_ends=f(s.key_ends), masks={}
        )
        return replace(self, segments=segments, extras=self.extras.map(f), **tensors)


def pack(
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    longest: int,
    row_length: int | None = None,
    extras: Extras | None = None,
) -> Batch:
    """Lay B examples out as trees in one row. `extras`: what these examples carry beside their
    tokens.

    `row_length` pads the row to a fixed length (for compiled models), in segments of their own: a
    kernel leaves what lies outside all segments uninitialised. `longest`: the most keys a segment
    can have (max_length).

    >>> a = Example(np.array([1, 2]), (np.array([3, 0]), np.array([4, 5, 0])), "")
    >>> batch = pack([a], pad_token_id=9, longest=8)
    >>> batch.input_ids, batch.position_ids
    (tensor([[1, 2, 3, 0, 4, 5, 0]]), tensor([[0, 1, 2, 3, 2, 3, 4]]))
    >>> batch.segments.query_lengths, batch.segments.key_lengths, batch.segments.gather.tolist()
    ([4, 3], [4, 5], [0, 1, 2, 3, 0, 1, 4, 5, 6])
    >>> batch.scored.tolist(), batch.targets.tolist(), batch.response.tolist()
    ([1, 2, 1, 4, 5], [3, 0, 4, 5, 0], [0, 0, 1, 1, 1])
    """
    trees = [tree for e in examples for tree in trees_of(e)]
    n_responses = np.array([len(e.responses) for e in examples])
    # [R] each: of a response in the row, its example and its place in it; and its number
    example_of = np.arange(len(examples)).repeat(n_responses)
    place_of = ranges(np.zeros_like(n_responses), n_responses)
    order = np.lexsort((example_of, place_of))
    numbers = order.argsort()
    ids = np.concatenate([x for prompt, responses in trees for x in (prompt, *responses)])  # [T]
    lengths = np.array([len(x) for prompt, responses in trees for x in (prompt, *responses)])
    starts = lengths.cumsum() - lengths
    k_of = np.array([len(responses) for _, responses in trees])
    roots = (k_of + 1).cumsum() - k_of - 1  # where each tree's prompt stands in `lengths`
    leaves = np.delete(np.arange(len(lengths)), roots)  # and where each response does
    root = roots.repeat(k_of)  # [R], of its tree
    # [R, 4], tree by tree
    spans = np.stack([starts[root], lengths[root], starts[leaves], lengths[leaves]], 1)

    offset = np.zeros_like(lengths)  # positions run on from the prompt's end in every response
    offset[leaves] = spans[:, 1]
    positions = ranges(offset, lengths)

    # A response's first token is predicted by the prompt's last, if there is one, and every other
    # by the one before it.
    skipped = (spans[:, 1] == 0).astype(np.int64)
    n_scored = np.maximum(spans[:, 3] - skipped, 0)
    targets = ranges(spans[:, 2] + skipped, n_scored)  # where in the row they stand
    scored = targets - 1
    firsts = (n_scored.cumsum() - n_scored)[(n_scored > 0) & (skipped == 0)]
    scored[firsts] = (spans[:, 0] + spans[:, 1] - 1)[(n_scored > 0) & (skipped == 0)]

    n_padding = max(0, (row_length or 0) - len(ids))
    tensor = torch.from_numpy
    row = np.pad(ids, (0, n_padding), constant_values=pad_token_id).astype(np.int64)
    return Batch(
        input_ids=tensor(row)[None],
        position_ids=tensor(np.pad(positions, (0, n_padding)))[None],
        segments=_segments(spans, leaves == root + 1, len(ids), n_padding, longest),
        scored=tensor(scored),
        targets=tensor(ids[targets].astype(np.int64)),
        response=tensor(numbers.repeat(n_scored)),
        spans=spans[order],
        n_responses=n_responses,
        n_tokens=len(ids),
        extras=_as_tensors(extras or Extras(), example_of[order], place_of[order]),
    )


def _as_tensors(extras: Extras, example_of: np.ndarray, place_of: np.ndarray) -> Extras:
    """Return the extras of a batch's examples in the order of its examples, responses and scored
    tokens; [R] each: the example of a response and its place in it.
    """
    as_float64 = lambda column: torch.from_numpy(np.asarray(column, np.float64))
    return Extras(
        {name: as_float64(x) for name, x in extras.example.items()},
        {name: as_float64(x[example_of, place_of]) for name, x in extras.response.items()},
        {name: as_float64(np.concatenate(list(x))) for name, x in extras.token.items()},
    )


def by_example(values: Tensor, n_responses: np.ndarray, fill: float = 0.0) -> Tensor:
    """Return the values of a batch's responses, [R, ...], by example and place: [B, k, ...], where
    k is the largest number of responses, and `fill` stands where an example has fewer.

    >>> by_example(torch.tensor([1, 2, 3, 4]), np.array([1, 3]))  # responses 1; 2, 3, 4
    tensor([[1, 0, 0],
            [2, 3, 4]])
    """
    n, k = len(n_responses), int(n_responses.max())
    (where,) = (np.arange(k)[:, None] < n_responses).ravel().nonzero()  # of [k, B]
    table = values.new_full((k * n, *values.shape[1:]), fill)
    index = torch.from_numpy(where).to(values.device, non_blocking=True)
    return table.index_copy(0, index, values).unflatten(0, (k, n)).transpose(0, 1)


def _segments(
    spans: np.ndarray, first: np.ndarray, n_tokens: int, n_padding: int, longest: int
) -> Segments:
    """Return the row's segments from the spans [R, 4], tree by tree; `first` [R]: is it its tree's
    first response?
    """
    # prompt's start and length, own start and length; a tree's first segment owns the prompt
    pieces = spans.copy()
    pieces[first, 2:] = np.stack([spans[first, 0], spans[first, 1] + spans[first, 3]], 1)
    pieces[first, 1] = 0
    pieces = pieces[pieces[:, 3] > 0]  # no segment without a query
    # cut, so that `longest` holds
    padding = np.diff(np.append(np.arange(0, n_padding, longest), n_padding))
    queries = np.concatenate([pieces[:, 3], padding])
    keys = np.concatenate([pieces[:, 1] + pieces[:, 3], padding])
    gather = ranges(pieces[:, [0, 2]].ravel(), pieces[:, [1, 3]].ravel())
    gather = np.concatenate([gather, np.arange(n_tokens, n_tokens + n_padding)])
    ends = lambda lengths: torch.from_numpy(
        np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    )
    return Segments(
        query_lengths=queries.tolist(),
        key_lengths=keys.tolist(),
        gather=torch.from_numpy(gather),
        query_ends=ends(queries),
        key_ends=ends(keys),
        longest=longest,
    )


class Padded(NamedTuple):
    """Hold the same responses one per row, each after its prompt, padded on the right."""

    input_ids: Tensor  # [R, W] int64
    attention_mask: Tensor  # [R, W] int64, 0 on padding
    scored: Tensor  # [N] int64: positions in the R * W tokens, in the order of the Batch's


def unfold(batch: Batch, pad_token_id: int) -> Padded:
    """Return the batch as padded rows, one for each response: for models that cannot take
    prompt-shared rows, and as the reference computation of the tests.

    >>> a = Example(np.array([1, 2]), (np.array([3, 0]), np.array([4, 5, 0])), "")
    >>> padded = unfold(pack([a], pad_token_id=9, longest=8), 9)
    >>> padded.input_ids, padded.scored.tolist()
    (tensor([[1, 2, 3, 0, 9],
            [1, 2, 4, 5, 0]]), [1, 2, 6, 7, 8])
    """
    # [R] lengths of the rows
    device = batch.input_ids.device
    n = batch.spans[:, 1] + batch.spans[:, 3]
    width = int(n.max())
    # each token's place in the packed row
    source = ranges(batch.spans[:, [0, 2]].ravel(), batch.spans[:, [1, 3]].ravel())
    # and in the padded ones
    where = torch.from_numpy(ranges(np.arange(len(n)) * width, n)).to(device)
    input_ids = torch.full((len(n) * width,), pad_token_id, device=device)
    input_ids[where] = batch.input_ids[0, torch.from_numpy(source).to(device)]
    mask = torch.zeros_like(input_ids).index_fill(0, where, 1)
    response = batch.response.cpu().numpy()
    _, first, of = np.unique(response, return_index=True, return_inverse=True)
    start = np.arange(len(n)) * width + np.maximum(batch.spans[:, 1] - 1, 0)
    scored = torch.from_numpy(start[response] + np.arange(len(response)) - first[of]).to(device)
    shape = (len(n), width)
    return Padded(input_ids.view(shape), mask.view(shape), scored)
