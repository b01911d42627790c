"""Reward models: the loss by hand, the score at the last token whatever the padding, and a run that
learns a preference.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from families import family_model
from runs import records
from tiny import LLAMA, SIZES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from plumb.batching.layout import pack
from plumb.data.registry import get_dataset
from plumb.data.tokenization import Example
from plumb.errors import UserError
from plumb.losses.contract import ScoredPairs, Scores
from plumb.losses.registry import build_loss
from plumb.models import export
from plumb.models.find import find_model
from plumb.models.forward_path import PLAIN_PATH, ForwardPath, use_tree_attention
from plumb.models.layout_probe import cannot_pack
from plumb.models.logps import read_hidden, response_scores
from plumb.models.scalar_head import (
    FOLDS,
    MIN_PAIRS,
    fit_head,
    holds_scores,
    initial_weight,
    put_scalar_head,
)
from plumb.models.tree_attention import NAME as TREES
from plumb.reports.score_plots import draw_evaluation
from plumb.scoring.scorers import knobs_of, load_scorer
from plumb.settings.validation import validate
from plumb.training.objective import shared_tokens

REWARD = {"name": "reward", "read": "last", "margin": 0.0, "label_smoothing": 0, "centering": 0.0}


def scored(*rows, width=4):
    """Scores of responses given as lists: the last one's score is the response's, and stands behind
    its end.
    """
    each = torch.tensor(
        [[*row, *[row[-1]] * (width - len(row))] for row in rows], dtype=torch.float64
    )
    return Scores(each[:, -1], each, torch.tensor([len(row) for row in rows]))


def pair(chosen, rejected, shared=0, margin=None):
    margins = None if margin is None else torch.tensor([margin], dtype=torch.float64)
    return ScoredPairs(scored(chosen), scored(rejected), torch.tensor([shared]), margins)


def softplus(x):
    return math.log1p(math.exp(x))


def test_the_loss_by_hand():
    """z = 3 - 1 = 2: log(1 + e^-2). Smoothed by 1/4; less half of the data's 4; plus 0.1 (3 +
    1)^2.
    """
    both = pair([0, 3], [1], margin=4.0)
    loss = lambda **knobs: build_loss(REWARD | knobs).compute(both).losses.item()
    assert loss() == pytest.approx(softplus(-2))
    assert loss(label_smoothing=0.25) == pytest.approx(0.75 * softplus(-2) + 0.25 * softplus(2))
    assert loss(margin=0.5) == pytest.approx(softplus(0))
    assert loss(centering=0.1) == pytest.approx(softplus(-2) + 0.1 * 16)
    out = build_loss(REWARD).compute(both)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (3, 1)


def test_the_gradient_is_the_papers():
    """d loss / d r_w = -sigmoid(r_l - r_w), minus that for r_l (Eq. 2 of arXiv:2305.18290)."""
    chosen, rejected = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([0.5, -2.0], [1.5, -2.5])
    )
    one = torch.ones(2, dtype=torch.int64)
    both = ScoredPairs(
        Scores(chosen, chosen[:, None], one),
        Scores(rejected, rejected[:, None], one),
        0 * one,
        None,
    )
    build_loss(REWARD).compute(both).losses.sum().backward()
    torch.testing.assert_close(chosen.grad, -torch.sigmoid(rejected - chosen).detach())
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_the_token_wise_loss_by_hand():
    """They differ from token 1 on. Positions 1, 2, 3: 2 - 1, 3 - 4, and 5 - 4, for rejected has
    ended with 4. Three terms.
    """
    out = build_loss(REWARD | {"read": "tokens"}).compute(pair([9, 2, 3, 5], [7, 1, 4], shared=1))
    assert out.losses.item() == pytest.approx((softplus(-1) + softplus(1) + softplus(-1)) / 3)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (5, 4)
    # equal: their last tokens
    same = build_loss(REWARD | {"read": "tokens"}).compute(pair([1, 2], [3, 5], shared=2))
    assert same.losses.item() == pytest.approx(softplus(3))
    # rows of other lengths beside
    rows = ScoredPairs(scored([1], [2, 4, 6]), scored([0, 0], [1]), torch.tensor([0, 0]), None)
    by_hand = [(softplus(-1) * 2) / 2, (softplus(-1) + softplus(-3) + softplus(-5)) / 3]
    assert build_loss(REWARD | {"read": "tokens"}).compute(rows).losses.tolist() == pytest.approx(
        by_hand
    )


def test_mean_scores_by_hand():
    """(9 + 2 + 3 + 6) / 4 - (7 + 1 + 4) / 3 = 1; a response without a token has its prompt's score;
    rewards are the means.
    """
    mean = build_loss(REWARD | {"read": "mean", "centering": 0.5})
    out = mean.compute(pair([9, 2, 3, 6], [7, 1, 4]))
    assert mean.read == "mean" and build_loss(REWARD).read == "last"
    assert out.losses.item() == pytest.approx(softplus(-1) + 0.5 * 9**2)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (5, 4)
    none = Scores(torch.tensor([3.0]), torch.tensor([[3.0, 3.0]]), torch.tensor([0]))
    assert none.of("mean").tolist() == [3]


@pytest.mark.parametrize(
    "knob, value",
    [("label_smoothing", 0.5), ("margin", -1), ("centering", -0.1), ("read", "first")],
)
def test_a_value_out_of_range_is_refused(knob, value):
    with pytest.raises(ValueError, match=f"loss.{knob}={value}"):
        build_loss(REWARD | {knob: value})


EOS = SIZES["eos_token_id"]
# the second answer cut, so without EOS; an answer of EOS alone; answers that begin alike; EOS
# within an answer
PAIRS = [
    ([5, 6, 7], [8, 9, EOS], [8, 4]),
    ([5, 6], [EOS], [7, 7, 7, 7, 7, EOS]),
    ([9], [3, 4, 5, EOS], [3, 4, EOS]),
    ([EOS, 8, EOS], [EOS, EOS], [5, EOS, 6, EOS]),
]
EXAMPLES = [Example(np.array(p), (np.array(c), np.array(r)), "x:1") for p, c, r in PAIRS]


def rewarding(family):
    model = tiny_model(family).double().eval()
    put_scalar_head(model, seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight.data = (
            model.get_output_embeddings().weight.data.double()
        )
    use_tree_attention(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "qwen3", "mistral"])
def test_the_score_is_that_of_the_last_token_alone(family):
    """Compared with each answer alone after its prompt, in a row of its own. PAD is EOS, and EOS
    stands in texts too.
    """
    model, batch = rewarding(family), pack(EXAMPLES, pad_token_id=EOS, longest=32)
    rows = [[*p, *r] for i in (1, 2) for p, r in ((x[0], x[i]) for x in PAIRS)]
    expected = [model(torch.tensor([row])).logits[0, -1, 0].item() for row in rows]
    forward_path = ForwardPath(packed=model.config._attn_implementation == TREES, plain_head=False)
    for candidate in {forward_path, PLAIN_PATH}:
        found = response_scores(model, batch, candidate)
        assert found.last.tolist() == pytest.approx(expected, abs=1e-9)
        assert found.tokens.tolist() == [len(x[i]) for i in (1, 2) for x in PAIRS]
        whole = model(torch.tensor([rows[0]])).logits[0, 3:, 0].tolist()
        assert found.each[0].tolist() == pytest.approx(whole + [whole[-1]] * 3, abs=1e-9)
    assert shared_tokens(batch).tolist() == [1, 0, 2, 0]


def hidden_states(n, d, strength, scale=1.0, seed=0):
    """Random ends of chosen and rejected responses, around a common point far from 0; and the
    direction that decides.
    """
    draw = torch.Generator().manual_seed(seed)
    direction = torch.randn(d, generator=draw, dtype=torch.float64) / d**0.5
    a, b = torch.randn(2, n, d, generator=draw, dtype=torch.float64)
    flip = torch.rand(n, generator=draw) > torch.sigmoid(strength * (a - b) @ direction)
    far = 20 * torch.randn(d, generator=draw, dtype=torch.float64)
    chosen = torch.where(flip[:, None], b, a) + far
    rejected = torch.where(flip[:, None], a, b) + far
    return chosen * scale, rejected * scale, torch.arange(n) % FOLDS, direction


@pytest.mark.parametrize("n, d", [(600, 20), (200, 300)])  # more pairs than coordinates, and fewer
def test_a_head_is_fitted_to_frozen_states(n, d):
    """It finds the direction, whatever the units of the coordinates; scores have the mean 0, and
    Bradley-Terry's scale.
    """
    scale = torch.logspace(-3, 3, d, dtype=torch.float64)
    chosen, rejected, folds, direction = hidden_states(n, d, 4.0, scale)
    fit = fit_head(chosen, rejected, folds)
    a, b = chosen @ fit.weight[0], rejected @ fit.weight[0]
    assert torch.cosine_similarity(fit.weight[0] * scale, direction, 0) > (0.9 if n > d else 0.3)
    assert abs(float((a + b).mean())) < 1e-6 and float((a > b).double().mean()) > 0.8
    assert fit.loss < (0.4 if n > d else 0.69) and fit.accuracy > (0.8 if n > d else 0.55)
    same = fit_head(*hidden_states(n, d, 4.0)[:3])
    assert torch.allclose(
        fit.weight * scale, same.weight, rtol=1e-4, atol=1e-6 * float(same.weight.abs().max())
    )


def test_a_head_is_fitted_to_what_can_be_learned():
    """Of noise nearly nothing, of too few pairs nothing, of pairs that are told apart always a
    scale that is finite.
    """
    chosen, rejected, folds, _ = hidden_states(500, 50, 0.0)
    noise = fit_head(chosen, rejected, folds)
    margins = (chosen - rejected) @ noise.weight[0]
    assert noise.loss <= math.log(2) and float(margins.square().mean().sqrt()) < 0.5
    few = fit_head(chosen[: MIN_PAIRS - 1], rejected[: MIN_PAIRS - 1], folds[: MIN_PAIRS - 1])
    assert not few.weight.any() and few.loss == math.log(2)
    same = fit_head(chosen, chosen, folds)
    assert not same.weight.any()
    sure = fit_head(chosen, chosen - torch.ones(50), folds)
    assert sure.accuracy == 1 and sure.weight.isfinite().all() and sure.loss < 0.05


AFTER_THE_HEAD = {  # what models do to logits after the head
    "cohere": LLAMA | {"logit_scale": 0.25},
    "cohere2": LLAMA | {"logit_scale": 0.25, "head_dim": 8},
    "granite": LLAMA | {"logits_scaling": 4.0},
    "gemma2": LLAMA | {"head_dim": 8, "final_logit_softcapping": 0.5},
    "gemma3_text": LLAMA | {"head_dim": 8, "final_logit_softcapping": 0.5},
    "falcon_h1": (
        LLAMA
        | {
            "lm_head_multiplier": 0.1,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 1,
        }
    ),
    "recurrent_gemma": (
        LLAMA
        | {
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 16,
            "lru_width": 32,
            "logits_soft_cap": 0.5,
            "head_dim": 8,
        }
    ),
}


@pytest.mark.parametrize("family", AFTER_THE_HEAD)
def test_nothing_is_done_to_scores_after_the_head(family):
    """The score is the head's product with the hidden state, exactly; and so is its gradient for
    the head.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | AFTER_THE_HEAD[family]))
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    put_scalar_head(model, seed=3)
    use_tree_attention(model)
    head, seen = model.get_output_embeddings(), []
    batch = pack(EXAMPLES, pad_token_id=EOS, longest=32)
    for candidate in {ForwardPath(packed=cannot_pack(model) is None, plain_head=False), PLAIN_PATH}:
        seen.clear()
        handle = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        found = response_scores(model, batch, candidate)
        handle.remove()
        # the first response's tokens are the first that the head sees
        each = found.each[0, : len(PAIRS[0][1])]
        assert each.equal((seen[0].float() @ head.weight.T)[0, : len(each), 0])
        (gradient,) = torch.autograd.grad(found.each[0, 0], head.weight)
        assert torch.allclose(gradient, seen[0][0, 0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("read", ["last", "mean"])
def test_the_state_that_a_score_is_of(read):
    """Its product with the head is the score: what a head is fitted to is what it will read."""
    model, batch = rewarding("llama"), pack(EXAMPLES, pad_token_id=EOS, longest=32)
    for forward_path in (ForwardPath(packed=True, plain_head=False), PLAIN_PATH):
        hidden = read_hidden(model, batch, forward_path, read)
        found = response_scores(model, batch, forward_path).of(read)
        assert torch.allclose(
            (hidden @ model.get_output_embeddings().weight.T)[:, 0], found, atol=1e-12
        )


def test_left_padding_and_right_padding_give_the_same_score():
    """What a user's own code may do with such a model: with a mask, read where the mask ends."""
    model = rewarding("llama")
    row, pad = [5, 6, 7, 8, 9, EOS], [EOS] * 3
    alone = model(torch.tensor([row])).logits[0, -1, 0].item()
    for ids, mask, at in (
        ([*pad, *row], [0] * 3 + [1] * 6, -1),
        ([*row, *pad], [1] * 6 + [0] * 3, 5),
    ):
        mask = torch.tensor([mask])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            out = (
                model(torch.tensor([ids]), attention_mask=mask, position_ids=positions)
                .logits[0, at, 0]
                .item()
            )
        assert out == pytest.approx(alone, abs=1e-9)


LEARN = [
    "loss=reward",
    "model=demo",
    "datasets=[demo/train.jsonl]",
    "eval_datasets=[demo/test.jsonl]",
    "optimizer=AdamW",
    "lr=1e-3",
    "warmup_steps=5",
    "batch_size=16",
    "n_epochs=null",
    "n_examples=240",
    "max_length=128",
    "max_prompt_length=64",
    "do_first_eval=false",
]


def head_of(run_dir):
    return torch.load(run_dir / "LATEST/policy.pt", weights_only=True)["state"]["lm_head.weight"]


def test_the_heads_first_values(train_here, capsys):
    """Fitted, it ranks before the first step; zero, every score is 0 and the loss log 2; drawn,
    scores are of order one.
    """
    frozen = ["lr=1e-12", "n_examples=16", "do_first_eval=true", "n_eval_examples=64"]
    first, heads = {}, {}
    for kind in ("fit", "zero", "random"):
        run_dir = train_here(
            *LEARN, *frozen, f"head_init={kind}", "head_pairs=100", f"exp_name={kind}"
        )
        first[kind], heads[kind] = records(run_dir, "eval")[0], head_of(run_dir)
    said = capsys.readouterr().out
    assert said.count("head: fitted to the untrained model's hidden states of 100 pairs") == 1
    # four standard errors above chance, of 64 pairs
    assert first["fit"]["rewards_eval/accuracies"] > 0.75
    assert first["fit"]["loss/eval"] < 0.6
    assert (
        first["zero"]["loss/eval"] == pytest.approx(math.log(2))
        and first["zero"]["rewards_eval/spread"] == 0
    )
    assert first["random"]["loss/eval"] != pytest.approx(math.log(2), abs=1e-4)
    assert torch.allclose(
        heads["random"], initial_weight(heads["random"].shape[1], seed=0), atol=1e-6
    )
    on = train_here(*LEARN, *frozen, f"model.archive={run_dir}", "head_init=zero", "exp_name=on")
    assert torch.allclose(head_of(on), heads["random"], atol=1e-6), (
        "a head that was trained is kept"
    )


def test_a_model_that_is_read_at_the_mean(train_here, tmp_path):
    """score.py reads it as its run did; it has no form in transformers, which is said before
    anything is trained.
    """
    run_dir = train_here(*LEARN, "loss.read=mean", "n_examples=16", "n_eval_examples=null")
    (record,) = records(run_dir, "eval")
    scorers_own = load_scorer(found := find_model(str(run_dir)), knobs_of(found, {}), device="cpu")
    rows = [*get_dataset(str(ROOT / "demo/test.jsonl"), "test", eval_share=1.0).rows]
    scores = scorers_own.score(rows, "keep_start").scores
    assert float((scores[:, 0] > scores[:, 1]).mean()) == pytest.approx(
        record["rewards_eval/accuracies"]
    )
    assert float(scores[:, 0].mean()) == pytest.approx(record["rewards_eval/chosen"], abs=1e-5)
    with pytest.raises(UserError, match="trained with loss.read=mean"):
        export.export(found, tmp_path / "out")
    with pytest.raises(UserError, match="export=hf: loss.read=mean has no form in transformers"):
        train_here(*LEARN, "loss.read=mean", "export=hf", "exp_name=refused")


def test_the_heads_own_rate(train_here):
    """The rest stays where it was, to the rate that it is given."""
    frozen = [
        "lr=1e-12",
        "n_examples=48",
        "head_init=zero",
        "n_eval_examples=16",
        "optimizer=SGD",
        "warmup_steps=0",
    ]
    still, moved = (
        head_of(train_here(*LEARN, *frozen, *more, f"exp_name=rate{len(more)}"))
        for more in ((), ["head_lr=0.1"])
    )
    assert still.abs().max() < 1e-9 < 1e-4 < moved.abs().max()


@pytest.mark.parametrize("knob", ["head_init=zero", "head_pairs=10", "head_lr=0.1"])
def test_knobs_of_the_head_are_for_reward_models(knob, compose):
    with pytest.raises(UserError, match=f"{knob}: is for a reward model's head"):
        validate(compose("loss=sft", "model.name_or_path=gpt2", "exp_name=x", knob))


def test_it_learns_the_demos_preference(train_here):
    run_dir = train_here(*LEARN)
    (record,) = records(run_dir, "eval")
    assert record["rewards_eval/accuracies"] > 0.95 and record["rewards_eval/spread"] > 1
    assert record["rewards_eval/margins"] == pytest.approx(
        record["rewards_eval/chosen"] - record["rewards_eval/rejected"]
    )
    by_length = {k: v for k, v in record.items() if k.startswith("rewards_eval/accuracies/length ")}
    assert len(by_length) > 1 and min(by_length.values()) > 0.8
    assert all(r["rewards_train/spread"] >= 0 for r in records(run_dir, "train"))
    for name in ("scores-240.png", "calibration-240.png"):
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")
    again = train_here(
        *LEARN, f"model.archive={run_dir}", "n_examples=16", "do_first_eval=true", "exp_name=more"
    )
    # its head was kept
    assert records(again, "eval")[0]["loss/eval"] == pytest.approx(record["loss/eval"], rel=1e-5)
    with pytest.raises(UserError, match="a reward model, which has no LM head"):
        train_here("exp=demo_dpo", f"model.archive={run_dir}")


def test_scores_that_are_no_numbers_are_not_drawn(tmp_path):
    """In 16 bits they may overflow; a run must not end over its picture."""
    for chosen, drawn in (([np.nan, np.inf], 0), ([np.nan, 1.0], 2)):
        draw_evaluation(np.array(chosen), np.zeros(2), tmp_path, 8)
        assert len(list(tmp_path.glob("*-8.png"))) == drawn


def test_a_margin_needs_scores(train_here, tmp_path):
    with pytest.raises(UserError, match=r"demo/train.jsonl:1: no scores .* loss.margin=0"):
        train_here(*LEARN, "loss.margin=1")
    with pytest.raises(UserError, match=r"demo/train.jsonl:1: no scores .* loss=odpo compares"):
        train_here(*LEARN, "loss=odpo", "loss.beta=0.1")
    assert not list(ROOT.glob("scores-*.png"))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "rwkv"])
def test_a_reward_models_weights_are_told_from_a_policys(family):
    """Whatever the family calls its head: lm_head, embed_out or head."""
    model = family_model(family)
    assert not holds_scores(model.state_dict())
    put_scalar_head(model, seed=0)
    assert holds_scores(model.state_dict())
