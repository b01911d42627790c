"""The device that one process computes on."""

from __future__ import annotations

import torch
from omegaconf import DictConfig


def pick_device(config: DictConfig) -> torch.device:
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
