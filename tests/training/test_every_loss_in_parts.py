"""Every loss on a real model: two gloo processes and microbatches of two examples give the losses
and the gradient of one process with the whole batch. One start of the group serves all losses.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from groups import run_in_group
from losses import knobs_of
from stores import view_of, write
from transformers import AutoModelForCausalLM

from plumb.batching.feed import Feed
from plumb.batching.microbatches import Packing
from plumb.data.extras import Extras
from plumb.distributed import sharding
from plumb.losses.registry import LOSSES, build_loss
from plumb.models.forward_path import PLAIN_PATH
from plumb.training.objective import Scorer

N = 5  # examples, so that a rank has no part of the last microbatches

ROWS = [
    {
        "prompt": f"what is {i}?",
        "responses": [f" it is {i * 37 % 11}.", " no" * (1 + i % 3), f" perhaps {i}"],
        "scores": [3.0 + i, 2.0, 1.0],
    }
    for i in range(N)
]


def rows_for(group):
    """Return the rows of a group: lists as they are, also as samples; their best two as pairs or
    votes.
    """
    if group in ("list", "rollout"):
        return ROWS
    if group == "pair":
        return [row | {field: row[field][:2] for field in ("responses", "scores")} for row in ROWS]
    label = {"labelled": lambda i: {"label": i % 2 == 0}, "single": lambda i: {}}[group]
    return [
        {"prompt": row["prompt"], "completion": row["responses"][i % 2], **label(i)}
        for i, row in enumerate(ROWS)
    ]


class Samples(list):
    """Examples of three responses each, as the policy has drawn them: with the log-probabilities
    that their tokens had, and with advantages.
    """

    def extras(self):
        tokens = [sum(map(len, e.responses)) for e in self]
        old = np.empty(len(self), dtype=object)
        old[:] = [-6 + 0.1 * np.arange(n) / n for n in tokens]
        advantages = np.array([[1.0 + i, -0.5, -0.5 - i] for i in range(len(self))])
        return Extras(response={"advantages": advantages}, token={"old_logps": old})


def examples_of(folder, group):
    if group == "rollout":
        return Samples(view_of(folder / "own.jsonl", folder, "list"))
    return view_of(folder / "own.jsonl", folder, group)


def measured(name, folder, models, rank, n_ranks, at_least):
    """Return the sum of the losses and the gradient's largest part, over all ranks."""
    bound = build_loss(knobs_of(name))
    policy, reference = models
    policy.zero_grad()
    examples = examples_of(folder / bound.group, bound.group)
    packing = Packing(
        packed=False,
        budget=4096,
        world_size=n_ranks,
        pad_token_id=0,
        longest=64,
    )
    feed = Feed(examples, packing, rank, context=bound.context_examples)
    step = feed.step(np.arange(len(examples)), at_least)
    scorer = Scorer(
        policy=policy,
        reference=reference if bound.needs_reference else None,
        loss=bound,
        forward_path=PLAIN_PATH,
        precision=nullcontext,
        device=torch.device("cpu"),
    )
    context = scorer.context(step.for_context, True)
    total = torch.zeros((), dtype=torch.float64)
    for batch, weight, where in step.microbatches:
        losses = weight * scorer(batch, bound.context_of(context, where)).output.losses
        losses.sum().backward()
        total += losses.detach().sum()
    gradients = [p.grad for p in policy.parameters()]
    parts = [total[None], *(g.flatten().double() for g in gradients)]
    if n_ranks > 1:
        parts = [sharding.all_reduce_sum(part) for part in parts]
    return parts[0].item(), torch.cat(parts[1:])


def same(ours, expected, name):
    """Compare losses and gradients to float32 rounding."""
    assert ours[0] == pytest.approx(expected[0], rel=1e-5), name
    far = 2e-5 * float(expected[1].abs().max())
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-3, atol=far, msg=name)


def compare(names, expected, folder, models):
    """Work of one process of the group."""
    rank = torch.distributed.get_rank()
    for name in names:
        same(measured(name, folder, models, rank, 2, 2), expected[name], name)


def test_parts_and_processes_change_nothing(tmp_path, tiny_model):
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(tiny_model, attention_dropout=0.0) for _ in range(2)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    names = [name for name in sorted(LOSSES) if build_loss(knobs_of(name)).reads != "scores"]
    expected = {}
    for group in {LOSSES[name].group for name in names}:
        (tmp_path / group).mkdir()
        write(tmp_path / group, *rows_for(group))
    for name in names:
        expected[name] = measured(name, tmp_path, (policy, reference), 0, 1, 1)
        assert expected[name][1].abs().max() > 0
        parts = measured(name, tmp_path, (policy, reference), 0, 1, N)
        same(parts, expected[name], name)
    run_in_group(2, compare, names, expected, tmp_path, (policy, reference))
