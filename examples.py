"""Examples as a view of token stores: which pairs or targets, cut to which lengths. One is made only when it is asked for.

n examples, k responses each (1 for SFT, 2 for pairs). An example costs 8 + 4 * (1 + k) bytes beside the mapped files.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import nan
from typing import Any, NamedTuple, overload

import numpy as np

from token_store import TokenStore
from tokenization import BLANK, HAS_EOS, Example, TextRules, truncate

CHUNK = 1 << 16  # examples that are looked at together: what is computed of them stays small


class Table(NamedTuple):
    """A store, and what is taken from it."""

    store: TokenStore
    items: np.ndarray  # [N, 1 + k] (row, text of each response)
    keep_end: bool  # which end of a long prompt survives


class Examples(Sequence[Example]):
    """Examples of one or several stores. `examples[i]` is an Example; slices and `select` give views.

    `lengths` [n, 1 + k] int32: tokens of the prompt, BOS included, and of each response, after truncation.
    """

    def __init__(self, tables: Sequence[Table], bos: int | None, items: np.ndarray, lengths: np.ndarray):
        self.tables, self.bos, self.items, self.lengths = tables, bos, items, lengths
        self.k = lengths.shape[1] - 1
        self.offsets = [0, *accumulate(len(table.items) for table in tables)]  # of each table's items among all

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
        store, items, keep_end = self.tables[t]
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
        for text, n in zip(texts, n_tokens, strict=True):
            start = starts.item(text)
            responses.append(ids[start : start + n].astype(np.int32))
        margin = store.margins.item(item - self.offsets[t]) if self.k == 2 else nan
        return Example(prompt, tuple(responses), f"{store.files[file]}:{number}", margin)

    def select(self, indices: np.ndarray | slice) -> Examples:
        """The examples at these indices, or where this mask is true, in that order."""
        return Examples(self.tables, self.bos, self.items[indices], self.lengths[indices])

    def margins(self) -> np.ndarray:
        """The score of chosen less that of rejected, of each pair; NaN where unknown, or without pairs.  [n] float32"""
        if self.k != 2:
            return np.full(len(self), nan, np.float32)
        return np.concatenate([table.store.margins for table in self.tables])[self.items]

    def data_sets(self) -> np.ndarray:
        """The name of each example's data set.  [n] str"""
        names = np.array([table.store.name for table in self.tables])
        return names[np.searchsorted(self.offsets, self.items, side="right") - 1]

    def highest_id(self) -> int:
        """The highest token id in the stores, which a model must have an embedding for."""
        return max([self.bos or 0, *(int(table.store.ids.max(initial=0)) for table in self.tables)])

    # What the data rules look at, of examples from one store: slices of it, where there are many.

    def text(self, i: int) -> np.ndarray:
        """Numbers of the prompts' texts (i = 0), or of the i-th responses', in the store.  [n]"""
        (table,) = self.tables
        numbers = table.items[self.items, i]
        return numbers if i else table.store.rows[numbers, 0]

    def digest(self, i: int) -> np.ndarray:
        return self.tables[0].store.digests[self.text(i)]  # [n]


def view(store: TokenStore, pairs: bool, rules: TextRules, keep: str, bos: int | None) -> Examples:
    """All pairs, or all SFT targets, of a store, in its order; `keep` is "keep_end" or "keep_start"."""
    table = Table(store, store.pairs if pairs else store.targets, keep == "keep_end")
    n, k = len(table.items), 2 if pairs else 1
    whole = Examples([table], bos, np.arange(n), np.empty((n, 1 + k), np.int32))
    for here in slices(n):
        lengths = _lengths(whole[here])
        whole.lengths[here] = truncate(lengths[:, 0], lengths[:, 1:], rules)
    return whole


def concatenate(parts: Sequence[Examples]) -> Examples:
    """The examples of all parts, one part after another."""
    if len(parts) == 1:
        return parts[0]
    tables = [table for part in parts for table in part.tables]
    offsets = accumulate((sum(len(table.items) for table in part.tables) for part in parts), initial=0)
    items = np.concatenate([part.items + offset for part, offset in zip(parts, offsets, strict=False)])
    return Examples(tables, parts[0].bos, items, np.concatenate([part.lengths for part in parts]))


def slices(n: int) -> Iterator[slice]:
    """Parts of n examples, one after another, such that what is computed of each stays small."""
    return (slice(start, start + CHUNK) for start in range(0, n, CHUNK))


def _lengths(examples: Examples) -> np.ndarray:
    """`examples.lengths` as they were before truncation."""
    starts = examples.tables[0].store.starts
    texts = np.column_stack([examples.text(i) for i in range(1 + examples.k)])
    lengths = starts[texts + 1] - starts[texts]
    lengths[:, 0] += examples.bos is not None
    return lengths


# ---- cases of the data rules ----


def cases(examples: Examples) -> dict[str, np.ndarray]:
    """Which examples are of which case of `data_rules`, by their own texts and tokens.  [n] bool each"""
    marks = np.column_stack([examples.tables[0].store.marks[examples.text(i)] for i in range(1 + examples.k)])
    cut = examples.lengths < _lengths(examples)
    found: dict[str, Any] = {
        "prompt_truncated": cut[:, 0],
        "response_truncated": cut[:, 1:].any(1),
        "eos_in_text": (marks & HAS_EOS).any(1),
        "empty_prompt": marks[:, 0] & BLANK > 0,
        "empty_response": (marks[:, 1:] & BLANK).any(1),
    }
    if examples.k == 2:
        same_text = examples.digest(1) == examples.digest(2)
        found |= {"identical_pair": same_text, "identical_after_truncation": _same_ids(examples) & ~same_text}
    return found


def _same_ids(examples: Examples) -> np.ndarray:
    """Where chosen and rejected are the same tokens.  [n] bool"""
    ids, starts = examples.tables[0].store.ids, examples.tables[0].store.starts
    same = examples.lengths[:, 1] == examples.lengths[:, 2]
    some = examples.select(same)
    lengths = some.lengths[:, 1].astype(np.int64)
    ends = np.cumsum(lengths)
    within = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)  # position in its response, of every token
    chosen, rejected = (ids[np.repeat(starts[some.text(i)], lengths) + within] for i in (1, 2))
    if len(some):
        same[same] = np.logical_and.reduceat(chosen == rejected, ends - lengths)
    return same


def _keys(examples: Examples, columns: Sequence[int]) -> np.ndarray:
    """64 bits that stand for these texts in this order.  [n]"""
    keys = np.zeros(len(examples), np.uint64)
    for i in columns:
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + examples.digest(i)
    return keys


def contradicted(examples: Examples) -> np.ndarray:
    """Pairs of two different responses that also stand there the other way round.  [n] bool"""
    if examples.k != 2:
        return np.zeros(len(examples), bool)
    return np.isin(_keys(examples, (0, 2, 1)), _keys(examples, (0, 1, 2))) & (examples.digest(1) != examples.digest(2))


def seen_before(examples: Examples) -> np.ndarray:
    """Examples of which an earlier one has the same prompt and responses.  [n] bool"""
    keys = _keys(examples, range(1 + examples.k))
    order = np.argsort(keys, kind="stable")  # equal ones side by side, the first of them first
    keys = keys[order]
    again = np.zeros(len(keys), bool)
    again[order[1:][keys[1:] == keys[:-1]]] = True
    return again
