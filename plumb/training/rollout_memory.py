"""Compute the memory of what a run on the policy's own responses holds in each process beside the
policy and its reference: for the choice of tokens per microbatch, and for plan=true.

Units: bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from plumb.console import to_dict
from plumb.distributed import sharding
from plumb.errors import UserError
from plumb.losses.advantage_rules import GaeRule
from plumb.losses.registry import Loss
from plumb.models.adapters import KEY
from plumb.models.find import find_model, n_parameters
from plumb.models.forward_path import DTYPES
from plumb.models.quantized_base import count_weights, packed_bytes, quantized_numbers
from plumb.training.budget import trained_bytes, weights_bytes

REWARD_ITEMSIZE = 4  # models that give rewards compute in float32


@dataclass(frozen=True)
class PolicySize:
    """Hold the size of a policy in one piece.

    Example: 1 M parameters in bfloat16, all trained, 0.2 M of them in a head that is not tied to
    the embedding: PolicySize(n=1_000_000, adapters=0, weights=2e6, trained=2e6, head=4e5,
    sharded=False).
    """

    n: int  # parameters without adapters
    adapters: int  # numbers of these
    weights: float  # with them
    trained: float  # the bytes of the weights that are trained
    head: float  # the bytes of a head of its own, which a critic has not; 0: it is the embedding
    sharded: bool  # over processes
    quantized: int = 0  # how many of the parameters are
    packed: float = 0.0  # the bytes of these

    @classmethod
    def of(cls, policy: Any) -> PolicySize:
        """Return the size of a policy that is loaded."""
        n = count_weights(policy)
        adapters = sum(p.numel() for name, p in policy.named_parameters() if KEY.fullmatch(name))
        head = policy.get_output_embeddings().weight
        own = head is not policy.get_input_embeddings().weight
        return cls(
            n=n - adapters,
            adapters=adapters,
            weights=weights_bytes(policy),
            trained=trained_bytes(policy),
            head=own * head.numel() * head.element_size(),
            sharded=bool(sharding.sharded_modules(policy)),
            quantized=quantized_numbers(policy),
            packed=packed_bytes(policy),
        )


@dataclass(frozen=True)
class Beside:
    """Hold the bytes of what a process holds beside the policy and its reference.

    Example: rewards by rule, without a critic, in one process: Beside(sampler=0, rewards={}).
    """

    sampler: float  # the copy of a sharded policy, or vLLM's share
    rewards: dict[str, float]  # the models of each term
    critic: float = 0.0  # its weights
    critic_trained: float = 0.0  # those of them that are trained

    @property
    def kept(self) -> float:
        """Return what is held at any time; the optimizer has two numbers for each one trained."""
        rewards = sum(self.rewards.values())
        return self.sampler + rewards + self.critic + 2 * self.critic_trained

    def taken(self, trained: float) -> float:
        """Return what the activations of a step lack. The critic's gradients are gone before the
        policy's begin, so they count only as far as there are more of them. `trained`: the bytes
        of the policy's trained weights in this process.
        """
        return self.kept + max(0.0, self.critic_trained - trained)


def beside_policy(config: DictConfig, loss: Loss, policy: PolicySize, memory: float) -> Beside:
    """Return what a run holds beside its policy. `memory`: that of the GPU. A model of rewards that
    is not there yet is taken for one of the policy's size.
    """
    rule = loss.advantages
    critic = critic_trained = 0.0
    if isinstance(rule, GaeRule) and rule.critic == "policy":
        critic = policy.weights - policy.head
        critic_trained = min(critic, policy.trained)
    rewards = {}
    for name, term in ((to_dict(config.reward) or {}).get("terms") or {}).items():
        if term.get("model") is None:
            continue
        n, n_models = size_of_term(str(term["model"]), policy.n)
        rewards[name] = REWARD_ITEMSIZE * float(n * n_models)
        is_critic = isinstance(rule, GaeRule) and rule.critic != "policy"
        if is_critic and term.get("beta") is None:
            critic = critic_trained = REWARD_ITEMSIZE * float(n)
    return Beside(sampler_bytes(config, policy, memory), rewards, critic, critic_trained)


def size_of_term(model: str, otherwise: int) -> tuple[int, int]:
    """Return the parameters of a model of rewards, and whether it is one or, with the reference of
    an implicit reward, two. `otherwise`: the parameters of one that is not there.
    """
    try:
        ref = find_model(model)
        return n_parameters(ref), 1 if ref.scalar else 2
    except UserError:
        return otherwise, 1


def sampler_bytes(config: DictConfig, policy: PolicySize, memory: float) -> float:
    """Return the bytes of what samples in each process, beside the policy itself."""
    at = config.rollout
    return at.vllm_memory * memory if at.engine == "vllm" else copy_bytes(config, policy)


def copy_bytes(config: DictConfig, policy: PolicySize) -> int:
    """Return the bytes of the copy from which a sharded policy is sampled in each process; 0 for a
    policy that is not sharded, and is sampled from itself.
    """
    if not policy.sharded:
        return 0
    dtype = DTYPES[config.model.policy_dtype]
    of_adapters = copy_dtype(config) or torch.promote_types(dtype, torch.float32)
    of_base = copy_dtype(config) or dtype
    of_others = (policy.n - policy.quantized) * of_base.itemsize
    return int(policy.packed) + of_others + policy.adapters * of_adapters.itemsize


def copy_dtype(config: DictConfig) -> torch.dtype | None:
    """Return the type of that copy's weights; None: those that the policy's have."""
    name = config.model.fsdp_policy_mp
    return None if name is None else DTYPES[name]


def computing_dtype(config: DictConfig) -> torch.dtype:
    """Return the type in which the policy computes."""
    return DTYPES[config.model.fsdp_policy_mp or config.model.policy_dtype]
