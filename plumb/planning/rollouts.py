"""Plan what a run on the policy's own responses adds to one on data: sampling, rewards, a critic.

Responses are taken to be as long as they may be (rollout.max_new_tokens). Units: bytes, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig

from plumb.training.budget import ClusterShape, Memory, activation_bytes, cache_bytes
from plumb.training.rollout_memory import Beside

GRADIENTS = ("gradients", "optimizer's temporaries")  # gone between two steps
SCORING_TOKENS = 8192  # of a microbatch of scoring/scorers.py


class AtOnce(NamedTuple):
    """Hold what a GPU samples at the same time.

    Example: 8 responses of up to 128 tokens to each of 8 prompts of up to 90: AtOnce(8, 8, 90,
    128).
    """

    n_prompts: int
    n: int  # responses to each
    prompt: int  # the longest
    response: int

    @property
    def rows(self) -> int:
        """Return the number of responses."""
        return self.n_prompts * self.n


def at_once(config: DictConfig, prompts: np.ndarray, layout: ClusterShape) -> AtOnce:
    """Return what a GPU samples at the same time, for prompts of these lengths [n]."""
    at = config.rollout
    n = max(at.n, at.eval_n)
    of_gpu = -(-at.batches * config.batch_size // layout.n_gpus)
    n_prompts = max(1, min(at.batch_size // n, of_gpu))
    return AtOnce(n_prompts, n, int(prompts.max()), at.max_new_tokens)


def sampling_bytes(
    model_config: Any, dtype: torch.dtype, sampled: AtOnce, vocabulary: int
) -> tuple[float, float]:
    """Return the bytes of keys and values at their most, and of what computes with them: the draws
    of a token, unless the pass over the prompts holds more than both.

    Keys and values of all layers, and the keys of one a second time, while a token is appended. A
    draw holds logits, also in float32 if they are narrower, their cumulative distribution in
    float64, and their softmax. A pass without gradients holds a third of what a layer keeps for
    its backward pass (seen: 11 to 16 numbers of the hidden size for each token).
    """
    spec = model_config.get_text_config()
    of_token = cache_bytes(model_config, dtype)
    tokens = sampled.rows * (sampled.prompt + sampled.response)
    cache = tokens * of_token * (1 + 0.5 / spec.num_hidden_layers)
    narrow = dtype.itemsize if dtype.itemsize < 4 else 0
    wide = max(4, dtype.itemsize)
    draw = sampled.rows * vocabulary * (narrow + wide + 8 + wide)
    of_prompt_token = of_token + activation_bytes(model_config, dtype, 0) / 3
    return cache, max(draw, sampled.n_prompts * sampled.prompt * of_prompt_token - cache)


@dataclass(frozen=True)
class Moments:
    """Hold the bytes of the moments that such a run adds.

    Example: without models of rewards and without a critic, scoring and critic are 0.
    """

    beside: Beside
    critic_state: float  # of its optimizer
    cache: float
    computing: float  # while sampling
    scoring: float  # the pass of a model of rewards
    critic: float  # the gradients of the critic, and what its passes or its optimizer hold

    def added_to(self, memory: Memory) -> Memory:
        """Return the memory with these moments before those of a step. Between steps there are no
        gradients of the policy.
        """
        new = ["sampling"]
        if self.beside.rewards and self.scoring:
            new.append("scoring")
        if self.beside.critic:
            new.append("critic steps")
        kinds = {
            kind: ((0.0 if kind in GRADIENTS else values[-1]),) * len(new) + values
            for kind, values in memory.kinds.items()
        }
        n = len(new) + len(memory.titles)
        at = lambda title, value: tuple(value * (title == t) for t in (*new, *memory.titles))
        kinds |= {
            "what samples": (self.beside.sampler,) * n,
            "models of rewards": (sum(self.beside.rewards.values()),) * n,
            "critic, optimizer state": (self.beside.critic + self.critic_state,) * n,
            "keys and values": at("sampling", self.cache),
            "sampling": at("sampling", self.computing),
            "scoring": at("scoring", self.scoring),
            "critic's step": at("critic steps", self.critic),
        }
        return Memory(
            {kind: values for kind, values in kinds.items() if any(values)},
            memory.host,
            (*new, *memory.titles),
        )


class Rates(NamedTuple):
    """Hold what a GPU does in a second: operations of the policy, and of models in float32, as they
    are reached; bytes of memory that it reads, from the data sheet.
    """

    of_policy: float
    of_float32: float
    bytes_read: float


@dataclass(frozen=True)
class Rollout:
    """Hold what is planned of the responses, beside their trees."""

    sampled: AtOnce
    moments: Moments
    weights: float  # bytes that a token reads
    cache: float  # bytes of keys and values of one token
    operations: float  # of one token, without attention
    of_rewards: float  # numbers of all models of rewards
    with_advantages: bool  # the policy and its reference are read before the steps
    critic: float  # the critic's size relative to the policy's; 0: there is none

    def sampling_secs(self, rates: Rates) -> float:
        """Return the least seconds that the responses to a prompt take on a GPU, shared among all
        that are sampled at the same time. Each token reads all weights once, and for each response
        the keys and values of its prompt and, on average, of half of itself; or it computes, if
        that takes longer.
        """
        at = self.sampled
        read = self.weights + at.rows * (at.prompt + at.response / 2) * self.cache
        each = max(read / rates.bytes_read, at.rows * self.operations / rates.of_policy)
        return at.response * each / at.n_prompts

    def scoring_secs(self, rates: Rates) -> float:
        """Return the seconds that the rewards of a prompt's responses take on a GPU."""
        at = self.sampled
        return 2 * self.of_rewards * at.n * (at.prompt + at.response) / rates.of_float32

    def passes(self, uses: int, live: bool, kept: float) -> float:
        """Return how often a prompt's trees are passed forwards, a pass backwards being two: for
        the log-probabilities and values before the first step, and in each of `uses` steps. `live`:
        there is a reference; `kept`: the share of activations that is not computed again.
        """
        step = 3 + 1 - kept + 3 * self.critic
        if self.with_advantages:
            return 1 + live + self.critic + uses * step
        return uses * (step + live)

    def in_words(self, config: DictConfig) -> str:
        """Return what is sampled and scored, and by what, in one line."""
        at = self.sampled
        text = (
            f"{config.rollout.batches * config.batch_size:,} prompts x {config.rollout.n} responses"
            f" of up to {at.response} tokens, {at.rows} at the same time on each GPU"
        )
        beside = self.moments.beside
        if beside.rewards:
            text += f"; models of rewards: {', '.join(beside.rewards)}"
        return text + ("; with a critic" if beside.critic else "")
