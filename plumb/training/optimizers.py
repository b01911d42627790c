"""Make schedules and optimizers, as pure functions of the config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from plumb.console import to_dict
from plumb.data.order import BlockSchedule
from plumb.errors import UserError
from plumb.models.scalar_head import ScalarHead

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and name
    not in (
        "Optimizer",
        "SparseAdam",
        "Muon",
    )  # these two take sparse gradients only, and matrices only
    and inspect.signature(kind.step).parameters["closure"].default is None
}


def make_schedule(config: DictConfig, n: int) -> BlockSchedule:
    """Return the steps of a run on n examples."""
    return BlockSchedule(
        n,
        batches=config.rollout.batches,
        uses=config.rollout.uses,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        shuffle=config.shuffle,
        seed=config.seed,
    )


def make_optimizer(
    config: DictConfig, policy: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    """Return torch.optim.<config.optimizer>, fused on a GPU if torch has such a kernel. Raise
    UserError if its arguments are refused.
    """
    factory = OPTIMIZERS[config.optimizer]
    arguments = to_dict(config.optimizer_args)
    fusible = "fused" in inspect.signature(factory).parameters and not arguments.keys() & {
        "fused",
        "foreach",
        "differentiable",
    }
    if device.type == "cuda" and fusible:
        arguments = {"fused": True} | arguments
    try:
        return factory(_groups(policy, config.head_lr), lr=config.lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"optimizer={config.optimizer} optimizer_args={arguments}: {str(error).splitlines()[0]}"
        ) from None


def _groups(policy: nn.Module, head_lr: float | None) -> Any:
    """Return all trained parameters as one group or, if a scalar head has its own learning rate,
    the head's and the others.
    """
    heads = [module for module in policy.modules() if isinstance(module, ScalarHead)]
    trained = [p for p in policy.parameters() if p.requires_grad]
    if head_lr is None or not heads:
        return trained
    apart = {id(p) for p in heads[0].parameters()}
    rest = [p for p in trained if id(p) not in apart]
    return [{"params": rest}, {"params": list(heads[0].parameters()), "lr": head_lr}]


def make_scheduler(
    config: DictConfig, optimizer: torch.optim.Optimizer, n_steps: int, done: int = 0
) -> Any:
    """Return the scheduler of the learning rate, advanced to `done` updates."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor := lr_factor(config, n_steps))
    if done:
        rates = [base * factor(done) for base in scheduler.base_lrs]
        state = {
            "last_epoch": done,
            "_step_count": done + 1,
            "_last_lr": rates,
            "lr_lambdas": [None] * len(rates),
        }
        scheduler.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return scheduler


def lr_factor(config: DictConfig, n_steps: int) -> Callable[[int], float]:
    """Return the factor of lr as a function of the update k (from 0): linear warmup min(1, (k + 1)
    / (warmup_steps + 1)) as in the original; then, by lr_schedule, constant, or down to
    min_lr_ratio at the last step, linearly or as half a cosine.
    """
    warmup, floor = config.warmup_steps, config.min_lr_ratio
    shape = {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    }
    decay = shape[config.lr_schedule]

    def factor(k: int) -> float:
        if k < warmup:
            return (k + 1) / (warmup + 1)
        x = min(1.0, (k - warmup) / max(1, n_steps - 1 - warmup))
        return floor + (1 - floor) * decay(x) if config.lr_schedule != "constant" else 1.0

    return factor
