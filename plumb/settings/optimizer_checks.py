"""Refuse an optimizer that can't do what the other options ask for, in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.util import find_spec

from omegaconf import DictConfig

from plumb.errors import UserError
from plumb.settings.schema import defaults


def check_optimizer(config: DictConfig, has_critic: bool) -> None:
    """Raise UserError for an optimizer that does not exist, is not installed, refuses its
    arguments, or does not fit the rest. `has_critic`: the run trains a critic, too.
    """
    import torch

    from plumb.models.forward_path import DTYPES
    from plumb.training import optimizers

    name = config.optimizer
    if name not in optimizers.OPTIMIZERS:
        raise UserError(
            f"optimizer={name}: expected one of {', '.join(optimizers.OPTIMIZERS)}"
            f"{_meant(name, optimizers.OPTIMIZERS)}"
        )
    package = optimizers.PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise UserError(
            f"optimizer={name}: needs {package}, which is not installed; pip install -r"
            f" {optimizers.REQUIREMENTS[package]}"
        )
    if name in optimizers.SCHEDULE_FREE:
        _check_schedule_free(config)
    if name in optimizers.OF_BITSANDBYTES:
        _check_bitsandbytes(config, torch.cuda.is_available())
    if has_critic:
        _check_critic(config, name in optimizers.PACKAGES)
    _check_precision(config, name in optimizers.PACKAGES)
    # refuses optimizer_args that the optimizer refuses
    layer = torch.nn.Linear(1, 1, dtype=DTYPES[config.model.policy_dtype])
    made = optimizers.make_optimizer(config, layer, torch.device("cpu"))
    if config.weight_decay_on != "all" and not any(
        group.get("weight_decay") for group in made.param_groups
    ):
        raise UserError(
            f"weight_decay_on={config.weight_decay_on}: no weight decays with optimizer={name};"
            " give optimizer_args='{weight_decay: 0.01}', or leave weight_decay_on as it is"
        )
    if config.optimizer_state != "full":
        _check_state(config)


def _meant(name: str, known: Sequence[str]) -> str:
    """Return which optimizer a name may mean; "" for none.

    >>> _meant("paged_adamw_8bit", ["AdamW", "PagedAdamW8bit"]), _meant("x", ["AdamW"])
    ('; did you mean optimizer=PagedAdamW8bit?', '')
    """
    plain = {each.lower(): each for each in known}
    wanted = name.lower().replace("_", "").replace("-", "").removesuffix("torch")
    near = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.75)
    return f"; did you mean optimizer={plain[near[0]]}?" if near else ""


def _check_state(config: DictConfig) -> None:
    """Refuse bfloat16 for the state of an optimizer that has none or another kind."""
    from plumb.training.optimizers import IN_BFLOAT16

    if config.optimizer not in IN_BFLOAT16:
        raise UserError(
            f"optimizer_state={config.optimizer_state}: is for optimizer="
            f"{', '.join(IN_BFLOAT16)}; leave optimizer_state as it is"
        )
    if config.optimizer == "SGD" and not (config.optimizer_args or {}).get("momentum"):
        raise UserError(
            f"optimizer_state={config.optimizer_state}: SGD without momentum has no state; leave"
            " optimizer_state as it is"
        )


def _check_schedule_free(config: DictConfig) -> None:
    """Refuse what would schedule or average a second time, and weights that round the average."""
    for name, value, why in (
        ("lr_schedule", "constant", "takes the place of a schedule"),
        ("ema_decay", None, "averages the weights itself"),
        ("reference_update_every", None, "trains other weights than the policy's, an average"),
    ):
        if config[name] != value:
            shown = "null" if value is None else value
            raise UserError(
                f"{name}={config[name]}: optimizer={config.optimizer} {why}; set {name}={shown}"
            )
    if config.adapter == "none" and config.model.policy_dtype == "bfloat16":
        raise UserError(
            f"model.policy_dtype=bfloat16: optimizer={config.optimizer} keeps an average in the"
            " weights, which bfloat16 rounds away; set float32"
        )


def _check_bitsandbytes(config: DictConfig, gpu: bool) -> None:
    """Refuse sharded weights, float64, and pages without a GPU to move them from."""
    name = config.optimizer
    if config.trainer != "BasicTrainer":
        raise UserError(
            f"optimizer={name}: bitsandbytes does not take weights that are sharded; set"
            " trainer=BasicTrainer, or optimizer_state=bfloat16 with AdamW"
        )
    if config.model.policy_dtype == "float64":
        raise UserError(
            f"optimizer={name}: bitsandbytes does not take float64, the model.policy_dtype of this"
            " run; set float32"
        )
    if name.startswith("Paged") and not gpu and not config.plan:
        raise UserError(
            f"optimizer={name}: its pages move between a GPU and RAM, and there is no GPU here; set"
            f" optimizer={name.removeprefix('Paged')}"
        )


def _check_critic(config: DictConfig, counts: bool) -> None:
    """Refuse what counts steps for a critic, whose checkpoints hold tensors only."""
    for name in ("stochastic_rounding", "optimizer_state"):
        if config[name] != defaults()[name]:
            raise UserError(
                f"{name}={config[name]}: is not made for the critic of this loss; leave {name} as"
                " it is"
            )
    if counts:
        raise UserError(
            f"optimizer={config.optimizer}: is not made for the critic of this loss; take AdamW"
        )


def _check_precision(config: DictConfig, of_package: bool) -> None:
    """Refuse rounding where nothing is rounded, and where the optimizer does it itself."""
    if not config.stochastic_rounding:
        return
    if config.model.policy_dtype != "bfloat16":
        raise UserError(
            "stochastic_rounding=true: is for model.policy_dtype=bfloat16, and here it is"
            f" {config.model.policy_dtype}; set one of the two"
        )
    if config.adapter != "none":
        raise UserError(
            f"stochastic_rounding=true: adapter={config.adapter} trains float32 adapters, and no"
            " bfloat16 weight; set it to false"
        )
    if of_package:
        raise UserError(
            f"stochastic_rounding=true: optimizer={config.optimizer} updates the weights itself;"
            " take AdamW, or another one of torch"
        )
