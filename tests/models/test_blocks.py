"""Blocks that are recomputed in the backward pass."""

import math
import warnings

import pytest
import torch
from tiny import LLAMA, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from plumb.errors import UserError
from plumb.models.blocks import checkpoint_blocks, recompute_blocks, share_of_blocks


def llama(n_layers=6):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(SIZES | LLAMA | {"num_hidden_layers": n_layers}))
    return AutoModelForCausalLM.from_config(config).train()


def saved_bytes(model):
    """What autograd saves for the backward pass; and the gradients."""
    size = 0

    def keep(x):
        nonlocal size
        size += x.numel() * x.element_size()
        return x

    ids = torch.arange(40)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
    loss.backward()
    return size, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("kept", "blocks"),
    [(0.0, []), (0.5, [1, 3, 5]), (1 / 3, [2, 5]), (0.25, [3]), (0.9, [1, 2, 3, 4, 5])],
)
def test_a_share_of_the_blocks_is_kept(kept, blocks):
    """Evenly spread; what is saved grows by the same amount with each, and gradients stay."""
    model = llama()
    truth, gradients = saved_bytes(model)
    model.zero_grad()
    recompute_blocks(model, kept)
    layers = model.model.layers
    assert [i for i, b in enumerate(layers) if not b.gradient_checkpointing] == blocks
    size, same = saved_bytes(model)
    recompute_blocks(model, 0.0)
    model.zero_grad()
    least, _ = saved_bytes(model)
    assert (size - least) * len(layers) == (truth - least) * len(blocks)
    for a, b in zip(gradients, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_checkpointing_by_its_name_in_this_transformers():
    """The older name where the newer one is missing; transformers warns of neither."""
    model = llama(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint_blocks(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)

    class Older:
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
            self.options = gradient_checkpointing_kwargs

    older = Older()
    checkpoint_blocks(older, preserve_rng_state=False)
    assert older.options == {"use_reentrant": False, "preserve_rng_state": False}


def test_blocks_that_cannot_be_told_apart(monkeypatch):
    model = llama(2)
    monkeypatch.setattr("plumb.models.blocks.checkpoint_blocks", lambda model: None)
    with pytest.raises(UserError, match="activation_checkpointing=0.5: the blocks of LlamaFor"):
        recompute_blocks(model, 0.5)
    recompute_blocks(model, 0.0)


def test_a_share_of_less_than_a_block_is_refused():
    with pytest.raises(UserError, match="=0.1: keeps none of the 6 blocks; give 0.167 or more"):
        recompute_blocks(llama(), 0.1)
    assert share_of_blocks(6, 0.167) == 1 / 6
    assert all(share_of_blocks(n, math.ceil(1000 / n) / 1000) == 1 / n for n in range(2, 127))
    assert share_of_blocks(6, 0.0) == 0
