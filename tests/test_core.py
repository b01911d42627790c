"""Lines of the core that a wrong sign or a missing weight would leave unseen elsewhere: each number
is derived by hand.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from groups import run_in_group
from torch import nn
from tqdm import tqdm

from plumb.batching.feed import Feed
from plumb.batching.layout import Segments
from plumb.batching.microbatches import Packing
from plumb.data.tokenization import Example
from plumb.distributed import sharding
from plumb.losses.contract import Logps, LossOutput, Mean, Pairs, ScoredPairs, Scores
from plumb.training.evaluator import all_logps, evaluate
from plumb.training.metrics import Means
from plumb.training.objective import _logp_metrics, _reward_metrics
from trainers import BasicTrainer


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- metrics ----


def test_an_accuracy_counts_no_ties():
    """Three pairs, chosen above, equal to and below rejected: 1, 0, 0. A policy that gives
    everything the same score ranks nothing right; counting ties would show 100 % at step 0, where
    all rewards are 0.
    """
    output = LossOutput(tensor(1, 2, 3), tensor(0.5, 0, -2), tensor(0.25, 0, 1))
    policy = Pairs(
        Logps(tensor(-1, -5, -9), tensor(1, 1, 1)), Logps(tensor(-4, -5, -2), tensor(1, 1, 1))
    )
    metrics = _reward_metrics(output, policy) | _logp_metrics(policy)
    assert {name: metric.values.tolist() for name, metric in metrics.items()} == {
        "rewards/chosen": [0.5, 0, -2],
        "rewards/rejected": [0.25, 0, 1],
        "rewards/accuracies": [1, 0, 0],
        "rewards/margins": [0.25, 0, -3],
        "logps/chosen": [-1, -5, -9],
        "logps/rejected": [-4, -5, -2],
        "logps/accuracies": [1, 0, 0],
    }


def test_the_metrics_of_scores():
    """Scores 3 and -1: the mean of their squares is (9 + 1) / 2 = 5, of themselves 1, so they
    deviate by sqrt(5 - 1) = 2.
    """
    of = lambda x: Scores(tensor(x), tensor(x)[:, None], torch.tensor([1]))
    policy = ScoredPairs(of(3), of(-1), torch.tensor([0]), None)
    metrics = _reward_metrics(LossOutput(tensor(0), tensor(3), tensor(-1)), policy)
    means = Means()
    means.add(metrics)
    assert means.reduce()["rewards/spread"] == 2 and not _logp_metrics(policy)


def test_means_leave_out_what_has_no_weight():
    """Values 1 and 2 of weight 1, and 9 of weight 0: (1 + 2) / 2; over 6 tokens, 3 / 6. Counting
    the 9, the first would be 1.
    """
    means = Means()
    means.add({"a": Mean(tensor(1, 2)), "b": Mean(tensor(1, 2), tensor(2, 4))}, 1.0)
    means.add({"a": Mean(tensor(9)), "b": Mean(tensor(9), tensor(4))}, 0.0)
    assert means.reduce() == {"a": 1.5, "b": 0.5}


def test_a_mean_over_nothing_is_left_out():
    """3 of no count and 0: 0 / 0 is no number that a log could hold."""
    means = Means()
    means.add({"a": Mean(tensor(3)), "b": Mean(tensor(0, 0), tensor(0, 0))})
    assert means.reduce() == {"a": 3}


def test_means_are_summed_in_float64():
    """100,000,000 + 1: float32 numbers have a spacing of 8 there, so that the 1 would be lost, as
    small ones are in long sums.
    """
    means = Means()
    means.add({"a": Mean(torch.tensor([1e8, 1.0]))})
    assert means.reduce() == {"a": 50_000_000.5}


# ---- masks ----


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("n_queries, n_keys", [(1, 1), (3, 3), (1, 5), (2, 5), (5, 5), (4, 6)])
def test_a_mask_by_definition(n_queries, n_keys, window):
    """The last query stands at the last key, so query i at key i + n_keys - n_queries; it sees the
    `window` keys up to itself.
    """
    segments = Segments([n_queries], [n_keys], *[torch.empty(0)] * 3, 16)
    found = segments.mask(n_queries, n_keys, window, torch.empty(0))
    behind = [[i + n_keys - n_queries - j for j in range(n_keys)] for i in range(n_queries)]
    seen = torch.tensor([[0 <= d < (window or 99) for d in row] for row in behind])
    if found is None:  # plain causal attention, for which kernels need no mask
        assert n_queries == n_keys and torch.equal(
            seen, torch.ones(n_queries, n_keys).tril().bool()
        )
    else:
        assert torch.equal(found == 0, seen) and torch.equal(found == -torch.inf, ~seen)


# ---- clipping ----


@pytest.mark.parametrize(
    "most, expected", [(1.0, [0.6, 0.8]), (2.5, [1.5, 2.0]), (5.0, [3, 4]), (10.0, [3, 4])]
)
def test_clipping_by_hand(most, expected):
    """The gradient (3, 4) has norm 5: times most / 5 where that is below 1, else left as it is to
    the bit. As in PyTorch, the factor is most / (5 + 1e-6), by 2e-7 too small.
    """
    policy = nn.Linear(2, 1, bias=False)
    policy.weight.grad = torch.tensor([[3.0, 4]])
    norm = BasicTrainer.clip(
        SimpleNamespace(policy=policy, config=SimpleNamespace(max_grad_norm=most))
    )
    assert norm == 5 and policy.weight.grad[0].tolist() == (
        expected if most >= 5 else pytest.approx(expected, rel=3e-7)
    )


# ---- evaluating ----

FIVE = [Example(np.array([1], np.int32), (np.array([10 * i, 7], np.int32),), "") for i in range(5)]


class OfIds:
    """In place of a Scorer: what it gives a response is the sum of its ids; it notes in which mode
    the policy was.
    """

    device, reference = torch.device("cpu"), None
    loss = SimpleNamespace(context_of=lambda context, examples: context)

    def __init__(self, training):
        self.policy = nn.Linear(1, 1).train(training)
        self.modes = set()

    def logps(self, model, batch):
        self.modes.add(model.training)
        zeros = torch.zeros(len(batch.spans), dtype=torch.float64)
        tokens = zeros.index_add(0, batch.response, torch.ones_like(batch.targets).double())
        return Logps(zeros.index_add(0, batch.response, batch.targets.double()), tokens)

    def __call__(self, batch, context=None):
        of_policy = self.logps(self.policy, batch)
        return SimpleNamespace(metrics={"loss": Mean(of_policy.sum)}, tokens=of_policy.tokens)


def feeds(examples, n):
    packing = Packing(packed=True, budget=100, world_size=n, pad_token_id=0, longest=64)
    return [Feed(examples, packing, rank) for rank in range(n)]


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_counts_each_example_once(training):
    """Five examples in batches of two on three ranks. A batch has a part for two ranks, or one, so
    the third computes an example that is not its own, to make the same calls as the others, and
    with weight 0. What the ranks found adds up to 10 i + 7, in the examples' order. Ranks beyond
    the first of a tensor-parallel group see the same rows and count nothing.
    """
    scorer = OfIds(training)
    found = np.zeros(5)
    n_tokens = np.zeros(5)
    for feed in feeds(FIVE, 3):
        part = evaluate(scorer, feed, batch_size=2)
        found, n_tokens = found + part.columns["loss"][0], n_tokens + part.tokens
        assert not evaluate(scorer, feed, 2, is_primary_replica=False).columns["loss"].any()
    assert found.tolist() == [7, 17, 27, 37, 47] and n_tokens.tolist() == [2] * 5
    assert scorer.modes == {False} and scorer.policy.training == training


def test_log_probabilities_of_some_examples():
    """Of examples 4, 1 and 0 on four ranks, of which one has no part of the batch: 47, 17, 7."""
    scorer = OfIds(True)
    found = np.zeros((3, 1))
    indices = np.array([4, 1, 0])
    for feed in feeds(FIVE, 4):
        found = found + all_logps(scorer, scorer.policy, feed, indices, True, tqdm(disable=True))
        assert not all_logps(scorer, scorer.policy, feed, indices, False, tqdm(disable=True)).any()
    assert found.tolist() == [[47], [17], [7]]
    assert scorer.modes == {False} and scorer.policy.training


# ---- over processes ----


def sum_of_gradients(shard_size, dtype):
    layout = sharding.Layout(shard_size, 1, dtype, False)
    body = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.ones_(body[0].weight)
    layout.shard(body, nn.Linear, trained=True)
    x = 1.0 if dist.get_rank() == 0 else 2.0**-9
    sharding.reduce_gradients(body, now=True, each=False)
    body(torch.full((1, 4), x)).sum().backward()
    gradient = body[0].weight.grad
    expected = 1 + (dist.get_world_size() - 1) * 2.0**-9
    assert torch.equal(sharding.full_tensor(gradient), torch.full((4, 4), expected)), (
        sharding.full_tensor(gradient)
    )
    # 16 numbers g: the norm is 4 g, and the copies that other replicas hold are not counted again.
    assert sharding.total_norm([gradient]).item() == pytest.approx(4 * expected, rel=1e-15)


@pytest.mark.parametrize("n, shard_size", [(2, None), (4, 2), (4, 1)])
def test_gradients_are_summed_in_float32(n, shard_size):
    """d loss / d weight is the input: 1 on rank 0, 2^-9 on the others. Both are bfloat16 numbers,
    and their sum over ranks, 1 + (n - 1) 2^-9, is none, as their spacing above 1 is 2^-7: in
    float32 it is exact. A sum, and no mean.
    """
    run_in_group(n, sum_of_gradients, shard_size, torch.bfloat16)
