"""The routers' balancing loss: transformers' own, of each sequence alone, however the batch is laid
out and cut.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from families import family_model, save_family
from packaging.version import Version
from runs import DPO, records
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from plumb.batching.layout import Batch, pack
from plumb.data.tokenization import Example
from plumb.errors import UserError
from plumb.losses.registry import build_loss
from plumb.models import logps
from plumb.models.forward_path import PLAIN_PATH, ForwardPath, use_tree_attention
from plumb.models.routers import Routers, balance, routers_of
from plumb.training.objective import Scorer

FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "phimoe",
    "olmoe",
    "granitemoe",
    "granitemoehybrid",
    "gpt_oss",
    "jamba",
    "ernie4_5_moe",
    "dbrx",
    "minimax",
]
# transformers 5.17 does not record the routers of these, so that router_aux_loss is refused for
# them, and of ernie4_5_moe it records something else
NEEDS_NEWER = {"granitemoe", "granitemoehybrid", "dbrx", "deepseek_v3", "ernie4_5_moe"}
PACKED = ["mixtral", "qwen2_moe", "phimoe", "olmoe", "granitemoe", "ernie4_5_moe", "dbrx"]


@pytest.fixture(autouse=True)
def recorded(request):
    family = getattr(request.node, "callspec", None) and request.node.callspec.params.get("family")
    if family in NEEDS_NEWER and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"transformers {transformers.__version__} does not record {family}'s routers")


def examples(n=5, seed=0):
    rng = np.random.default_rng(seed)
    some = lambda low, high: rng.integers(3, 2000, rng.integers(low, high)).astype(np.int32)
    return [Example(some(2, 14), (some(1, 12), some(1, 12)), "") for _ in range(n)]


def laid_out(rows, **options) -> Batch:
    return pack(rows, pad_token_id=0, longest=48, **options)


def expected(model, batch):
    """transformers' function, for one layer and one sequence at a time, unpadded, and averaged over
    the layers.  -> [R]
    """
    values = []
    for prompt, n_prompt, own, n in batch.spans.tolist():
        ids = torch.cat(
            [batch.input_ids[0, prompt : prompt + n_prompt], batch.input_ids[0, own : own + n]]
        )[None]
        with Routers(model).watched() as logits:
            model(ids, use_cache=False)
        k = model.num_experts_per_tok
        values.append(
            torch.stack([load_balancing_loss_func((x,), x.shape[-1], k) for x in logits]).mean()
        )
    return torch.stack(values)


def ours(model, batch, forward_path):
    routers = Routers(model)
    with routers.watched() as logits:
        logps.response_logps(model, batch, forward_path)
    assert len(logits) == len(routers_of(model)) > 0
    return balance(logits, batch, forward_path.packed, routers.top_k)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sequence_has_the_balancing_loss_of_transformers(family):
    """In padded rows and, where its attention can be exchanged, in trees, with padding at the row's
    end: values and gradients.
    """
    model, rows = family_model(family).eval(), examples()
    weights = torch.linspace(0.5, 2, 10)
    theirs = expected(model, laid_out(rows))
    model_k = float(model.num_experts_per_tok)
    assert (theirs > model_k).any() and theirs.max() < 4.1
    grads = gradients(model, (weights * theirs).sum())
    assert any(g.any() for g in grads)
    use_tree_attention(model)
    for forward_path in [PLAIN_PATH, *([ForwardPath(True, True)] if family in PACKED else [])]:
        got = ours(
            model, laid_out(rows, row_length=300 if forward_path.packed else None), forward_path
        )
        torch.testing.assert_close(got, theirs, atol=1e-5, rtol=1e-5)
        for mine, other in zip(gradients(model, (weights * got).sum()), grads, strict=True):
            assert (mine - other).norm() <= 1e-4 * max(1, other.norm())


def test_microbatches_change_nothing():
    """The sum over microbatches of what a step adds to its loss is that of the batch, and so is its
    gradient.
    """
    model, rows = family_model("mixtral").eval(), examples(6)
    use_tree_attention(model)
    loss = build_loss({"name": "sft", "average_over": "examples"})
    one = [Example(e.prompt, e.responses[:1], "") for e in rows]
    scorer = Scorer(
        policy=model,
        reference=None,
        loss=loss,
        forward_path=ForwardPath(True, True),
        precision=torch.no_grad,
        device=torch.device("cpu"),
    )
    scorer = replace(scorer, precision=torch.enable_grad, routers=Routers(model))
    whole = scorer(laid_out(one)).balance.sum() / 6
    parts = [scorer(laid_out(one[i:j])).balance.sum() / 6 for i, j in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=1e-6)
    for a, b in zip(gradients(model, sum(parts)), gradients(model, whole), strict=True):
        assert (a - b).norm() <= 1e-5 * max(1, b.norm())


def test_it_is_trained_on_and_shown(train, tmp_path, capsys):
    """It falls; and it is the same in one microbatch or four, recomputed or not."""
    folder = save_family(tmp_path / "mixtral", "mixtral")
    given = [*DPO, f"model.name_or_path={folder}", "reference=cached", "lr=1e-4"]
    none = train("none", *given, "n_examples=4", "do_last_eval=false")
    said = capsys.readouterr().out
    assert "the routers' balancing loss is not part of the loss (router_aux_loss=0)" in said
    assert not any("router_balance" in name for row in records(none) for name in row)
    one = train("one", *given, "router_aux_loss=10", "n_examples=40")
    assert "10 x the routers' balancing loss is added to the loss" in capsys.readouterr().out
    before, *_, after = (r["router_balance/eval"] for r in records(one, "eval"))
    assert after < before - 0.05
    options = ["gradient_accumulation_steps=4", "activation_checkpointing=true", "n_examples=4"]
    four = train("four", *given, "router_aux_loss=10", *options, "do_last_eval=false")
    a, b, without = (records(run, "train")[0] for run in (one, four, none))
    assert a["router_balance/train"] == pytest.approx(b["router_balance/train"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert abs(a["grad_norm"] - without["grad_norm"]) > 0.01 * without["grad_norm"]


@pytest.mark.parametrize(
    "family, why", [("llama", "has no routers"), ("deepseek_v3", "has no such loss")]
)
def test_refused_where_there_is_none(family, why):
    with pytest.raises(UserError, match=f"router_aux_loss: .* {why}.*; set router_aux_loss=0"):
        Routers(family_model(family))
    assert bool(routers_of(family_model(family))) == (family != "llama")
