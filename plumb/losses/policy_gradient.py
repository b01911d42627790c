"""Losses on the policy's own samples, with advantages in place of preferences. Shapes and units:
contract.py; M is N where each token has a ratio, R where each response has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from plumb.losses.advantage_rules import (
    Baseline,
    EqualRewards,
    GaeRule,
    KlIn,
    Scale,
    check_kl_weight,
)
from plumb.losses.bound import AverageOver, Usual
from plumb.losses.contract import Largest, LossOutput, Mean, Metric, Rollouts, TokenLogps
from plumb.losses.ratios import check_not_negative, check_positive
from plumb.losses.registry import loss

# what the sum over a response's tokens is divided by: its length, the tokens of the batch, a number
Normalizer = Literal["sequence", "token"] | float
Ratio = Literal["token", "sequence"]
# nats; a ratio of log-probabilities beyond it stays there, without a gradient, since a few rare
# tokens would otherwise outweigh all others or overflow
FARTHEST = 20.0


class Surrogate(NamedTuple):
    """Say how samples of an older policy stand for samples of this one: three choices, and bounds.

    Example: PPO's, as a mean over tokens: Surrogate("token", "token", 0.2, 0.2).
    """

    normalizer: Normalizer
    ratio: Ratio
    clip_low: float | None
    clip_high: float | None

    def check(self) -> None:
        """Raise ValueError for a knob out of range, and for one that another would ignore."""
        if not isinstance(self.normalizer, str):
            check_positive(normalizer=self.normalizer)
        if self.ratio == "sequence" and self.normalizer == "token":
            raise ValueError(
                "ratio=sequence: is one number for a response, which normalizer=token cannot"
                " spread over tokens; set normalizer=sequence (GSPO) or a number (RLOO: 1)"
            )
        for name, bound in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if bound is not None:
                check_positive(**{name: bound})
        if self.clip_low is not None and self.clip_low >= 1:
            raise ValueError(
                f"clip_low={self.clip_low}: ratios are kept above 1 - clip_low; must be below 1, or"
                " null for no bound"
            )


class Ratios(NamedTuple):
    """Hold the ratios of the policy to the one that sampled, and the loss of each.

    Example: two tokens, of advantage 1 and ratios 1.5 and 1, with a bound of 1.2:
    Ratios(losses=[-1.2, -1], values=[1.5, 1], below=[False, False], above=[True, False]).
    """

    losses: Tensor  # [M] -min(ratio A, clip(ratio) A)
    values: Tensor  # [M]
    below: Tensor  # [M] bool: the lower bound stops the gradient
    above: Tensor  # [M] bool: the upper one does


def _average_over(knobs: Mapping[str, Any]) -> AverageOver:
    return "tokens" if knobs["normalizer"] == "token" else "examples"


def _usual(knobs: Mapping[str, Any]) -> Usual:
    usual: dict[str, tuple[float, float]] = {"lr": (1e-6, 3e-6)}
    if knobs["beta"] is not None:
        usual["beta"] = (0.001, 0.05)
    return usual


def _usual_of_ppo(knobs: Mapping[str, Any]) -> Usual:
    usual: dict[str, tuple[float, float]] = {
        "lr": (1e-6, 1e-5),
        "critic_lr": (1e-6, 1e-5),
        "gamma": (0.99, 1.0),
        "gae_lambda": (0.9, 1.0),
    }
    if knobs["beta"] is not None:
        usual["beta"] = (0.001, 0.4)
    return usual


@loss(
    group="rollout",
    needs_reference=lambda knobs: knobs["kl"] != "none",
    average_over=_average_over,
    usual=_usual,
)
def rloo(
    policy: Rollouts[TokenLogps],
    reference: Rollouts[TokenLogps] | None,
    *,
    baseline: Baseline,
    scale: Scale,
    equal_rewards: EqualRewards,
    normalizer: Normalizer,
    ratio: Ratio,
    clip_low: float | None,
    clip_high: float | None,
    kl: Literal["reward", "none"],
    beta: float | None,
) -> LossOutput:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), summed over s and divided as `normalizer`
    says, where s = pi / pi_old, and A is the reward less beta log pi_old(y|x) / pi_ref(y|x) less
    its baseline: RLOO, Eq. 6 of arXiv:2402.14740, with the ratio and the bounds of PPO,
    arXiv:1707.06347, for samples that are used more than once.

    `baseline`: leave_one_out is the mean reward of the prompt's other answers, group_mean of all of
    them, batch_mean of all answers of the batch. `scale` divides what is left by the deviation of
    the group's or the batch's rewards. batch_mean with scale=batch is the whitening of
    REINFORCE++. `equal_rewards=drop` leaves out prompts whose answers all have the same reward.

    `ratio=token` has one s for each token, `sequence` one for the answer: the product of its
    tokens', to the power of 1 / n where `normalizer` divides by n (n = 1: the importance ratio).

    `normalizer` divides the sum over an answer's tokens by its length (sequence), by the number of
    all tokens in the batch (token), or by a number. Except with token, a prompt counts as the mean
    of its answers.

    The KL of the whole answer is part of its reward, so where A is not scaled, the optimum is
    pi_ref exp(r / beta). With `kl=none` there is no reference, and beta is null.

    Rewards: none; those of the answers are given from outside.
    """
    surrogate = Surrogate(normalizer, ratio, clip_low, clip_high)
    surrogate.check()
    _check_kl(kl, beta, baseline, equal_rewards)
    ratios = _ratios(policy, surrogate)
    losses = _by_example(policy, surrogate, ratios.losses)
    return LossOutput(losses, metrics=_metrics(policy, reference, surrogate, ratios))


