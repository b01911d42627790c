"""Build what samples and scores the policy's own responses in a run, from the run's knobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from plumb.batching.feed import Feed
from plumb.batching.layout import Batch
from plumb.batching.microbatches import Packing
from plumb.console import rank, rank0_print, to_dict
from plumb.data.examples import Examples, Lengths, lengths_of
from plumb.data.tokenization import automatic_bos
from plumb.distributed import collectives, sharding
from plumb.errors import UserError
from plumb.losses.advantage_rules import AdvantageRule
from plumb.losses.registry import Loss
from plumb.models.logps import response_token_logps
from plumb.rollouts.by_critic import ByCritic
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.engine import Engine
from plumb.rollouts.gathered_engine import GatheredEngine, UnshardedCopy
from plumb.rollouts.hf_engine import end_tokens
from plumb.rollouts.kl_control import KlControl
from plumb.rollouts.learning import ByAdvantage, ByPairs, Learn, SampledLogps, by_lists
from plumb.rollouts.policy_engine import PolicyEngine
from plumb.rollouts.ptx import Ptx
from plumb.rollouts.rewards import Rewards, build_rewards
from plumb.rollouts.source import Position, RolloutSource, Sampler
from plumb.rollouts.token_reader import ReadTokens, TokenReader
from plumb.rollouts.vllm_engine import VllmEngine, VllmModel
from plumb.training import optimizers
from plumb.training.budget import cache_bytes
from plumb.training.critics import make_critic
from plumb.training.objective import Scorer
from plumb.training.rollout_evaluator import RolloutEvaluator
from plumb.training.rollout_memory import PolicySize, computing_dtype, copy_bytes, copy_dtype
from plumb.training.train_state import TrainState


def samples_responses(config: DictConfig, loss: Loss) -> bool:
    """Return whether a run learns from responses that its policy samples."""
    return loss.group == "rollout" or config.rollout.preferences is not None


@dataclass(frozen=True)
class Rollouts:
    """Build the sources of training and evaluation of a run."""

    config: DictConfig
    tokenizer: PreTrainedTokenizerBase
    packing: Packing
    rank: int  # among the packing.world_size that see different rows
    is_primary_replica: bool
    scorer: Scorer
    rewards: Rewards
    engine_of: Callable[[float], Engine]  # from the temperature
    # the trainer's: of a loss, and whether it is the last microbatch of a step
    backward: Callable[[Tensor, bool], None]

    def source(
        self,
        examples: Examples,
        ptx: Examples | None,
        state: TrainState,
        keep: Callable[[list[dict[str, Any]]], None],
    ) -> RolloutSource:
        """Return the source of the run's steps. `ptx`: what is mixed into them, if anything is.
        `keep` is given the rows of each rollout.
        """
        at = self.config.rollout
        check_prompts(examples, self.config.max_length - at.max_new_tokens, at.max_new_tokens)
        learn = self._learn(state)
        return RolloutSource(
            sampler=self._sampler(examples, at.temperature, at.n),
            learn=learn,
            packing=self.packing,
            rank=self.rank,
            context=self.scorer.loss.context_examples,
            position=lambda: Position(state.position.n_updates, state.position.n_seen),
            block_at=state.schedule.block_at,
            keep=keep,
            follower=learn if isinstance(learn, ByCritic) else None,
            ptx=None if ptx is None else self._ptx(ptx),
        )

    def evaluator(self, examples: Examples, feed: Feed) -> RolloutEvaluator:
        """Return the evaluator of the policy's responses to held-out prompts."""
        at = self.config.rollout
        check_prompts(examples, self.config.max_length - at.max_new_tokens, at.max_new_tokens)
        return RolloutEvaluator(
            scorer=self.scorer,
            feed=feed,
            sampler=self._sampler(examples, at.eval_temperature, at.eval_n),
            batch_size=self.config.eval_batch_size,
            is_primary_replica=self.is_primary_replica,
        )

    def _sampler(self, examples: Examples, temperature: float, n: int) -> Sampler:
        policy = self.scorer.policy
        return Sampler(
            examples=examples,
            tokenizer=self.tokenizer,
            engine=self.engine_of(temperature),
            ends=end_tokens(policy, self.tokenizer),
            bos=automatic_bos(self.tokenizer) if self.config.add_bos else None,
            n=n,
            seed=self.config.seed,
            rewards=self.rewards,
            policy=policy,
            # ranks that see the same rows divide the prompts, too
            rank=rank(),
            n_ranks=collectives.world_size(),
        )

    def _learn(self, state: TrainState) -> Learn:
        at = self.config.rollout
        loss = self.scorer.loss
        if at.preferences == "ranks":
            return by_lists
        if at.preferences is not None:
            return ByPairs(at.preferences, at.pair_margin, self.config.seed)
        logps = SampledLogps(
            read=TokenReader(self.packing, self.rank),
            policy=self._logps_of(self.scorer.policy),
            reference=self._logps_of(self.scorer.reference) if loss.needs_reference else None,
            tolerance=at.tolerance,
        )
        rule = loss.advantages
        assert rule is not None  # a loss of group "rollout"
        if isinstance(rule, AdvantageRule):
            return ByAdvantage(rule, logps)
        # as the policy's at the same step
        lr_factor = lambda: optimizers.lr_factor(self.config, state.n_steps)(
            state.position.n_updates
        )
        n_copies = collectives.world_size() // self.packing.world_size
        critic = make_critic(self.config, rule, self.scorer, self.tokenizer, lr_factor, n_copies)
        return ByCritic(rule, logps, critic, KlControl.of(rule))

    def _ptx(self, examples: Examples) -> Ptx:
        scorer = self.scorer
        return Ptx(
            feed=Feed(examples, self.packing, self.rank),
            batch_size=self.config.batch_size,
            weight=self.config.rollout.ptx_weight,
            seed=self.config.seed,
            logps=lambda batch: scorer.logps(scorer.policy, batch.to(scorer.device)).sum,
            backward=lambda loss: self.backward(loss, False),
            n_copies=collectives.world_size() // self.packing.world_size,
        )

    def _logps_of(self, model: Any) -> ReadTokens:
        """Return the function that reads log-probabilities by the training path, at the temperature
        of sampling.
        """
        scorer = self.scorer

        @torch.no_grad()
        def read(batch: Batch) -> Tensor:
            on_device = batch.to(scorer.device)
            with scorer.precision():
                logps = response_token_logps(
                    model, on_device, scorer.forward_path, scorer.temperature
                )
            # otherwise FSDP would miss the gradients of what it has left gathered
            sharding.reshard(model)
            return logps.each

        return read


