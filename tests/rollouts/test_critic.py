"""The critic: which positions its values are of, its loss by hand, and that it learns returns."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import tiny_model

from plumb.batching.feed import Feed
from plumb.batching.microbatches import Packing
from plumb.data.extras import Extras
from plumb.data.tokenization import Example
from plumb.errors import NonFinite
from plumb.models.forward_path import PLAIN_PATH, ForwardPath, use_tree_attention
from plumb.models.logps import response_token_values
from plumb.models.scalar_head import put_scalar_head
from plumb.rollouts.critic import Critic, value_losses

PACKED = ForwardPath(packed=True, plain_head=False)
CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[[11, 12, 2], [13, 2]], [[14, 15, 16, 17], [2]], [[18, 2], [19, 20, 2]]]


def model_with_head(seed=0):
    model = tiny_model().eval()
    put_scalar_head(model, seed=seed)
    use_tree_attention(model)
    return model


class Samples(list):
    """Examples with what their tokens carry."""

    def __init__(self, token=None):
        super().__init__(
            Example(np.array(prompt), tuple(map(np.array, responses)), "")
            for prompt, responses in zip(PROMPTS, RESPONSES, strict=True)
        )
        self.token = token or {}

    def extras(self):
        return Extras(token=self.token)


def by_example(values):
    """Return numbers of all tokens, one response after another, as a column."""
    sizes = np.cumsum([sum(map(len, responses)) for responses in RESPONSES])[:-1]
    column = np.empty(len(PROMPTS), object)
    column[:] = np.split(np.asarray(values, float), sizes)
    return column


def step_of(budget=512, **token):
    columns = {name: by_example(values) for name, values in token.items()}
    packing = Packing(packed=True, budget=budget, world_size=1, pad_token_id=0, longest=32)
    return Feed(Samples(columns), packing, rank=0).step(np.arange(3))


def critic_of(model, lr=1e-2, **changed):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    values = {
        "model": model,
        "optimizer": optimizer,
        "lr": lr,
        "lr_factor": lambda: 1.0,
        "forward_path": PACKED,
        "precision": nullcontext,
        "device": CPU,
        "value_clip": None,
        "value_weight": 1.0,
        "max_grad_norm": 10.0,
        "n_copies": 1,
    }
    return Critic(**values | changed)


N = sum(len(response) for responses in RESPONSES for response in responses)


@pytest.mark.parametrize("path", [PACKED, PLAIN_PATH])
def test_values_are_of_the_state_before_each_token(path):
    """The scores of the row up to before the token, one row at a time; the end token has one, and
    what follows it has none.
    """
    model = model_with_head()
    (batch, _, where), *more = step_of().microbatches
    assert not more
    values = response_token_values(model, batch, path)
    expected = [
        model(torch.tensor([PROMPTS[i] + response])).logits[0, len(PROMPTS[i]) - 1 : -1, 0]
        for i in where.tolist()
        for response in RESPONSES[i]
    ]
    torch.testing.assert_close(values, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert values.shape == (N,)
    torch.testing.assert_close(critic_of(model).values(batch), values.detach())


def test_the_bound_of_values_by_hand():
    """Old values 0, bound 0.2. Towards 1: at 0.5 the bounded value 0.2 has the larger loss and no
    gradient. Away from it: at -0.5 the value itself has. Within the bound both are the same.
    """
    values = torch.tensor([0.5, -0.5, 0.1], requires_grad=True)
    losses, beyond = value_losses(values, torch.zeros(3), torch.ones(3), 0.2)
    assert losses.tolist() == pytest.approx([0.8**2 / 2, 1.5**2 / 2, 0.9**2 / 2])
    assert beyond.tolist() == [True, False, False]
    losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([0, -1.5, -0.9])
    losses, beyond = value_losses(values, torch.zeros(3), torch.ones(3), None)
    assert losses[0].item() == pytest.approx(0.5**2 / 2) and not beyond.any()


def test_an_update_by_hand():
    """Its metrics are those of the values before it; microbatches change nothing."""
    model = model_with_head()
    old = np.concatenate(
        [
            model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, 0].tolist()
            for prompt, responses in zip(PROMPTS, RESPONSES, strict=True)
            for response in responses
        ]
    )
    returns = np.linspace(-2, 3, N)
    after = []
    for budget in (512, 8):
        own = copy.deepcopy(model)
        step = step_of(budget, values=old, returns=returns)
        metrics = critic_of(own).update(step)
        after.append(own.get_output_embeddings().weight.detach())
        error = returns - old
        assert metrics == pytest.approx(
            {
                "critic_train/loss": (error**2).mean() / 2,
                "critic_train/clip": 0,
                "critic_train/explained_variance": 1 - error.var() / returns.var(),
                "critic_train/returns": returns.mean(),
                "critic_train/values": old.mean(),
                "critic_train/grad_norm": metrics["critic_train/grad_norm"],
            },
            rel=1e-4,
        )
    assert len(step.microbatches) > 1
    torch.testing.assert_close(*after)
    assert (after[0] - model.get_output_embeddings().weight).abs().max() > 1e-3


def test_it_learns_returns():
    critic = critic_of(model_with_head())
    returns = np.linspace(-2, 3, N)
    records = [critic.update(step_of(values=np.zeros(N), returns=returns)) for _ in range(40)]
    assert records[0]["critic_train/explained_variance"] < 0.3
    assert records[-1]["critic_train/explained_variance"] > 0.9


def test_it_continues_from_its_tensors():
    """As one that was not interrupted, though its own start was another one."""
    returns = np.linspace(-2, 3, N)
    step = step_of(values=np.zeros(N), returns=returns)
    one, other = critic_of(model_with_head()), critic_of(model_with_head(seed=1))
    one.update(step)
    assert set(other.tensors()) < set(one.tensors())
    other.expect_state()
    for name, tensor in other.tensors().items():
        tensor.detach().copy_(one.tensors()[name])
    assert one.update(step) == other.update(step)
    for name, tensor in other.tensors().items():
        assert torch.equal(tensor, one.tensors()[name]), name


def test_a_gradient_that_is_not_finite_stops_the_run():
    model = model_with_head()
    before = copy.deepcopy(model.state_dict())
    step = step_of(values=np.zeros(N), returns=np.full(N, np.nan))
    with pytest.raises(NonFinite, match="the critic's gradient has the norm nan; try a smaller"):
        critic_of(model).update(step)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
