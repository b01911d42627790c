"""Compute the reference's log-probabilities once for all steps of a run, and keep them on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from plumb.batching.feed import Feed, KnownLogps
from plumb.console import quiet, rank0_print
from plumb.distributed import collectives
from plumb.errors import ResumeMismatch
from plumb.models.reference_cache import ReferenceCache, digests_of_all, response_digests
from plumb.training.evaluator import all_logps
from plumb.training.objective import Scorer


@dataclass(frozen=True)
class CachedReference:
    """Give both feeds of a run the log-probabilities of its reference. Every rank must make each
    call.
    """

    scorer: Scorer
    train_feed: Feed
    eval_feed: Feed
    is_primary_replica: bool
    open_cache: Callable[[str], ReferenceCache]  # by a digest of the reference's weights

    def fill(
        self, weights: str, batches: Sequence[np.ndarray], model: PreTrainedModel | None
    ) -> None:
        """Fill in the log-probabilities of the training examples of these batches, and of all
        held-out examples: from the cache of the reference with the digest `weights`, and for what
        is missing there by one pass of `model`. Raise ResumeMismatch if the pass is needed and
        `model` is None.
        """
        cache = self.open_cache(weights)
        every = np.arange(len(self.eval_feed.examples))
        for feed, of_feed in ((self.train_feed, batches), (self.eval_feed, [every])):
            logps_of = partial(_logps, self.scorer, model, cache, self.is_primary_replica)
            used = np.unique(np.concatenate([np.zeros(0, np.int64), *of_feed]))
            # without the log-probabilities of an earlier reference, and without a batch context
            bare = Feed(feed.examples, feed.packing, feed.rank)
            _, logps = logps_of(bare, used)
            feed.reference = np.full((len(feed.examples), logps.shape[1]), np.nan)
            feed.reference[used] = logps
            if feed.context == "mismatched" and len(of_feed):
                examples = [e for indices in of_feed for e in feed.mismatched_examples(indices)]
                mismatched = Feed(examples, feed.packing, feed.rank)
                digests, logps = logps_of(mismatched, np.arange(len(examples)))
                digests, first = np.unique(digests, return_index=True)
                feed.known = KnownLogps(digests, logps.ravel()[first])
                feed.digests = response_digests


@torch.no_grad()
def _logps(
    scorer: Scorer,
    model: PreTrainedModel | None,
    cache: ReferenceCache,
    is_primary_replica: bool,
    feed: Feed,
    indices: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the digests and the log-probabilities of the examples `indices`, [n, k] each."""
    digests = digests_of_all(feed.examples, indices)
    # [n, k], on every rank those of rank 0
    logps = collectives.from_rank0(partial(cache.find, digests))
    (new,) = np.isnan(logps).any(1).nonzero()
    if len(new) and model is None:
        raise ResumeMismatch(
            f"{cache.path}: {len(new):,} log-probabilities of the reference are missing, and the"
            " weights they came from are not kept; resume with the reference_cache of the"
            " run's start, or start a new run with reference=live"
        )
    progress = tqdm(total=len(new), desc="reference", unit="example", leave=False, disable=quiet())
    # an interrupted pass keeps the chunks that are done; each rewrites the file
    size = max(4096, len(new) // 64)
    for start in range(0, len(new), size):
        some = new[start : start + size]
        logps[some] = all_logps(scorer, model, feed, indices[some], is_primary_replica, progress)
        collectives.from_rank0(partial(cache.add, digests[some], logps[some]))
    progress.close()
    rank0_print(
        f"reference: {len(logps) - len(new):,} of {len(logps):,} examples in {cache.path}"
        + (f", {len(new):,} computed now" if len(new) else "")
    )
    return digests, logps