def make_rollouts(
    config: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    packing: Packing,
    rank: int,
    is_primary_replica: bool,
    scorer: Scorer,
    backward: Callable[[Tensor, bool], None],
) -> Rollouts:
    """Return the builder of a run's sources. `rank`: among those that see different rows;
    `backward`: see Rollouts.
    """
    rank0_print(described(config, scorer.policy))
    return Rollouts(
        config=config,
        tokenizer=tokenizer,
        packing=packing,
        rank=rank,
        is_primary_replica=is_primary_replica,
        scorer=scorer,
        rewards=build_rewards(to_dict(config.reward), device=str(scorer.device)),
        engine_of=engines(config, packing, scorer, end_tokens(scorer.policy, tokenizer)),
        backward=backward,
    )


def engines(
    config: DictConfig, packing: Packing, scorer: Scorer, ends: Sequence[int]
) -> Callable[[float], Engine]:
    """Return the function from a temperature to the engine that samples. What these engines need
    beside the policy, they share.
    """
    at = config.rollout

    def decoding(temperature: float) -> Decoding:
        return Decoding("sample", max_new_tokens=at.max_new_tokens, temperature=temperature)

    def own(temperature: float) -> Engine:
        return PolicyEngine(
            decoding=decoding(temperature),
            ends=ends,
            pad_token_id=packing.pad_token_id,
            longest=config.max_length,
            batch_size=at.batch_size,
            precision=scorer.precision,
        )

    if at.engine == "vllm":
        model = VllmModel(computing_dtype(config), config.max_length, at.batch_size, at.vllm_memory)
        return lambda temperature: VllmEngine(decoding(temperature), ends, model)
    if sharding.sharded_modules(scorer.policy):
        copied = UnshardedCopy(scorer.device, copy_dtype(config))
        return lambda temperature: GatheredEngine(own(temperature), copied)
    return own


def described(config: DictConfig, policy: Any) -> str:
    """Return in one line what a run samples, and the memory that this takes in each process."""
    at = config.rollout
    line = f"rollouts: {at.n} responses to each of {at.batches * config.batch_size:,} prompts; "
    if at.engine == "vllm":
        return line + f"vLLM takes {at.vllm_memory:.0%} of the GPU's memory"
    at_once = max(at.n, at.batch_size)
    cache = at_once * config.max_length * cache_bytes(policy.config, computing_dtype(config))
    line += (
        f"sampling {at_once} at the same time takes up to {cache / 1e9:.2g} GB for keys and values"
    )
    if held := copy_bytes(config, PolicySize.of(policy)):
        line += f", and the copy of the policy that samples {held / 1e9:.2g} GB"
    return line


def trees_of(config: DictConfig, prompts: np.ndarray) -> tuple[Lengths, int]:
    """Return the lengths of a tree for each prompt [n], and how many trees are made of a prompt at
    most.
    """
    at = config.rollout
    k, n_trees = {
        None: (at.n, 1),
        "ranks": (at.n, 1),
        "best-worst": (2, 1),
        "margin": (2, at.n * (at.n - 1) // 2),
        "bradley-terry": (2, at.n // 2),
    }[at.preferences]
    shape = (len(prompts), k)
    lengths = Lengths(
        prompts=np.broadcast_to(prompts[:, None], shape),
        responses=np.full(shape, at.max_new_tokens),
        roots=np.broadcast_to(np.arange(k) == 0, shape),
        counts=np.full(len(prompts), k),
    )
    return lengths, n_trees


def check_prompts(examples: Examples, room: int, max_new_tokens: int) -> None:
    """Raise UserError for prompts of more than `room` tokens, and for those without any."""
    lengths = lengths_of(examples).prompts[:, 0]
    (empty,) = (lengths < 1).nonzero()
    if len(empty):
        raise UserError(f"{examples[int(empty[0])].source}: the prompt has no tokens; write one")
    (long,) = (lengths > room).nonzero()
    if len(long):
        raise UserError(
            f"{examples[int(long[0])].source}: the prompt has {lengths[long[0]]:,} tokens, and"
            f" rollout.max_new_tokens={max_new_tokens} leaves {room:,} ({len(long):,} such); set"
            f" max_length={lengths.max() + max_new_tokens} or more, or lower"
            " rollout.max_new_tokens, or remove the row"
        )
