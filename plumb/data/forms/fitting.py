"""Which of a folder's splits serve a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from plumb.data.files import Fits, RawRow
from plumb.data.forms import Form
from plumb.data.forms.recognise import form_of
from plumb.errors import UserError

PAIR_NAMES = frozenset(
    {"prefs", "pref", "preference", "preferences", "dpo", "rm", "reward", "pairs"}
    | {"comparison", "comparisons"}
)
SFT_NAMES = frozenset({"sft", "instruct", "instruction", "instructions", "demonstrations"})


def fitting(
    group: str | None,
    field_map: Mapping[str, str] | None = None,
    label_threshold: float | None = None,
) -> Fits:
    """Return which of a folder's splits serve a loss of this group: by their form, then by their
    name.

    `group` None: what is needed is not known, so all of them serve.
    """

    def fits(splits: Mapping[str, Callable[[], RawRow | None]]) -> list[str]:
        if group is None:
            return list(splits)
        forms: dict[str, Form] = {}
        for name, first in splits.items():
            with suppress(UserError):
                row = first()
                if row is not None:
                    forms[name] = form_of(row, field_map, label_threshold, group)
        of_pairs = [name for name, form_ in forms.items() if not (form_.sft or form_.labelled)]
        serve = of_pairs
        if group == "single":
            serve = [name for name, form_ in forms.items() if form_.sft] or list(forms)
        elif group == "rollout":
            serve = list(forms)
        elif group == "labelled":
            serve = [name for name, form_ in forms.items() if form_.labelled] or of_pairs
        wanted = SFT_NAMES if group == "single" else PAIR_NAMES
        named = [
            name
            for name in serve
            if wanted & set(name.lower().replace("-", "_").replace(".", "_").split("_"))
        ]
        return named if len(named) == 1 else serve

    return fits
