"""The one training loop (BasicTrainer). The other trainers only place models and share out each microbatch.

Shapes: B pairs (or SFT examples) in a microbatch; see evaluation.py and losses.py.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import checkpoints
import parallel
from batching import Schedule, microbatches
from evaluation import Scorer, evaluate
from generation import sample
from losses import Loss
from metrics import Means, Record, TrainingLog
from models import as_in_2023, block_class
from tokenization import Example, n_scored_tokens
from utils import UserError, plain, quiet, rank0_print


class NonFinite(UserError):
    """Loss or gradients are not finite: the run stops before the optimizer can spread it. Exit code 4."""

    exit_code = 4


class BasicTrainer:
    """One process: a GPU if there is one, else the CPU; over several GPUs the model's layers are spread, as in 2023."""

    rank, world_size = 0, 1

    def __init__(
        self, config: DictConfig, policy: PreTrainedModel, reference: PreTrainedModel | None, loss: Loss,
        tokenizer: PreTrainedTokenizerBase, train: Sequence[Example], evaluation: Sequence[Example],
        run_dir: Path, log: TrainingLog,
    ):  # fmt: skip
        self.config, self.run_dir, self.log, self.loss, self.tokenizer = config, run_dir, log, loss, tokenizer
        self.train_examples, self.eval_examples = train, evaluation
        self.policy = self.place(policy)
        self.reference = self.place(reference) if reference is not None else None
        if config.activation_checkpointing:
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        device = next(self.policy.parameters()).device
        self.scorer = Scorer(self.policy, self.reference, loss, self.precision(device), device, tokenizer.pad_token_id)
        self.schedule = Schedule(
            len(train), batch_size=config.batch_size, n_epochs=config.n_epochs, n_examples=config.n_examples,
            shuffle=config.shuffle, seed=config.seed,
        )  # fmt: skip
        self.optimizer = make_optimizer(config, self.policy, device)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_factor(config, self.schedule.n_steps))
        self.n_seen = self.n_updates = 0

    # ------------------------------------------------------------------------------------- what other trainers change

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Move a model to where this trainer computes. A model that was loaded over several GPUs stays there."""
        if getattr(model, "hf_device_map", None) is None:
            nn.Module.to(model, pick_device(self.config))
        return model

    def precision(self, device: torch.device) -> Callable[[], Any]:
        """Both models compute in `model.fsdp_policy_mp` where it is set; weights and optimizer keep their own precision."""
        name = self.config.model.fsdp_policy_mp
        return (lambda: torch.autocast(device.type, getattr(torch, name))) if name else nullcontext

    def shares(self, examples: Sequence[Example]) -> tuple[Sequence[Example], float]:
        """This rank's part of a microbatch and its weight. A rank left without any repeats one at weight 0, so that all
        ranks make the same calls."""
        mine = examples[self.rank :: self.world_size]
        return (mine, 1.0) if mine else (examples[:1], 0.0)

    def policy_state(self) -> dict[str, torch.Tensor]:
        """The whole policy's state dict, on every rank that writes."""
        return self.policy.state_dict()

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    # ---------------------------------------------------------------------------------------------------- the loop

    def train(self) -> Record:
        """Train to the end of the schedule, evaluating and saving every eval_every examples. -> the last evaluation."""
        config = self.config
        torch.manual_seed(config.seed)
        self.policy.train()
        record = self.evaluate() if config.do_first_eval else {}
        progress = tqdm(total=self.schedule.n_steps, desc=self.loss.name, unit="step", disable=quiet())
        self.started = time.monotonic()
        for indices in self.schedule:
            self.step([self.train_examples[int(i)] for i in indices])
            progress.update()
            last = self.n_updates == self.schedule.n_steps
            if not last and self.n_seen // config.eval_every > (self.n_seen - len(indices)) // config.eval_every:
                record = self.evaluate()
                self.save(record)
        progress.close()
        self.log.flush()
        record = self.evaluate() if config.do_last_eval else {}
        self.save(record)
        return record

    def step(self, examples: Sequence[Example]) -> None:
        """One optimizer step on a batch, in gradient_accumulation_steps microbatches.

        The summed losses are divided by the whole batch's count, known before the first forward pass, so any split of the
        batch gives the same gradient. Metrics stay on the device.
        """
        start = time.perf_counter()
        n = n_scored_tokens(examples) if self.loss.average_over == "tokens" else len(examples)
        means = Means()
        for microbatch in microbatches(examples, self.config.gradient_accumulation_steps):
            mine, weight = self.shares(microbatch)
            scored = self.scorer(mine)
            self.backward(weight * scored.output.losses.sum() / n)
            means.add(scored.metrics, weight, scored.counts)
        if self.n_updates == 0:
            self.check_start(means)
        grad_norm = self.clip()
        if not math.isfinite(grad_norm):
            self.log.flush()
            raise NonFinite(f"step {self.n_updates + 1}: the gradient norm is {grad_norm}; stopped before the update; batch: "
                            f"{', '.join(e.source for e in examples[:8])}; lower lr={self.config.lr:g}, or compute in float32; "
                            f"checkpoints so far are whole: {self.run_dir}")  # fmt: skip
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.n_updates += 1
        self.n_seen += len(examples)
        means.sums = {name.format("train"): value for name, value in means.sums.items()}
        counters: Record = {
            "examples_per_second": len(examples) / (time.perf_counter() - start), "grad_norm": grad_norm, "lr": lr,
            "seconds_left": (time.monotonic() - self.started) * (self.schedule.n_steps / self.n_updates - 1),
            "counters/examples": self.n_seen, "counters/updates": self.n_updates,
        }  # fmt: skip
        self.log.step(means, counters)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self) -> float:
        """Clip the gradient norm to max_grad_norm. -> the norm before clipping"""
        return float(nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm))

    def check_start(self, means: Means) -> None:
        """Before the first update the policy is the reference: every reward is 0. Say so, or say what is wrong."""
        if self.reference is None or "rewards_{}/chosen" not in means.sums:
            return
        reduced = Means()
        reduced.sums, reduced.counts = dict(means.sums), dict(means.counts)
        record = reduced.reduce()
        rewards = max(abs(record["rewards_{}/chosen"]), abs(record["rewards_{}/rejected"]))
        if rewards == 0:
            rank0_print(f"step 0: policy and reference agree (rewards 0, {self.loss.name} loss {record['loss/{}']:.4f})")
        else:
            rank0_print(f"step 0: policy and reference DISAGREE: mean rewards {record['rewards_{}/chosen']:.2g} and "
                        f"{record['rewards_{}/rejected']:.2g} instead of 0; is model.reference_dtype="
                        f"{self.config.model.reference_dtype} not the policy's precision?")  # fmt: skip

    # ---------------------------------------------------------------------------------------- evaluating and saving

    def evaluate(self) -> Record:
        """Metrics over the eval examples, and samples if sample_during_eval; logged at the current number of examples."""
        if not self.eval_examples:
            return {}
        config = self.config
        rank0_print(f"evaluating {len(self.eval_examples)} examples after {self.n_seen:,} training examples")
        record = evaluate(self.scorer, self.eval_examples, config.eval_batch_size, self.shares)
        self.log.evaluation(record, self.n_seen)
        if config.sample_during_eval:
            prompts = [e.prompt for e in self.eval_examples[: config.n_eval_model_samples]]
            for name, model in (("policy_samples", self.policy), ("reference_samples", self.reference)):
                if model is not None:
                    self.log.samples(name, self.sample(model, prompts), self.n_seen)
        return record

    def sample(self, model: PreTrainedModel, prompts: Sequence) -> list[tuple[int, str, str]]:
        texts = sample(
            model, self.tokenizer, prompts, batch_size=self.config.eval_batch_size, max_length=self.config.max_length,
            max_new_tokens=self.config.sample_max_new_tokens, temperature=self.config.sample_temperature,
            seed=self.config.seed + self.n_seen,
        )  # fmt: skip
        decoded = [str(self.tokenizer.decode(p, skip_special_tokens=True)) for p in prompts]
        return [(self.n_seen, prompt, text) for prompt, text in zip(decoded, texts, strict=True)]

    def save(self, record: Record) -> None:
        """policy.pt, optimizer.pt and scheduler.pt of this moment in step-<examples>, with LATEST pointing there."""
        if self.config.debug:
            rank0_print("debug=true: no checkpoint is written")
            return
        state = self.policy_state()
        if self.config.policy_format == "repo2023" and self.rank == 0:
            state = as_in_2023(self.policy, state)
        parts = {
            "policy": state,
            "optimizer": self.optimizer_state(),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
        }
        if self.rank == 0:
            path = checkpoints.save(self.run_dir, self.n_seen, parts, record)
            rank0_print(f"saved {path}")


