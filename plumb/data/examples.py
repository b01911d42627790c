"""View token stores as examples: which pairs, targets or lists, truncated to which lengths. An
example is created only when asked for.

n examples of at most k responses each (1 for SFT, 2 for pairs). An example costs 8 + 4 * (1 + k)
bytes beside the mapped files.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import nan
from typing import Any, NamedTuple, overload

import numpy as np

from plumb.data.extras import Extras
from plumb.data.token_store import TokenStore
from plumb.data.tokenization import BLANK, CHANGED, HAS_EOS, Example, TextRules, trees_of, truncate

CHUNK = 1 << 16  # examples that are processed together: what is computed from them stays small


class Table(NamedTuple):
    """Hold a store, and what is taken from it."""

    store: TokenStore
    items: np.ndarray  # [N, 1 + k] (row, text of each response; -1 where there are fewer)
    keep_end: bool  # which end of a long prompt survives
    # what the examples carry beside their tokens: [N] numbers of examples, [N, k] of responses
    extras: Mapping[str, np.ndarray] = {}


class Taking(NamedTuple):
    """Hold what a loss takes from a store; each field is the option of that name in config.yaml."""

    list_pairs: str = "all"  # which pairs of a ranked list: "all" | "best-worst" | "adjacent"
    unpair: bool = True  # with labelled responses: is a pair two of them?
    soft_labels: str = "use"  # "use" | "ignore"


EVERYTHING = Taking()


class Examples(Sequence[Example]):
    """Hold examples of one or more stores. `examples[i]` is an Example; slices and `select` give
    views.

    `lengths` [n, 1 + k] int32: tokens of the prompt, including BOS, and of each response, after
    truncation; 0 where an example has fewer responses (one that it has keeps a token at least).
    """

    def __init__(
        self, tables: Sequence[Table], bos: int | None, items: np.ndarray, lengths: np.ndarray
    ):
        self.tables = tables
        self.bos = bos
        self.items = items
        self.lengths = lengths
        self.k = lengths.shape[1] - 1
        # of each table's items among all
        self.offsets = [
            0,
            *accumulate(len(table.items) for table in tables),
        ]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Examples: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.select(i)
        item = int(self.items[i])
        t = bisect_right(self.offsets, item) - 1
        store, items, keep_end, _ = self.tables[t]
        row, *texts = items[item - self.offsets[t]].tolist()
        n_prompt, *n_tokens = self.lengths[i].tolist()
        text, file, number = store.rows[row].tolist()
        ids, starts = store.ids, store.starts
        n_bos = self.bos is not None
        start = starts.item(text + 1) - n_prompt + n_bos if keep_end else starts.item(text)
        prompt = np.empty(n_prompt, np.int32)
        prompt[n_bos:] = ids[start : start + n_prompt - n_bos]
        if n_bos:
            prompt[0] = self.bos
        responses = []
        # a table may have fewer columns than the longest list of another
        for text, n in zip(texts, n_tokens, strict=False):
            if n:
                start = starts.item(text)
                responses.append(ids[start : start + n].astype(np.int32))
        return Example(prompt, tuple(responses), f"{store.files[file]}:{number}")

    def select(self, indices: np.ndarray | slice) -> Examples:
        """Return the examples at these indices, or where this mask is true, in that order."""
        return Examples(self.tables, self.bos, self.items[indices], self.lengths[indices])

    def ids(self) -> np.ndarray:
        """Return the tokens of all examples, one after another, each prompt followed by its
        responses. [tokens] int32

        Takes about 30 bytes of memory per token: for many examples, call it slice by slice.
        """
        n = self.lengths.astype(np.int64)
        each = n.sum(1)
        ids = np.empty(each.sum(), np.int32)
        table_of = np.searchsorted(self.offsets, self.items, side="right") - 1
        for t in np.unique(table_of):
            store, items, keep_end, _ = self.tables[t]
            mine = table_of == t
            texts = items[self.items[mine] - self.offsets[t]]
            texts[:, 0] = store.rows[texts[:, 0], 0]
            starts = np.zeros((len(texts), n.shape[1]), np.int64)
            starts[:, : texts.shape[1]] = store.starts[texts]
            if keep_end:
                starts[:, 0] = store.starts[texts[:, 0] + 1] - n[mine, 0]
            elif self.bos is not None:
                starts[:, 0] -= (
                    # from there a prompt with BOS has its length; what stands there is overwritten
                    1
                )
            here = slice(None) if mine.all() else mine.repeat(each)
            ids[here] = store.ids[ranges(starts.ravel(), n[mine].ravel())]
        if self.bos is not None:
            ids[each.cumsum() - each] = self.bos
        return ids

    def extras(self) -> Extras:
        """Return what the examples carry beside their tokens."""
        example: dict[str, np.ndarray] = {}
        response: dict[str, np.ndarray] = {}
        for name, first in self.tables[0].extras.items() if self.tables else ():
            columns = [table.extras[name] for table in self.tables]
            if first.ndim == 1:
                example[name] = np.concatenate(columns)[self.items]
            else:
                room = [((0, 0), (0, self.k - column.shape[1])) for column in columns]
                filled = map(partial(np.pad, constant_values=nan), columns, room)
                response[name] = np.concatenate(list(filled))[self.items]
        return Extras(example, response)

    def margins(self) -> np.ndarray:
        """Return the score of chosen minus that of rejected for each pair; NaN if unknown, or
        without pairs.  [n] float32
        """
        margins = self.extras().example.get("margins")
        return np.full(len(self), nan, np.float32) if margins is None else margins

    def data_sets(self) -> np.ndarray:
        """Return the name of each example's data set.  [n] str"""
        names = np.array([table.store.name for table in self.tables])
        return names[np.searchsorted(self.offsets, self.items, side="right") - 1]

    def highest_id(self) -> int:
        """Return the highest token id in the stores, for which a model must have an embedding."""
        return max([self.bos or 0, *(int(table.store.ids.max(initial=0)) for table in self.tables)])

    # What the data rules read, for examples of one store; where there are many, in slices.

    def text(self, i: int) -> np.ndarray:
        """Return the numbers of the prompts' texts (i = 0), or of the i-th responses', in the
        store.  [n]
        """
        (table,) = self.tables
        numbers = table.items[self.items, i]
        return numbers if i else table.store.rows[numbers, 0]

    def of_text(self, column: str, i: int) -> np.ndarray:
        """Return a column of the store at these texts, 0 where an example has no i-th response.

        [n]
        """
        numbers = self.text(i)
        values = getattr(self.tables[0].store, column)[numbers]
        return np.where(numbers < 0, values.dtype.type(0), values)

    def digest(self, i: int) -> np.ndarray:
        return self.of_text("digests", i)  # [n]


