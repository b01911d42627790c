"""Diagnose a run that learns from its policy's own responses: see diagnosis.py."""

from __future__ import annotations

import math

import numpy as np

from plumb.reports.trends import MIN_STEPS, ends, fifths, values_of
from plumb.runs.history import Run

# Thresholds, rough on purpose: see diagnosis.py.
# nats per response: what reward models are over-optimized at (arXiv:2210.10760, Figure 1, whose x
# axis is the root)
FAR = 50.0
SAME = 0.9  # share of prompts whose responses all have the same reward
LEFT = 0.1  # of the entropy at the beginning
ENDED = 0.1  # share of responses that end by themselves
DISTANCE = 0.02  # nats per token between sampler and trainer; bfloat16 has less
BOUNDED = 0.3  # share of the ratios that a bound stops
EXPLAINED = 0.1  # share of the returns' variance that a critic explains
EXPLODED = 10.0  # times the least mean loss of a critic in any fifth


def learns_from_samples(run: Run) -> bool:
    """Return whether the run's loss is a policy gradient, whose value says nothing."""
    return any("ratio_train/mean" in record for record in run.steps)


def negative_kl(run: Run) -> str:
    """Detect a mean KL to the reference below 0, by three standard errors, in the last fifth."""
    kl = values_of(run.steps, "kl_train/k1")
    if len(kl) < 5 * MIN_STEPS:
        return ""
    last = fifths(kl)[-1]
    error = last.std() / math.sqrt(len(last))
    if last.mean() >= 0 or last.mean() > -3 * error:
        return ""
    return f"k1 has a mean of {last.mean():.2g} nats in the last fifth; a KL is never below 0"


def all_equal(run: Run) -> str:
    """Detect that nine of ten prompts of the last fifth have responses of equal reward."""
    equal = values_of(run.steps, "rollout_train/equal_rewards")
    if len(equal) < MIN_STEPS or (share := fifths(equal)[-1].mean()) < SAME:
        return ""
    return f"{share:.0%} of the prompts teach nothing, in the last fifth of the rollouts"


def far_from_reference(run: Run) -> str:
    """Detect a KL above 50 nats per response, or a held-out reward that fell below its best by a
    tenth of its rise, while the training reward rose.
    """
    reward, kl = (values_of(run.steps, key) for key in ("rollout_train/reward", "kl_train/k1"))
    if len(reward) < MIN_STEPS or len(kl) < MIN_STEPS:
        return ""
    parts = [part.mean() for part in fifths(reward)]
    if parts[-1] <= parts[0]:
        return ""
    far = fifths(kl)[-1].mean()
    held_out = values_of(run.evaluations, "rollout_eval/reward")
    fell = False
    if len(held_out) > 2:
        best = held_out.max()
        fell = best - held_out[-1] > max(0.1 * (best - held_out[0]), 1e-9)
    if far < FAR and not fell:
        return ""
    evidence = f"reward {ends(np.array(parts))}, KL {far:.3g} nats per response at the end"
    if not fell:
        return evidence
    return (
        f"{evidence}; held-out reward {held_out.max():.4g} at best, {held_out[-1]:.4g} at the end"
    )


def entropy_falls(run: Run) -> str:
    """Detect an entropy that is below a tenth of that at the beginning."""
    entropy = values_of(run.steps, "entropy/train")
    if len(entropy) < MIN_STEPS:
        return ""
    parts = [part.mean() for part in fifths(entropy)]
    return f"{ends(np.array(parts))} nats per token" if parts[-1] < LEFT * parts[0] else ""


def never_ends(run: Run) -> str:
    """Detect that fewer than a tenth of the responses of the last fifth end by themselves."""
    ended = values_of(run.steps, "rollout_train/eos")
    if len(ended) < MIN_STEPS or (share := fifths(ended)[-1].mean()) >= ENDED:
        return ""
    return f"{share:.0%} end by themselves, the others at rollout.max_new_tokens"


def disagrees(run: Run) -> str:
    """Detect a mean distance above 0.02 nats per token between the log-probabilities of the sampler
    and those of the training path.
    """
    distance = values_of(run.steps, "rollout_train/logps_difference")
    if not len(distance) or distance.mean() < DISTANCE:
        return ""
    return f"{distance.mean():.2g} nats per token on average, {distance.max():.2g} at worst"


def used_too_often(run: Run) -> str:
    """Detect that bounds stop the gradient of three of ten ratios in the last fifth."""
    shares = [values_of(run.steps, f"clip_train/{which}") for which in ("low", "high")]
    if min(map(len, shares)) < MIN_STEPS:
        return ""
    share = sum(fifths(x)[-1].mean() for x in shares)
    return f"{share:.0%} of the ratios are beyond their bounds" if share > BOUNDED else ""


def critic_explains_nothing(run: Run) -> str:
    """Detect that a critic explains less than a tenth of the variance of the returns in the last
    fifth, after fifty steps or more.
    """
    explained = values_of(run.steps, "critic_train/explained_variance")
    if len(explained) < 5 * MIN_STEPS:
        return ""
    parts = np.array([part.mean() for part in fifths(explained)])
    if parts[-1] >= EXPLAINED:
        return ""
    return (
        f"its values explain {parts[-1]:.0%} of the returns' variance in the last fifth,"
        f" {parts.max():.0%} at best"
    )


def critic_explodes(run: Run) -> str:
    """Detect a critic's loss in the last fifth that is ten times that of its best fifth, and above
    it by three standard errors.
    """
    losses = values_of(run.steps, "critic_train/loss")
    if len(losses) < 5 * MIN_STEPS:
        return ""
    parts = fifths(losses)
    best = min(parts, key=lambda part: part.mean())
    rise = parts[-1].mean() - best.mean()
    error = math.hypot(*(part.std() / math.sqrt(len(part)) for part in (parts[-1], best)))
    if parts[-1].mean() <= EXPLODED * best.mean() or rise <= 3 * error:
        return ""
    return f"its loss is {parts[-1].mean():.3g} in the last fifth, {best.mean():.3g} in the best"
