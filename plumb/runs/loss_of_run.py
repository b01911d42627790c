"""The loss of a run, from the record of its config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from plumb.console import to_dict
from plumb.losses.registry import Loss, build_loss
from plumb.paths import CONFIG


def loss_of_run(config: Mapping[str, Any]) -> Loss:
    """Return the loss of a run's config, nested dicts. A knob that an older run does not record has
    the value of config/loss.

    Raises ValueError, in one line, for a config without a loss, and as build_loss does: the loss of
    a plugin is known only where the plugin has been imported.
    """
    recorded = config.get("loss")
    if not isinstance(recorded, Mapping) or not recorded.get("name"):
        raise ValueError("loss: the config names none")
    return build_loss({**_defaults(str(recorded["name"])), **recorded})


def _defaults(name: str) -> dict[str, Any]:
    """Return the knobs of config/loss/NAME.yaml that have a value there."""
    file = CONFIG / "loss" / f"{name}.yaml"
    if not re.fullmatch(r"\w+", name) or not file.is_file():
        return {}
    knobs = to_dict(OmegaConf.load(file))
    return {knob: value for knob, value in knobs.items() if value != "???" and knob != "defaults"}
