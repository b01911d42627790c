"""Prepare a run for its first step: the models in their places, the optimizer, the forward path,
the feeds, the reference's log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumb.batching.feed import Feed
from plumb.batching.microbatches import Packing
from plumb.console import rank0_print
from plumb.data.examples import Examples
from plumb.distributed import collectives, sharding
from plumb.losses.registry import Loss
from plumb.models import reference_cache
from plumb.models.adapters import StartingPolicy
from plumb.models.blocks import block_class, compile_blocks, recompute_blocks, recomputes_blocks
from plumb.models.draws import run_without_draws
from plumb.models.forward_path import DTYPES, ForwardPath
from plumb.models.layout_probe import Precision, choose_forward_path, ordinary_ids
from plumb.models.offload import activations_on_host
from plumb.models.reference_cache import ReferenceCache
from plumb.models.routers import Routers, routers_of
from plumb.models.scalar_head import scores
from plumb.paths import get_local_dir
from plumb.rollouts.source import RolloutSource
from plumb.runs.checkpoints import Saver
from plumb.training import budget as sizing
from plumb.training import first_step
from plumb.training.cached_reference import CachedReference
from plumb.training.evaluator import Evaluator
from plumb.training.metrics import TrainingLog
from plumb.training.moving import MovingCache, MovingModel, MovingReference
from plumb.training.objective import Scorer
from plumb.training.optimizers import averages, make_optimizer, make_schedule
from plumb.training.rollout_evaluator import RolloutEvaluator
from plumb.training.rollouts import make_rollouts, samples_responses
from plumb.training.run_evaluator import EvalSampler, RunEvaluator
from plumb.training.run_plan import RunPlan
from plumb.training.saving import RunSaver, best_by, parts_of_2023
from plumb.training.throughput import Throughput
from plumb.training.train_state import TrainState


@dataclass(frozen=True)
class Computation:
    """Hold where and in what precision the models compute.

    Example: `Computation(torch.device("cuda"), torch.bfloat16, torch.float32, autocast)`.
    """

    device: torch.device
    dtype: torch.dtype  # of the forward pass
    weights_dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager]  # entered around each forward pass


@dataclass(frozen=True)
class Data:
    """Hold the training and the held-out examples of a run, and the tokenizer that encoded them."""

    tokenizer: PreTrainedTokenizerBase
    train: Examples
    evaluation: Examples
    ptx: Examples | None = None  # whose cross-entropy is mixed into steps on own responses


@dataclass(frozen=True)
class Reference:
    """Hold how the reference's log-probabilities are computed. Without a `digest` of its weights,
    the model runs beside the policy; with one, it runs once over what the cache lacks. If the model
    is None, the reference is the policy before its first step, or there is none. If it is a
    StartingPolicy, it has no weights of its own.
    """

    model: PreTrainedModel | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Run:
    """Hold what a run consists of, besides its config and its models."""

    loss: Loss
    data: Data
    plan: RunPlan  # the decisions that depend on memory
    fingerprint: dict[str, Any]  # what must be the same when it resumes
    run_dir: Path
    log: TrainingLog
    layout: sharding.Layout | None = None  # how both models are laid out over several processes


class Placement(Protocol):
    """Decide where the models compute, in which precision, and how they are gathered: a trainer."""

    def place(self, model: PreTrainedModel) -> PreTrainedModel: ...
    def autocast(self, device: torch.device) -> Callable[[], Any]: ...
    def backward(self, loss: torch.Tensor, last: bool) -> None: ...
    def policy_state(self) -> dict[str, torch.Tensor]: ...
    def optimizer_state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Prepared:
    """Hold what the first step needs."""

    state: TrainState
    scorer: Scorer
    train_feed: Feed | RolloutSource
    evaluator: Evaluator | RolloutEvaluator
    packing: Packing
    throughput: Throughput
    device: torch.device
    computation: first_step.Computation
    layout_found: str  # how the models compute, and how exact that is
    cached: CachedReference | None = None


def prepare(
    config: DictConfig,
    policy: PreTrainedModel,
    reference: Reference,
    run: Run,
    trainer: Placement,
) -> Prepared:
    """Place both models and choose how they compute; make the optimizer, the feeds and, if the
    reference is cached, its log-probabilities. Every rank must call it.
    """
    plan = run.plan
    layout = run.layout
    tokenizer = run.data.tokenizer
    is_primary_replica = layout is None or layout.first_of_rows
    schedule = make_schedule(config, len(run.data.train))
    cost = sizing.cost_of(policy)
    block = block_class(policy, config.model.block_name) if config.compile else None
    if recomputes_blocks(config.activation_checkpointing, config.compile):
        recompute_blocks(policy, sizing.kept(config))
    policy = trainer.place(policy)
    reference_model = reference.model
    if reference_model is not None and not isinstance(reference_model, StartingPolicy):
        reference_model = trainer.place(reference_model)
    device = layout.device if layout is not None else next(policy.parameters()).device
    computation = Computation(
        device=device,
        dtype=DTYPES[config.model.fsdp_policy_mp or config.model.policy_dtype],
        weights_dtype=DTYPES[config.model.policy_dtype],
        autocast=trainer.autocast(device),
    )
    # Before the first forward pass, since FSDP leaves some weights gathered after it.
    state = TrainState(config, policy, make_optimizer(config, policy, device), schedule)

    def token_budget(path: ForwardPath) -> int:
        # a score needs no logits, and a head that is computed in chunks never holds all of them
        return plan.tokens(no_logits=path.plain_head or scores(policy))

    routers = watch_routers(policy, config.router_aux_loss)
    stop_draws(policy, device)
    forward_path, layout_found = find_forward_path(
        policy, tokenizer, computation, config.max_length, token_budget
    )
    forward_path = forward_path._replace(chunk=plan.head_chunk)
    budget = token_budget(forward_path)
    packing = Packing(
        packed=forward_path.packed,
        budget=budget,
        world_size=layout.n_rows if layout is not None else 1,
        pad_token_id=tokenizer.pad_token_id,
        longest=config.max_length,
        row_length=budget if config.compile and forward_path.packed else None,
    )
    if block is not None:  # the layout was tried before that, on rows of other lengths
        for model in (policy, reference_model):
            if model is not None and not isinstance(model, StartingPolicy):
                compile_blocks(model, block, config.activation_checkpointing)
    scorer = Scorer(
        policy=policy,
        reference=reference_model,
        loss=run.loss,
        forward_path=forward_path,
        precision=computation.autocast,
        device=device,
        routers=routers,
        saving=activations_on_host if config.activation_offload else nullcontext,
        temperature=config.rollout.temperature if run.loss.group == "rollout" else 1.0,
    )
    rank = layout.rank if layout is not None else 0
    train_feed, eval_feed = (
        Feed(examples, packing, rank, context=run.loss.context_examples)
        for examples in (run.data.train, run.data.evaluation)
    )
    source = evaluator = None
    if samples_responses(config, run.loss):
        rollouts = make_rollouts(
            config, tokenizer, packing, rank, is_primary_replica, scorer, trainer.backward
        )
        source = state.rollouts = rollouts.source(
            run.data.train, run.data.ptx, state, run.log.rollouts
        )
        evaluator = rollouts.evaluator(run.data.evaluation, eval_feed)
    cached = None
    if reference.digest is not None:
        open_cache = partial(open_reference_cache, config, scorer, computation, trainer)
        model = scorer.reference or policy
        scorer = replace(scorer, reference=None)
        cached = CachedReference(
            scorer=scorer,
            train_feed=train_feed,
            eval_feed=eval_feed,
            is_primary_replica=is_primary_replica,
            open_cache=open_cache,
        )
        batches = list(islice(schedule, config.reference_update_every))
        cached.fill(reference.digest, batches, model)
    spec = config.model
    same = spec.reference_dtype in (None, spec.policy_dtype)
    return Prepared(
        state=state,
        scorer=scorer,
        train_feed=source or train_feed,
        evaluator=evaluator
        or Evaluator(scorer, eval_feed, config.eval_batch_size, is_primary_replica),
        packing=packing,
        throughput=Throughput(
            cost, sizing.peak_flops(device, computation.dtype), forward_path.packed
        ),
        device=device,
        computation=first_step.Computation(
            computation.dtype, None if same else spec.reference_dtype, config.lr
        ),
        layout_found=layout_found,
        cached=cached,
    )


def open_reference_cache(
    config: DictConfig, scorer: Scorer, computation: Computation, trainer: Placement, weights: str
) -> ReferenceCache:
    """Return the cache of a reference as this run computes it; `weights`: its weights' digest."""
    spec = config.model
    by_run = reference_cache.Computation(
        weights_dtype=spec.reference_dtype or spec.policy_dtype,
        dtype=str(computation.dtype),
        cast_by=type(trainer).__name__ if spec.fsdp_policy_mp else None,
        layout=str(scorer.forward_path),
        compile=config.compile,
        device=computation.device.type,
    )
    cache = ReferenceCache(
        get_local_dir(config.local_dirs) / "reference_cache",
        reference_cache.described(scorer.policy, weights, spec.revision, by_run),
    )
    if cache.problem:
        rank0_print(cache.problem)
    return cache


