"""Text -> the turns of a dialogue -> a prompt and the response that ends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plumb.data.files import Messages, RawRow, Text

# Roles that ask or inform; every other one answers. In lower case.
ASKING = frozenset(
    {"user", "human", "prompter", "system", "developer", "tool", "function", "observation"}
    | {"ipython", "environment", "tool_response", "function_response"}
)


def answers(turn: Mapping[str, Any]) -> bool:
    """Return whether a model may be trained to write this turn."""
    return turn["role"].lower() not in ASKING


def as_messages(row: RawRow, text: Text, role: str, field: str) -> Messages:
    """Return a string as one turn of `role`; the row's system field comes before a prompt, if it
    has no system turn.
    """
    turns: Messages = [row.turn(role, text, field)] if isinstance(text, str) else text
    if role == "user" and row.fields.get("system") and not (turns and turns[0]["role"] == "system"):
        return [row.turn("system", row.text("system"), "system"), *turns]
    return turns


def instruction(row: RawRow) -> Messages:
    """Return instruction, a blank line, and the input as a user's turn, since a template has to
    separate the turns.
    """
    text = row.text("instruction")
    if row.fields.get("history"):
        raise row.error("field 'history' isn't read", "write the whole dialogue as messages")
    if row.fields.get("input"):  # absent, null and "" all mean none
        text += "\n\n" + row.text("input")
    return [row.turn("user", text, "instruction")]


def asked(row: RawRow, field: str) -> Messages:
    """Return a question that is separate from its answers as a user's turn."""
    return as_messages(row, row.text_or_messages(field), "user", field)


def split_turns(
    row: RawRow, prompt: Messages, response: Text, field: str
) -> tuple[Messages, Messages]:
    """Return (all turns before the last, [the last]); the last must be an answer.

    `response` may begin with the prompt's own turns, as in UltraFeedback; otherwise it follows
    them.
    """
    turns = as_messages(row, response, "assistant", field)
    system, before = prompt[: _n_system(prompt)], prompt[_n_system(prompt) :]
    own_system, after = turns[: _n_system(turns)], turns[_n_system(turns) :]
    if after[: len(before)] != before:
        if not after or after[0]["role"].lower() in ("user", "human", "system"):
            raise row.error(
                f"field '{field}' begins with a different prompt than the row's",
                "begin with the assistant's turn",
            )
        after = before + after
    if not after or not answers(after[-1]):
        raise row.error(
            f"field '{field}' has no assistant's turn at its end",
            f"add the response, or remove the {row.unit}",
        )
    if len(after) == 1:
        raise row.error(
            f"field '{field}' has no user's turn before the response", "add it, or a field 'prompt'"
        )
    return (own_system or system) + after[:-1], after[-1:]


def _n_system(turns: Messages) -> int:
    return int(bool(turns) and turns[0]["role"] == "system")
