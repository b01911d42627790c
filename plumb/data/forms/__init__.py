"""The forms that a row of a user's own file may have, and how each becomes a `Row`.

A raw row comes in, by its fields; a `Row` goes out. Strings are used exactly as they stand (prompt
"abc", response " def"); where something has to set the turns apart, a row becomes chat messages.
What no form reads goes with the row, for a chat template may. A new form is one function, and one
line in the FORMS of its file. Tokens and files do not belong here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from plumb.data.files import RawRow
from plumb.data.rows import Row

TRANSCRIPTS = "chosen / rejected, each a whole dialogue"


class Form(NamedTuple):
    """Describe one way to write a row of pairs or of SFT."""

    name: str  # as the form line calls it
    needs: tuple[str, ...]
    convert: Callable[[RawRow], Row | None]  # None: skipped, and counted
    # returns the form as a file with these rows uses it; None: all files use it alike
    of_file: Callable[[Iterable[RawRow]], Form] | None = None

    @property
    def sft(self) -> bool:
        return self.name.endswith("(SFT)")

    @property
    def labelled(self) -> bool:
        return self.name.endswith("(labelled)")

    @property
    def dialogue(self) -> bool:
        return self.name == TRANSCRIPTS