@loss(
    group="rollout",
    needs_reference=lambda knobs: knobs["kl"] != "none",
    average_over=_average_over,
    usual=_usual,
)
def grpo(
    policy: Rollouts[TokenLogps],
    reference: Rollouts[TokenLogps] | None,
    *,
    baseline: Baseline,
    scale: Scale,
    equal_rewards: EqualRewards,
    normalizer: Normalizer,
    ratio: Ratio,
    clip_low: float | None,
    clip_high: float | None,
    kl: Literal["loss", "none"],
    beta: float | None,
) -> LossOutput:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) + beta s (e^d - d - 1), summed over tokens
    and divided as `normalizer` says, where s = pi / pi_old, d = log pi_ref / pi, and A is the
    reward less its group's mean, over its group's deviation: GRPO, Eq. 3 and 4 of arXiv:2402.03300.

    The factor s of the KL estimate is not in the paper. Without it, the gradient is that of
    KL(pi_ref || pi); with it, that of KL(pi || pi_ref).

    `baseline`, `scale`, `equal_rewards`, `normalizer` and `ratio`: as in `rloo`. ratio=sequence
    with normalizer=sequence is GSPO, arXiv:2507.18071; the factor of the KL is then the ratio of
    the whole answer.

    Where the optimum lies: a deviation as scale makes prompts count the same whatever their rewards
    are, so pi_ref exp(r / beta) is not the optimum. A group's mean contains the answer itself, so
    with k answers the optimum is that of beta k / (k - 1). With ratio=token, the KL of a token does
    not count the KL of those after it: only the last token's distribution is the optimum's. The
    defaults of `rloo` have none of the three.

    Rewards: none; those of the answers are given from outside.
    """
    surrogate = Surrogate(normalizer, ratio, clip_low, clip_high)
    surrogate.check()
    _check_kl(kl, beta, baseline, equal_rewards)
    ratios = _ratios(policy, surrogate)
    each = ratios.losses  # [M]
    if reference is not None and beta is not None:
        each = each + beta * _weighted_k3(policy, reference, surrogate)
    losses = _by_example(policy, surrogate, each)
    return LossOutput(losses, metrics=_metrics(policy, reference, surrogate, ratios))


@loss(
    group="rollout",
    needs_reference=lambda knobs: knobs["kl"] != "none",
    average_over=_average_over,
    usual=_usual_of_ppo,
)
def ppo(
    policy: Rollouts[TokenLogps],
    reference: Rollouts[TokenLogps] | None,
    *,
    normalizer: Normalizer,
    clip_low: float | None,
    clip_high: float | None,
    entropy: float,
    gae: GaeRule,
) -> LossOutput:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) - entropy H, summed over tokens and divided
    as `normalizer` says, where s = pi / pi_old of the token, A is its advantage by a critic (GAE),
    and H is the entropy of the distribution that it is drawn from: PPO, Eq. 7 and 9 of
    arXiv:1707.06347, on responses as in arXiv:2009.01325.

    A token's reward is -beta log pi_old / pi_ref, and the last token has the response's reward as
    well. With delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma gae_lambda A_{t+1}
    (arXiv:1506.02438, Eq. 16); the critic's V_t, from before the token, is trained towards A_t +
    V_t. What follows the last token is worth 0.

    `normalizer` as in `rloo`. H is exact, over the whole vocabulary, and so is its gradient.

    The KL of each later token is part of a token's return, so with gamma = 1 the optimum is pi_ref
    exp(r / beta): with gae_lambda = 1 whatever the critic has learned, with less once the critic
    has no error. With kl_token=k1_positive, it is another one.

    Rewards: none; those of the answers are given from outside.
    """
    surrogate = Surrogate(normalizer, "token", clip_low, clip_high)
    surrogate.check()
    check_not_negative(entropy=entropy)
    gae.check()
    ratios = _ratios(policy, surrogate)
    each = ratios.losses
    if entropy:
        exact = policy.responses.entropy
        assert exact is not None  # is read for a loss on own samples
        each = each - entropy * exact.to(each)
    losses = _by_example(policy, surrogate, each)
    return LossOutput(losses, metrics=_metrics(policy, reference, surrogate, ratios))


