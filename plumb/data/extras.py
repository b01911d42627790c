"""What examples carry beside their tokens: columns by name, for a data set or for a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Extras:
    """Hold columns of n examples with at most k responses each. In a batch they are tensors, in the
    batch's own order of examples, responses and tokens: [B], [R] and [N].

    Example: two pairs whose scores differ by 1 and 2, and the reference's log-probabilities:

    >>> margins, logps = np.array([1.0, 2.0]), np.array([[-3.0, -4.0], [-5.0, -6.0]])
    >>> extras = Extras(example={"margins": margins}, response={"reference": logps})
    >>> extras.take(np.array([1])).response["reference"].tolist()
    [[-5.0, -6.0]]
    """

    example: Mapping[str, Any] = field(default_factory=dict)  # [n] numbers
    # [n, k] numbers, NaN where an example has fewer responses
    response: Mapping[str, Any] = field(default_factory=dict)
    # [n] arrays: the numbers of an example's response tokens, one response after another
    token: Mapping[str, Any] = field(default_factory=dict)

    def take(self, indices: np.ndarray) -> Extras:
        """Return the columns of these examples. Nothing else slices extras."""
        return self.map(lambda column: column[indices])

    def map(self, f: Callable[[Any], Any]) -> Extras:
        """Return the extras with `f` applied to every column."""
        of = lambda columns: {name: f(column) for name, column in columns.items()}
        return Extras(of(self.example), of(self.response), of(self.token))
