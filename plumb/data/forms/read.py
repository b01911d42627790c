"""Read the rows of a file in the form of its first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from plumb.data.files import (
    ROLES,
    Message,
    Messages,
    OnBad,
    RawRow,
    and_more,
    without_nulls,
)
from plumb.data.forms import Form
from plumb.data.forms.recognise import rename
from plumb.data.rows import Row, is_empty
from plumb.data.weights import row_p_chosen, row_weight
from plumb.errors import UserError


def read_rows(
    raw_rows: Iterable[RawRow],
    form_: Form,
    field_map: Mapping[str, str] | None = None,
    role_map: Mapping[str, str] | None = None,
    on_bad: OnBad | None = None,
    label_threshold: float | None = None,
) -> Iterator[Row]:
    """Yield one Row for each raw row, in order, except those that are skipped.

    A row that can't be used goes to `on_bad`. Without it, the first such row raises UserError once
    all have been read, so that it can say how many more there are.
    """
    roles = ROLES | dict(role_map or {})
    problem: UserError | None = None
    n_problems = 0
    in_messages: bool | None = None
    for raw in raw_rows:
        try:
            named = rename(raw, field_map or {})
            row = _convert(form_, named._replace(roles=roles, label_threshold=label_threshold))
            if row and in_messages is None:
                in_messages = isinstance(row.prompt, list)
            if row and in_messages != isinstance(row.prompt, list):
                before, here = ("messages", "text") if in_messages else ("text", "messages")
                mixed = (
                    f"mixed forms: the file began with {before}, and field 'chosen' or 'prompt'"
                    f" here is {here}"
                )
                raise raw.error(mixed, "write all rows in the same format")
        except UserError as error:
            if on_bad:
                on_bad(error)
                continue
            problem = problem or error
            n_problems += 1
        else:
            if row and not problem:
                yield row
    if problem:
        raise UserError(f"{problem}{and_more(n_problems - 1, 'row')}")


def row_in_turns(row: Row) -> Row:
    """Return a row of strings as chat messages: the prompt is the user's turn, and each response
    the assistant's. Messages, and texts without a prompt, stay as they are.
    """
    if not isinstance(row.prompt, str) or not row.prompt:
        return row

    def turn(role: str, text: Any, field: str) -> Messages:
        return [Message({"role": role, "content": text}, row.source, field)]

    target = row.sft_target
    return row._replace(
        prompt=turn("user", row.prompt, "prompt"),
        responses=[turn("assistant", text, "response") for text in row.responses],
        sft_target=None if target is None else turn("assistant", target, "response"),
    )


def _convert(form_: Form, row: RawRow) -> Row | None:
    """Return the row, with what it carries beside its texts; None where it is skipped."""
    for field in form_.needs:
        if field not in row.fields:
            raise row.error(
                f"no field '{field}' (the row has: {row.names}), but the file began as"
                f" {form_.name}",
                "add it",
            )
    fields = Fields(without_nulls(row.fields) if row.arrow else row.fields)
    row = row._replace(fields=fields)
    converted = form_.convert(row)
    return converted and converted._replace(
        weight=row_weight(row),
        p_chosen=row_p_chosen(row, len(converted.pairs)),
        more={**fields.unread(), **(converted.more or {})} or None,
    )


class Fields(Mapping[str, Any]):
    """Hold a row's fields, and remember which were read."""

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = fields
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._fields[name]
        self._read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def unread(self) -> dict[str, Any]:
        """Return the fields that were not read and are neither null nor empty."""
        return {k: v for k, v in self._fields.items() if k not in self._read and not is_empty(v)}
