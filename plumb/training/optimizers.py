"""Make schedules and optimizers, as pure functions of the config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from plumb.console import to_dict
from plumb.data.order import BlockSchedule
from plumb.distributed import sharding
from plumb.errors import UserError
from plumb.models.blocks import block_class
from plumb.models.scalar_head import ScalarHead
from plumb.training.stepwise import Joint, StandIns, Stepwise

# Those of torch that take any parameter. SparseAdam takes sparse gradients only; Muon takes
# matrices only, so that it is part of `muon`.
OF_TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam", "Muon")
    and inspect.signature(kind.step).parameters["closure"].default is None
}
MUON = "muon"
# Those that compute with a parameter as a whole, and don't take one that is sharded.
WHOLE = ("Muon", "Adafactor", "Rprop")
# optimizer -> where it is from. Its eval() leaves the weights' average in place of the weights.
SCHEDULE_FREE = {"AdamWScheduleFree": "schedulefree"}
# Their state is in blocks of 256 numbers of 8 bits, or in pages that move between GPU and RAM.
OF_BITSANDBYTES = {"AdamW8bit", "PagedAdamW8bit", "PagedAdamW"}
PACKAGES = {**SCHEDULE_FREE, **dict.fromkeys(sorted(OF_BITSANDBYTES), "bitsandbytes")}
REQUIREMENTS = {
    "schedulefree": "requirements-optim.txt",
    "bitsandbytes": "requirements-quant.txt",
}
OPTIMIZERS = (*OF_TORCH, MUON, *PACKAGES)
IN_BFLOAT16 = ("Adam", "AdamW", "RMSprop", "SGD", MUON)  # whose state may be
OF_MUON = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn")


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
    """Return the optimizer `config.optimizer` of the trained parameters, fused on a GPU if torch
    has such a kernel. Raise UserError if its arguments are refused.
    """
    arguments = to_dict(config.optimizer_args)
    try:
        if config.optimizer == MUON:
            return _muon(config, policy, device, arguments)
        factory = _factory(config.optimizer)
        trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        return _made(factory, config, policy, trained, _fused(factory, device, arguments))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"optimizer={config.optimizer} optimizer_args={arguments}: {str(error).splitlines()[0]}"
        ) from None


def _factory(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of an optimizer."""
    if name in OF_TORCH:
        return OF_TORCH[name]
    if name in SCHEDULE_FREE:
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree
    from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit

    of_bitsandbytes = (AdamW8bit, PagedAdamW8bit, PagedAdamW)
    return {kind.__name__: kind for kind in of_bitsandbytes}[name]


def _fused(
    factory: Callable[..., Any], device: torch.device, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments with fused=True on a GPU, if torch has such a kernel and nothing else is
    asked for.
    """
    fusible = "fused" in inspect.signature(factory).parameters and not arguments.keys() & {
        "fused",
        "foreach",
        "differentiable",
    }
    return {"fused": True} | arguments if device.type == "cuda" and fusible else arguments


def _muon(
    config: DictConfig, policy: nn.Module, device: torch.device, arguments: dict[str, Any]
) -> Joint:
    """Return Muon for the matrices of the blocks and AdamW for the rest. Muon's updates are scaled
    to the size of AdamW's (arXiv:2502.16982), so that one learning rate is for both.
    """
    within = _within_blocks(policy, config.model.block_name)
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if p.ndim == 2 and id(p) in within]
    rest = [(name, p) for name, p in trained if p.ndim != 2 or id(p) not in within]
    known = {*OF_MUON, *inspect.signature(torch.optim.AdamW).parameters}
    if unknown := [name for name in arguments if name not in known]:
        raise TypeError(
            f"{unknown[0]} is no argument of Muon ({', '.join(OF_MUON)}, weight_decay), nor of"
            " AdamW, which trains what is no matrix; leave it out"
        )
    decay = {k: v for k, v in arguments.items() if k == "weight_decay"}
    of_muon = {k: v for k, v in arguments.items() if k in OF_MUON}
    of_adamw = {k: v for k, v in arguments.items() if k not in OF_MUON}
    of_muon = {"adjust_lr_fn": "match_rms_adamw"} | of_muon | decay
    of_adamw = _fused(torch.optim.AdamW, device, of_adamw)
    parts = []
    if matrices:
        parts.append(_made(torch.optim.Muon, config, policy, matrices, of_muon))
    if rest:
        parts.append(_made(torch.optim.AdamW, config, policy, rest, of_adamw))
    return Joint(parts)


def _within_blocks(policy: nn.Module, block_name: str | None) -> set[int]:
    """Return the ids of the parameters of the blocks; all of them for what is no language model."""
    if not hasattr(policy, "_no_split_modules"):
        return {id(p) for p in policy.parameters()}
    block = block_class(policy, block_name)
    return {
        id(p)
        for module in policy.modules()
        if isinstance(module, block)
        for p in module.parameters()
    }


Named = Sequence[tuple[str, nn.Parameter]]


def _made(
    factory: Callable[..., torch.optim.Optimizer],
    config: DictConfig,
    policy: nn.Module,
    trained: Named,
    arguments: dict[str, Any],
) -> torch.optim.Optimizer:
    """Return an optimizer of these parameters, which steps them through stand-ins where it has
    to.
    """
    made = factory(_groups(config, policy, trained), lr=config.lr, **arguments)
    if config.optimizer in SCHEDULE_FREE:
        made.train()  # type: ignore[attr-defined]
    whole = factory.__name__ in WHOLE and any(sharding.is_sharded(p) for _, p in trained)
    in_bfloat16 = config.optimizer_state == "bfloat16"
    if not (whole or in_bfloat16 or config.stochastic_rounding):
        return made
    how = StandIns(config.seed, whole, torch.bfloat16 if in_bfloat16 else None)
    return Stepwise(made, {p: name for name, p in trained}, how)


def _groups(config: DictConfig, policy: nn.Module, trained: Named) -> list[dict[str, Any]]:
    """Return the parameters in groups: a scalar head that has its own learning rate, and vectors
    and embeddings whose weights don't decay.
    """
    modules = list(policy.modules())
    heads = {
        id(p) for module in modules if isinstance(module, ScalarHead) for p in module.parameters()
    }
    tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for _, p in trained:
        apart = config.head_lr is not None and id(p) in heads
        constant = config.weight_decay_on == "matrices" and (p.ndim < 2 or id(p) in tables)
        options = ({"lr": config.head_lr} if apart else {}) | (
            {"weight_decay": 0.0} if constant else {}
        )
        groups.setdefault((apart, constant), {"params": [], **options})["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer trains other weights than it would leave at the end."""
    return hasattr(optimizer, "eval")


@contextmanager
def averaged_weights(policy: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give the policy, within the context, the weights that its optimizer would leave at the end:
    those of AdamW schedule-free are the average of its steps. Nothing may be saved there. Every
    rank must enter it.
    """
    if not averages(optimizer):
        yield
        return
    trained = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    sharding.reshard(policy)
    own = [p.clone() for p in trained]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        sharding.reshard(policy)
        with torch.no_grad():
            for p, before in zip(trained, own, strict=True):
                p.copy_(before)  # optimizer.train() would round
        for group in optimizer.param_groups:
            group["train_mode"] = True


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
