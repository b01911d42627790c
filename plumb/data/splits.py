"""Give each stage its own prompts: with `data_split=5,0,5`, `stage=sft` takes half of every data
set and `stage=policy` the other half.

A set's prompts are put into one order, drawn from split_seed, and the stages take consecutive parts
of it. Prompts are divided, not pairs, so that all pairs of a prompt go to one stage; training and
evaluation prompts are divided separately. The result is a view of one token store.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from plumb.console import to_dict
from plumb.data.registry import resolve
from plumb.errors import UserError

if TYPE_CHECKING:
    from plumb.data.examples import Examples

STAGES = ("sft", "reward", "policy")
NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")


def weights(data_split: Any) -> tuple[Fraction, ...]:
    """Return the share of each of STAGES, from "5,0,5" or a list of numbers. Raise ValueError for
    anything else.

    >>> weights("5,0,5") == weights([1, 0, 1.0])
    True
    """
    texts = data_split.split(",") if isinstance(data_split, str) else list(map(str, data_split))
    if len(texts) != len(STAGES) or not all(NUMBER.fullmatch(text.strip()) for text in texts):
        raise ValueError(data_split)
    values = [Fraction(text.strip()) for text in texts]
    if not any(values):
        raise ValueError(data_split)
    return tuple(value / sum(values) for value in values)


def is_data_split(value: Any) -> bool:
    """Return whether this is a legal value of the option: weights, or weights for each data set by
    name.
    """
    with suppress(ValueError, TypeError):
        value = value if isinstance(value, str) else to_dict(value)
        return bool(
            [weights(each) for each in (value.values() if isinstance(value, dict) else [value])]
        )
    return False


def weights_of(data_split: Any, name: str) -> tuple[Fraction, ...] | None:
    """Return what data_split says for the data set of this name; None if nothing, so that every
    stage takes all of it.
    """
    if isinstance(data_split, Mapping):
        data_split = {resolve(str(key)): value for key, value in data_split.items()}.get(name)
    return None if data_split is None else weights(data_split)


def sizes(n: int, shares: Sequence[Fraction]) -> list[int]:
    """Divide n prompts among the stages: exact shares rounded down, the rest to the largest
    remainders, the first of equals; then one from the largest to each stage that would have none.
    Raise ValueError if there are too few for that.

    >>> sizes(7, weights("5,0,5")), sizes(7, weights("0,5,5")), sizes(10, weights("98,1,1"))
    ([4, 0, 3], [0, 4, 3], [8, 1, 1])
    """
    if n < sum(share > 0 for share in shares):
        raise ValueError(n)
    quotas = [share * n for share in shares]
    rounded = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: rounded[i] - quotas[i])
    for i in by_remainder[: n - sum(rounded)]:
        rounded[i] += 1
    for i, share in enumerate(shares):
        if share and not rounded[i]:
            rounded[rounded.index(max(rounded))] -= 1
            rounded[i] = 1
    return rounded


def permuted(digests: np.ndarray, seed: int) -> np.ndarray:
    """Return a different 64-bit number for each prompt's digest; their order is the seed's
    permutation of the prompts. [n] uint64

    It thus depends only on the prompts: not on the order of the rows, nor on what else is in the
    set (the finalizer of splitmix64, which gives different numbers for different digests; Steele et
    al., OOPSLA 2014).
    """
    x = digests + np.full_like(digests, (seed + 1) % 2**64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def cut(
    examples: Examples, shares: Sequence[Fraction], stage: str, seed: int
) -> tuple[Examples, int]:
    """Return the stage's examples out of one split of one data set, and the number of prompts of
    all stages.

    The prompts are those of all rows of the store, so that pairs and SFT targets are divided alike.
    Raises ValueError if there are fewer prompts than stages.
    """
    store = examples.tables[0].store
    order = np.sort(permuted(np.unique(store.digests[store.rows[:, 0]]), seed))
    if not len(order):
        return examples, 0
    ends = np.cumsum([0, *sizes(len(order), shares)])
    i = STAGES.index(stage)
    mine = order[ends[i] : ends[i + 1]]
    return examples.select(np.isin(permuted(examples.digest(0), seed), mine)), len(order)


def check(config: DictConfig) -> None:
    """Raise UserError for a stage without a split, a split without a stage, and a stage whose share
    is 0.
    """
    split, stage = config.data_split, config.stage
    if (split is None) != (stage is None):
        missing = (
            f"stage={stage}: chooses a part of data_split, which is not set; add"
            " data_split=5,0,5 or the like"
        )
        raise UserError(
            missing
            if split is None
            else f"data_split={split}: needs a stage; add stage={', '.join(STAGES)}"
        )
    if split is None:
        return
    names = list(map(resolve, (*config.datasets, *(config.eval_datasets or ()))))
    if unknown := (
        [key for key in split if resolve(str(key)) not in names]
        if isinstance(split, Mapping)
        else []
    ):
        raise UserError(
            f"data_split={split}: {unknown[0]} is not among datasets={list(config.datasets)}"
        )
    i = STAGES.index(stage)
    if not any(
        shares is None or shares[i]
        for shares in (weights_of(split, resolve(name)) for name in config.datasets)
    ):
        raise UserError(
            f"data_split={split}: gives stage={stage} nothing; its numbers are the shares of"
            f" {', '.join(STAGES)}"
        )
