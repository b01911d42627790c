"""The scores of a row's responses, and the pairs that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from plumb.data.files import RawRow, describe
from plumb.data.rows import EQUAL_SCORES, skipped


def check_scores(row: RawRow, scores: Any, field: str, n: int) -> list[float]:
    """Return the n scores of a row's responses as numbers. Raise UserError for anything else: NaN,
    and what float32 can't hold.
    """
    if not isinstance(scores, list) or len(scores) != n:
        raise row.error(
            f"field '{field}' is {describe(scores)}, not a list of {n} numbers",
            "write one for each response",
        )
    return [check_number(row, score, f"{field}[{i}]") for i, score in enumerate(scores)]


def number_of(row: RawRow, field: str) -> float:
    """Return a field's finite number, which a CSV holds as text. Raise UserError for others."""
    value = row.value(field)
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    return check_number(row, value, field)


def check_number(row: RawRow, value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise row.error(
            f"field '{field}' is {describe(value)}, not a finite number",
            f"fix or remove the {row.unit}",
        )
    return value


def score_pairs(scores: list[float]) -> list[tuple[int, int]]:
    """Return every (better, worse); equal scores carry no preference, and are counted.

    >>> score_pairs([1, 3, 1])
    [(1, 0), (1, 2)]
    """
    pairs = []
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            if scores[i] == scores[j]:
                skipped(EQUAL_SCORES)
            else:
                pairs.append((i, j) if scores[i] > scores[j] else (j, i))
    return pairs


def pair_scores(row: RawRow) -> list[float] | None:
    """Return the scores of chosen and rejected, if the row or its `metadata` has both
    (UltraFeedback).
    """
    for fields in (row.fields, row.fields.get("metadata")):
        for names in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
            values = [fields.get(name) for name in names] if isinstance(fields, Mapping) else [None]
            if all(value not in (None, "") for value in values):
                with suppress(ValueError):  # a CSV's cells are strings
                    values = [float(value) if isinstance(value, str) else value for value in values]
                return check_scores(row, values, ", ".join(names), 2)
    return None
