"""What holds for every family of families.py."""

import pytest
import torch
from families import FAMILIES, family_config

import activations
import sizing


@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_ends_no_run(family):
    """What a step costs, and the default budget; a model whose layers have heads of different sizes has no one head size."""
    config = family_config(family)
    model = activations.blank_model(config, torch.float32)
    cost = sizing.cost_of(model)
    head = model.get_output_embeddings().weight.numel()
    embeddings = head + (
        0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    )
    assert (
        cost.head == head and cost.body == sum(p.numel() for p in model.parameters()) - embeddings
    )
    assert cost.attention >= 0
    budget = sizing.default_budget(config, torch.device("cpu"), torch.float32, 4e9, 1.0, False)
    assert budget == 1024


def test_layers_with_heads_of_their_own():
    """Gemma 4: windows of 4 heads of 12, and global attention of 4 heads of 512, whose sum has no single factor."""
    spec = family_config("gemma4").get_text_config()
    assert sizing.attention_width(spec) == 4 * 12 + 4 * 512
    assert sizing.attention_width(family_config("llama")) == 2 * 4 * 12
