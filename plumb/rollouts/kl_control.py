"""The weight of the KL to the reference: fixed, or controlled towards a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plumb.losses.advantage_rules import GaeRule

LARGEST_ERROR = 0.2  # of arXiv:1909.08593, Eq. 4, and its code


@dataclass
class KlControl:
    """Hold the weight. With a target, it grows while the KL is above it: weight <- weight (1 + e n
    / horizon) after n responses, where e is KL / target - 1 within +-0.2 (arXiv:1909.08593, Eq. 4).

    >>> control = KlControl(0.1, target=6.0, horizon=100.0)
    >>> control.update(12.0, n=50)
    >>> round(control.weight, 3)
    0.11
    """

    weight: float
    target: float | None = None  # nats per response; None: the weight is fixed
    horizon: float | None = None  # responses

    @classmethod
    def of(cls, rule: GaeRule) -> KlControl:
        """Return the control of a loss, as it begins."""
        return cls(rule.kl_weight, rule.kl_target, rule.kl_horizon)

    def update(self, kl: float, n: int) -> None:
        """Adapt the weight to the mean KL of n responses, in nats; to be called once for each
        rollout, after its rewards were computed.
        """
        if self.target is None or self.horizon is None:
            return
        error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
        self.weight *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` takes."""
        return {"weight": self.weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a state."""
        self.weight = float(state["weight"])
