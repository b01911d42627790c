"""The training loop (BasicTrainer). The other trainers place models differently, and nothing else.

Shapes: B pairs (or SFT examples) in a microbatch; see training/objective.py and
losses/contract.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel

from plumb.batching.feed import Feed, Step
from plumb.distributed import sharding
from plumb.distributed.device import pick_device
from plumb.distributed.signals import stop_requested
from plumb.models.adapters import stored
from plumb.models.forward_path import DTYPES
from plumb.reports.score_plots import draw_evaluation
from plumb.runs.checkpoints import Checkpoint
from plumb.training import first_step, setup
from plumb.training.between_steps import BetweenSteps
from plumb.training.head_init import start_head
from plumb.training.metrics import Means
from plumb.training.rollouts import samples_responses
from plumb.training.run_console import unit_of
from plumb.training.stopping import StopRule
from plumb.training.throughput import Pace
from utils import peak_memory_gb


class BasicTrainer:
    """Train in one process: on a GPU if there is one, else on the CPU; over several GPUs the
    model's layers are spread, as in the original repository.
    """

    def __init__(
        self,
        config: DictConfig,
        policy: PreTrainedModel,
        reference: setup.Reference,
        run: setup.Run,
    ):
        """Prepare the run for its first step, or for `restore`. Every rank must call it."""
        self.config = config
        ready = setup.prepare(config, policy, reference, run, self)
        self.run = run
        self.loss = run.loss
        self.log = run.log
        self.device = ready.device
        self.computation = ready.computation
        self.packing = ready.packing
        self.layout_found = ready.layout_found
        self.state = ready.state
        self.policy = ready.state.policy
        self.optimizer = ready.state.optimizer
        self.scorer = ready.scorer
        self.train_feed = ready.train_feed
        self.throughput = ready.throughput
        # true on one of the ranks that see the same rows
        self.is_primary_replica = ready.evaluator.is_primary_replica
        self.saver = setup.make_run_saver(config, run, ready, self)
        self.state.reference = setup.make_moving_reference(config, ready, self.saver)
        self.stop_rule = StopRule(config.max_hours, self.saver)
        self.pace = Pace()
        self.between = BetweenSteps(
            state=self.state,
            log=self.log,
            evaluator=setup.make_run_evaluator(config, run, ready, self.saver, draw_evaluation),
            saver=self.saver,
            stop_rule=self.stop_rule,
            eval_every=config.eval_every,
            do_last_eval=config.do_last_eval,
            pace=self.pace,
        )

    # ---- what other trainers change ----

    @staticmethod
    def make_layout(config: DictConfig) -> sharding.Layout | None:
        """Return how models are laid out over several processes; needed before they are loaded."""
        return None

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Move a model to where this trainer computes."""
        return setup.place_on(model, pick_device(self.config))

    def autocast(self, device: torch.device) -> Callable[[], Any]:
        """Return the context of a forward pass. Both models compute in `model.fsdp_policy_mp` where
        it is set; weights and optimizer keep their own precision.
        """
        return setup.autocast_to(self.config.model.fsdp_policy_mp, device)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add to the gradients; `last`: the last microbatch of this step."""
        loss.backward()

    def policy_state(self) -> dict[str, torch.Tensor]:
        """Return the full weights of the policy, or its adapters, on every rank that writes."""
        return {name: x.detach() for name, x in stored(self.policy).items()}

    def optimizer_state(self) -> dict[str, Any]:
        """Return the full state dict of the optimizer, on every rank that writes."""
        return self.optimizer.state_dict()

    # ---- the loop ----

    @property
    def n_updates(self) -> int:
        """Return the number of optimizer steps so far."""
        return self.state.position.n_updates

    @property
    def n_seen(self) -> int:
        """Return the number of training examples so far."""
        return self.state.position.n_seen

    def train(self) -> None:
        """Train to the end of the schedule, evaluating and saving every eval_every examples. Raise
        Stopped when asked to stop, after saving a checkpoint of the last step.
        """
        state = self.state
        self.policy.train()
        self.saver.mark()
        stop_requested()  # from here on a signal waits for the end of its step
        unit = unit_of(self.loss, samples_responses(self.config, self.loss))
        with self.log.training(self.loss, unit, self.n_updates, state.n_steps):
            if self.n_updates == 0:
                self.start()
            if state.position.evaluation_due:  # the run was stopped before this evaluation
                self.between.evaluate_and_save()
            for step, waited_secs in self.steps():
                self.step(step, waited_secs)
                self.between.after_step(len(step.indices))
            if not state.position.finished:  # changed settings left nothing to train
                self.saver.mark()
                self.between.evaluate_and_save()
            self.saver.wait()

    def start(self) -> None:
        """Make what precedes the first step: the values of a new scalar head, the policy's average
        and the first evaluation.
        """
        config = self.config
        if self.loss.reads == "scores" and isinstance(self.train_feed, Feed):
            pairs = self.state.schedule.order(0)[: config.head_pairs]
            start_head(
                self.scorer, self.train_feed, config.head_init, pairs, self.is_primary_replica
            )
        if self.state.average is not None:
            self.state.average.start()
        if config.do_first_eval:
            with self.pace.evaluation():
                self.between.evaluate()

    def steps(self) -> Iterator[tuple[Step, float]]:
        """Yield the remaining steps, each with the seconds spent waiting for it. A moving reference
        moves in between, when no step with its old log-probabilities is being prepared.
        """
        state = self.state
        while state.schedule.n_steps_after(self.n_seen):
            if state.reference is not None and state.reference_moves():
                state.reference.move(list(state.coming()))
            ahead = self.train_feed.ahead(
                state.coming(), self.device, self.config.gradient_accumulation_steps
            )
            for step in ahead:
                yield step, ahead.waited_secs

    def step(self, step: Step, waited_secs: float) -> None:
        """Make one optimizer step on a batch.

        The summed losses are divided by the count of the batch over all ranks, known before the
        first forward pass, so any split of the batch gives the same gradient. Metrics stay on the
        device.
        """
        start = time.perf_counter()
        # randomness is a function of seed and step
        torch.manual_seed(hash((self.config.seed, self.n_updates)) % 2**63)
        is_first = not self.state.position.checked and bool(step.microbatches)

        # forward and backward, one microbatch after another
        n = step.lengths.n_scored() if self.loss.average_over == "tokens" else len(step.lengths)
        context = self.scorer.context(step.for_context, self.is_primary_replica)
        means = Means()
        first_scored = []
        for i, (batch, weight, where) in enumerate(step.microbatches):
            scored = self.scorer(batch, self.loss.context_of(context, where))
            if is_first:
                first_scored.append(scored.detached())
            loss = weight * scored.weighted_losses().sum() / n
            if scored.balance is not None:
                loss = loss + self.config.router_aux_loss * weight * scored.balance.sum() / len(
                    step.lengths
                )
            self.backward(loss, last=i == len(step.microbatches) - 1)
            means.add(scored.metrics, weight, scored.weights)

        # clip and update; the first time, with checks before and after
        checks = None
        if is_first:
            checks = first_step.FirstStep(self.scorer, self.computation, batch, first_scored, means)
        grad_norm = self.clip()
        if not math.isfinite(grad_norm):
            self.log.flush()
            raise first_step.not_finite(
                self.train_feed.examples,
                step,
                self.n_updates + 1,
                grad_norm,
                self.config.lr,
                self.run.run_dir,
            )
        lr = float(self.state.scheduler.get_last_lr()[0])
        self.state.update(step.indices, trained=bool(step.microbatches))
        if checks is not None:
            checks.check(grad_norm)
            self.state.position.checked = True
            n_left = self.state.schedule.n_examples - self.n_seen
            self.saver.rehearse(n_saves=math.ceil(n_left / self.config.eval_every))

        # log
        secs = time.perf_counter() - start
        self.stop_rule.longest_step_secs = max(self.stop_rule.longest_step_secs, secs)
        self.pace.step(secs + waited_secs)
        live = self.scorer.reference is not None
        counters = {
            **self.throughput.of(step, secs + waited_secs, waited_secs, live),
            "peak_memory_gb": peak_memory_gb(),
            "grad_norm": grad_norm,
            "lr": lr,
            "seconds_left": self.between.seconds_left(),
            "counters/examples": self.n_seen,
            "counters/updates": self.n_updates,
            **step.counters,
        }
        self.log.step(means, counters)

    def clip(self) -> float:
        """Clip the gradient norm to max_grad_norm. Return the norm before clipping.

        This is the only time in a step that the host waits for the device: gradients are scaled
        only if they are too large, and a norm that is not finite prevents the update.
        """
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        if not gradients:  # a step without microbatches
            return 0.0
        total = sharding.total_norm(gradients)
        norm = float(total)
        if norm > self.config.max_grad_norm:
            sharding.scale(gradients, self.config.max_grad_norm / (total + 1e-6))
        return norm

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: weights, optimizer and position."""
        self.saver.restore(checkpoint)


