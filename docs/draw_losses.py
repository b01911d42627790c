"""Draw docs/losses.png, the value and the gradient of every loss on pairs against the margin h:
`python docs/draw_losses.py`.

Both responses have TOKENS tokens, and the reference gives each -1 nat per token. The policy gives
the chosen response h/2 nats more and the rejected one h/2 less, so h = 0 is the reference. Knobs
are those of config/loss; a required one has a usual value, shown in the panel's title.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from list_losses import knobs_of  # noqa: E402

from plumb.losses.contract import (  # noqa: E402
    Logps,
    LogpsAndKL,
    LogpsAndSquares,
    Pairs,
    ScoredPairs,
    Scores,
    TokenLogps,
)
from plumb.losses.registry import LOSSES, Loss, build_loss  # noqa: E402

TOKENS = 20
FARTHEST = 30.0  # nats of log-probability
FARTHEST_SCORE = 6.0
N_POINTS = 241
COLUMNS = 5
LOSS, GRADIENT = "#1f5fa8", "#c8501e"


def response(bound: Loss, value: Tensor) -> Any:
    """Return one response of TOKENS tokens with this sum of log-probabilities, or this score."""
    n = torch.tensor([TOKENS])
    if bound.reads == "scores":
        return Scores(value[None], value.expand(1, TOKENS), n)
    if bound.reads == "token_logps":
        each = (value / TOKENS).expand(TOKENS)
        return TokenLogps(each, torch.zeros(TOKENS, dtype=torch.int64), 1)
    if bound.reads == "logps_and_squares":
        return LogpsAndSquares(value[None], n, torch.tensor([-1.0 * TOKENS]))
    if bound.reads == "logps_and_kl":
        return LogpsAndKL(value[None], n, torch.zeros(1))
    return Logps(value[None], n)


def loss_at(bound: Loss, h: Tensor) -> Tensor:
    """Return the loss of one pair with margin h."""
    start = torch.tensor(0.0 if bound.reads == "scores" else -TOKENS, dtype=h.dtype)
    values = (start + h / 2, start - h / 2)
    chosen, rejected = (response(bound, value) for value in values)
    same: Any = Logps(start[None], torch.tensor([TOKENS]))
    if bound.reference_by_token:
        same = response(bound, start)
    context = None
    if bound.context is not None:
        pair = Logps(torch.stack(values).detach()[None], torch.full((1, 2), TOKENS))
        start_of_both = Logps(start.expand(1, 2), pair.tokens)
        context = bound.context.compute(pair, start_of_both if bound.needs_reference else None)
    policy: Any = Pairs(chosen, rejected)
    if bound.reads == "scores":
        policy = ScoredPairs(chosen, rejected, torch.tensor([0]), None)
    if bound.needs_margins:
        policy = policy._replace(margins=torch.ones(1))
    reference = Pairs(same, same) if bound.needs_reference else None
    return bound.compute(policy, reference, context).losses[0]


def curve(bound: Loss) -> tuple[list[float], list[float], list[float]]:
    """Return N_POINTS margins, the losses there, and the losses' derivatives by h."""
    far = FARTHEST_SCORE if bound.reads == "scores" else FARTHEST
    margins = torch.linspace(-far, far, N_POINTS, dtype=torch.float64)
    losses = []
    gradients = []
    for value in margins:
        h = value.clone().requires_grad_()
        loss = loss_at(bound, h)
        losses.append(float(loss.detach()))
        gradients.append(float(torch.autograd.grad(loss, h)[0]))
    return margins.tolist(), losses, gradients


def title(name: str) -> str:
    """Return a loss's name with its required and its non-zero numeric knobs."""
    shown = {k: v for k, v in knobs_of(name).items() if k != "name"}
    numbers = [
        f"{k}={v:g}"
        for k, v in shown.items()
        if isinstance(v, (int, float)) and v and v is not True
    ]
    return f"{name}\n{', '.join(numbers)}"


def panel(axes: Axes, name: str) -> None:
    """Draw one loss, in blue at the left axis, and its derivative, in orange at the right one."""
    margins, losses, gradients = curve(build_loss(knobs_of(name)))
    other = axes.twinx()
    other.axhline(0, color=GRADIENT, linewidth=0.5, alpha=0.6)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.plot(margins, losses, color=LOSS, linewidth=1.8)
    other.plot(margins, gradients, color=GRADIENT, linewidth=1.4, linestyle="--")
    for side, colour in ((axes, LOSS), (other, GRADIENT)):
        side.tick_params(axis="y", labelsize=8, colors=colour)
        side.locator_params(axis="y", nbins=4)
        side.margins(x=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(title(name), fontsize=10, linespacing=1.3)


def draw(path: Path) -> None:
    """Draw a panel for each loss on pairs."""
    names = sorted(name for name, declared in LOSSES.items() if declared.group == "pair")
    n_rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3.1 * COLUMNS, 2.45 * n_rows + 0.6), layout="constrained")
    axes = figure.subplots(n_rows, COLUMNS, squeeze=False)
    for one, name in zip(axes.flat, names, strict=False):
        panel(one, name)
    for one in axes.flat[len(names) :]:
        one.set_axis_off()
    figure.suptitle(
        "loss (blue, left axis) and its derivative by h (orange, dashed, right axis) against the"
        " margin h, in nats; for reward models h = r_w - r_l",
        fontsize=12,
    )
    titles = json.dumps([title(name) for name in names])
    figure.savefig(path, dpi=100, metadata={"Description": titles})


def main(folder: Path = ROOT / "docs") -> None:
    """Write losses.png into `folder`."""
    draw(folder / "losses.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
