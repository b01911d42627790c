"""The forms of single responses with a label: desirable, or not."""

from __future__ import annotations

from typing import Any

from plumb.data.files import RawRow, describe
from plumb.data.forms import Form
from plumb.data.forms.targets import target_row
from plumb.data.rows import Row
from plumb.data.scores import number_of

# labels in words, in lower case, with spaces for - and _
DESIRABLE = frozenset(
    {"true", "1", "thumbs up", "thumb up", "up", "good", "desirable", "\U0001f44d"}
)
UNDESIRABLE = frozenset(
    {"false", "0", "thumbs down", "thumb down", "down", "bad", "undesirable", "\U0001f44e"}
)


def label_of(value: Any) -> bool | None:
    """Return whether a label says desirable; None for what is no label.

    >>> label_of("thumbs_up"), label_of(0), label_of("False"), label_of(3)
    (True, False, False, None)
    """
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    if not isinstance(value, str):
        return None
    word = value.strip().lower().replace("_", " ").replace("-", " ")
    return True if word in DESIRABLE else False if word in UNDESIRABLE else None


def is_boolean(value: Any) -> bool:
    """Return whether this is a boolean, or its text in a CSV's cell."""
    return str(value).lower() in ("true", "false")


def _labelled_completion(row: RawRow) -> Row | None:
    return _labelled(row, "completion")


def _labelled_response(row: RawRow) -> Row | None:
    return _labelled(row, "response")


def _labelled_messages(row: RawRow) -> Row | None:
    return _labelled(row, "messages")


def _labelled_conversations(row: RawRow) -> Row | None:
    return _labelled(row, "conversations")


def _labelled(row: RawRow, field: str) -> Row | None:
    """Return a row with one response, and whether it is desirable."""
    desirable = _desirable(row)
    is_dialogue = field in ("messages", "conversations")
    converted = target_row(row, [] if is_dialogue else row.text_or_messages("prompt"), field)
    return converted and converted._replace(sft_target=None, labels=[desirable])


def _desirable(row: RawRow) -> bool:
    """Return whether the row's label, or its score and `label_threshold`, call it desirable. Raise
    UserError for any other label.
    """
    label = row.value("label")
    if row.label_threshold is not None:
        return number_of(row, "label") >= row.label_threshold
    if (desirable := label_of(label)) is None:
        is_score = isinstance(label, int | float) and not isinstance(label, bool)
        fix = "set label_threshold to read scores" if is_score else f"fix or remove the {row.unit}"
        raise row.error(f"field 'label' is {describe(label)}, not true or false", fix)
    return desirable


FORMS = (
    Form(
        "prompt / completion / label (labelled)",
        ("prompt", "completion", "label"),
        _labelled_completion,
    ),
    Form(
        "prompt / response / label (labelled)", ("prompt", "response", "label"), _labelled_response
    ),
    Form("messages / label (labelled)", ("messages", "label"), _labelled_messages),
    Form("conversations / label (labelled)", ("conversations", "label"), _labelled_conversations),
)
