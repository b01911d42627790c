"""Say how a loss on the policy's own samples gets advantages from their rewards: by comparing the
responses to a prompt, or by token with a critic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from plumb.losses.ratios import check_not_negative, check_positive

# what is taken off a sample's reward: the mean of its group's others, of its group, of the batch
Baseline = Literal["leave_one_out", "group_mean", "batch_mean"]
# the deviation that divides what is left: its group's, the batch's, or none
Scale = Literal["group", "batch", "none"]
# whether groups whose rewards are all equal are trained on
EqualRewards = Literal["keep", "drop"]
# where the KL to the reference is counted, and what stands for it at each token
KlIn = Literal["reward", "loss", "none"]
KlOfToken = Literal["k1", "k1_positive"]
# what is given mean 0 (a reward: its own mean) and deviation 1 over all tokens of a rollout
Whiten = Literal["advantages", "rewards_and_advantages", "none"]


class AdvantageRule(NamedTuple):
    """Say how rewards become advantages by response, without a critic.

    Example: RLOO's: AdvantageRule("leave_one_out", "none", kl_weight=0.05, equal_rewards="keep").
    """

    baseline: Baseline
    scale: Scale
    kl_weight: float  # of log pi(y|x) / pi_ref(y|x), which is taken off the reward; 0: it is not
    equal_rewards: EqualRewards

    @property
    def compares(self) -> bool:
        """Return whether a response is compared with the others to its prompt."""
        return self.baseline != "batch_mean"


@dataclass(frozen=True)
class GaeRule:
    """Say how rewards become advantages by token with a critic, and how the critic is trained. Each
    field is a knob of the loss, whose file in config/loss says what it means.

    Example: OpenRLHF's has gamma=1, gae_lambda=1, kl="reward", beta=0.01, kl_token="k1".
    """

    kl: Literal["reward", "none"]
    beta: float | None
    kl_token: KlOfToken
    kl_target: float | None  # nats per response; None: beta stays as it is
    kl_horizon: float | None  # responses
    gamma: float
    gae_lambda: float
    whiten: Whiten
    stop_kl: float | None  # nats per response
    critic: Literal["reward", "policy"]  # where its first weights come from
    critic_lr: float
    critic_warmup: int  # the first rollouts, which train the critic only
    value_clip: float | None
    value_weight: float

    compares: ClassVar[bool] = False  # a response with the others to its prompt

    @property
    def kl_weight(self) -> float:
        """Return what the KL of a token is multiplied by before it is taken off the reward; 0: it
        is not taken off.
        """
        return 0.0 if self.beta is None else self.beta

    def check(self) -> None:
        """Raise ValueError for a knob out of range, and for one that another would ignore."""
        check_kl_weight(self.kl, self.beta)
        _check_control(self.kl, self.kl_target, self.kl_horizon)
        for name, value in (("gamma", self.gamma), ("gae_lambda", self.gae_lambda)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value}: must be above 0, and 1 at most")
        check_positive(critic_lr=self.critic_lr, value_weight=self.value_weight)
        check_not_negative(critic_warmup=self.critic_warmup)
        for name, bound in (("value_clip", self.value_clip), ("stop_kl", self.stop_kl)):
            if bound is not None:
                check_positive(**{name: bound})


Rule = AdvantageRule | GaeRule


def by_group(knobs: Mapping[str, Any]) -> AdvantageRule:
    """Return the rule of a loss that compares the responses to a prompt, by knobs that every such
    loss has. Raise ValueError for one that is missing.
    """
    for knob in ("baseline", "scale", "equal_rewards", "kl", "beta"):
        if knob not in knobs:
            raise ValueError(f"{knob}: a loss on the policy's own samples needs this knob")
    return AdvantageRule(
        baseline=knobs["baseline"],
        scale=knobs["scale"],
        kl_weight=knobs["beta"] if knobs["kl"] == "reward" else 0.0,
        equal_rewards=knobs["equal_rewards"],
    )


def check_kl_weight(kl: KlIn, beta: float | None) -> None:
    """Raise ValueError for a KL without its weight, and for a weight without a KL."""
    if kl == "none" and beta is not None:
        raise ValueError(f"beta={beta}: is the weight of the KL, and kl=none; set beta=null")
    if kl != "none":
        if beta is None:
            raise ValueError(f"beta=null: kl={kl} needs its weight; give a number above 0")
        check_positive(beta=beta)


def _check_control(kl: KlIn, target: float | None, horizon: float | None) -> None:
    if target is None and horizon is None:
        return
    if target is None or horizon is None:
        missing = "kl_target" if target is None else "kl_horizon"
        raise ValueError(
            f"{missing}=null: beta is controlled with both kl_target and kl_horizon; give both, or"
            " null for both"
        )
    check_positive(kl_target=target, kl_horizon=horizon)
    if kl == "none":
        raise ValueError(f"kl_target={target}: kl=none has no KL to control; set null for both")
