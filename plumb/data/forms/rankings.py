"""The forms of responses with scores or ranks."""

from __future__ import annotations

from plumb.data.files import RawRow, Text, describe
from plumb.data.forms import Form
from plumb.data.forms.turns import as_messages
from plumb.data.rows import Row
from plumb.data.scores import check_scores, score_pairs


def _scored(row: RawRow) -> Row:
    return _ranked(row, check_scores(row, row.value("scores"), "scores", _n_responses(row)), True)


def _with_ranks(row: RawRow) -> Row:
    """Read ranks, of which 1 is the best. Ranks order responses, but do not say how far apart they
    are.
    """
    ranks = check_scores(row, row.value("ranks"), "ranks", _n_responses(row))
    return _ranked(row, [-rank for rank in ranks], False)


def _n_responses(row: RawRow) -> int:
    """Return the number of responses; raise UserError for what is no list of them."""
    responses = row.value("responses")
    if not isinstance(responses, list) or not responses:
        raise row.error(
            f"field 'responses' is {describe(responses)}, not a list of responses",
            "write at least one",
        )
    return len(responses)


def _ranked(row: RawRow, ranking: list[float], as_scores: bool) -> Row:
    """Return the row of ranked responses, where a higher number is better; `as_scores`: the numbers
    say how far apart they are.
    """
    prompt, responses = row.text_or_messages("prompt"), row.value("responses")
    texts: list[Text] = [
        row.check_text_or_messages(response, f"responses[{i}]")
        for i, response in enumerate(responses)
    ]
    if any(isinstance(text, list) for text in (prompt, *texts)) or "system" in row.fields:
        prompt = as_messages(row, prompt, "user", "prompt")
        texts = [
            as_messages(row, text, "assistant", f"responses[{i}]") for i, text in enumerate(texts)
        ]
    return ranked_row(row, prompt, texts, ranking, as_scores)


def ranked_row(
    row: RawRow, prompt: Text, texts: list[Text], ranking: list[float], as_scores: bool
) -> Row:
    """Return the row of these responses with all pairs that their ranking makes (see `_ranked`)."""
    return Row(
        prompt=prompt,
        responses=texts,
        pairs=score_pairs(ranking),
        sft_target=texts[ranking.index(max(ranking))],
        source=row.source,
        scores=ranking if as_scores else None,
        ranking=ranking,
    )


FORMS = (
    Form("prompt / responses / scores", ("prompt", "responses", "scores"), _scored),
    Form("prompt / responses / ranks", ("prompt", "responses", "ranks"), _with_ranks),
)
