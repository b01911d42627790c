"""How published data sets are written: HH's dialogues, SHP's pairs, and the forms of UltraFeedback
and Stack Exchange.
"""

from __future__ import annotations

from plumb.data.files import RawRow, Text, describe
from plumb.data.forms import Form
from plumb.data.forms.rankings import ranked_row
from plumb.data.forms.turns import as_messages, instruction
from plumb.data.rows import Row
from plumb.data.scores import check_scores

ASSISTANT = "\n\nAssistant:"


def hh_prompt(question: str) -> str:
    """Return the question as the beginning of an HH dialogue."""
    return f"\n\nHuman: {question}{ASSISTANT}"


def split_transcript(row: RawRow, field: str) -> tuple[str, str]:
    """Split an HH transcript into (text through the last "\\n\\nAssistant:", the rest)."""
    return split_text(row, row.text(field), field)


def split_text(row: RawRow, text: str, field: str) -> tuple[str, str]:
    """Split a text, the row's `field`, as `split_transcript` does."""
    before, marker, response = text.rpartition(ASSISTANT)
    if not marker:
        raise row.error(
            f"field '{field}' holds no '\\n\\nAssistant:' to end the prompt",
            "add it, or a field 'prompt'",
        )
    return before + marker, response


def shp_pair(row: RawRow) -> tuple[list[str], list[float], tuple[int, int]]:
    """Return (responses A and B, their scores, (preferred, dispreferred) by `labels`) for a row of
    SHP.
    """
    responses = [" " + row.text("human_ref_A"), " " + row.text("human_ref_B")]
    scores = check_scores(row, [row.value("score_A"), row.value("score_B")], "score_A, score_B", 2)
    label = row.value("labels")
    if label not in (0, 1):
        raise row.error(
            f"field 'labels' is {describe(label)}, not 1 (A preferred) or 0 (B preferred)",
            "fix the row",
        )
    return responses, scores, (0, 1) if label == 1 else (1, 0)


def _ultrafeedback(row: RawRow) -> Row:
    """Read openbmb/UltraFeedback as published: a completion is {response, overall_score, ...}."""
    completions = row.value("completions")
    if not isinstance(completions, list) or not completions:
        raise row.error(
            f"field 'completions' is {describe(completions)}, not a list of completions",
            "write at least one",
        )
    for i, completion in enumerate(completions):
        if (
            not isinstance(completion, dict)
            or not {"response", "overall_score"} <= completion.keys()
        ):
            raise row.error(
                f"field 'completions[{i}]' is {describe(completion)}",
                "write {response, overall_score}",
            )
    scores = [completion["overall_score"] for completion in completions]
    scores = check_scores(row, scores, "completions.overall_score", len(completions))
    texts: list[Text] = [
        as_messages(
            row,
            row.check_text(completion["response"], f"completions[{i}].response"),
            "assistant",
            f"completions[{i}].response",
        )
        for i, completion in enumerate(completions)
    ]
    return ranked_row(row, instruction(row), texts, scores, True)


def _stack_exchange_pair(row: RawRow) -> Row:
    """Read lvwerra/stack-exchange-paired, where response_j is preferred. Turned into HH's dialogue,
    as `get_se` does.
    """
    chosen, rejected = " " + row.text("response_j"), " " + row.text("response_k")
    return Row(
        prompt=hh_prompt(row.text("question")),
        responses=[chosen, rejected],
        pairs=[(0, 1)],
        sft_target=chosen,
        source=row.source,
    )


FORMS = (
    Form("instruction / completions", ("instruction", "completions"), _ultrafeedback),
    Form(
        "question / response_j / response_k",
        ("question", "response_j", "response_k"),
        _stack_exchange_pair,
    ),
)