def autocast_to(name: str | None, device: torch.device) -> Callable[[], Any]:
    """Return the context in which models compute in the type of this name; None: in that of their
    weights.
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
) -> tuple[ForwardPath, str]:
    """Choose how the models compute, by trying, and return it with a line that says why; a slower
    path than packed rows is printed. `row_tokens` gives the length of a microbatch's row on a path.
    Every rank must call it.
    """
    autocast = computation.autocast
    precisions = [Precision(autocast, computation.dtype)]
    if autocast is not nullcontext:  # shows errors that 16 bits would hide
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
    if not forward_path.packed:
        rank0_print(line)
    return forward_path, line


def make_run_saver(config: DictConfig, run: Run, ready: Prepared, trainer: Placement) -> RunSaver:
    """Return the saver of the run's checkpoints."""

    def parts() -> dict[str, Callable[[], Any]]:
        return parts_of_2023(
            ready.state.policy,
            trainer.policy_state,
            trainer.optimizer_state if config.save_optimizer_pt else None,
            ready.state,
            config.policy_format,
        )

    decisions: dict[str, Any] = {
        "tokens_per_microbatch": ready.packing.budget,
        "head_chunk_mb": run.plan.head_chunk_mb,
    }
    if run.plan.reference is not None:
        decisions["reference"] = run.plan.reference
    if run.layout is not None:
        decisions["fsdp_reduce"] = "each" if run.plan.reduce_each else "last"
    saver = Saver(
        run.run_dir,
        in_background=config.async_save,
        keep=config.keep_checkpoints,
        best_by=best_by(config, run.loss),
    )
    return RunSaver(
        run_dir=run.run_dir,
        state=ready.state,
        log=run.log,
        saver=saver,
        parts=parts,
        fingerprint=run.fingerprint,
        decisions=decisions,
        every=config.save_every,
        every_minutes=config.save_every_minutes,
        writes=not config.debug,
        policy_pt_is_complete=config.policy_format == "current"
        and config.adapter == "none"
        and not averages(ready.state.optimizer),
    )


