"""The cross-entropy that is mixed into steps: its gradient by definition, and its batches."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from plumb.batching.feed import Feed
from plumb.batching.microbatches import Packing
from plumb.data.tokenization import Example
from plumb.models.forward_path import ForwardPath, use_tree_attention
from plumb.models.logps import response_logps
from plumb.rollouts.ptx import Ptx

PATH = ForwardPath(packed=True, plain_head=True)
ROWS = [([5, 6, 7], [8, 2]), ([9], [10, 11, 12, 2]), ([13, 14], [2])]


def ptx_of(model, weight=27.8, budget=512, batch_size=2):
    examples = [Example(np.array(a), (np.array(b),), "") for a, b in ROWS]
    packing = Packing(packed=True, budget=budget, world_size=1, pad_token_id=0, longest=16)
    return Ptx(
        feed=Feed(examples, packing, rank=0),
        batch_size=batch_size,
        weight=weight,
        seed=0,
        logps=lambda batch: response_logps(model, batch, PATH).sum,
        backward=lambda loss: loss.backward(),
    )


def test_its_gradient_by_definition():
    """It is added to what is there: the weight times the mean over tokens, in any microbatches."""
    model = tiny_model().eval()
    use_tree_attention(model)
    total = 0.0
    for prompt, response in ROWS:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total = total - logits.log_softmax(1).gather(1, torch.tensor(response)[:, None]).sum()
    mean = total / 7
    expected = torch.autograd.grad(27.8 * mean, [*model.parameters()])
    for budget in (512, 5):
        model.zero_grad()
        before = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = before[name].clone()
        counters = ptx_of(model, budget=budget, batch_size=3).add(0)
        assert counters == {"ptx_train/nll": pytest.approx(mean.item())}
        for (name, p), grad in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad - before[name], grad, atol=1e-4, rtol=1e-4)


def test_each_epoch_has_every_example_once():
    """In an order of its own; what a step gets depends on nothing but its number."""
    ptx = ptx_of(None)
    epochs = [np.concatenate([ptx.indices(2 * e), ptx.indices(2 * e + 1)]) for e in range(8)]
    assert all(sorted(epoch.tolist()) == [0, 1, 2] for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 2
    assert [len(ptx.indices(n)) for n in range(4)] == [2, 1, 2, 1]
