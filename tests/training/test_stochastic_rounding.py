"""Stochastic rounding: unbiased, the same wherever a number lies, and enough for small updates."""

import math

import pytest
import torch
from torch import nn

from plumb.training import stochastic_rounding
from plumb.training.optimizers import make_optimizer
from plumb.training.stochastic_rounding import key_of, rounded

N = 200_000


def of(x, key, offset=None, shape=None):
    return rounded(x, key, offset or (0,) * x.dim(), shape or x.shape).double()


@pytest.mark.parametrize("value", [0.02, -0.02, 1.0 + 2**-9, 3e-39, -1e30, 2.0 - 2**-12])
def test_the_mean_is_the_number(value):
    """Each result is one of the two neighbours, and the mean of n of them within 5 standard errors
    of the number: of sqrt(p (1 - p) / n) steps.
    """
    x = torch.full((N,), value)
    got = of(x, key_of(0, 1, "w"))
    bits = x[:1].view(torch.int32) & -0x10000
    low, high = bits.view(torch.float32).double(), (bits + 0x10000).view(torch.float32).double()
    step = float(high - low)
    p = float((x[0].double() - low) / step)
    assert set(got.unique().tolist()) <= {float(low), float(high)}
    error = abs(float((got.mean() - x[0].double()) / step))
    assert error <= 5 * math.sqrt(p * (1 - p) / N)


def test_draws_of_neighbours_steps_and_parameters_are_independent():
    """The correlation of n pairs of draws is 0 within 5 / sqrt(n)."""
    x = torch.full((N,), 1 + 2**-8)  # half way, so that a draw is a coin
    coins = {
        (step, name): (of(x, key_of(0, step, name)) > 1).double() * 2 - 1
        for step in (1, 2)
        for name in ("v", "w")
    }
    first = coins[1, "v"]
    others = [first.roll(1), first.roll(2), first.roll(256), *list(coins.values())[1:]]
    for other in others:
        assert abs(float((first * other).mean())) < 5 / math.sqrt(N)
    assert torch.equal(first, (of(x, key_of(0, 1, "v")) > 1).double() * 2 - 1)


def test_a_part_is_rounded_as_in_the_whole(monkeypatch):
    """By rows, by columns and in chunks."""
    x, key = torch.randn(12, 10), key_of(3, 4, "w")
    whole = of(x, key)
    assert torch.equal(of(x[4:7], key, (4, 0), (12, 10)), whole[4:7])
    assert torch.equal(of(x[2:9, 5:], key, (2, 5), (12, 10)), whole[2:9, 5:])
    monkeypatch.setattr(stochastic_rounding, "CHUNK", 25)
    assert torch.equal(of(x, key), whole)
    assert not torch.equal(of(x, key_of(3, 5, "w")), whole)


def test_what_is_not_finite_or_is_a_bfloat16_stays():
    kept = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1.5, -3.0])
    assert torch.equal(rounded(kept, 1, (0,), (6,)).float(), kept)
    assert rounded(torch.tensor([math.nan]), 1, (0,), (1,)).isnan().all()


@pytest.mark.parametrize("optimizer", ["RMSprop", "AdamW"])
def test_updates_at_5e_7_are_not_lost(optimizer, compose):
    """1,000 steps whose gradients are mostly positive: the mean drift of bfloat16 weights is that
    of float32 ones, within 5 standard errors of the rounding, and 0 if rounded to the nearest. A
    step rounds a weight near 0.02 by 2^-14 at most, with variance p (1 - p) for p = update / 2^-13.
    """
    drifts = {}
    n = 64 * 256
    for name, dtype, more in (
        ("float32", torch.float32, []),
        ("nearest", torch.bfloat16, []),
        ("rounded", torch.bfloat16, ["stochastic_rounding=true"]),
    ):
        layer = nn.Linear(64, 256, bias=False, dtype=dtype)
        with torch.no_grad():
            layer.weight.fill_(0.02)
        before = layer.weight.detach().double()
        config = compose("lr=5e-7", f"optimizer={optimizer}", "optimizer_args={foreach: false}")
        config.stochastic_rounding = bool(more)
        made = make_optimizer(config, layer, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for _ in range(1000):
            layer.weight.grad = (torch.randn(256, 64, generator=generator) + 1).to(dtype)
            made.step()
        drifts[name] = float((layer.weight.detach().double() - before).mean())
    assert drifts["nearest"] == 0
    assert drifts["float32"] < -1e-4
    spacing = 2.0**-13  # of bfloat16 at 0.02
    moves = 1000 * 5e-7 * 2 / spacing  # an upper bound of the expected number of moves of a weight
    error = spacing * math.sqrt(moves / n)
    assert abs(drifts["rounded"] - drifts["float32"]) < 5 * error
    assert 5 * error < -drifts["float32"] / 20
    assert layer.weight.element_size() == 2
