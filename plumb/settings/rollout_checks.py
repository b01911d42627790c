"""Refuse settings of a run on the policy's own responses that do not fit each other or the rest,
and such settings in a run on data.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from plumb.console import to_dict
from plumb.errors import UserError
from plumb.settings.schema import KNOBS, PREFERENCES, defaults

if TYPE_CHECKING:
    from plumb.losses.registry import Loss


def check_rollout(config: DictConfig, loss: Loss) -> None:
    """Refuse knobs of the policy's own responses that the loss does not read, and what does not fit
    them.
    """
    at = config.rollout
    if loss.group != "rollout" and at.preferences is None:
        for name in KNOBS:
            value = OmegaConf.select(config, name)
            if name.startswith(("rollout.", "reward.")) and value != defaults()[name]:
                raise UserError(
                    f"{name}={value}: is about responses that the policy samples while it trains,"
                    f" and this loss ({loss.name}) learns from those of the data; take loss=rloo or"
                    " loss=grpo, or add rollout=pairs to a loss on pairs; or leave it out"
                )
        return

    from plumb.losses.advantage_rules import GaeRule
    from plumb.rollouts.rewards import build_rewards, reward_model_of

    if at.preferences is not None and PREFERENCES[at.preferences] != loss.group:
        raise UserError(
            f"rollout.preferences={at.preferences}: makes {PREFERENCES[at.preferences]}s of the"
            f" policy's responses, which this loss ({loss.name}) does not learn from; set"
            " rollout=pairs for a loss on pairs, rollout=lists for one on lists, or leave it out"
        )
    if loss.reads == "scores":
        raise UserError(
            f"rollout.preferences={at.preferences}: this loss ({loss.name}) trains a reward model,"
            " which samples nothing; leave it out"
        )
    if at.pair_margin and at.preferences != "margin":
        raise UserError(
            f"rollout.pair_margin={at.pair_margin}: is for rollout.preferences=margin; leave it at"
            " 0"
        )
    rule = loss.advantages
    if at.n < 2 and (rule is None or rule.compares):
        raise UserError(
            f"rollout.n={at.n}: a response is compared with others to its prompt; set 2 or more"
        )
    _check_ptx(config)
    if at.max_new_tokens + config.max_prompt_length > config.max_length:
        raise UserError(
            f"rollout.max_new_tokens={at.max_new_tokens}: does not fit with"
            f" max_prompt_length={config.max_prompt_length} in max_length={config.max_length};"
            f" set max_length={at.max_new_tokens + config.max_prompt_length} or more, or lower"
            " one of the two"
        )
    _check_run_on_rollouts(config)
    _check_engine(config)
    # the run that writes a model of rewards may not have started
    build_rewards(to_dict(config.reward), find=not config.plan)
    if isinstance(rule, GaeRule) and rule.critic != "policy":
        reward_model_of(to_dict(config.reward))
    if config.reference == "cached":
        raise UserError(
            "reference=cached: the responses are sampled while the policy trains, so nothing can be"
            " computed before; set reference=live, or auto"
        )


def _check_run_on_rollouts(config: DictConfig) -> None:
    """Refuse knobs that do not fit a run on the policy's own responses, whatever its loss."""
    if config.keep_checkpoints and config.keep_best == "loss/eval":
        raise UserError(
            "keep_best=loss/eval: a run on the policy's own responses has no held-out loss; set"
            " keep_best=auto, which is rollout_eval/reward, or null"
        )


def _check_ptx(config: DictConfig) -> None:
    """Refuse a weight of no data set."""
    at = config.rollout
    if at.ptx_weight != 1 and at.ptx_datasets is None:
        raise UserError(
            f"rollout.ptx_weight={at.ptx_weight}: there is no data set to weigh; set"
            " rollout.ptx_datasets, or leave it out"
        )


def _check_engine(config: DictConfig) -> None:
    """Refuse what the engine cannot sample, and vLLM where it is not installed."""
    at = config.rollout
    if at.engine != "vllm":
        if at.vllm_memory != defaults()["rollout.vllm_memory"]:
            raise UserError(
                f"rollout.vllm_memory={at.vllm_memory}: is for rollout.engine=vllm; leave it out"
            )
        return
    instead = "set rollout.engine=policy"
    if config.trainer != "BasicTrainer":
        raise UserError(
            f"rollout.engine=vllm: trainer={config.trainer}: several processes sample with"
            f" engine=policy; {instead}"
        )
    if "float64" in (config.model.policy_dtype, config.model.fsdp_policy_mp):
        raise UserError(f"rollout.engine=vllm: vLLM does not compute in float64; {instead}")
    if find_spec("vllm") is None:
        raise UserError(f"rollout.engine=vllm: needs vllm, which is not installed; {instead}")
