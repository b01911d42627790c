"""Which form a row has, by its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plumb.data.files import RawRow, describe
from plumb.data.forms import Form, comparisons, labels, pairs, published, rankings, targets
from plumb.data.forms.labels import is_boolean, label_of
from plumb.errors import UserError

# the first that fits a file's first row is taken, so the more specific stand first
FORMS = [
    *pairs.FORMS,
    *comparisons.FORMS,
    *rankings.FORMS,
    *published.FORMS,
    *labels.FORMS,
    *targets.FORMS,
]
# Fields that a form reads when they are there; with every form's `needs`, what `field_map` may
# name.
OPTIONAL = (
    "system",
    "input",
    "output",
    "sft_target",
    "score_chosen",
    "score_rejected",
    "weight",
    "p_chosen",
    "tools",
    "documents",
)


def form_of(
    first: RawRow,
    field_map: Mapping[str, str] | None,
    label_threshold: float | None = None,
    group: str | None = None,
) -> Form:
    """Return the form of a file that begins with this row, for a loss of this group. Raise
    UserError for a field_map or fields that fit none.
    """
    check_field_map(field_map)
    row = rename(first, field_map or {})
    return recognise(row._replace(label_threshold=label_threshold), alone=group == "rollout")


def recognise(row: RawRow, alone: bool = False) -> Form:
    """Return the first form whose fields the row has. `alone`: prompts alone are a form, too, since
    the policy itself responds to them. Raises UserError for a label in a row that is of no form
    with labels, and for fields that fit no form.
    """
    has = row.fields.keys()
    labelled = "label" in has and (
        row.label_threshold is not None or label_of(row.fields["label"]) is not None
    )
    # another label, a class for instance, is a field like others
    forms = [form_ for form_ in FORMS if not form_.labelled or labelled]
    forms += targets.PROMPTS if alone else ()
    if fits := next((form_ for form_ in forms if has >= set(form_.needs)), None):
        booleans = [f for f in ("label", "kto_tag") if f in has and is_boolean(row.fields[f])]
        if booleans and fits.sft:
            raise row.error(
                f"labelled data (field '{booleans[0]}' is a boolean) in another form",
                "write prompt, completion and label, or use field_map",
            )
        return fits
    near = max(forms, key=lambda form_: (len(has & set(form_.needs)), -len(form_.needs)))
    fix = "add it, or name the file's own fields in field_map"
    if not has & set(near.needs):
        raise row.error(
            f"no known fields (the row has: {row.names})",
            "write prompt, chosen and rejected, or use field_map",
        )
    missing = next(field for field in near.needs if field not in has)
    raise row.error(f"no field '{missing}' for {near.name} (the row has: {row.names})", f"{fix}")


def check_field_map(field_map: Mapping[str, str] | None) -> None:
    """Raise UserError for a field that no form has."""
    ours = sorted({field for form_ in FORMS for field in form_.needs}.union(OPTIONAL))
    for name in field_map or {}:
        if name not in ours:
            raise UserError(
                f"field_map.{name}: no form has such a field; the fields to map are"
                f" {', '.join(ours)}"
            )


def rename(row: RawRow, field_map: Mapping[str, str]) -> RawRow:
    """Return the row with its fields under the names of the forms (`field_map`: ours -> theirs).

    Theirs may be a path into a field, such as chosen.answer or turns.0.text. A field that any path
    leads into is not kept.
    """
    if not field_map:
        return row
    mapped = {ours: _mapped(row, ours, theirs) for ours, theirs in field_map.items()}
    used = {*field_map.values()} | {theirs.partition(".")[0] for theirs in field_map.values()}
    kept = {name: value for name, value in row.fields.items() if name not in used}
    return row._replace(fields=kept | mapped)


def _mapped(row: RawRow, ours: str, theirs: str) -> Any:
    """Return the value at a name or path. Raise UserError where the row has none."""
    if theirs in row.fields:
        return row.fields[theirs]
    here, value = "the row", row.fields
    for key in theirs.split("."):
        inner: Any = value
        if isinstance(inner, list) and key.isdigit() and int(key) < len(inner):
            value = inner[int(key)]
        elif isinstance(inner, Mapping) and key in inner:
            value = inner[key]
        else:
            has = ", ".join(map(str, inner)) if isinstance(inner, Mapping) else describe(inner)
            raise row.error(
                f"no field '{theirs}', which field_map.{ours} names ({here} has: {has})",
                "fix field_map",
            )
        here = key if here == "the row" else f"{here}.{key}"
    return value
