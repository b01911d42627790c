"""The forms of SFT targets: a response to imitate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plumb.data.files import Message, RawRow, Text
from plumb.data.forms import Form
from plumb.data.forms.turns import answers, as_messages, instruction, split_turns
from plumb.data.rows import Row, skipped

UNTRAINED = "no answer with a weight above 0"
BEHIND = "turns after the last answer"
MARKS = ("weight", "train")  # of a turn: 0 or false where it is not to be trained


def _completion(row: RawRow) -> Row | None:
    return target_row(row, row.text_or_messages("prompt"), "completion")


def _response(row: RawRow) -> Row | None:
    return target_row(row, row.text_or_messages("prompt"), "response")


def _sft_messages(row: RawRow) -> Row | None:
    return target_row(row, [], "messages")


def _sft_conversations(row: RawRow) -> Row | None:
    return target_row(row, [], "conversations")


def _sft_instruction(row: RawRow) -> Row | None:
    return target_row(row, instruction(row), "output")


def _sft_text(row: RawRow) -> Row | None:
    """Read a text, all of which is trained on."""
    text = row.text("text")
    return Row(
        prompt="",
        responses=[text],
        pairs=[],
        sft_target=text,
        source=row.source,
    )


def _prompt_alone(row: RawRow) -> Row | None:
    """Read a prompt that the policy itself responds to."""
    prompt = row.text_or_messages("prompt")
    if isinstance(prompt, list) or "system" in row.fields:
        prompt = as_messages(row, prompt, "user", "prompt")
    return Row(
        prompt=prompt,
        responses=[""],
        pairs=[],
        sft_target="",
        source=row.source,
    )


def target_row(row: RawRow, prompt: Text, field: str) -> Row | None:
    """Return a row whose response is the target; of a dialogue, the last turn that answers and
    isn't marked as not to be trained on.
    """
    target = row.messages(field) if prompt == [] else row.text_or_messages(field)
    if isinstance(prompt, list) or isinstance(target, list) or "system" in row.fields:
        if isinstance(target, list):
            places = [i for i, turn in enumerate(target) if answers(turn)]
            trained = [i for i in places if not _unmarked(target[i])]
            if places and not trained:
                skipped(UNTRAINED)
                return None
            last = max(trained, default=len(target))
            if target[last + 1 :]:
                skipped(BEHIND, len(target[last + 1 :]))
            target = [_less_mark(turn) for turn in target[: last + 1]]
        prompt, target = split_turns(row, as_messages(row, prompt, "user", "prompt"), target, field)
    return Row(
        prompt=prompt,
        responses=[target],
        pairs=[],
        sft_target=target,
        source=row.source,
    )


def _unmarked(turn: Mapping[str, Any]) -> bool:
    return any(turn.get(mark) in (0, False) and turn.get(mark) is not None for mark in MARKS)


def _less_mark(turn: Mapping[str, Any]) -> Message:
    """Return the turn without the marks that say yes or no; a weight in between is not used, and
    stays so that it is reported.
    """
    assert isinstance(turn, Message)
    return turn.without(*(mark for mark in MARKS if turn.get(mark) in (0, 1)))


FORMS = (
    Form("prompt / completion (SFT)", ("prompt", "completion"), _completion),
    Form("prompt / response (SFT)", ("prompt", "response"), _response),
    Form("messages (SFT)", ("messages",), _sft_messages),
    Form("conversations (SFT)", ("conversations",), _sft_conversations),
    Form("instruction + input / output (SFT)", ("instruction", "output"), _sft_instruction),
    Form("text (SFT)", ("text",), _sft_text),
)
# for losses on the policy's own responses
PROMPTS = (Form("prompt alone", ("prompt",), _prompt_alone),)
