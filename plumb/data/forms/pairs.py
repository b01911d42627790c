"""The forms of a chosen response and one or more rejected ones."""

from __future__ import annotations

from collections.abc import Mapping

from plumb.data.files import RawRow, Text
from plumb.data.forms import TRANSCRIPTS, Form
from plumb.data.forms.published import split_text
from plumb.data.forms.turns import as_messages, asked, instruction, split_turns
from plumb.data.rows import PROMPTS_DIFFER, Row, is_empty, skipped
from plumb.data.scores import pair_scores


def _prompt_pair(row: RawRow) -> Row | None:
    return pair_row(row, row.text_or_messages("prompt"))


def _conversation_pair(row: RawRow) -> Row | None:
    return pair_row(row, row.messages("conversations"))


def _instruction_pair(row: RawRow) -> Row | None:
    return pair_row(row, instruction(row), target="output")


def _question_pair(row: RawRow) -> Row | None:
    return pair_row(row, asked(row, "question"))


def _input_pair(row: RawRow) -> Row | None:
    return pair_row(row, asked(row, "input"))


def _openai_pair(row: RawRow) -> Row | None:
    """Read OpenAI's form: `input` is {messages, tools, ...}."""
    value = row.value("input")
    within = value if isinstance(value, dict) and "messages" in value else {"messages": value}
    field = "input.messages" if within is value else "input"
    prompt = row.check_text_or_messages(within["messages"], field)
    if isinstance(prompt, str):
        prompt = [row.turn("user", prompt, field)]
    pair = pair_row(row, prompt, "preferred_output", "non_preferred_output")
    more = {k: v for k, v in within.items() if k != "messages" and not is_empty(v)}
    return pair and pair._replace(more=more)


def _transcript_pair(row: RawRow) -> Row | None:
    """Read two complete dialogues, as HH transcripts or as messages, that differ in the last
    answer.
    """
    texts = {"chosen": row.text_or_messages("chosen"), **_several(row, "rejected")}
    if any(isinstance(text, list) for text in texts.values()):
        return pair_row(row, [])
    halves = {field: split_text(row, str(text), field) for field, text in texts.items()}
    return _pair_of(row, halves, "chosen", "chosen")


def pair_row(
    row: RawRow,
    prompt: Text,
    chosen: str = "chosen",
    rejected: str = "rejected",
    target: str = "sft_target",
) -> Row | None:
    """Return chosen, and one or more rejected, after `prompt`; SFT imitates the field `target`
    instead of chosen, if it exists.
    """
    texts = {chosen: row.text_or_messages(chosen), **_several(row, rejected)}
    if row.fields.get(target) is not None:
        texts[target] = row.text_or_messages(target)
    if (
        all(isinstance(text, str) for text in (prompt, *texts.values()))
        and "system" not in row.fields
    ):
        halves = {field: (prompt, text) for field, text in texts.items()}
    else:
        before = as_messages(row, prompt, "user", "prompt")
        halves = {field: split_turns(row, before, text, field) for field, text in texts.items()}
    return _pair_of(row, halves, chosen, target if target in texts else chosen)


def _pair_of(
    row: RawRow, halves: Mapping[str, tuple[Text, Text]], chosen: str, target: str
) -> Row | None:
    """Return the row of (prompt, response) by field; a rejected response after a different prompt
    is skipped and counted.
    """
    prompt = halves[chosen][0]
    rejected = {field: half for field, half in halves.items() if field not in (chosen, target)}
    responses = [response for other, response in rejected.values() if other == prompt]
    if len(responses) < len(rejected):
        skipped(PROMPTS_DIFFER, len(rejected) - len(responses))
    if not responses:
        return None
    pairs = [(0, i + 1) for i in range(len(responses))]
    scores = pair_scores(row) if len(responses) == len(rejected) == 1 else None
    return Row(
        prompt=prompt,
        responses=[halves[chosen][1], *responses],
        pairs=pairs,
        sft_target=halves[target][1],
        source=row.source,
        scores=scores,
    )


def _several(row: RawRow, field: str) -> dict[str, Text]:
    """Return a response, or each of a list of them, with the field it is in."""
    value = row.value(field)
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        return {
            f"{field}[{i}]": row.check_text_or_messages(each, f"{field}[{i}]")
            for i, each in enumerate(value)
        }
    return {field: row.check_text_or_messages(value, field)}


FORMS = (
    Form("prompt / chosen / rejected", ("prompt", "chosen", "rejected"), _prompt_pair),
    Form(
        "conversations / chosen / rejected",
        ("conversations", "chosen", "rejected"),
        _conversation_pair,
    ),
    Form(
        "instruction + input / chosen / rejected",
        ("instruction", "chosen", "rejected"),
        _instruction_pair,
    ),
    Form("question / chosen / rejected", ("question", "chosen", "rejected"), _question_pair),
    Form("input / chosen / rejected", ("input", "chosen", "rejected"), _input_pair),
    Form(
        "input / preferred_output / non_preferred_output",
        ("input", "preferred_output", "non_preferred_output"),
        _openai_pair,
    ),
    Form(TRANSCRIPTS, ("chosen", "rejected"), _transcript_pair),
)