def view(
    store: TokenStore,
    group: str,
    rules: TextRules,
    keep: str,
    bos: int | None,
    taking: Taking = EVERYTHING,
) -> Examples:
    """Return all examples of this group (see losses/contract.py) in a store, in its order; `keep`
    is "keep_end" or "keep_start".
    """
    items, extras = VIEWS[group](store, taking)
    weights = store.weights[items[:, 0]]  # an example weighs what its row does
    table = Table(store, items, keep == "keep_end", {**extras, "weights": weights})
    n = len(items)
    examples = Examples([table], bos, np.arange(n), np.empty((n, items.shape[1]), np.int32))
    for here in slices(n):
        lengths = _lengths(examples[here])
        examples.lengths[here] = truncate(lengths[:, 0], lengths[:, 1:], rules)
    return examples


View = tuple[np.ndarray, dict[str, np.ndarray]]  # items (see Table) and extras


def _targets(store: TokenStore, taking: Taking) -> View:
    return store.targets, {}


def _pairs(store: TokenStore, taking: Taking) -> View:
    """Return the pairs; of a ranked list, those that `list_pairs` names."""
    chosen, rejected, lowest = store.places.T
    kept = {
        "all": np.ones(len(chosen), bool),
        "best-worst": (chosen == 0) & (rejected == lowest),
        "adjacent": rejected - chosen == 1,
    }[taking.list_pairs]
    extras = {"margins": store.margins[kept]}
    if taking.soft_labels == "use":
        extras["p_chosen"] = store.p_chosen[kept]
    return np.ascontiguousarray(store.pairs[kept]), extras


def _lists(store: TokenStore, taking: Taking) -> View:
    """Return the lists that rank a response above another, with the levels of their responses; NaN
    where no two responses of any list rank alike.
    """
    lists = store.lists[ranks(store)]
    rows, starts, counts = lists.T
    k = int(counts.max(initial=2))
    items = np.full((len(rows), 1 + k), -1, np.int32)
    items[:, 0] = rows
    filled = np.arange(k) < counts[:, None]
    items[:, 1:][filled] = store.ranked[ranges(starts, counts)]
    levels = np.full((len(rows), k), nan, np.float32)
    levels[filled] = store.levels[ranges(starts, counts)]
    if (levels[filled] == np.broadcast_to(np.arange(k), filled.shape)[filled]).all():
        levels[:] = nan
    return items, {"levels": levels}


