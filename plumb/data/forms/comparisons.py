"""The forms of two responses and a label that says which is better: winner, label, better_id.

A label is a word (a field's name, its last part, or "tie") or a number. Numbers count from 0 or
from 1, which the file decides: 0 occurs only in the first case, 2 only in the second. The form's
name then says which response each number means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import NamedTuple

from plumb.data.files import RawRow, Text, describe
from plumb.data.forms import Form
from plumb.data.forms.pairs import pair_row
from plumb.data.forms.turns import asked, instruction
from plumb.data.rows import Row, skipped

TIES = "ties"  # what these rows are counted as

PROMPTS: dict[str, Callable[[RawRow], Text]] = {
    "prompt": lambda row: row.text_or_messages("prompt"),
    "instruction": instruction,
    "question": lambda row: asked(row, "question"),
}
RESPONSES = (
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("output_1", "output_2"),
    ("output_a", "output_b"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
)
DIALOGUES = ("conversation_a", "conversation_b")
LABELS = ("winner", "label", "better_id", "better_response_id", "preference")
TIE_WORDS = frozenset({"tie", "tied", "draw", "equal", "same", "both", "neither", "bothbad"})


class Compared(NamedTuple):
    """Name the fields of a comparison, and what its numbers count from."""

    prompt: str  # "": the responses are whole dialogues
    responses: tuple[str, str]
    label: str
    base: int | None = None  # None: labels are words

    def convert(self, row: RawRow) -> Row | None:
        """Return the row's pair; None for a tie, which is counted."""
        better = self._better(row)
        if better is None:
            skipped(TIES)
            return None
        prompt = PROMPTS[self.prompt](row) if self.prompt else []
        return pair_row(row, prompt, self.responses[better], self.responses[1 - better])

    def _better(self, row: RawRow) -> int | None:
        """Return the index of the better response, or None for a tie."""
        value = row.value(self.label)
        number = number_of(value)
        if number is not None and self.base is not None:
            if number - self.base in (0, 1):
                return int(number - self.base)
            if number - self.base == 0.5:
                return None
        elif isinstance(value, str):
            words = re.findall(r"[^\W_]+", value.lower())
            if TIE_WORDS & {*words}:
                return None
            names = [name.rpartition("_")[2] for name in self.responses]
            if words and words[-1] in names:
                return names.index(words[-1])
        base = 0 if self.base is None else self.base
        counted = "" if self.base is None else f"{base}, {base + 1}, "
        raise row.error(
            f"field '{self.label}' is {describe(value)}, not which response is better",
            f"write {counted}{', '.join(self.responses)} or tie",
        )


def number_of(value: object) -> float | None:
    """Return a label that is a number, or a number's text as in CSV files; None for others.

    >>> number_of(1), number_of(" 2 "), number_of(True), number_of("a")
    (1, 2.0, None, None)
    """
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d*)?\s*", value):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def of_file(compared: Compared, rows: Iterable[RawRow]) -> Form:
    """Return the form with what the numbers of this file's labels count from. Rows are read until
    one decides. Raises UserError where all labels are 1, and nothing says what they count from.
    """
    first_one: RawRow | None = None
    for row in rows:
        value = row.fields.get(compared.label)
        number = number_of(value)
        if number in (0, 0.5, 1.5, 2):
            return _form(compared._replace(base=int(number >= 1)))
        if number is None and isinstance(value, str) and not TIE_WORDS & {*value.lower().split()}:
            return _form(compared)
        if number == 1:
            first_one = first_one or row
    digits = [int(digit) for digit in re.findall(r"_(\d)$", compared.responses[0])]
    if first_one is not None and not digits:
        raise first_one.error(
            f"field '{compared.label}' is 1 in all rows, which may be the first response or the"
            " second",
            f"write {' or '.join(compared.responses)}",
        )
    return _form(compared._replace(base=digits[0]) if first_one is not None else compared)


def _form(compared: Compared) -> Form:
    name = " / ".join(filter(None, (compared.prompt, *compared.responses, compared.label)))
    if compared.base is not None:
        first, second = compared.responses
        base = compared.base
        name += f", {base}-based ({base}: {first}, {base + 1}: {second})"
    needs = tuple(filter(None, (compared.prompt, *compared.responses, compared.label)))
    return Form(name, needs, compared.convert, partial(of_file, compared))


FORMS = (
    *(_form(Compared(*fields)) for fields in product(PROMPTS, RESPONSES, LABELS)),
    _form(Compared("", DIALOGUES, "winner")),
)
