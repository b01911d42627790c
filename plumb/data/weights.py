"""How many rows a row counts as, and how sure its preference is."""

from __future__ import annotations

from plumb.data.files import RawRow
from plumb.data.scores import number_of


def row_weight(row: RawRow) -> float | None:
    """Return the row's field `weight`; None where it has none. Raise UserError for what is no
    number of at least 0.
    """
    if row.fields.get("weight") in (None, ""):
        return None
    weight = number_of(row, "weight")
    if weight < 0:
        raise row.error(
            f"field 'weight' is {weight:g}, which is negative",
            "write how many rows it counts as, such as 0.5 or 2",
        )
    return weight


def row_p_chosen(row: RawRow, n_pairs: int) -> float | None:
    """Return the row's field `p_chosen`; None where it has none. Raise UserError for what is no
    probability, and for one that does not belong to a single pair.
    """
    if row.fields.get("p_chosen") in (None, ""):
        return None
    p_chosen = number_of(row, "p_chosen")
    if not 0 <= p_chosen <= 1:
        raise row.error(
            f"field 'p_chosen' is {p_chosen:g}, not a probability",
            "write a number from 0 to 1; 1 says that chosen is preferred for sure",
        )
    if n_pairs != 1:
        raise row.error(
            f"field 'p_chosen' is of one pair, and this row has {n_pairs} pairs",
            "write a row for each pair",
        )
    return p_chosen
