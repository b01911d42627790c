"""Losses: pure functions of log-probabilities or scores, one value per example. Imports only
torch.

A loss is a decorated function (registry.py) of the types in contract.py, and a YAML in config/loss
with its knobs. Models, batches and the division by the batch's count do not belong here.
"""

from plumb.losses import (  # noqa: F401  registers the losses
    listwise,
    pairwise,
    pairwise_anchored,
    pairwise_batch,
    pairwise_offset,
    pairwise_reference_free,
    pairwise_token,
    policy_gradient,
    reward_model,
    supervised,
    unpaired,
)
from plumb.losses.contract import (
    BatchContext,
    Labelled,
    Largest,
    Lists,
    Logps,
    LogpsAndKL,
    LogpsAndSquares,
    LossOutput,
    Mean,
    Pairs,
    Rollouts,
    ScoredPairs,
    Scores,
    Spread,
    TokenLogps,
    flip_probability,
)
from plumb.losses.registry import loss

__all__ = [
    "BatchContext",
    "Labelled",
    "Largest",
    "Lists",
    "Logps",
    "LogpsAndKL",
    "LogpsAndSquares",
    "LossOutput",
    "Mean",
    "Pairs",
    "Rollouts",
    "ScoredPairs",
    "Scores",
    "Spread",
    "TokenLogps",
    "flip_probability",
    "loss",
]
