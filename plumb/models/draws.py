"""Find the parts of a model that draw random numbers in its forward pass, and run them without.

Some routers sample experts in training, or add noise to their input; others drop whole layers. A
preference loss compares two models, so neither may draw: a policy would differ from its own
reference, and from itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

N_TOKENS = 32  # of the row that is tried


def run_without_draws(model: Any, device: torch.device) -> list[str]:
    """Make the parts of a model that draw random numbers in training compute as in evaluation,
    permanently. Return their classes.

    Found by trying a short row: the innermost module that was running when the random state
    changed, and all of its class. Their mode is changed during their own forward pass, so that the
    modules inside them, and recomputation, still train. Parts that also draw in evaluation are left
    as they are. Every rank must call it.
    """
    classes = drawing(model, device)
    for module in model.modules():
        if type(module) in classes:
            module.register_forward_pre_hook(_to_evaluation)
            module.register_forward_hook(_back, always_call=True)
    return sorted(kind.__name__ for kind in classes - drawing(model, device)) if classes else []


@torch.no_grad()
def drawing(model: Any, device: torch.device) -> set[type[nn.Module]]:
    """Return the classes of the modules that draw random numbers when `model` is in train mode.
    Random state and mode are left unchanged.
    """
    watch, was_training = _Watch(), model.training
    before = watch.state
    ids = (torch.arange(N_TOKENS, device=device) % model.config.get_text_config().vocab_size)[None]
    handles = [
        register_module_forward_pre_hook(watch.enter),
        register_module_forward_hook(watch.leave, always_call=True),
    ]
    try:
        model.train()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
        _set_random_state(before)
    return watch.found


class _Watch:
    """Record which module is running when the random state changes."""

    def __init__(self) -> None:
        self.state = _random_state()
        self.at_work: list[nn.Module] = []
        self.found: set[type[nn.Module]] = set()

    def enter(self, module: nn.Module, _: Any) -> None:
        self.look()
        self.at_work.append(module)

    def leave(self, *_: Any) -> None:
        self.look()
        self.at_work.pop()

    def look(self) -> None:
        state = _random_state()
        changed = any(not torch.equal(a, b) for a, b in zip(state, self.state, strict=True))
        if changed and self.at_work:
            self.found.add(type(self.at_work[-1]))
        self.state = state


def _random_state() -> list[Tensor]:
    return [
        torch.get_rng_state(),
        *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()),
    ]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def _to_evaluation(module: Any, _: Any) -> None:
    module.mode_outside = module.training
    module.training = False


def _back(module: Any, *_: Any) -> None:
    module.training = module.mode_outside
