"""Check what a loader returns, `{prompt: Prompt}` or rows, and turn it into `Row`s."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

from plumb.data.files import RawRow, Text, describe, shorten
from plumb.data.rows import Row
from plumb.data.scores import check_scores
from plumb.data.weights import row_p_chosen, row_weight
from plumb.errors import UserError


def check_loaded(name: str, loaded: Any) -> Iterator[Row]:
    """Yield a loader's prompts as Rows. Raise UserError for what breaks the contract, naming
    loader, prompt and field.
    """
    for n, (prompt, entry) in enumerate(_entries(name, loaded), 1):
        row = RawRow(entry, f"get_{name}", n, f"prompt {shorten(prompt)}, number")
        if not isinstance(entry, Mapping):
            raise row.error(
                f"it has {describe(entry)}", "return {responses, pairs, sft_target} for it"
            )
        row = row._replace(fields={"prompt": prompt, **entry})
        prompt = row.text_or_messages("prompt")
        responses = _checked_responses(row)
        target = row.value("sft_target")
        target = None if target is None else row.check_text(target, "sft_target")
        scores = entry.get("scores")
        scores = None if scores is None else check_scores(row, scores, "scores", len(responses))
        pairs = _checked_pairs(row, len(responses))
        yield Row(
            prompt=prompt,
            responses=responses,
            pairs=pairs,
            sft_target=target,
            source=f"{name}:{n}",
            scores=scores,
            weight=row_weight(row),
            p_chosen=row_p_chosen(row, len(pairs)),
        )


def _entries(name: str, loaded: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (prompt, what the loader returned for it), for whatever it returned."""
    if isinstance(loaded, Mapping):
        yield from loaded.items()
    elif isinstance(loaded, Iterable) and not isinstance(loaded, str):
        for entry in loaded:
            yield dict(entry).get("prompt") if isinstance(entry, Mapping) else None, entry
    else:
        raise UserError(
            f"get_{name} returned {describe(loaded)}; return {{prompt: {{responses, pairs,"
            " sft_target}}"
        )


def _checked_responses(row: RawRow) -> list[Text]:
    """Return the row's responses; raise UserError for what is no list of texts."""
    responses = row.value("responses")
    if not isinstance(responses, list):
        raise row.error(
            f"field 'responses' is {describe(responses)}, not a list",
            "return a list of strings",
        )
    for i, response in enumerate(responses):
        row.check_text(response, f"responses[{i}]")
    return responses


def _checked_pairs(row: RawRow, n_responses: int) -> list[tuple[int, int]]:
    pairs = row.value("pairs")
    if not isinstance(pairs, list):
        raise row.error(
            f"field 'pairs' is {describe(pairs)}, not a list",
            "return (preferred, dispreferred) indices",
        )
    for i, pair in enumerate(pairs):
        good = (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and all(isinstance(index, Integral) for index in pair)
        )
        if not good or not all(0 <= index < n_responses for index in pair) or pair[0] == pair[1]:
            problem = (
                f"field 'pairs[{i}]' is {describe(pair)}, not two different indices into"
                f" {n_responses} responses"
            )
            raise row.error(problem, "return (preferred, dispreferred)")
    return [(int(preferred), int(dispreferred)) for preferred, dispreferred in pairs]
