"""Read files of prompts and answers: what sample.py writes, and a few other forms; with scores,
and split by them.

A line holds {prompt, answers: [...]}, {prompt, response}, {instruction, (input,) output}, or
{instruction, (input,) output_1, output_2}; a scored pair {prompt, chosen, rejected}. Scores are in
`scores`, `score` or `output_1_score` beside the answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plumb.data.files import RawRow, Text, describe, read_file
from plumb.data.rows import Row
from plumb.errors import UserError

FORMS = (
    "{prompt, answers}, {prompt, response}, {instruction, output} or {instruction, output_1,"
    " output_2}"
)


class Answered(NamedTuple):
    """Hold a prompt and its answers, one line of a file."""

    prompt: Text
    answers: list[str]
    raw: RawRow

    @property
    def model(self) -> str:
        """Return whose answers these are: the line's `model`, otherwise the file's name."""
        name = self.raw.fields.get("model")
        return name if isinstance(name, str) and name else Path(self.raw.file).stem

    @property
    def key(self) -> str:
        """Return a key that is the same for equal prompts."""
        return json.dumps(self.prompt, ensure_ascii=False)

    def rows(self) -> list[Row]:
        """Return one row per answer, in the form used for training: after messages, an answer is
        the assistant's.
        """
        if isinstance(self.prompt, str):
            return [
                Row(
                    prompt=self.prompt,
                    responses=[answer],
                    pairs=[],
                    sft_target=answer,
                    source=self.raw.source,
                )
                for answer in self.answers
            ]
        turns: list[Text] = [
            [{"role": "assistant", "content": answer.strip()}] for answer in self.answers
        ]
        return [
            Row(
                prompt=self.prompt,
                responses=[turn],
                pairs=[],
                sft_target=turn,
                source=self.raw.source,
            )
            for turn in turns
        ]

    def with_scores(self, scores: Sequence[float]) -> dict[str, Any]:
        """Return the line with its answers' scores."""
        names = score_fields(self.raw)
        return {**self.raw.fields} | (
            {names[0]: list(scores)}
            if names == ["scores"]
            else dict(zip(names, scores, strict=True))
        )


def score_fields(raw: RawRow) -> list[str]:
    """Return the fields that hold the scores of a line's answers, or will."""
    if "answers" in raw.fields:
        return ["scores"]
    return ["output_1_score", "output_2_score"] if "output_1" in raw.fields else ["score"]


def read_answers(path: Path) -> Iterator[Answered]:
    """Yield the file's lines. Raise UserError that names file, line and field."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a file of {FORMS}")
    return map(_answered, read_file(path))


def _answered(raw: RawRow) -> Answered:
    if "answers" in raw.fields:
        answers = raw.fields["answers"]
        if not isinstance(answers, list) or not answers:
            raise raw.error(
                f"field 'answers' is {describe(answers)}, not a list of answers",
                "write at least one",
            )
        texts = [raw.check_text(answer, f"answers[{i}]") for i, answer in enumerate(answers)]
    elif "output_1" in raw.fields:
        texts = [raw.text("output_1"), raw.text("output_2")]
    elif name := next((name for name in ("response", "output") if name in raw.fields), None):
        texts = [raw.text(name)]
    else:
        raise raw.error(f"no answers (the row has: {raw.names})", f"write {FORMS}")
    return Answered(_prompt(raw), texts, raw)


def _prompt(raw: RawRow) -> Text:
    """Return an instruction, followed by a blank line and its input, as a user's turn, unless it
    has already been rendered.
    """
    field = (
        "instruction" if "instruction" in raw.fields and "prompt" not in raw.fields else "prompt"
    )
    text = raw.text_or_messages(field)
    if field == "prompt" or isinstance(text, list) or text.endswith("Assistant:"):
        return text
    more = "\n\n" + raw.text("input") if raw.fields.get("input") else ""
    return [{"role": "user", "content": text + more}]


class Ranked(NamedTuple):
    """Hold a scored line as a pair: a row of a data set, and the margin of its better answer."""

    # prompt (or instruction and input), chosen, rejected, chosen_score, rejected_score, margin
    row: dict[str, Any]
    margin: float


def read_ranked(path: Path) -> Iterator[Ranked]:
    """Yield the better and the worse answer of each scored line; if there are more than two, the
    best and the worst. A margin of 0 is a tie.

    Raises UserError for a line without scores, or with one answer.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the output of score.py pairs or answers")
    for raw in read_file(path):
        if "chosen" in raw.fields:
            scores = [
                _score(raw, name, raw.value(name)) for name in ("chosen_score", "rejected_score")
            ]
            texts = [raw.text_or_messages(name) for name in ("chosen", "rejected")]
            prompt = {"prompt": raw.text_or_messages("prompt")}
        else:
            answered = _answered(raw)
            values = (
                raw.value("scores")
                if "answers" in raw.fields
                else [raw.value(name) for name in score_fields(raw)]
            )
            if not isinstance(values, list) or len(values) != len(answered.answers):
                raise raw.error(
                    f"field 'scores' is {describe(values)}",
                    f"write {len(answered.answers)} numbers, one for each answer",
                )
            scores = [_score(raw, f"scores[{i}]", score) for i, score in enumerate(values)]
            if len(scores) < 2:
                raise raw.error("one answer, but a pair needs two", "sample two or more")
            prompt = {"prompt": answered.prompt}
            # after messages as it was scored: the template adds what is around it
            as_it_stands = isinstance(answered.prompt, str)
            texts = [text if as_it_stands else text.strip() for text in answered.answers]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        margin = scores[best] - scores[worst]
        row = prompt | {
            "chosen": texts[best],
            "rejected": texts[worst],
            "chosen_score": scores[best],
            "rejected_score": scores[worst],
            "margin": margin,
        }
        yield Ranked(row, margin)


def _score(raw: RawRow, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise raw.error(
            f"field '{field}' is {describe(value)}, not a finite number",
            "score the file with score.py",
        )
    return float(value)
