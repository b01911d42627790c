"""The one training loop (BasicTrainer). The other trainers only place models.

Shapes: B pairs (or SFT examples) in a microbatch; see training/objective.py and
losses/contract.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm
from transformers import PreTrainedModel

from plumb.batching.feed import Feed, Step
from plumb.batching.microbatches import Packing
from plumb.console import quiet, rank, rank0_print
from plumb.distributed import collectives, sharding
from plumb.distributed.device import pick_device
from plumb.distributed.progress import run_progress
from plumb.distributed.signals import stop_requested
from plumb.losses.registry import Loss
from plumb.models import reference_cache
from plumb.models.blocks import block_class, compile_blocks
from plumb.models.forward_path import DTYPES, ForwardPath
from plumb.models.scalar_head import scores
from plumb.paths import get_local_dir
from plumb.reports.score_plots import draw_evaluation
from plumb.runs import checkpoints, directory
from plumb.training import budget as sizing
from plumb.training import first_step, setup
from plumb.training.evaluator import EvalSampler, Evaluator
from plumb.training.metrics import Means, Record, TrainingLog
from plumb.training.objective import Scorer
from plumb.training.optimizers import make_optimizer, make_schedule, make_scheduler
from plumb.training.run_plan import RunPlan
from plumb.training.stopping import StopRule
from plumb.training.throughput import Throughput
from plumb.training.train_state import Position, TrainState, parts_of_2023
from utils import peak_memory_gb


class BasicTrainer:
    """One process: a GPU if there is one, else the CPU; over several GPUs the model's layers are
    spread, as in the original repository.
    """

    def __init__(
        self,
        config: DictConfig,
        policy: PreTrainedModel,
        reference: setup.Reference,
        loss: Loss,
        data: setup.Data,
        plan: RunPlan,
        fingerprint: dict[str, Any],
        run_dir: Path,
        log: TrainingLog,
        layout: sharding.Layout | None = None,
    ):
        """`plan`: what was decided by the memory at hand. `fingerprint`: what the run is made of.
        `layout`: how both models lie over several processes, which they do already.
        """
        self.config = config
        self.run_dir = run_dir
        self.log = log
        self.loss = loss
        self.tokenizer = data.tokenizer
        self.plan = plan
        self.fingerprint = fingerprint
        self.layout = layout
        # of those who see other rows
        self.rank, self.world_size = (layout.rank, layout.n_rows) if layout is not None else (0, 1)
        # one of the ranks that see the same rows
        self.is_primary_replica = layout is None or layout.first_of_rows
        self.schedule = make_schedule(config, len(data.train))
        cost = sizing.cost_of(policy)
        block = block_class(policy, config.model.block_name) if config.compile else None
        if config.activation_checkpointing is True:
            policy.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.policy = self.place(policy)
        reference_model = self.place(reference.model) if reference.model is not None else None
        self.device = layout.device if layout is not None else next(self.policy.parameters()).device
        spec = config.model
        self.computation = setup.Computation(
            device=self.device,
            dtype=DTYPES[spec.fsdp_policy_mp or spec.policy_dtype],
            weights_dtype=DTYPES[spec.policy_dtype],
            autocast=self.autocast(self.device),
        )
        peak_flops = sizing.peak_flops(self.device, self.computation.dtype)
        # Before the first forward pass, after which FSDP leaves some weights gathered.
        self.optimizer = make_optimizer(config, self.policy, self.device)
        self.scheduler = make_scheduler(config, self.optimizer, self.schedule.n_steps)

        routers = setup.watch_routers(self.policy, config.router_aux_loss)
        setup.stop_draws(self.policy, self.device)
        forward_path = self.choose_forward_path()
        budget = self.token_budget(forward_path)
        rank0_print(f"microbatches of up to {budget:,} tokens")
        self.packing = Packing(
            forward_path.packed,
            budget,
            self.world_size,
            data.tokenizer.pad_token_id,
            config.max_length,
            row_length=budget if config.compile and forward_path.packed else None,
        )
        if block is not None:  # after the layout was tried, on rows of other lengths
            for model in filter(None, (self.policy, reference_model)):
                compile_blocks(model, block, config.activation_checkpointing)
        self.scorer = Scorer(
            self.policy,
            reference_model,
            loss,
            forward_path,
            self.computation.autocast,
            self.device,
            routers,
        )
        context = loss.context_examples
        self.train_feed = Feed(data.train, self.packing, self.rank, context=context)
        self.eval_feed = Feed(data.evaluation, self.packing, self.rank, context=context)
        if reference.digest is not None:
            self.find_reference_logps(reference.digest)
            self.scorer = self.scorer._replace(reference=None)
        self.evaluator = Evaluator(
            self.scorer, self.eval_feed, config.eval_batch_size, self.is_primary_replica
        )
        self.throughput = Throughput(cost, peak_flops, forward_path.packed)
        self.stop_rule = StopRule(config.max_hours)
        self.position = Position()
        self.first_update = 0  # updates that were made before this start
        self.n_steps = self.schedule.n_steps
        self.saver = checkpoints.Saver(
            run_dir,
            in_background=config.async_save,
            keep=config.keep_checkpoints,
            best_by=config.keep_best,
        )
        self.state = TrainState(self.policy, self.optimizer, self.saver)
        self.decisions: dict[str, Any] = {"tokens_per_microbatch": budget}
        if plan.reference is not None:
            self.decisions["reference"] = plan.reference

    # ---- what other trainers change ----

    @staticmethod
    def make_layout(config: DictConfig) -> sharding.Layout | None:
        """Return how models are to lie over several processes; made before they are loaded."""
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
        """Add to the gradients; `last`: of this step."""
        loss.backward()

    def policy_state(self) -> dict[str, torch.Tensor]:
        """Return the whole policy's state dict, on every rank that writes."""
        return self.policy.state_dict()

    def optimizer_state(self) -> dict[str, Any]:
        """Return the whole optimizer's state dict, on every rank that writes."""
        return self.optimizer.state_dict()

    # ---- before training ----

    def choose_forward_path(self) -> ForwardPath:
        """Return how the models compute, and print why."""
        return setup.find_forward_path(
            self.policy,
            self.tokenizer,
            self.computation,
            self.config.max_length,
            self.token_budget,
        )

    def token_budget(self, forward_path: ForwardPath) -> int:
        """Return the tokens of a microbatch. A score takes no logits, and so does a head that is
        computed in chunks.
        """
        return self.plan.tokens(forward_path.plain_head or scores(self.policy))

    def find_reference_logps(self, weights: str) -> None:
        """Give both feeds the reference's log-probabilities: from the cache, and by one pass over
        what is not in it. `weights`: the digest of the reference's.
        """
        spec = self.config.model
        computation = reference_cache.Computation(
            weights_dtype=spec.reference_dtype or spec.policy_dtype,
            dtype=str(self.computation.dtype),
            cast_by=type(self).__name__ if spec.fsdp_policy_mp else None,
            layout=str(self.scorer.forward_path),
            compile=self.config.compile,
            device=self.device.type,
        )
        cache = reference_cache.ReferenceCache(
            get_local_dir(self.config.local_dirs) / "reference_cache",
            reference_cache.described(self.policy, weights, spec.revision, computation),
        )
        if cache.problem:
            rank0_print(cache.problem)
        # a run of few examples needs only these
        used = np.unique(np.concatenate([np.zeros(0, np.int64), *self.schedule]))
        every = np.arange(len(self.eval_feed.examples))
        for feed, indices, batches in (
            (self.train_feed, used, self.schedule),
            (self.eval_feed, every, [every]),
        ):
            setup.add_reference_logps(self.scorer, feed, indices, cache, self.is_primary_replica)
            if feed.context == "mismatched":
                setup.add_mismatched_logps(
                    self.scorer, feed, batches, cache, self.is_primary_replica
                )

    # ---- the loop ----

    @property
    def n_updates(self) -> int:
        return self.position.n_updates

    @property
    def n_seen(self) -> int:
        return self.position.n_seen

    def train(self) -> None:
        """Train to the end of the schedule, evaluating and saving every eval_every examples. Raises
        Stopped when asked to stop, with a checkpoint of the step that was done.
        """
        config = self.config
        position = self.position
        self.policy.train()
        self.started = time.monotonic()
        self.logs = self.log.mark()
        stop_requested()  # from here on signals wait for the step that they find
        if self.n_updates == 0 and self.loss.reads == "scores":
            pairs = self.schedule.order(0)[: config.head_pairs]
            setup.start_head(
                self.scorer, self.train_feed, config.head_init, pairs, self.is_primary_replica
            )
        if self.n_updates == 0 and config.do_first_eval:
            self.evaluate()
        if position.evaluation_due:  # the run was stopped before the evaluation that belongs here
            self.milestone()
        progress = tqdm(
            total=self.n_steps,
            initial=self.n_updates,
            desc=self.loss.name,
            unit="step",
            disable=quiet(),
        )
        ahead = self.train_feed.ahead(
            self.schedule.after(self.n_seen), self.device, config.gradient_accumulation_steps
        )
        for step in ahead:
            self.step(step, ahead.waited_secs)
            progress.update()
            n = len(step.indices)
            position.evaluation_due = self.n_updates == self.n_steps or position.passed(
                config.eval_every, n
            )
            if position.evaluation_due:
                # a stop from here on, until it is saved, takes the evaluation back
                self.logs = self.log.mark()
            self.between_steps(n)
            # once in a while: evaluate, and save with what came out
            if position.evaluation_due:
                self.milestone()
        progress.close()
        if not position.finished:  # nothing was left to train, since the settings were changed
            self.logs = self.log.mark()
            self.milestone()
        self.saver.wait()

    def step(self, step: Step, waited_secs: float) -> None:
        """One optimizer step on a batch.

        The summed losses are divided by the whole batch's count, known before the first forward
        pass, so any split of the batch gives the same gradient. Metrics stay on the device.
        """
        start = time.perf_counter()
        # randomness is a function of seed and step
        torch.manual_seed(hash((self.config.seed, self.n_updates)) % 2**63)
        is_first = self.n_updates == 0

        # forward and backward, one microbatch after another
        n = step.lengths.n_scored() if self.loss.average_over == "tokens" else len(step.indices)
        context = self.scorer.context(step.whole, self.is_primary_replica)
        means = Means()
        seen = []
        for i, (batch, weight, where) in enumerate(step.microbatches):
            scored = self.scorer(batch, self.loss.context_of(context, where))
            if is_first:
                losses = replace(scored.output, losses=scored.output.losses.detach())
                seen.append(scored._replace(output=losses, balance=None))
            loss = weight * scored.weighted_losses().sum() / n
            if scored.balance is not None:
                loss = loss + self.config.router_aux_loss * weight * scored.balance.sum() / len(
                    step.indices
                )
            self.backward(loss, last=i == len(step.microbatches) - 1)
            means.add(scored.metrics, weight, scored.weights)

        # clip and update; the first time, with checks before and after
        checks = None
        if is_first:
            checks = first_step.FirstStep(self.scorer, self.first_computation(), batch, seen, means)
        grad_norm = self.clip()
        if not math.isfinite(grad_norm):
            self.log.flush()
            raise first_step.not_finite(
                self.train_feed.examples,
                step,
                self.n_updates + 1,
                grad_norm,
                self.config.lr,
                self.run_dir,
            )
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.position.advance(step.indices)
        run_progress.report(self.n_updates, self.n_seen)
        if checks is not None:
            checks.check(grad_norm)
            self.rehearse_save()

        # log
        secs = time.perf_counter() - start
        self.stop_rule.longest_step_secs = max(self.stop_rule.longest_step_secs, secs)
        live = self.scorer.reference is not None
        counters: Record = {
            **self.throughput.of(step, secs + waited_secs, waited_secs, live),
            "peak_memory_gb": peak_memory_gb(),
            "grad_norm": grad_norm,
            "lr": lr,
            "seconds_left": (
                (time.monotonic() - self.started)
                * (self.n_steps - self.n_updates)
                / (self.n_updates - self.first_update)
            ),
            "counters/examples": self.n_seen,
            "counters/updates": self.n_updates,
        }
        self.log.step(means, counters)

    def clip(self) -> float:
        """Clip the gradient norm to max_grad_norm. -> the norm before clipping

        The one time in a step that the host waits for the device: gradients are scaled only if they
        are too large, and an update is not made with what is not finite.
        """
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        total = sharding.total_norm(gradients)
        norm = float(total)
        if norm > self.config.max_grad_norm:
            sharding.scale(gradients, self.config.max_grad_norm / (total + 1e-6))
        return norm

    def between_steps(self, n: int) -> None:
        """Do what all ranks agree on after a step of `n` examples: log, save between evaluations,
        stop.
        """
        minutes = self.config.save_every_minutes
        save = self.position.passed(self.config.save_every, n) or (
            bool(minutes) and time.monotonic() - self.state.last_save > 60 * minutes
        )
        self.stop_rule.save_secs = self.saver.secs
        due, failed, save, late, number = collectives.all_reduce_max(
            [self.log.due(), self.saver.failed(), save, *self.stop_rule.wishes()]
        )
        if due:
            self.log.flush()
        if failed:
            self.saver.wait()
        if number or late:
            self.stop(int(number))
        if save and not self.position.evaluation_due:
            self.save({}, interim=True)

    def check_stop(self) -> None:
        """Stop within an evaluation, between batches, if asked to."""
        self.stop_rule.save_secs = self.saver.secs
        late, number = self.stop_rule.agreed()
        if late or number:
            self.position.finished = False
            self.stop(number)

    def stop(self, number: int) -> None:
        """Save, unless nothing was trained, and raise Stopped. `number`: the signal, or 0 when the
        time is up.
        """
        if self.n_updates:
            self.save({}, interim=True)
            self.saver.wait()
        raise self.stop_rule.stopped(
            number,
            f"step {self.n_updates:,} of {self.n_steps:,}, {self.n_seen:,} examples",
            resumable=self.n_updates > 0 and not self.config.debug,
        )

    # ---- once in a while: evaluate and save ----

    def milestone(self) -> None:
        """Evaluate, and save with what came out."""
        self.position.evaluation_due = True
        self.position.finished = self.n_updates >= self.n_steps
        record = self.evaluate() if not self.position.finished or self.config.do_last_eval else {}
        self.position.evaluation_due = False
        self.save(record)

    def evaluate(self) -> Record:
        """Log the metrics over the eval examples, and samples if sample_during_eval, at the current
        number of examples. -> the metrics
        """
        if not len(self.evaluator):
            return {}
        rank0_print(
            f"evaluating {len(self.evaluator)} examples after {self.n_seen:,} training examples"
        )
        evaluation = self.evaluator.evaluate(self.check_stop)
        record = self.evaluator.record(evaluation)
        self.saver.check(record)
        self.log.evaluation(record, self.n_seen)
        if self.loss.reads == "scores":
            if rank() == 0:
                draw_evaluation(*evaluation.scores(), self.run_dir, self.n_seen)
        elif self.config.sample_during_eval:
            self.log_samples()
        return record

    def log_samples(self) -> None:
        """Log samples of the policy, and of its reference if there is one."""
        config = self.config
        sampler = EvalSampler(
            tokenizer=self.tokenizer,
            n=config.n_eval_model_samples,
            batch_size=config.eval_batch_size,
            max_length=config.max_length,
            max_new_tokens=config.sample_max_new_tokens,
            temperature=config.sample_temperature,
            seed=config.seed,
        )
        examples = self.eval_feed.examples
        rows = sampler.rows(self.policy, examples, self.n_seen, self.check_stop)
        self.log.samples("policy_samples", rows, self.n_seen)
        reference = self.scorer.reference
        if reference is not None:
            rows = sampler.rows(reference, examples, self.n_seen, self.check_stop)
            self.log.samples("reference_samples", rows, self.n_seen)
        elif self.loss.needs_reference and self.n_updates == 0:
            # a cached reference is the policy before its first step
            self.log.samples("reference_samples", rows, self.n_seen)

    def save(self, record: Record, interim: bool = False) -> None:
        """Save a checkpoint of this moment, step-<examples>, or interim-<examples> between
        evaluations; LATEST points to it.
        """
        self.state.last_save = time.monotonic()
        if self.config.debug:
            rank0_print("debug=true: no checkpoint is written")
            return
        name = f"{'interim' if interim else 'step'}-{self.n_seen}"
        self.state.save(name, self.parts(), self.manifest(record))
        if rank() == 0:
            directory.write_status(self.run_dir, "running")

    def rehearse_save(self) -> None:
        """Find out what a save takes, and that it works."""
        if not self.config.debug:
            n_saves = -(-(self.schedule.n_examples - self.n_seen) // self.config.eval_every)
            self.state.rehearse(self.parts(), self.manifest({}), n_saves)

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Return the files of the original repository's form."""
        return parts_of_2023(
            self.policy,
            self.policy_state,
            self.optimizer_state if self.config.save_optimizer_pt else None,
            self.scheduler,
            self.config.policy_format,
        )

    def manifest(self, record: Record) -> checkpoints.Manifest:
        """Return what is known of a checkpoint that is saved now."""
        position = self.position
        return checkpoints.Manifest(
            step=position.n_updates,
            examples=position.n_seen,
            finished=position.finished and not position.evaluation_due,
            evaluation_due=position.evaluation_due,
            metrics=record,
            fingerprint=self.fingerprint,
            decisions=self.decisions,
            logs=self.logs if position.evaluation_due else self.log.mark(),
            order=position.order,
            wandb=self.log.wandb_id(),
            values=self.state.values(),
            save_secs=self.saver.secs,
        )

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Continue from a checkpoint: weights, optimizer and position."""
        self.position = self.state.restore(checkpoint)
        self.first_update = self.n_updates
        self.n_steps = self.n_updates + self.schedule.n_steps_after(self.n_seen)
        self.scheduler = make_scheduler(self.config, self.optimizer, self.n_steps, self.n_updates)
        run_progress.report(self.n_updates, self.n_seen)

    def first_computation(self) -> first_step.Computation:
        """Return what the first step's checks need to know beside the scorer."""
        spec = self.config.model
        same = spec.reference_dtype in (None, spec.policy_dtype)
        return first_step.Computation(
            self.computation.dtype, None if same else spec.reference_dtype, self.config.lr
        )


class FSDPTrainer(BasicTrainer):
    """One process per GPU; parameters, gradients and optimizer state are sharded over them, block
    by block.
    """

    layout: sharding.Layout

    @staticmethod
    def make_layout(config: DictConfig) -> sharding.Layout:
        return _layout(config, 1)

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        return model  # it was loaded there

    def autocast(self, device: torch.device) -> Callable[[], Any]:
        return nullcontext  # the sharded modules cast by themselves

    def __init__(self, config: DictConfig, *arguments: Any, **options: Any):
        super().__init__(config, *arguments, **options)
        self.decisions["fsdp_reduce"] = "each" if self.plan.reduce_each else "last"

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        sharding.reduce_gradients(self.policy, now=last, each=self.plan.reduce_each)
        super().backward(loss, last)

    def policy_state(self) -> dict[str, torch.Tensor]:
        return sharding.gathered_model_state(self.policy)

    def optimizer_state(self) -> dict[str, Any]:
        return sharding.gathered_optimizer_state(self.policy, self.optimizer)


class TensorParallelTrainer(FSDPTrainer):
    """One process per GPU; tp_size of them see the same rows and hold a part of every matrix each;
    over the others, FSDP.
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
