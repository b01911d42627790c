"""List the GPUs that plan=true may plan for. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """A GPU that plan=true can plan for, from its data sheet."""

    gb: int  # 1e9 bytes; its real memory is up to 7% more, which its context and fragmentation take
    flops16: float  # dense, per second
    flops32: float  # without TF32, which PyTorch leaves off
    bytes_per_sec: float  # of its memory


CARDS = {
    "H100": Card(80, 989e12, 67e12, 3.35e12),
    "H200": Card(141, 989e12, 67e12, 4.8e12),
    "A100": Card(80, 312e12, 19.5e12, 2.04e12),
    "A100-40GB": Card(40, 312e12, 19.5e12, 1.56e12),
    "L40S": Card(48, 362e12, 91.6e12, 864e9),
    "A10": Card(24, 125e12, 31.2e12, 600e9),
    "RTX4090": Card(24, 165e12, 82.6e12, 1.01e12),
}
