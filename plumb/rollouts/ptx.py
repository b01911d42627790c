"""Mix the cross-entropy of a data set into the steps of a policy, against what it forgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plumb.batching.feed import Feed
from plumb.batching.layout import Batch
from plumb.distributed import sharding


@dataclass(frozen=True)
class Ptx:
    """Add the gradient of a data set's cross-entropy per token, times a weight, to those of a step
    that the policy is about to make: PPO-ptx, Eq. 2 of arXiv:2203.02155. Every rank must make each
    call.
    """

    feed: Feed  # of prompts with their responses
    batch_size: int
    weight: float
    seed: int
    logps: Callable[[Batch], Tensor]  # the sums of a batch's responses, with gradients.  -> [R]
    backward: Callable[[Tensor], None]  # adds to the gradients, which a later pass reduces
    n_copies: int = 1  # ranks that see the same rows

    def add(self, number: int) -> dict[str, float]:
        """Add the gradient of the batch of step `number`, from 0. Return the cross-entropy before
        the step, in nats per token.
        """
        step = self.feed.step(self.indices(number))
        n = step.lengths.n_scored()
        parts = []  # read once: each reading waits for the device
        for batch, weight, _ in step.microbatches:
            nll = -weight * self.logps(batch).sum() / n
            self.backward(self.weight * nll)
            parts.append(nll.detach())
        total = sharding.all_reduce_sum(torch.stack(parts).sum())
        return {"ptx_train/nll": float(total) / self.n_copies}

    def indices(self, number: int) -> np.ndarray:
        """Return the examples of a step: batches of one epoch after the other, each in an order of
        its own.
        """
        n = len(self.feed.examples)
        epoch, place = divmod(number, -(-n // self.batch_size))
        order = np.random.default_rng((self.seed, epoch)).permutation(n)
        return order[place * self.batch_size :][: self.batch_size]
