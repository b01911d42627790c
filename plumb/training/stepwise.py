"""Step an optimizer of torch one parameter at a time, through stand-ins.

What torch's optimizers don't do with a parameter they do with a stand-in of it: the whole matrix of
one that is sharded (Muon, Adafactor), a float32 copy of bfloat16 weights or state. After its step a
stand-in is cut to this rank's part again, and rounded stochastically. So there is one such copy of
one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plumb.distributed import sharding
from plumb.training.stochastic_rounding import key_of, rounded


@dataclass(frozen=True)
class StandIns:
    """Say what a stand-in of a parameter is.

    Example: `StandIns(seed=0, whole=False, state=torch.bfloat16)` keeps all state in bfloat16.
    """

    seed: int  # of the rounding
    whole: bool  # the full tensor of a parameter that is sharded
    state: torch.dtype | None  # in which state as large as the parameter is kept; None: the step's


class Stepwise(torch.optim.Optimizer):
    """Step each parameter of an optimizer through a stand-in, in float32 or wider. Every rank must
    make each step.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, names: Mapping[Tensor, str], how: StandIns
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)  # the same groups
        self.inner = inner
        self.state = inner.state
        self.names = names
        self.how = how
        # Draws are a function of the step. What draws nothing counts none, so that it can resume
        # where nothing needs a stand-in.
        self.draws = torch.bfloat16 in {how.state, *(p.dtype for p in names)}
        if self.draws:
            for group in self.param_groups:
                group["n_steps"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        groups = self.inner.param_groups
        for group in groups:
            parameters = group["params"]
            self.inner.param_groups = [group]
            for p in parameters:
                if p.grad is not None:
                    self._step(group, p)
            group["params"] = parameters
            if self.draws:
                group["n_steps"] += 1
        self.inner.param_groups = groups

    def _step(self, group: dict[str, Any], p: Tensor) -> None:
        """Update one parameter, the only one that its group has meanwhile."""
        wide = torch.promote_types(p.dtype, torch.float32)
        weight = self._taken(p, wide)
        stand_in = p if weight is p else nn.Parameter(weight, requires_grad=False)
        if stand_in is not p:
            assert p.grad is not None
            stand_in.grad = self._taken(p.grad, wide)
        kept = self.state.pop(p, {})
        self.state[stand_in] = {key: self._taken(x, wide) for key, x in kept.items()}
        group["params"] = [stand_in]
        self.inner.step()
        changed = self.state.pop(stand_in)
        name, step = self.names[p], group.get("n_steps", 0)
        self.state[p] = {key: self._kept(x, p, f"{name} {key}", step) for key, x in changed.items()}
        if stand_in is not p:
            self._put(stand_in, p, name, step)

    def _taken(self, x: Any, wide: torch.dtype) -> Any:
        """Return a tensor as the stand-in has it; anything else, and a single number, as it is."""
        if not isinstance(x, Tensor) or not x.dim():
            return x
        x = sharding.full_tensor(x) if self.how.whole else x
        return x.to(wide) if x.dtype == torch.bfloat16 else x

    def _kept(self, x: Any, p: Tensor, name: str, step: int) -> Any:
        """Return a number or tensor of the stand-in's state as it is kept for the parameter: one of
        the same shape is laid out as the parameter is.
        """
        if not isinstance(x, Tensor) or x.shape != p.shape or not x.dim():
            return x
        dtype = self.how.state or x.dtype
        if dtype == x.dtype and not self.how.whole:
            return x
        kept = torch.empty_like(p, dtype=dtype, requires_grad=False)
        self._put(x, kept, name, step)
        return kept

    def _put(self, x: Tensor, target: Tensor, name: str, step: int) -> None:
        """Write a stand-in, or its state, into this rank's part of a tensor."""
        offset, there = sharding.region(target)
        part = sharding.local(x)
        if self.how.whole:
            part = x[tuple(slice(o, o + n) for o, n in zip(offset, there.shape, strict=True))]
        if there.dtype == torch.bfloat16 and part.dtype != torch.bfloat16:
            part = rounded(part, key_of(self.how.seed, step, name), offset, x.shape)
        there.copy_(part)


class Joint(torch.optim.Optimizer):
    """Step several optimizers, each with its own parameters, as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        # the same groups
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            _share(part, self.state)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.step()


def _share(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Let an optimizer without state keep it there from now on."""
    optimizer.state = state
    if isinstance(optimizer, Stepwise):
        optimizer.inner.state = state