def k1(policy: Tensor, reference: Tensor) -> Tensor:
    """Return log pi - log pi_ref of tokens that pi sampled: its mean is KL(pi || pi_ref).  [N]"""
    return policy - reference


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """Return pi_ref / pi - 1 - log(pi_ref / pi), which is never negative and has the same mean with
    less variance: http://joschu.net/blog/kl-approx.html.  [N]
    """
    d = (reference - policy).clamp(-FARTHEST, FARTHEST)
    return torch.expm1(d) - d


def _check_kl(
    kl: KlIn, beta: float | None, baseline: Baseline, equal_rewards: EqualRewards
) -> None:
    check_kl_weight(kl, beta)
    if equal_rewards == "drop" and baseline == "batch_mean":
        raise ValueError(
            "equal_rewards=drop: with baseline=batch_mean, answers of equal reward have an"
            " advantage; set equal_rewards=keep"
        )


def _lengths(policy: Rollouts[TokenLogps]) -> Tensor:
    """Return the number of tokens of each response.  [R]"""
    tokens = policy.responses
    return torch.bincount(tokens.response, minlength=tokens.n)


def _divisor(policy: Rollouts[TokenLogps], surrogate: Surrogate) -> Tensor | float:
    """Return what the sum over each response's tokens is divided by.  [R], or a number"""
    if surrogate.normalizer == "sequence":
        return _lengths(policy).clamp(min=1)
    return 1.0 if isinstance(surrogate.normalizer, str) else surrogate.normalizer


def _ratios(policy: Rollouts[TokenLogps], surrogate: Surrogate) -> Ratios:
    """Return the ratios of tokens or of responses, and the loss of each."""
    tokens = policy.responses
    log_ratio = tokens.each - policy.old.to(tokens.each)  # [N]
    if surrogate.ratio == "sequence":
        log_ratio = tokens.sum(log_ratio) / _divisor(policy, surrogate)
        advantages = policy.advantages.to(tokens.each)  # [R]
    else:
        advantages = _by_token(policy).to(tokens.each)  # [N]
    values = log_ratio.clamp(-FARTHEST, FARTHEST).exp()  # [M]
    least = None if surrogate.clip_low is None else 1 - surrogate.clip_low
    most = None if surrogate.clip_high is None else 1 + surrogate.clip_high
    bounded = values
    below = above = torch.zeros_like(values, dtype=torch.bool)
    if least is not None:
        bounded = bounded.clamp(min=least)
        below = (values < least) & (advantages < 0)
    if most is not None:
        bounded = bounded.clamp(max=most)
        above = (values > most) & (advantages > 0)
    losses = -torch.minimum(values * advantages, bounded * advantages)
    return Ratios(losses, values, below, above)


