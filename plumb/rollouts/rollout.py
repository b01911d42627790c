"""Hold a rollout, which is the responses to a block of prompts with their rewards, and what the
steps on them are made of, which a checkpoint keeps until they are used up.

Shapes: n prompts, k responses to each; m trees with N response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plumb.data.extras import Extras
from plumb.data.tokenization import Example
from plumb.rollouts.answered import Answered
from plumb.rollouts.engine import Samples
from plumb.rollouts.rewards import Measured


@dataclass(frozen=True)
class Rollout:
    """Hold the responses to a block of prompts, and what they are worth."""

    number: int  # optimizer steps before it
    prompts: np.ndarray  # [n] the prompts' indices among the data
    trees: list[Example]  # a prompt with its k responses
    samples: Samples
    answered: list[list[Answered]]  # [n][k]
    measured: Measured  # of [n * k] responses

    @property
    def rewards(self) -> np.ndarray:
        """Return the final rewards.  [n, k]"""
        return self.measured.final.reshape(len(self.prompts), -1)


@dataclass(frozen=True, eq=False)
class Lessons(Sequence[Example]):
    """Hold what the steps on a rollout are made of: trees, with what they carry beside their
    tokens.
    """

    prompts: np.ndarray  # [m] int64: which of the data's prompts each tree is of
    trees: list[Example]
    columns: Extras
    # what is logged of the rollout at its first step
    counters: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, i: Any) -> Any:
        return self.trees[i]

    def extras(self) -> Extras:
        """Return the columns; the feed asks for them."""
        return self.columns

    def of(self, prompts: np.ndarray) -> np.ndarray:
        """Return the places of the trees of these prompts, in the prompts' order."""
        places = [np.flatnonzero(self.prompts == prompt) for prompt in prompts]
        return np.concatenate([np.empty(0, np.int64), *places])

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it but the counters, by name; {} if there are no trees."""
        if not self.trees:
            return {}
        parts = [part for tree in self.trees for part in (tree.prompt, *tree.responses)]
        arrays: dict[str, Any] = {
            "prompts": self.prompts,
            "counts": [len(tree.responses) for tree in self.trees],
            "sizes": [*map(len, parts)],
            "ids": np.concatenate(parts).astype(np.int64),
        }
        arrays |= {f"example.{name}": x for name, x in self.columns.example.items()}
        arrays |= {f"response.{name}": x for name, x in self.columns.response.items()}
        arrays |= {f"token.{name}": np.concatenate(x) for name, x in self.columns.token.items()}
        return {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], source_of: Callable[[int], str]
    ) -> Lessons:
        """Return what these tensors came from; `source_of` gives a prompt's source."""
        if not tensors:
            return cls(np.empty(0, np.int64), [], Extras())
        arrays = {name: x.numpy() for name, x in tensors.items()}
        parts = iter(np.split(arrays["ids"], np.cumsum(arrays["sizes"])[:-1]))
        trees = []
        for prompt, count in zip(arrays["prompts"], arrays["counts"], strict=True):
            ids = next(parts)
            responses = tuple(next(parts) for _ in range(count))
            trees.append(Example(ids, responses, source_of(int(prompt))))
        of = lambda kind: {
            name.removeprefix(kind): x for name, x in arrays.items() if name.startswith(kind)
        }
        sizes = [sum(map(len, tree.responses)) for tree in trees]
        token = {
            name: column_of(np.split(x, np.cumsum(sizes)[:-1])) for name, x in of("token.").items()
        }
        return cls(arrays["prompts"], trees, Extras(of("example."), of("response."), token))


def column_of(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays of different lengths as one column of arrays.  [m] object"""
    column = np.empty(len(rows), object)
    for i, row in enumerate(rows):
        column[i] = row
    return column
