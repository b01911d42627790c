"""Initialize a new scalar head."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from plumb.batching.feed import Feed
from plumb.console import quiet, rank0_print
from plumb.distributed import collectives, sharding
from plumb.models.scalar_head import fit_head
from plumb.training.evaluator import all_hidden, folds_of
from plumb.training.objective import Scorer


@torch.no_grad()
def start_head(
    scorer: Scorer, feed: Feed, head_init: str, indices: np.ndarray, is_primary_replica: bool
) -> None:
    """Initialize a new scalar head as head_init says: "fit" gives it the weights that rank the
    pairs `indices` best, "zero" zeros; "random" keeps what was drawn. A head that was trained
    before is left alone. Every rank must call it.
    """
    policy: Any = scorer.policy
    head = policy.get_output_embeddings()
    if not head.drawn or head_init == "random":
        return
    (name,) = (
        name for name, p in policy.named_parameters() if any(p is own for own in head.parameters())
    )
    weight = torch.zeros(head.weight.shape)
    if head_init == "fit":
        weight = _fitted(scorer, feed, indices, is_primary_replica)
    sharding.reshard(policy)
    for part_name, part, where in sharding.parts(policy):
        if part_name == name and part.numel():
            part.copy_(weight[where])


def _fitted(
    scorer: Scorer, feed: Feed, indices: np.ndarray, is_primary_replica: bool
) -> torch.Tensor:
    """Return the head's weight that ranks these pairs best, and print how well it does."""
    progress = tqdm(total=len(indices), desc="head", unit="pair", leave=False, disable=quiet())
    hidden = all_hidden(scorer, feed, indices, is_primary_replica, progress)  # [n, 2, d]
    progress.close()
    folds = torch.from_numpy(folds_of(feed.examples, indices))
    fit = collectives.from_rank0(partial(fit_head, hidden[:, 0], hidden[:, 1], folds))
    result = f"on left-out pairs its accuracy is {fit.accuracy:.3f}, its loss {fit.loss:.4f}"
    rank0_print(
        f"head: fitted to the untrained model's hidden states of {len(indices):,} pairs; "
        f"{result if fit.weight.any() else 'they show no signal, so it starts at zero'}"
    )
    return fit.weight
