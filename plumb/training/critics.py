"""Make the critic of a run: a copy of the reward model, or of the policy with a head of 0."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from plumb.console import rank0_print, to_dict
from plumb.distributed import sharding
from plumb.errors import UserError
from plumb.losses.advantage_rules import GaeRule
from plumb.models.blocks import (
    block_class,
    compile_blocks,
    recompute_blocks,
    recomputes_blocks,
)
from plumb.models.draws import run_without_draws
from plumb.models.find import find_model, open_model
from plumb.models.forward_path import PLAIN_PATH, ForwardPath, use_tree_attention
from plumb.models.load import has_scalar_head
from plumb.models.scalar_head import put_scalar_head
from plumb.rollouts.critic import Critic
from plumb.rollouts.gathered_engine import UnshardedCopy
from plumb.rollouts.rewards import reward_model_of
from plumb.training import budget
from plumb.training.objective import Scorer
from plumb.training.optimizers import make_optimizer


def make_critic(
    config: DictConfig,
    rule: GaeRule,
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    lr_factor: Callable[[], float],
    n_copies: int,
) -> Critic:
    """Return the critic, before its first update, and print where it begins. `scorer` has the
    policy, before its own first; `lr_factor`, `n_copies`: see Critic. Raise UserError for a reward
    model that cannot be one. Every rank must call it.
    """
    if rule.critic == "policy":
        name = "the policy, with a head of 0"
        model = _of_policy(scorer.policy, scorer.device)
    else:
        name = reward_model_of(to_dict(config.reward))
        model = of_reward_model(name, tokenizer, str(scorer.device))
    rank0_print(f"critic: from {name}")
    if recomputes_blocks(config.activation_checkpointing, config.compile):
        _recompute(model, scorer.device, budget.kept(config))
    if config.compile:
        block_name = config.model.block_name if _is_like(model, scorer.policy) else None
        compile_blocks(model, block_class(model, block_name), config.activation_checkpointing)
    own = OmegaConf.merge(config, {"lr": rule.critic_lr, "head_lr": None})
    assert isinstance(own, DictConfig)
    return Critic(
        model=model,
        optimizer=make_optimizer(own, model, scorer.device),
        lr=rule.critic_lr,
        lr_factor=lr_factor,
        forward_path=_path(model, scorer),
        precision=scorer.precision,
        device=scorer.device,
        value_clip=rule.value_clip,
        value_weight=rule.value_weight,
        max_grad_norm=config.max_grad_norm,
        n_copies=n_copies,
    )


def _of_policy(policy: Any, device: torch.device) -> Any:
    """Return a copy of the policy with a head of 0; in one piece, of one that is sharded."""
    if sharding.sharded_modules(policy):
        model = UnshardedCopy(device, None).updated(policy)
        own = dict(policy.named_parameters(remove_duplicate=False))
        for name, p in model.named_parameters():
            p.requires_grad_(own[name].requires_grad)
    else:
        model = copy.deepcopy(policy).eval()
    put_scalar_head(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return model


def of_reward_model(name: str, tokenizer: PreTrainedTokenizerBase, device: str) -> Any:
    """Return a reward model that reads the policy's tokens, to be trained. Raise UserError for any
    other model.
    """
    ref = find_model(name)
    if not ref.scalar or (ref.archive is None and not has_scalar_head(ref.config)):
        raise UserError(
            f"loss.critic=reward: {name} has no score for each token that values could begin from;"
            " set loss.critic=policy"
        )
    model, own = open_model(ref, device)[1:]
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"loss.critic=reward: {name} has another tokenizer than the policy, whose tokens the"
            " critic reads; set loss.critic=policy"
        )
    use_tree_attention(model)
    return model.requires_grad_(True)


def _recompute(model: Any, device: torch.device, kept: float) -> None:
    """Make a critic compute its activations again in its backward pass, but those of a share of its
    blocks. transformers does so in
    train mode only, in which nothing of the critic may draw random numbers.
    """
    run_without_draws(model, device)
    recompute_blocks(model, kept)
    model.train()


def _path(model: Any, scorer: Scorer) -> ForwardPath:
    """Return how the critic computes: as the policy, if both are of one family."""
    if not _is_like(model, scorer.policy):
        return PLAIN_PATH
    return ForwardPath(packed=scorer.forward_path.packed, plain_head=False)


def _is_like(model: Any, policy: Any) -> bool:
    """Return whether a critic is of the policy's family."""
    return bool(model.config.model_type == policy.config.model_type)