def ranks(store: TokenStore) -> np.ndarray:
    """Return which lists rank a response above another.  [lists] bool"""
    _, starts, counts = store.lists.T
    is_ranked = np.zeros(len(counts), bool)
    some = counts > 1
    is_ranked[some] = store.levels[(starts + counts - 1)[some]] > 0  # the last, the best being 0
    return is_ranked


def _labelled(store: TokenStore, taking: Taking) -> View:
    """Return the labelled responses, and with `unpair` each pair as a desirable and an undesirable
    one.
    """
    row, chosen, rejected = store.pairs.T if taking.unpair else store.pairs[:0].T
    yes, no = np.ones_like(row), np.zeros_like(row)
    unfolded = np.stack([row, chosen, yes, row, rejected, no], 1).reshape(-1, 3)
    both = np.concatenate([store.labelled, unfolded])
    return np.ascontiguousarray(both[:, :2]), {"labels": both[:, 2].astype(np.float32)}


# group -> the part of a store that it reads
VIEWS: dict[str, Callable[[TokenStore, Taking], View]] = {
    "single": _targets,
    "pair": _pairs,
    "list": _lists,
    "labelled": _labelled,
    "rollout": _targets,  # a prompt; its target, which may be empty, is for rewards
}


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Return the examples of all parts, one part after another."""
    if len(parts) == 1:
        return parts[0]
    tables = [table for part in parts for table in part.tables]
    offsets = accumulate(
        (sum(len(table.items) for table in part.tables) for part in parts), initial=0
    )
    items = np.concatenate(
        [part.items + offset for part, offset in zip(parts, offsets, strict=False)]
    )
    k = max(part.k for part in parts)
    lengths = [np.pad(part.lengths, ((0, 0), (0, k - part.k))) for part in parts]
    return Examples(tables, parts[0].bos, items, np.concatenate(lengths))


def select(examples: Sequence[Example], indices: np.ndarray) -> Sequence[Example]:
    """Return the examples at these indices, in that order; for a token store, without creating
    them.
    """
    return (
        examples.select(indices)
        if isinstance(examples, Examples)
        else [examples[i] for i in indices.tolist()]
    )


def ids_of(examples: Sequence[Example]) -> np.ndarray:
    """Return the tokens of all examples, each prompt followed by its responses.  [tokens] int32"""
    if isinstance(examples, Examples):
        return examples.ids()
    texts = [x for e in examples for prompt, responses in trees_of(e) for x in (prompt, *responses)]
    return np.concatenate([np.empty(0, np.int32), *texts], dtype=np.int32)


@dataclass(frozen=True, eq=False)
class Lengths:
    """Hold the numbers of tokens of n examples of at most k responses each, as columns: they are
    known without reading an example.

    A prompt is a root of the first response alone where an example's responses share it, else of
    every response. All three are 0 where an example has fewer than k responses.
    """

    prompts: np.ndarray  # [n, k] of the prompt that the response follows
    responses: np.ndarray  # [n, k]
    # [n, k] bool: is the prompt computed before this response? A shared one is, before the first
    roots: np.ndarray
    counts: np.ndarray  # [n] number of responses

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, indices: np.ndarray | slice) -> Lengths:
        return Lengths(
            self.prompts[indices],
            self.responses[indices],
            self.roots[indices],
            self.counts[indices],
        )

    @property
    def k(self) -> int:
        return self.prompts.shape[1]

    def tokens(self) -> np.ndarray:
        """Return each example's number of tokens, counting a shared prompt once.  [n]"""
        return (self.prompts * self.roots + self.responses).sum(1)

    def longest(self) -> np.ndarray:
        """Return, for each example, the tokens of the longest prompt with its response.  [n]"""
        return (self.prompts + self.responses).max(1, initial=0)

    def n_scored(self) -> int:
        """Return the number of response tokens that are predicted: all of them, without the first
        if no prompt token predicts it.
        """
        return int(np.maximum(self.responses - (self.prompts == 0), 0).sum())


