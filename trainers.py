"""The one training loop (BasicTrainer). The other trainers only place models.

Shapes: B pairs (or SFT examples) in a microbatch; see training/objective.py and
losses/contract.py.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumb.batching.feed import Feed, Step
from plumb.batching.microbatches import Packing
from plumb.console import quiet, rank, rank0_print
from plumb.data.examples import lengths_of
from plumb.data.token_text import decode
from plumb.data.tokenization import Example
from plumb.distributed import collectives, sharding
from plumb.distributed.device import pick_device
from plumb.distributed.progress import run_progress
from plumb.distributed.signals import Stopped, exit_code, stop_requested
from plumb.losses.registry import Loss
from plumb.models.blocks import block_class, compile_blocks
from plumb.models.chunked_head import held_bytes
from plumb.models.draws import run_without_draws
from plumb.models.forward_path import DTYPES, ForwardPath
from plumb.models.layout_probe import Precision, choose_forward_path, ordinary_ids
from plumb.models.reference_cache import Computation, ReferenceCache, described, digests_of_all
from plumb.models.routers import Routers, routers_of
from plumb.models.scalar_head import fit_head, scores
from plumb.paths import get_local_dir
from plumb.reports.score_plots import draw_evaluation
from plumb.rollouts.hf_engine import sample
from plumb.runs import checkpoints, directory, state_files
from plumb.runs.policy_file import as_in_2023
from plumb.training import budget as sizing
from plumb.training import first_step
from plumb.training.evaluator import all_hidden, all_logps, eval_groups, evaluate, folds_of
from plumb.training.metrics import Means, Record, TrainingLog
from plumb.training.objective import Scorer
from plumb.training.optimizers import make_optimizer, make_schedule, make_scheduler
from utils import peak_memory_gb


class BasicTrainer:
    """One process: a GPU if there is one, else the CPU; over several GPUs the model's layers are
    spread, as in 2023.
    """

    def __init__(
        self,
        config: DictConfig,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        weights: str | None,
        loss: Loss,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Example],
        evaluation: Sequence[Example],
        run_dir: Path,
        log: TrainingLog,
        layout: sharding.Layout | None = None,
    ):
        """`reference`: to be run beside the policy, or, with `weights`, once. `weights`: the digest
        of the reference's, whose log-probabilities are then taken from a cache; a reference that is
        None is the policy before its first step. `layout`: how both models lie over several
        processes, which they do already.
        """
        self.config = config
        self.run_dir = run_dir
        self.log = log
        self.loss = loss
        self.tokenizer = tokenizer
        self.layout = layout
        # of those who see other rows
        self.rank, self.world_size = (layout.rank, layout.n_rows) if layout is not None else (0, 1)
        # one of the ranks that see the same rows
        self.is_primary_replica = layout is None or layout.first_of_rows
        self.schedule = make_schedule(config, len(train))
        self.cost = sizing.cost_of(policy)
        block = block_class(policy, config.model.block_name) if config.compile else None
        if config.activation_checkpointing is True:
            policy.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.policy = self.place(policy)
        reference = self.place(reference) if reference is not None else None
        self.device = layout.device if layout is not None else next(self.policy.parameters()).device
        # of computation
        self.dtype = DTYPES[config.model.fsdp_policy_mp or config.model.policy_dtype]
        # of one process; None on a CPU
        self.peak_flops = sizing.peak_flops(self.device, self.dtype)
        # Before the first forward pass, after which FSDP leaves some weights gathered.
        self.optimizer = make_optimizer(config, self.policy, self.device)
        self.scheduler = make_scheduler(config, self.optimizer, self.schedule.n_steps)

        routers = self.watch_routers()
        if drawing := run_without_draws(self.policy, self.device):
            rank0_print(
                f"{', '.join(drawing)} would draw random numbers in training: computed as in"
                " evaluation"
            )
        forward_path = self.choose_forward_path(train)
        budget = collectives.broadcast_object(self.token_budget(train, forward_path))
        rank0_print(f"microbatches of up to {budget:,} tokens")
        self.packing = Packing(
            forward_path.packed,
            budget,
            self.world_size,
            tokenizer.pad_token_id,
            config.max_length,
            row_length=budget if config.compile and forward_path.packed else None,
        )
        if block is not None:  # after the layout was tried, on rows of other lengths
            for model in (self.policy, reference) if reference is not None else (self.policy,):
                compile_blocks(model, block, config.activation_checkpointing)
        self.scorer = Scorer(
            self.policy,
            reference,
            loss,
            forward_path,
            self.precision(self.device),
            self.device,
            routers,
        )
        self.train_feed, self.eval_feed = (
            Feed(examples, self.packing, self.rank) for examples in (train, evaluation)
        )
        if weights is not None:
            self.find_reference_logps(weights)
            self.scorer = self.scorer._replace(reference=None)
        self.eval_groups = eval_groups(evaluation)
        self.n_seen = self.n_updates = self.first_update = (
            0  # begun: updates that were made before this start
        )
        self.n_steps = self.schedule.n_steps
        self.order = ""  # a digest of the indices of all examples seen, chained
        self.evaluation_due = False
        self.finished = False
        self.saved = ""
        self.saver = checkpoints.Saver(
            run_dir,
            in_background=config.async_save,
            keep=config.keep_checkpoints,
            best_by=config.keep_best,
        )
        self.fingerprint: dict[str, Any] = {}
        self.decisions: dict[str, Any] = {"tokens_per_microbatch": budget}
        self.decisions |= (
            {"reference": "live" if weights is None else "cached"} if loss.needs_reference else {}
        )
        self.checkpoint_bytes = 0
        self.longest_step_secs = 0.0
        self.last_save = time.monotonic()

    # ---- what other trainers change ----

    @staticmethod
    def make_layout(config: DictConfig) -> sharding.Layout | None:
        """How models are to lie over several processes; made before they are loaded."""
        return None

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Move a model to where this trainer computes. A model that was loaded over several GPUs
        stays there.
        """
        if getattr(model, "hf_device_map", None) is None:
            nn.Module.to(model, pick_device(self.config))
        return model

    def precision(self, device: torch.device) -> Callable[[], Any]:
        """Both models compute in `model.fsdp_policy_mp` where it is set; weights and optimizer keep
        their own precision.
        """
        name = self.config.model.fsdp_policy_mp
        return (lambda: torch.autocast(device.type, DTYPES[name])) if name else nullcontext

    def policy_state(self) -> dict[str, torch.Tensor]:
        """The whole policy's state dict, on every rank that writes."""
        return self.policy.state_dict()

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    # ---- before training ----

    def watch_routers(self) -> Routers | None:
        """Of a mixture of experts, where router_aux_loss asks for it; and say what of their balance
        is in the loss.
        """
        coefficient = self.config.router_aux_loss
        if not coefficient and routers_of(self.policy):
            rank0_print(
                "mixture of experts: the routers' balancing loss is not part of the loss"
                " (router_aux_loss=0)"
            )
        elif coefficient:
            rank0_print(
                f"mixture of experts: {coefficient:g} x the routers' balancing loss is added to the"
                " loss"
            )
        return Routers(self.policy) if coefficient else None

    def choose_forward_path(self, train: Sequence[Example]) -> ForwardPath:
        """Return how the models compute, and print why."""
        autocast = self.precision(self.device)
        precisions = [Precision(autocast, self.dtype)]
        if autocast is not nullcontext:  # where errors show that 16 bits would hide
            precisions.insert(0, Precision(nullcontext, DTYPES[self.config.model.policy_dtype]))
        forward_path, line = choose_forward_path(
            self.policy,
            device=self.device,
            longest=self.config.max_length,
            vocabulary=ordinary_ids(self.policy, self.tokenizer),
            row_tokens=lambda forward_path: collectives.broadcast_object(
                self.token_budget(train, forward_path)
            ),
            precisions=precisions,
            gradients=True,
        )
        rank0_print(line)
        return forward_path

    def token_budget(self, train: Sequence[Example], forward_path: ForwardPath) -> int:
        """Tokens of a microbatch: as configured, or from the memory at hand."""
        trained = sizing.trained_bytes(self.policy) / (
            1 if self.layout is None else self.layout.n_shards
        )
        free = sizing.memory_at_hand(self.device) - trained - held_bytes(self.device)
        mean = float(np.mean(lengths_of(train).tokens()))
        small = forward_path.plain_head or scores(self.policy)  # no logits
        return sizing.token_budget(
            self.config,
            self.policy.config,
            self.device,
            self.dtype,
            free,
            small,
            mean,
            self.world_size,
        )

    @torch.no_grad()
    def find_reference_logps(self, weights: str) -> None:
        """Give both feeds the reference's log-probabilities: from the cache, and by one pass over
        what is not in it.
        """
        model, spec = self.scorer.reference or self.policy, self.config.model
        computation = Computation(
            weights_dtype=spec.reference_dtype or spec.policy_dtype,
            dtype=str(self.dtype),
            cast_by=type(self).__name__ if spec.fsdp_policy_mp else None,
            layout=str(self.scorer.forward_path),
            compile=self.config.compile,
            device=self.device.type,
        )
        made_of = described(self.policy, weights, spec.revision, computation)
        cache = ReferenceCache(get_local_dir(self.config.local_dirs) / "reference_cache", made_of)
        if cache.problem:
            rank0_print(cache.problem)
        # a run of few examples needs only these
        used = np.unique(np.concatenate([np.zeros(0, np.int64), *self.schedule]))
        for feed, indices in (
            (self.train_feed, used),
            (self.eval_feed, np.arange(len(self.eval_feed.examples))),
        ):
            digests = digests_of_all(feed.examples, indices)
            # [n, k], on every rank what rank 0 knows
            known = collectives.from_rank0(partial(cache.find, digests))
            (new,) = np.isnan(known).any(1).nonzero()
            progress = tqdm(total=len(new), desc="reference", unit="example", disable=quiet())
            # what is kept when the pass is interrupted; the file is written anew each time
            size = max(4096, len(new) // 64)
            for start in range(0, len(new), size):
                some = new[start : start + size]
                known[some] = all_logps(
                    self.scorer, model, feed, indices[some], self.is_primary_replica, progress
                )
                collectives.from_rank0(partial(cache.add, digests[some], known[some]))
            progress.close()
            rank0_print(
                f"reference: {len(known) - len(new):,} of {len(known):,} examples in {cache.path}"
                + (f", {len(new):,} computed now" if len(new) else "")
            )
            feed.reference = np.full((len(feed.examples), known.shape[1]), np.nan)
            feed.reference[indices] = known

    @torch.no_grad()
    def start_head(self) -> None:
        """Give a scalar head that is new its first values, as head_init says. One that was trained
        before keeps its own.
        """
        head, config = cast(Any, self.policy).get_output_embeddings(), self.config
        if not head.drawn or config.head_init == "random":
            return
        (name,) = (
            name
            for name, p in self.policy.named_parameters()
            if any(p is own for own in head.parameters())
        )
        weight = torch.zeros(head.weight.shape)
        if config.head_init == "fit":
            indices = self.schedule.order(0)[: config.head_pairs]
            progress = tqdm(total=len(indices), desc="head", unit="pair", disable=quiet())
            # [n, 2, d]
            hidden = all_hidden(
                self.scorer, self.train_feed, indices, self.is_primary_replica, progress
            )
            progress.close()
            folds = folds_of(self.train_feed.examples, indices)
            fit = collectives.from_rank0(
                partial(fit_head, hidden[:, 0], hidden[:, 1], torch.from_numpy(folds))
            )
            weight = fit.weight
            result = (
                f"of pairs left out it ranks {fit.accuracy:.3f} as the data do, at a loss of"
                f" {fit.loss:.4f}"
            )
            rank0_print(
                f"head: fitted to what the untrained model reads of {len(indices):,} pairs; "
                f"{result if weight.any() else 'they tell nothing, so it starts at zero'}"
            )
        sharding.reshard(self.policy)
        for part_name, part, where in sharding.parts(self.policy):
            if part_name == name and part.numel():
                part.copy_(weight[where])

    # ---- the loop ----

    def train(self) -> None:
        """Train to the end of the schedule, evaluating and saving every eval_every examples. Raises
        Stopped when asked to stop, with a checkpoint of the step that was done.
        """
        config = self.config
        self.policy.train()
        self.started = time.monotonic()
        self.logs = self.log.mark()
        stop_requested()  # from here on signals wait for the step that they find
        if self.n_updates == 0 and self.loss.reads == "scores":
            self.start_head()
        if self.n_updates == 0 and config.do_first_eval:
            self.evaluate()
        if self.evaluation_due:  # the run was stopped before the evaluation that belongs here
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
            n, last = len(step.indices), self.n_updates == self.n_steps
            self.evaluation_due = (
                last or self.n_seen // config.eval_every > (self.n_seen - n) // config.eval_every
            )
            if self.evaluation_due:
                # a stop from here on, until it is saved, takes the evaluation back
                self.logs = self.log.mark()
            self.between_steps(n)
            if self.evaluation_due:
                self.milestone()
        progress.close()
        if not self.finished:  # nothing was left to train, since the settings were changed
            self.logs = self.log.mark()
            self.milestone()
        self.saver.wait()

    def milestone(self) -> None:
        """Evaluate, and save with what came out."""
        self.evaluation_due = True
        self.finished = self.n_updates >= self.n_steps
        record = self.evaluate() if not self.finished or self.config.do_last_eval else {}
        self.evaluation_due = False
        self.save(record)

    def between_steps(self, n: int) -> None:
        """What all ranks agree on after a step: to log, to save between evaluations, to stop. `n`:
        examples of the step.
        """
        config = self.config
        by_number = (
            config.save_every
            and self.n_seen // config.save_every > (self.n_seen - n) // config.save_every
        )
        by_time = (
            config.save_every_minutes
            and time.monotonic() - self.last_save > 60 * config.save_every_minutes
        )
        due, failed, save, late, number = collectives.all_reduce_max(
            [
                self.log.due(),
                self.saver.failed(),
                bool(by_number or by_time),
                self.out_of_time(),
                stop_requested(),
            ]
        )
        if due:
            self.log.flush()
        if failed:
            self.saver.wait()
        if number or late:
            self.stop(int(number))
        if save and not self.evaluation_due:
            self.save({}, interim=True)

    def check_stop(self) -> None:
        """Within an evaluation, between batches."""
        late, number = collectives.all_reduce_max([self.out_of_time(), stop_requested()])
        if late or number:
            self.finished = False
            self.stop(int(number))

    def out_of_time(self) -> bool:
        """Would another step and a save, each twice as long as so far, end after max_hours?"""
        margin = 2 * (self.longest_step_secs + self.saver.secs) + 10
        return (
            self.config.max_hours is not None
            and run_progress.uptime_secs() + margin > 3600 * self.config.max_hours
        )

    def stop(self, number: int) -> None:
        """Save, unless nothing was trained, and raise Stopped. `number`: the signal, or 0 when the
        time is up.
        """
        why = signal.Signals(number).name if number else f"max_hours={self.config.max_hours:g}"
        if self.n_updates:
            self.save({}, interim=True)
            self.saver.wait()
        then = (
            "nothing is saved"
            if self.config.debug or not self.n_updates
            else "resume with resume=auto"
        )
        raise Stopped(
            exit_code(number),
            f"stopped by {why} after step {self.n_updates:,} of {self.n_steps:,}, {self.n_seen:,} "
            f"examples; {then}",
        )

    def step(self, step: Step, waited_secs: float) -> None:
        """One optimizer step on a batch.

        The summed losses are divided by the whole batch's count, known before the first forward
        pass, so any split of the batch gives the same gradient. Metrics stay on the device.
        """
        start = time.perf_counter()
        # randomness is a function of seed and step
        torch.manual_seed(hash((self.config.seed, self.n_updates)) % 2**63)
        n = step.lengths.n_scored() if self.loss.average_over == "tokens" else len(step.indices)
        means, seen = Means(), []
        for i, (batch, weight, _) in enumerate(step.microbatches):
            scored = self.scorer(batch)
            if self.n_updates == 0:
                losses = replace(scored.output, losses=scored.output.losses.detach())
                seen.append(scored._replace(output=losses, balance=None))
            loss = weight * scored.output.losses.sum() / n
            if scored.balance is not None:
                loss = loss + self.config.router_aux_loss * weight * scored.balance.sum() / len(
                    step.indices
                )
            self.backward(loss, last=i == len(step.microbatches) - 1)
            means.add(scored.metrics, weight, scored.counts)
        first = None
        if self.n_updates == 0:
            first = first_step.FirstStep(self.scorer, self.computation(), batch, seen, means)
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
        self.n_updates += 1
        self.n_seen += len(step.indices)
        self.order = hashlib.sha256(
            bytes.fromhex(self.order) + step.indices.astype("<i8").tobytes()
        ).hexdigest()
        run_progress.report(self.n_updates, self.n_seen)
        if first:
            first.check(grad_norm)
            self.rehearse_save()
        self.longest_step_secs = max(self.longest_step_secs, time.perf_counter() - start)
        means.sums = {name.format("train"): value for name, value in means.sums.items()}
        counters: Record = {
            **self.speed(step, time.perf_counter() - start + waited_secs, waited_secs),
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

    def computation(self) -> first_step.Computation:
        """What the first step's checks need to know beside the scorer."""
        spec = self.config.model
        same = spec.reference_dtype in (None, spec.policy_dtype)
        return first_step.Computation(
            self.dtype, None if same else spec.reference_dtype, self.config.lr
        )

    def speed(self, step: Step, secs: float, waited_secs: float) -> Record:
        """What docs/metrics.md says of speed; padding is this rank's, all else of all ranks."""
        batches = [m.batch for m in step.microbatches]
        # forward, backward (twice as much), the live reference's forward
        passes = 4 if self.scorer.reference is not None else 3
        mfu: Record = {}
        if self.peak_flops is not None:
            mfu["mfu"] = (
                passes
                * self.cost.forward(step.lengths)
                / secs
                / (collectives.world_size() * self.peak_flops)
            )
        return {
            "examples_per_second": len(step.indices) / secs,
            "tokens_per_second": float(step.lengths.tokens().sum()) / secs,
            "padding": (
                1
                - sum(b.n_tokens for b in batches)
                / sum(b.n_processed(self.packing.packed) for b in batches)
            ),
            "peak_memory_gb": peak_memory_gb(),
            "data_wait_secs": waited_secs,
            **mfu,
        }

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add to the gradients; `last`: of this step."""
        loss.backward()

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

    # ---- evaluating and saving ----

    def evaluate(self) -> Record:
        """Metrics over the eval examples, and samples if sample_during_eval; logged at the current
        number of examples.
        """
        config, examples = self.config, self.eval_feed.examples
        if not examples:
            return {}
        rank0_print(f"evaluating {len(examples)} examples after {self.n_seen:,} training examples")
        evaluation = evaluate(
            self.scorer,
            self.eval_feed,
            config.eval_batch_size,
            self.is_primary_replica,
            self.check_stop,
        )
        record = evaluation.record(self.eval_groups)
        self.saver.check(record)
        self.log.evaluation(record, self.n_seen)
        if self.loss.reads == "scores" and rank() == 0:
            chosen, rejected = (
                evaluation.metrics[f"rewards_{{}}/{which}"] for which in ("chosen", "rejected")
            )
            draw_evaluation(chosen, rejected, self.run_dir, self.n_seen)
        elif config.sample_during_eval and self.loss.reads == "logps":
            prompts = [
                examples[i].prompt for i in range(min(config.n_eval_model_samples, len(examples)))
            ]
            self.log.samples(
                "policy_samples", policy := self.sample(self.policy, prompts), self.n_seen
            )
            if self.scorer.reference is not None:
                self.log.samples(
                    "reference_samples", self.sample(self.scorer.reference, prompts), self.n_seen
                )
            elif (
                self.loss.needs_reference and self.n_updates == 0
            ):  # a cached reference is the policy before its first step
                self.log.samples("reference_samples", policy, self.n_seen)
        return record

    def sample(self, model: PreTrainedModel, prompts: Sequence) -> list[tuple[int, str, str]]:
        texts = sample(
            model,
            self.tokenizer,
            prompts,
            batch_size=self.config.eval_batch_size,
            max_length=self.config.max_length,
            max_new_tokens=self.config.sample_max_new_tokens,
            temperature=self.config.sample_temperature,
            seed=self.config.seed + self.n_seen,
            between=self.check_stop,
        )
        decoded = decode([p.tolist() for p in prompts], self.tokenizer, skip_special=True)
        return [(self.n_seen, prompt, text) for prompt, text in zip(decoded, texts, strict=True)]

    def save(self, record: Record, interim: bool = False) -> None:
        """A checkpoint of this moment, step-<examples>, or interim-<examples> between evaluations;
        LATEST points to it.
        """
        self.last_save = time.monotonic()
        name = f"{'interim' if interim else 'step'}-{self.n_seen}"
        if self.config.debug:
            rank0_print("debug=true: no checkpoint is written")
            return
        if name != self.saved:  # or it was stopped again before its next step
            self.saved = name
            state = state_files.tensors_of(self.policy, self.optimizer)
            self.saver.save(name, self.parts(), state, self.manifest(record), self.checkpoint_bytes)
        if rank() == 0:
            directory.write_status(self.run_dir, "running")

    def rehearse_save(self) -> None:
        """What a save takes, and that it works."""
        if not self.config.debug:
            n_saves = -(-(self.schedule.n_examples - self.n_seen) // self.config.eval_every)
            state = state_files.tensors_of(self.policy, self.optimizer)
            self.checkpoint_bytes = self.saver.rehearse(
                self.parts(), state, self.manifest({}), n_saves
            )

    def parts(self) -> dict[str, Callable[[], Any]]:
        """The files of the 2023 form, each to be made by all ranks, whole on rank 0."""

        def policy() -> dict[str, torch.Tensor]:
            state = self.policy_state()
            old = self.config.policy_format == "repo2023" and rank() == 0
            return as_in_2023(self.policy, state) if old else state

        optimizer = {"optimizer": self.optimizer_state} if self.config.save_optimizer_pt else {}
        scheduler = {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"}
        return {"policy": policy, **optimizer, "scheduler": lambda: scheduler}

    def manifest(self, record: Record) -> checkpoints.Manifest:
        return checkpoints.Manifest(
            self.n_updates,
            self.n_seen,
            self.finished and not self.evaluation_due,
            self.evaluation_due,
            record,
            self.fingerprint,
            self.decisions,
            self.logs if self.evaluation_due else self.log.mark(),
            self.order,
            self.log.wandb_id(),
            state_files.values_of(self.policy, self.optimizer),
            save_secs=self.saver.secs,
        )

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Go on from there: weights, optimizer and position."""
        manifest = checkpoint.manifest
        state_files.restore(self.policy, self.optimizer, checkpoint.state_files(), manifest.values)
        self.n_updates = manifest.step
        self.n_seen = manifest.examples
        self.n_steps = self.n_updates + self.schedule.n_steps_after(self.n_seen)
        self.order = manifest.order
        self.evaluation_due = manifest.evaluation_due
        self.first_update = manifest.step
        self.scheduler = make_scheduler(self.config, self.optimizer, self.n_steps, self.n_updates)
        self.saved = checkpoint.path.name
        self.saver.secs = manifest.save_secs
        self.checkpoint_bytes = sum(file.bytes for file in manifest.files.values())
        run_progress.report(self.n_updates, self.n_seen)


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

    def precision(self, device: torch.device) -> Callable[[], Any]:
        return nullcontext  # the sharded modules cast by themselves

    def __init__(self, *arguments):
        super().__init__(*arguments)
        n = sum(p.numel() for p in self.policy.parameters()) / self.layout.tp_size
        each = sizing.sums_each(self.config, n, sizing.memory_at_hand(self.device))
        self.each = bool(collectives.all_reduce_max([each])[0])
        self.decisions["fsdp_reduce"] = "each" if self.each else "last"

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        sharding.reduce_gradients(self.policy, now=last, each=self.each)
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
