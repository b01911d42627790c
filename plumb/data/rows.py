"""What the rest of the code knows of a row of data, and how rows that are left out are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from plumb.data.files import Text

PROMPTS_DIFFER = "prompts of the pair differ"
EQUAL_SCORES = "equal scores"


class Row(NamedTuple):
    """Hold one prompt with its responses; this is what the rest of the code consumes."""

    prompt: Text
    responses: list[Text]
    pairs: list[tuple[int, int]]  # (preferred, dispreferred) indices into responses
    sft_target: Text | None
    # "my.jsonl:17": a line (jsonl, csv) or a row, from 1; "hh:123": the 123rd prompt of the split
    source: str
    scores: list[float] | None = None  # of the responses, one each, where they're known
    # fields that no form reads, such as tools; a chat template may
    more: Mapping[str, Any] | None = None
    # one for each response: the higher, the better; None: only the pairs are known
    ranking: list[float] | None = None
    labels: list[bool] | None = None  # of the responses, one each: is it desirable?
    weight: float | None = None  # how many rows it counts as; None: not given
    # soft label of its pair: the probability that chosen is the preferred one
    p_chosen: float | None = None
    prefix: str = ""  # what its responses begin with beside their own text


# get_dataset's; None: they are not counted
counted: ContextVar[Counter[str] | None] = ContextVar("counted", default=None)


def skipped(reason: str, n: int = 1) -> None:
    """Count `n` rows or pairs left out for `reason`. Forms and loaders call it; `get_dataset`
    reports the counts.
    """
    counter = counted.get()
    if counter is not None:
        counter[reason] += n


def is_empty(value: Any) -> bool:
    """Return whether a field says nothing: null, or an empty text, list or table."""
    return value in (None, "", "[]", "{}", [], {})
