"""Compute divergences that replace the reverse KL of DPO (f-DPO, arXiv:2309.16240)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# exp of more overflows float32. Beyond it pi is 1e-35 of pi_ref: the term is constant there.
LARGEST_EXPONENT = 80.0


def check_divergence(
    divergence: Divergence, alpha: float | None, normalize: str, reference_free: bool
) -> None:
    """Raise ValueError for an alpha that is missing, ignored or outside (0, 1), and for knobs with
    which there is no ratio pi/pi_ref.
    """
    if divergence != "reverse_kl" and (reference_free or normalize != "sum"):
        knob = "reference_free=true" if reference_free else f"normalize={normalize}"
        raise ValueError(
            f"divergence={divergence}: is a function of pi(y|x)/pi_ref(y|x), which {knob} does not"
            " keep; set divergence=reverse_kl"
        )
    if divergence != "alpha" and alpha is not None:
        raise ValueError(
            f"alpha={alpha}: only divergence=alpha uses it, but divergence={divergence}; leave"
            " alpha=null"
        )
    if divergence == "alpha" and not (alpha is not None and 0 < alpha < 1):
        raise ValueError(
            f"alpha={alpha}: divergence=alpha needs a number between 0 (reverse KL) and 1 (forward"
            " KL); 0.3 to 0.7 is usual"
        )


def derivative(log_u: Tensor, divergence: Divergence, alpha: float | None) -> Tensor:
    """Return f'(u) of u = pi/pi_ref, up to a constant, which cancels in a pair.  [B]

    reverse KL log u; forward KL -1/u; Jensen-Shannon log(2u / (1+u)); alpha -u^-alpha / alpha.
    """
    if divergence == "forward_kl":
        return -(-log_u).clamp(max=LARGEST_EXPONENT).exp()
    if divergence == "js":
        return F.logsigmoid(log_u)
    if divergence == "alpha" and alpha is not None:
        return -(-alpha * log_u).clamp(max=LARGEST_EXPONENT).exp() / alpha
    return log_u
