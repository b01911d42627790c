"""Models that draw random numbers in their forward pass: those parts compute as in evaluation,
whatever mode is set later.
"""

import copy

import pytest
import torch
from families import family_config, family_model, save_family
from runs import DPO, records
from torch import nn
from transformers import AutoModelForCausalLM

from plumb.models.blocks import checkpoint_blocks
from plumb.models.draws import drawing, run_without_draws
from plumb.models.load import no_dropout

CPU = torch.device("cpu")
IDS = torch.arange(3, 43)[None]
# What draws, and the settings that make it: routers that sample, noise on their input, layers that
# are dropped.
DRAWN = [
    ("phimoe", {}, {"PhimoeTopKRouter"}),
    ("phimoe", {"input_jitter_noise": 0.1}, {"PhimoeSparseMoeBlock", "PhimoeTopKRouter"}),
    ("mixtral", {"router_jitter_noise": 0.3}, {"MixtralSparseMoeBlock"}),
    ("minimax", {"router_jitter_noise": 0.3}, {"MiniMaxSparseMoeBlock"}),
    ("opt", {"layerdrop": 0.5}, {"OPTDecoder"}),
]


def logits(model):
    return model(IDS, use_cache=False).logits


def made(family, settings):
    config = family_config(family)
    for name, value in settings.items():
        setattr(config, name, value)
    no_dropout(config)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("family, settings, kinds", DRAWN)
def test_parts_that_draw_compute_as_in_evaluation(family, settings, kinds):
    """After the mode is changed, too, and in a copy; all else stays in train mode, and the random
    state where it was.
    """
    model = made(family, settings)
    with torch.no_grad():
        assert any(not torch.equal(logits(model), logits(model)) for _ in range(8)), (
            "it does not draw"
        )
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert run_without_draws(model, CPU) == sorted(kinds) and not drawing(model, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    expected = copy.deepcopy(model).eval()(IDS, use_cache=False).logits
    for each in (model.eval().train(), copy.deepcopy(model)):
        assert torch.equal(logits(each), expected) and all(m.training for m in each.modules())


def test_nothing_is_changed_where_nothing_draws():
    model = family_model("llama")
    assert run_without_draws(model, CPU) == [] and not any(
        m._forward_hooks for m in model.modules()
    )
    assert not drawing(model, CPU) and model.training


def test_dropout_without_a_name_is_off():
    """A model's own nn.Dropout, which none of its settings names."""
    model = family_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Dropout(0.5))
    assert run_without_draws(model, CPU) == ["Dropout"] and torch.equal(
        logits(model), logits(model)
    )


def test_blocks_are_still_recomputed():
    """Activation checkpointing asks whether its block trains. The gradient is that of
    evaluation.
    """
    model = made("phimoe", {})
    run_without_draws(model, CPU)
    logits(model).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint_blocks(model)
    calls = []
    model.model.layers[0].mlp.router.register_forward_hook(
        lambda module, *_: calls.append(module.training)
    )
    logits(model).square().sum().backward()
    assert len(calls) == 2
    for p, gradient in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_a_run_of_a_model_whose_router_samples(train, tmp_path, capsys, reference):
    """It was refused: policy and reference disagreed before the first step."""
    folder = save_family(tmp_path / "phimoe", "phimoe")
    options = [
        f"model.name_or_path={folder}",
        f"reference={reference}",
        "n_examples=8",
        "do_first_eval=false",
        "do_last_eval=false",
    ]
    run = train("run", *DPO, *options)
    said = capsys.readouterr().out
    assert (
        "PhimoeTopKRouter would draw random numbers in training: computed as in evaluation" in said
    )
    assert "policy and reference agree" in said and len(records(run, "train")) == 2