def _by_token(policy: Rollouts[TokenLogps]) -> Tensor:
    """Return the advantage of each token: its own, or that of its response.  [N]"""
    if policy.token_advantages is not None:
        return policy.token_advantages
    return policy.advantages[policy.responses.response]


def _weighted_k3(
    policy: Rollouts[TokenLogps], reference: Rollouts[TokenLogps], surrogate: Surrogate
) -> Tensor:
    """Return k3 times pi / pi_old, which makes samples of pi_old stand for those of pi.  [M]"""
    tokens = policy.responses
    estimate = k3(tokens.each, reference.responses.each.to(tokens.each))
    log_ratio = tokens.each - policy.old.to(tokens.each)
    if surrogate.ratio == "token":
        return log_ratio.clamp(-FARTHEST, FARTHEST).exp() * estimate
    factor = tokens.sum(log_ratio).clamp(-FARTHEST, FARTHEST).exp()
    return factor * tokens.sum(estimate) / _divisor(policy, surrogate)


def _by_example(policy: Rollouts[TokenLogps], surrogate: Surrogate, each: Tensor) -> Tensor:
    """Return the loss of each example from those of its tokens or responses, [M].  [B]"""
    if surrogate.ratio == "token":
        each = policy.responses.sum(each) / _divisor(policy, surrogate)
    of_examples = policy.sum(each)
    return of_examples if surrogate.normalizer == "token" else of_examples / policy.n_responses()


def _largest(values: Tensor, example: Tensor, n: int) -> Tensor:
    """Return the largest of the values [M] of each example, 0 of one without values.  [n]"""
    return values.new_zeros(n).scatter_reduce(0, example.to(values.device), values, "amax")


def _metrics(
    policy: Rollouts[TokenLogps],
    reference: Rollouts[TokenLogps] | None,
    surrogate: Surrogate,
    ratios: Ratios,
) -> dict[str, Metric]:
    """Return the metrics: of ratios, and by response the KL to the policy that sampled (old) and to
    the reference, in nats. The entropy is exact where it was read, else estimated by -log pi of the
    sampled tokens.
    """
    tokens = policy.responses
    each = tokens.each.detach()
    n_tokens = policy.sum(_lengths(policy))  # [B]
    n_responses = policy.n_responses()

    def mean_ratio(values: Tensor) -> Mean:
        values = values.detach().to(each)
        if surrogate.ratio == "token":
            return Mean(policy.sum(tokens.sum(values)), n_tokens)
        return Mean(policy.sum(values), n_responses)

    per_response = lambda values: Mean(policy.sum(tokens.sum(values)), n_responses)
    surprise = -each if tokens.entropy is None else tokens.entropy.detach().to(each)  # [N]
    by_token = surrogate.ratio == "token"
    of_ratios = policy.example[tokens.response] if by_token else policy.example  # [M]
    metrics: dict[str, Metric] = {
        "ratio/mean": mean_ratio(ratios.values),
        "ratio/max": Largest(_largest(ratios.values.detach(), of_ratios, policy.n)),
        "clip/low": mean_ratio(ratios.below),
        "clip/high": mean_ratio(ratios.above),
        "kl/old": per_response(k3(policy.old.to(each), each)),
        "entropy": Mean(policy.sum(tokens.sum(surprise)), n_tokens),
    }
    if reference is not None:
        theirs = reference.responses.each.to(each)
        metrics["kl/k1"] = per_response(k1(each, theirs))
        metrics["kl/k3"] = per_response(k3(each, theirs))
        metrics["kl/k3_token"] = Mean(policy.sum(tokens.sum(k3(each, theirs))), n_tokens)
    return metrics
