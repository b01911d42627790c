"""Set up the computation before the first step: routers, forward path, the reference's
log-probabilities, the first values of a scalar head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumb.batching.feed import Feed, KnownLogps
from plumb.console import quiet, rank0_print
from plumb.data.examples import Examples
from plumb.distributed import collectives, sharding
from plumb.models.draws import run_without_draws
from plumb.models.forward_path import DTYPES, ForwardPath
from plumb.models.layout_probe import Precision, choose_forward_path, ordinary_ids
from plumb.models.reference_cache import ReferenceCache, digests_of_all, response_digests
from plumb.models.routers import Routers, routers_of
from plumb.models.scalar_head import fit_head
from plumb.training.evaluator import all_hidden, all_logps, folds_of
from plumb.training.objective import Scorer


@dataclass(frozen=True)
class Computation:
    """Where and in what precision the models compute.

    Example: `Computation(torch.device("cuda"), torch.bfloat16, torch.float32, autocast)`.
    """

    device: torch.device
    dtype: torch.dtype  # of the forward pass
    weights_dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager]  # entered around each forward pass


@dataclass(frozen=True)
class Data:
    """What a run trains and is evaluated on, and the tokenizer that made it."""

    tokenizer: PreTrainedTokenizerBase
    train: Examples
    evaluation: Examples


@dataclass(frozen=True)
class Reference:
    """How the reference's log-probabilities are computed. The model runs beside the policy, or,
    with a `digest` of its weights, once over what their cache lacks; a model that is None is the
    policy before its first step, or there is no reference.
    """

    model: PreTrainedModel | None = None
    digest: str | None = None


def autocast_to(name: str | None, device: torch.device) -> Callable[[], Any]:
    """Return the context in which models compute in the type of this name, or as their weights
    are if it is None.
    """
    return nullcontext if name is None else lambda: torch.autocast(device.type, DTYPES[name])


def place_on(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to the device. A model that was loaded over several GPUs stays there."""
    if getattr(model, "hf_device_map", None) is None:
        nn.Module.to(model, device)
    return model


def watch_routers(policy: PreTrainedModel, coefficient: float) -> Routers | None:
    """Return the routers of a mixture of experts if their balancing loss counts (`coefficient`,
    the knob router_aux_loss), and print whether it does.
    """
    if not coefficient:
        if routers_of(policy):
            rank0_print(
                "mixture of experts: the routers' balancing loss is not part of the loss"
                " (router_aux_loss=0)"
            )
        return None
    rank0_print(
        f"mixture of experts: {coefficient:g} x the routers' balancing loss is added to the loss"
    )
    return Routers(policy)


def stop_draws(policy: PreTrainedModel, device: torch.device) -> None:
    """Make the parts of a model that would draw random numbers in training compute as in
    evaluation, and print their names.
    """
    if drawing := run_without_draws(policy, device):
        rank0_print(
            f"{', '.join(drawing)} would draw random numbers in training: computed as in evaluation"
        )


def find_forward_path(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    computation: Computation,
    max_length: int,
    row_tokens: Callable[[ForwardPath], int],
) -> ForwardPath:
    """Return how the models compute, by trying, and print why. `row_tokens`: the length of a
    microbatch's row on a path. Every rank must call it.
    """
    autocast = computation.autocast
    precisions = [Precision(autocast, computation.dtype)]
    if autocast is not nullcontext:  # where errors show that 16 bits would hide
        precisions.insert(0, Precision(nullcontext, computation.weights_dtype))
    forward_path, line = choose_forward_path(
        policy,
        device=computation.device,
        longest=max_length,
        vocabulary=ordinary_ids(policy, tokenizer),
        row_tokens=lambda path: collectives.broadcast_object(row_tokens(path)),
        precisions=precisions,
        gradients=True,
    )
    rank0_print(line)
    return forward_path


@torch.no_grad()
def add_reference_logps(
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
def add_mismatched_logps(
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


@torch.no_grad()
def start_head(
    scorer: Scorer, feed: Feed, head_init: str, indices: np.ndarray, is_primary_replica: bool
) -> None:
    """Give a scalar head that is new its first values, as head_init says: for "fit" those that rank
    the pairs `indices` best, else zeros; "random" keeps what was drawn. A head that was trained
    before keeps its own. Every rank must call it.
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
    progress = tqdm(total=len(indices), desc="head", unit="pair", disable=quiet())
    hidden = all_hidden(scorer, feed, indices, is_primary_replica, progress)  # [n, 2, d]
    progress.close()
    folds = torch.from_numpy(folds_of(feed.examples, indices))
    fit = collectives.from_rank0(partial(fit_head, hidden[:, 0], hidden[:, 1], folds))
    result = (
        f"of pairs left out it ranks {fit.accuracy:.3f} as the data do, at a loss of {fit.loss:.4f}"
    )
    rank0_print(
        f"head: fitted to what the untrained model reads of {len(indices):,} pairs; "
        f"{result if fit.weight.any() else 'they tell nothing, so it starts at zero'}"
    )
    return fit.weight