class FSDPTrainer(BasicTrainer):
    """One process per GPU; parameters, gradients and optimizer state are sharded over them, block by block."""

    def __init__(self, *arguments):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        super().__init__(*arguments)

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        name = self.config.model.fsdp_policy_mp
        parallel.shard(model, block_class(model, self.config.model.block_name), name and getattr(torch, name))
        return model

    def precision(self, device: torch.device) -> Callable[[], Any]:
        return nullcontext  # the sharded modules cast by themselves

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.world_size).backward()  # FSDP averages gradients over ranks, and ours are parts of one sum

    def clip(self) -> float:
        return float(parallel.whole(nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)))

    def policy_state(self) -> dict[str, torch.Tensor]:
        return parallel.gathered_model_state(self.policy)

    def optimizer_state(self) -> dict[str, Any]:
        return parallel.gathered_optimizer_state(self.policy, self.optimizer)


def pick_device(config: DictConfig) -> torch.device:
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def make_optimizer(config: DictConfig, policy: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """torch.optim.<config.optimizer>, fused on a GPU where torch has such a kernel. UserError when its arguments are refused."""
    factory = getattr(torch.optim, config.optimizer)
    arguments = plain(config.optimizer_args)
    fusible = "fused" in inspect.signature(factory).parameters and not arguments.keys() & {"fused", "foreach", "differentiable"}
    if device.type == "cuda" and fusible:
        arguments = {"fused": True} | arguments
    try:
        return factory(policy.parameters(), lr=config.lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer={config.optimizer} optimizer_args={arguments}: {str(error).splitlines()[0]}") from None


def lr_factor(config: DictConfig, n_steps: int) -> Callable[[int], float]:
    """Update k (from 0) runs at lr times: linear warmup min(1, (k + 1) / (warmup_steps + 1)) as in 2023; then, by lr_schedule,
    constant, or down to min_lr_ratio at the last step by a line or half a cosine.
    """
    warmup, floor = config.warmup_steps, config.min_lr_ratio
    shape = {"constant": lambda x: 1.0, "linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}
    decay = shape[config.lr_schedule]

    def factor(k: int) -> float:
        if k < warmup:
            return (k + 1) / (warmup + 1)
        x = min(1.0, (k - warmup) / max(1, n_steps - 1 - warmup))
        return floor + (1 - floor) * decay(x) if config.lr_schedule != "constant" else 1.0

    return factor
