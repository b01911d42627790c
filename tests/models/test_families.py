"""What holds for every family of families.py."""

import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import run_families
import torch
from conftest import PATIENCE, ROOT
from families import FAMILIES, family_config, family_model

from plumb.batching.layout import pack
from plumb.data.tokenization import Example
from plumb.models import logps as models
from plumb.models.draws import run_without_draws
from plumb.models.forward_path import use_tree_attention
from plumb.models.layout_probe import Precision, choose_forward_path
from plumb.planning import activations
from plumb.training import budget as sizing

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_ends_no_run(family):
    """What a step costs, and the default budget; a model whose layers have heads of different sizes
    has no one head size.
    """
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
    """Gemma 4: windows of 4 heads of 12, and global attention of 4 heads of 512, whose sum has no
    single factor.
    """
    spec = family_config("gemma4").get_text_config()
    assert sizing.attention_width(spec) == 4 * 12 + 4 * 512
    assert sizing.attention_width(family_config("llama")) == 2 * 4 * 12


# ---- log-probabilities ----


def lone(model, batch):
    """Each prompt with one response in a row of its own, through transformers alone.  -> [R]
    nats
    """
    sums = []
    for prompt, n_prompt, start, length in batch.spans.tolist():
        ids = torch.cat(
            [
                batch.input_ids[0, prompt : prompt + n_prompt],
                batch.input_ids[0, start : start + length],
            ]
        )
        logps = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        sums.append(logps[n_prompt - 1 : -1].gather(1, ids[n_prompt:, None]).sum())
    return torch.stack(sums)


def gradients(model, sums, weights):
    model.zero_grad()
    (sums * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_each_response_alone(family):
    """In the layout that a run chooses: values and gradients, whoever the neighbours are and in
    whichever order they stand.

    Sequences of 3 to 60 tokens: longer than windows and chunks of 16, below the 64 at which some
    ropes change.
    """
    model, plain = family_model(family), family_model(family)
    run_without_draws(plain, CPU)
    run_without_draws(model, CPU)
    use_tree_attention(model)
    random = np.random.default_rng(0)
    some = lambda n: random.integers(3, 2000, n).astype(np.int32)
    lengths = [(2, 1, 4), (24, 36, 3), (5, 20, 2)]
    examples = [Example(some(p), (some(a), some(b)), "") for p, a, b in lengths]
    forward_path, line = choose_forward_path(
        model,
        device=CPU,
        longest=60,
        vocabulary=np.arange(3, 2000),
        row_tokens=lambda forward_path: 120,
        precisions=[Precision(nullcontext, torch.float32)],
        gradients=False,
    )
    assert "WARNING" not in line
    batches = [
        pack(rows, pad_token_id=0, longest=64) for rows in (examples, examples[::-1], examples[1:2])
    ]
    weights = torch.linspace(-1, 2, 6)
    alone = lone(plain, batches[0])
    theirs = gradients(plain, alone, weights)
    tokens = torch.from_numpy(batches[0].spans[:, 3])
    got = [models.response_logps(model, batch, forward_path).sum for batch in batches]
    mine = gradients(model, got[0], weights)
    order = [2, 1, 0, 5, 4, 3]  # all first responses, then all second ones
    for sums in (got[0], got[1][order]):
        assert ((sums - alone).abs() / tokens).max() < 1e-5, line
    assert ((got[2] - alone[[1, 4]]).abs() / tokens[[1, 4]]).max() < 1e-5, line
    scale = torch.stack([g.norm() for g in theirs.values()]).norm()
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= 1e-4 * scale, name


def test_one_family_through_everything():
    """The smoke form of `make families`; and what fails stands in the table, with its message."""
    row = run_families.one("llama")
    assert row.kind == "LlamaForCausalLM" and row.batches == "packed trees, head in chunks"
    assert {row.sft, row.fsdp, row.dpo, row.reward} == {"yes"} and row.export == "same logits"

    def failing():
        raise ValueError("two lines\nof which the last | says it")

    assert run_families.caught(failing).startswith(
        "**ValueError** of which the last / says it (test_families.py:"
    )


def test_the_commands_behind_make_start():
    """They are programs, whose imports differ from those of a test."""
    for script in ("run_families", "torture"):
        command = [sys.executable, f"tests/support/{script}.py", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr
