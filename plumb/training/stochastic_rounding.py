"""Round float32 numbers to bfloat16 at random, so that the mean of the result is the number.

bfloat16 keeps 8 significant bits: rounding to the nearest loses every update below 1/512 of a
weight. Rounding up with the probability of the fraction that is cut off keeps it on average.

The random numbers are a function of a key and of a number's place in the full tensor, so that they
do not depend on how a tensor is cut, on the device, or on what was drawn before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 2**22  # numbers at a time, each with a few temporaries of 8 bytes


def key_of(seed: int, step: int, name: str) -> int:
    """Return the key of a parameter's rounding in a step, a number of 64 bits."""
    text = f"{seed} {step} {name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@torch.no_grad()
def rounded(part: Tensor, key: int, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return a part of a tensor of this `shape`, which begins at `offset`, in bfloat16. NaN and
    infinity stay what they are.

    Adds 16 random bits to a number's last 16 and cuts these off: a carry, which makes the magnitude
    the next larger one, has the probability of what is cut.
    """
    flat = part.float().reshape(-1)
    if not part.dim():
        return _rounded(flat, key, flat.new_zeros(1, dtype=torch.int64)).reshape(part.shape)
    made = torch.empty(part.shape, dtype=torch.bfloat16, device=part.device)
    n_rows = max(1, CHUNK // max(1, math.prod(part.shape[1:])))
    for first in range(0, part.shape[0], n_rows):
        rows = part[first : first + n_rows].float()
        places = _places(rows, (offset[0] + first, *offset[1:]), shape)
        made[first : first + n_rows] = _rounded(rows, key, places)
    return made


def _rounded(x: Tensor, key: int, places: Tensor) -> Tensor:
    """Return float32 numbers in bfloat16; `places`: those in the full tensor."""
    drawn = _hashed(places, key) & 0xFFFF
    cut = (x.view(torch.int32) + drawn.to(torch.int32)) & -0x10000
    return torch.where(x.isfinite(), cut.view(torch.float32), x).to(torch.bfloat16)


def _places(rows: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return each number's index in the full tensor, row by row.

    >>> _places(torch.zeros(2, 2), (1, 2), (3, 4))
    tensor([[ 6,  7],
            [10, 11]])
    """
    places = torch.zeros((), dtype=torch.int64, device=rows.device)
    for dim, (begin, n) in enumerate(zip(offset, rows.shape, strict=True)):
        along = torch.arange(begin, begin + n, device=rows.device) * math.prod(shape[dim + 1 :])
        places = places.unsqueeze(-1) + along
    return places


def _hashed(x: Tensor, key: int) -> Tensor:
    """Return 32 random bits for each index: C. Wellons' 32-bit mixing function (lowbias32) of its
    low half with one half of the key, then of the result with the other halves.
    """
    low = _mixed((x & _MASK) ^ (key & _MASK))
    return _mixed(low ^ ((x >> 32) + (key >> 32) & _MASK))


_MASK = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