def lengths_of(examples: Sequence[Example]) -> Lengths:
    """Return the lengths as columns; those of a token store are not copied."""
    if isinstance(examples, Examples):
        responses = examples.lengths[:, 1:]
        prompts = np.broadcast_to(examples.lengths[:, :1], responses.shape)
        counts = np.count_nonzero(responses, axis=1)
        if (counts < examples.k).any():
            prompts = prompts * (responses > 0)
        first = np.broadcast_to(np.arange(examples.k) == 0, responses.shape)
        return Lengths(prompts, responses, first, counts)
    counts = np.array([len(e.responses) for e in examples], np.int64)
    columns = np.zeros((len(examples), counts.max(initial=1), 3), np.int32)
    for i, e in enumerate(examples):
        columns[i, : counts[i]] = [
            (len(prompt), len(response), j == 0)
            for prompt, responses in trees_of(e)
            for j, response in enumerate(responses)
        ]
    prompts, responses, roots = columns.transpose(2, 0, 1)
    return Lengths(prompts, responses, roots.astype(bool), counts)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the numbers of all ranges, one after another.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    shift = starts - (lengths.cumsum() - lengths)
    return np.arange(lengths.sum()) + shift.repeat(lengths)


def slices(n: int) -> Iterator[slice]:
    """Yield parts of n examples, one after another, so small that intermediate results stay
    small.
    """
    return (slice(start, start + CHUNK) for start in range(0, n, CHUNK))


def _lengths(examples: Examples) -> np.ndarray:
    """Return `examples.lengths` before truncation."""
    starts = examples.tables[0].store.starts
    texts = np.column_stack([examples.text(i) for i in range(1 + examples.k)])
    lengths = np.where(texts < 0, 0, starts[texts + 1] - starts[texts])
    lengths[:, 0] += examples.bos is not None
    return lengths


# ---- cases of the data rules ----


def cases(examples: Examples) -> dict[str, np.ndarray]:
    """Return which examples belong to which case of `data_rules`, judged by their own texts and
    tokens.  [n] bool each
    """
    marks = np.column_stack([examples.of_text("marks", i) for i in range(1 + examples.k)])
    cut = examples.lengths < _lengths(examples)
    by_case: dict[str, Any] = {
        "prompt_truncated": cut[:, 0],
        "response_truncated": cut[:, 1:].any(1),
        "eos_in_text": (marks & HAS_EOS).any(1),
        "text_changed": (marks & CHANGED).any(1),
        "empty_prompt": marks[:, 0] & BLANK > 0,
        "empty_response": (marks[:, 1:] & BLANK).any(1),
    }
    if examples.k == 2:
        same_text = examples.digest(1) == examples.digest(2)
        by_case |= {
            "identical_pair": same_text,
            "identical_after_truncation": _same_ids(examples) & ~same_text,
        }
    return by_case


def _same_ids(examples: Examples) -> np.ndarray:
    """Return where chosen and rejected are the same tokens.  [n] bool"""
    ids, starts = examples.tables[0].store.ids, examples.tables[0].store.starts
    same = examples.lengths[:, 1] == examples.lengths[:, 2]
    some = examples.select(same)
    lengths = some.lengths[:, 1].astype(np.int64)
    chosen, rejected = (ids[ranges(starts[some.text(i)], lengths)] for i in (1, 2))
    if len(some):
        same[same] = np.logical_and.reduceat(chosen == rejected, lengths.cumsum() - lengths)
    return same


def _keys(examples: Examples, columns: Sequence[int]) -> np.ndarray:
    """Return a 64-bit key of these texts in this order.  [n]"""
    keys = np.zeros(len(examples), np.uint64)
    for i in columns:
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + examples.digest(i)
    return keys


def contradicted(examples: Examples) -> np.ndarray:
    """Return where a pair of two different responses also stands there the other way round, and
    where a response is desirable in one example and undesirable in another.  [n] bool
    """
    labels = examples.extras().example.get("labels")
    if labels is not None:
        keys = _keys(examples, (0, 1))
        both = np.intersect1d(keys[labels > 0], keys[labels == 0])
        return np.isin(keys, both)
    if examples.k != 2:
        return np.zeros(len(examples), bool)
    return np.isin(_keys(examples, (0, 2, 1)), _keys(examples, (0, 1, 2))) & (
        examples.digest(1) != examples.digest(2)
    )


def seen_before(examples: Examples) -> np.ndarray:
    """Return which examples have the same prompt and responses as an earlier one.  [n] bool"""
    keys = _keys(examples, range(1 + examples.k))
    order = np.argsort(keys, kind="stable")  # equal ones side by side, the first of them first
    keys = keys[order]
    again = np.zeros(len(keys), bool)
    again[order[1:][keys[1:] == keys[:-1]]] = True
    return again