class FSDPTrainer(BasicTrainer):
    """Train in one process per GPU; parameters, gradients and optimizer state are sharded over
    them, block by block.
    """

    @staticmethod
    def make_layout(config: DictConfig) -> sharding.Layout:
        return _layout(config, 1)

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        return model  # it was loaded in place

    def autocast(self, device: torch.device) -> Callable[[], Any]:
        return nullcontext  # the sharded modules cast by themselves

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        sharding.reduce_gradients(self.policy, now=last, each=self.run.plan.reduce_each)
        super().backward(loss, last)

    def policy_state(self) -> dict[str, torch.Tensor]:
        return sharding.gathered_state(stored(self.policy))

    def optimizer_state(self) -> dict[str, Any]:
        return sharding.gathered_optimizer_state(self.policy, self.optimizer)


class TensorParallelTrainer(FSDPTrainer):
    """Train in one process per GPU. Groups of tp_size processes see the same rows, and each holds a
    part of every matrix; FSDP shards over the groups.
    """

    @staticmethod
    def make_layout(config: DictConfig) -> sharding.Layout:
        return _layout(config, config.tp_size)


def _layout(config: DictConfig, tp_size: int | None) -> sharding.Layout:
    name = config.model.fsdp_policy_mp
    return sharding.Layout(
        config.fsdp_shard_size, tp_size, name and DTYPES[name], config.fsdp_cpu_offload
    )


TRAINERS = {kind.__name__: kind for kind in (BasicTrainer, FSDPTrainer, TensorParallelTrainer)}
