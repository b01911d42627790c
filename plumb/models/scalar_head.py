"""Build a reward model: a causal LM whose LM head is replaced by one row, which scores the text up
to each token.

Shapes: d hidden size. Everything else (packed trees, sharding, checkpoints) sees a causal LM with a
vocabulary of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = ("lm_head", "embed_out", "head")  # what transformers calls a causal LM's head


FOLDS = 5
MIN_PAIRS = 10 * FOLDS  # with fewer, a fit only memorises them
RIDGES = [10 ** (x / 2) for x in range(-6, 9)]  # times the mean square of a coordinate
# root mean square of margins; above 5 a pair's loss is below 0.01
SPREADS = [
    0.0,
    *(10 ** (x / 8) for x in range(-16, 7)),
]


class ScalarHead(nn.Linear):
    """Map hidden states to scores, without a bias.  [..., d] -> [..., 1]

    Weight, product and score are float32 (or float64), whatever the model computes in.
    """

    computed: Tensor | None = None  # the scores of the forward pass that is running
    drawn = False  # its weight is a draw from a seed: it was neither trained nor read from a file

    def __init__(self, d: int, dtype: torch.dtype = torch.float32, device: Any = None):
        super().__init__(
            d, 1, bias=False, device=device, dtype=torch.promote_types(dtype, torch.float32)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            self.computed = F.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight)
        return self.computed


def _scores_as_logits(model: Any, inputs: Any, output: Any) -> Any:
    """Set the logits, after the model's forward pass, to the scalar head's output, whatever was
    done to them after the head.
    """
    head = model.get_output_embeddings()
    output.logits = head.computed
    head.computed = None
    return output


def initial_weight(d: int, seed: int) -> Tensor:
    """Draw from a normal with variance 1 / (d + 1), so that first scores are of order one (Stiennon
    et al. 2020, arXiv:2009.01325, C.2). -> [1, d] float32
    """
    return torch.randn(1, d, generator=torch.Generator().manual_seed(seed)) / (d + 1) ** 0.5


def put_scalar_head(model: Any, seed: int | None = None) -> str:
    """Replace the model's LM head in place; given a seed, the new one gets initial values. Return
    its weight's name.

    What the model does to logits afterwards (soft-capping, scaling) no longer matters: its output's
    `logits` are the head's scores. The embedding is no longer tied to the head.
    """
    old = model.get_output_embeddings().weight
    head = ScalarHead(old.shape[1], old.dtype, old.device)
    if seed is not None:
        head.drawn = True
        with torch.no_grad():
            head.weight.copy_(initial_weight(old.shape[1], seed))
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    # before FSDP's own, which has to see what the loss is computed from
    model.register_forward_hook(_scores_as_logits)
    return head_name(model)


def head_name(model: Any) -> str:
    """Return the name of the head's weight in the state dict."""
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


class Fit(NamedTuple):
    """Hold a head for frozen hidden states, and its cross-validation results."""

    weight: Tensor  # [1, d] float64, on the CPU
    accuracy: float  # share of pairs that a fit without their fold ranks as the data do
    loss: float  # their mean Bradley-Terry loss, nats; log 2 where nothing can be learned


def fit_head(chosen: Tensor, rejected: Tensor, folds: Tensor) -> Fit:
    """Fit the linear head that separates chosen from rejected by the hidden states of a model
    without training at their ends.  [n, d], [n, d], [n] numbers 0 to FOLDS - 1.

    Ridge regression of 1 on the difference of the two hidden states, each coordinate divided by its
    root mean square; then scaled to minimise the Bradley-Terry loss. Ridge and scale are those with
    the least loss on held-out folds; if none is below log 2, or with fewer than MIN_PAIRS, the head
    is 0. The mean score of all responses is 0.
    """
    if chosen.device.type == "mps":  # which has no float64
        chosen, rejected = chosen.cpu(), rejected.cpu()
    chosen, rejected, folds = chosen.double(), rejected.double(), folds.to(chosen.device)
    if len(folds) < MIN_PAIRS:
        return Fit(torch.zeros(1, chosen.shape[1], dtype=torch.float64), 0.0, math.log(2))
    unit = (chosen - rejected).square().mean(0).sqrt()
    unit = torch.where(unit > 1e-9 * unit.max(), unit, torch.inf)  # what never differs is left out
    # at a right angle to it, scores have the mean 0
    mean = F.normalize(((chosen + rejected) / unit).mean(0), dim=0)
    z = (chosen - rejected) / unit
    u, s, vh = torch.linalg.svd(z - (z @ mean)[:, None] * mean, full_matrices=False)
    points = u * s  # [n, r], the same differences in min(n, d) coordinates
    margins = points.new_zeros(len(points), len(RIDGES))
    for fold in range(FOLDS):
        margins[folds == fold] = points[folds == fold] @ _ridge(points[folds != fold])
    spreads = torch.tensor(SPREADS, dtype=margins.dtype, device=margins.device)
    size = margins.square().mean(0).sqrt()[:, None]
    scales = torch.where(size > 0, spreads / size, 0.0)  # [ridges, spreads]
    losses = torch.stack([-F.logsigmoid(margins * scale).mean(0) for scale in scales.T], 1)
    best, spread = divmod(int(losses.argmin()), len(SPREADS))
    weight = scales[best, spread] * (_ridge(points)[:, best] @ vh) / unit
    return Fit(
        weight[None].cpu(),
        float((margins[:, best] > 0).double().mean()),
        float(losses[best, spread]),
    )


def _ridge(points: Tensor) -> Tensor:
    """Return the coefficients of the regression of 1 on the points, for each of RIDGES.  [n, r] ->
    [r, ridges]
    """
    values, vectors = torch.linalg.eigh(points.T @ points)
    ridges = values.new_tensor(RIDGES) * values.clamp(min=0).mean()
    return vectors @ (
        (vectors.T @ points.sum(0))[:, None]
        / (values.clamp(min=0)[:, None] + ridges).clamp(min=1e-300)
    )


def scores(model: Any) -> bool:
    """Return whether this is a reward model with a scalar head."""
    return isinstance(model.get_output_embeddings(), ScalarHead)


def holds_scores(state: Mapping[str, Tensor]) -> bool:
    """Return whether this is the state dict of one."""
    return any(is_head(name) and tensor.shape[0] == 1 for name, tensor in state.items())


def is_head(name: str) -> bool:
    """Return whether a state dict's entry of this name is the weight of a causal LM's head."""
    return name in {f"{head}.weight" for head in HEADS}
