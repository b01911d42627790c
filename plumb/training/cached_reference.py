"""The reference's log-probabilities, computed once for all steps of a run, and kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from plumb.batching.feed import Feed, KnownLogps
from plumb.console import quiet, rank0_print
from plumb.distributed import collectives
from plumb.models.reference_cache import ReferenceCache, digests_of_all, response_digests
from plumb.training.evaluator import all_logps
from plumb.training.objective import Scorer


def add_reference_logps(
    scorer: Scorer,
    feed: Feed,
    batches: Sequence[np.ndarray],
    cache: ReferenceCache,
    is_primary_replica: bool,
) -> None:
    """Give the feed the reference's log-probabilities of all examples in `batches`: from the cache,
    and by one pass over what is not in it. Every rank must call it.
    """
    used = np.unique(np.concatenate([np.zeros(0, np.int64), *batches]))
    _add_logps(scorer, feed, used, cache, is_primary_replica)
    if feed.context == "mismatched":
        _add_mismatched_logps(scorer, feed, batches, cache, is_primary_replica)


@torch.no_grad()
def _add_logps(
    scorer: Scorer,
    feed: Feed,
    indices: np.ndarray,
    cache: ReferenceCache,
    is_primary_replica: bool,
) -> None:
    """Give the feed the reference's log-probabilities of the examples `indices`. Every rank must
    call it.
    """
    _, known = _reference_logps(scorer, feed, indices, cache, is_primary_replica)
    feed.reference = np.full((len(feed.examples), known.shape[1]), np.nan)
    feed.reference[indices] = known


@torch.no_grad()
def _add_mismatched_logps(
    scorer: Scorer,
    feed: Feed,
    batches: Iterable[np.ndarray],
    cache: ReferenceCache,
    is_primary_replica: bool,
) -> None:
    """Give the feed the reference's log-probabilities of the mismatched examples of all these
    batches, for a loss with a batch context. Every rank must call it.
    """
    examples = [e for indices in batches for e in feed.mismatched_examples(indices)]
    mismatched = Feed(examples, feed.packing, feed.rank)
    digests, logps = _reference_logps(
        scorer, mismatched, np.arange(len(examples)), cache, is_primary_replica
    )
    digests, first = np.unique(digests, return_index=True)
    feed.known = KnownLogps(digests, logps.ravel()[first])
    feed.digests = response_digests


def _reference_logps(
    scorer: Scorer,
    feed: Feed,
    indices: np.ndarray,
    cache: ReferenceCache,
    is_primary_replica: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the digests and the reference's log-probabilities of the examples `indices`, [n, k]
    each: from the cache, and by one pass over those that are not in it.
    """
    model = scorer.reference or scorer.policy
    digests = digests_of_all(feed.examples, indices)
    # [n, k], on every rank what rank 0 knows
    known = collectives.from_rank0(partial(cache.find, digests))
    (new,) = np.isnan(known).any(1).nonzero()
    progress = tqdm(total=len(new), desc="reference", unit="example", disable=quiet())
    # what is kept when the pass is interrupted; the file is written anew each time
    size = max(4096, len(new) // 64)
    for start in range(0, len(new), size):
        some = new[start : start + size]
        known[some] = all_logps(scorer, model, feed, indices[some], is_primary_replica, progress)
        collectives.from_rank0(partial(cache.add, digests[some], known[some]))
    progress.close()
    rank0_print(
        f"reference: {len(known) - len(new):,} of {len(known):,} examples in {cache.path}"
        + (f", {len(new):,} computed now" if len(new) else "")
    )
    return digests, known