def make_moving_reference(
    config: DictConfig, ready: Prepared, saver: RunSaver
) -> MovingReference | None:
    """Return what moves the reference; None if it stays fixed."""
    every = config.reference_update_every
    if every is None:
        return None
    if ready.cached is not None:
        return MovingCache(ready.state.policy, ready.cached, every, saver.record_reference)
    assert ready.scorer.reference is not None  # validation refuses a loss without one
    return MovingModel(
        ready.state.policy, ready.scorer.reference, every, config.reference_update_weight
    )


def make_run_evaluator(
    config: DictConfig,
    run: Run,
    ready: Prepared,
    saver: RunSaver,
    draw_scores: Callable[[np.ndarray, np.ndarray, Path, int], None],
) -> RunEvaluator:
    """Return the evaluator of the policy within the run. `draw_scores`: see RunEvaluator."""
    return RunEvaluator(
        evaluator=ready.evaluator,
        sampler=make_sampler(config, run),
        average=ready.state.average,
        log=run.log,
        run_dir=run.run_dir,
        check=saver.saver.check,
        draw_scores=draw_scores,
    )


def make_sampler(config: DictConfig, run: Run) -> EvalSampler | None:
    """Return the sampler of the evaluations; None if nothing is to be, or can be, sampled."""
    if not config.sample_during_eval or run.loss.reads == "scores":
        return None
    return EvalSampler(
        tokenizer=run.data.tokenizer,
        n=config.n_eval_model_samples,
        batch_size=config.eval_batch_size,
        max_length=config.max_length,
        max_new_tokens=config.sample_max_new_tokens,
        temperature=config.sample_temperature,
        seed=config.seed,
        prefix=run.loss.prefixes[1] if run.loss.prefixes else "",
    )
