"""Responses that the policy's own engine samples: the same in any batch, from the distribution that
is trained, with the log-probabilities that training computes.
"""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import family_model
from tiny import tiny_model

from plumb.batching.layout import pack
from plumb.data.prompts import NumberedPrompt
from plumb.data.tokenization import Example
from plumb.errors import UserError
from plumb.models.forward_path import ForwardPath, use_tree_attention
from plumb.models.logps import response_token_logps
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.engine import draw, uniforms
from plumb.rollouts.policy_engine import PolicyEngine

DRAWN = Decoding("sample", max_new_tokens=16, temperature=0.7)
ENDS = range(3, 25)  # enough of them that responses end at different places
SEED = (5, 1)  # of a run, and its step


def prompts_of(*lengths):
    rng = np.random.default_rng(0)
    return [
        NumberedPrompt(rng.integers(30, 250, n), i, f"my.jsonl:{i + 1}")
        for i, n in enumerate(lengths)
    ]


PROMPTS = prompts_of(7, 23, 3, 40, 11)


def engine_of(model, decoding=DRAWN, batch_size=64, ends=ENDS, longest=64):
    engine = PolicyEngine(
        decoding=decoding,
        ends=[*ends],
        pad_token_id=0,
        longest=longest,
        batch_size=batch_size,
        precision=nullcontext,
    )
    engine.load(model)
    return engine


def sampled(model, prompts=PROMPTS, n=4, seed=SEED, **options):
    return engine_of(model, **options).sample(prompts, n, seed).responses


def ids_of(responses):
    return [[response.ids.tolist() for response in each] for each in responses]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("mistral", torch.float32),
        ("gpt2", torch.float32),
        ("mistral", torch.float64),
    ],
)
def test_the_batch_changes_no_token(family, dtype):
    model = tiny_model(family).to(dtype)
    state = torch.get_rng_state()
    together = sampled(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert {r.ended for each in together for r in each} == {"eos", "length"}
    one_by_one = [sampled(model, [prompt], batch_size=1)[0] for prompt in PROMPTS]
    other_order = sampled(model, PROMPTS[::-1], batch_size=8)[::-1]
    more = sampled(model, n=6)  # two further ones leave the first four unchanged
    for other in (one_by_one, other_order, [each[:4] for each in more]):
        assert ids_of(other) == ids_of(together)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    for one, other in zip(sum(together, []), sum(one_by_one, []), strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=limit)


def test_what_the_draws_depend_on():
    """On the seed, the step, the prompt's number, and which sample; the same text under two numbers
    has different responses.
    """
    model = tiny_model()
    first = ids_of(sampled(model))
    assert ids_of(sampled(model, seed=(5, 2))) != first
    assert ids_of(sampled(model, seed=(6, 1))) != first
    again = [PROMPTS[0], PROMPTS[0]._replace(number=9)]
    one, other = ids_of(sampled(model, again))
    assert one == first[0] and other != one and len({tuple(ids) for ids in one}) == 4
    draws = uniforms(SEED, PROMPTS, 4, 16)
    assert draws.shape == (5, 4, 16) and np.unique(draws).size == draws.size
    assert np.array_equal(uniforms(SEED, PROMPTS[:2], 2, 10), draws[:2, :2, :10])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_a_temperature(temperature):
    """20,000 evenly spaced draws: each token's share is its probability to 1 / 20,000; one without
    probability is never drawn.
    """
    n = 20_000
    logits = torch.tensor([0.3, -torch.inf, 2.0, -1.0, 0.0], dtype=torch.float64)
    evenly = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, logps = draw(logits.expand(n, 5), temperature, evenly)
    p = (logits / temperature).softmax(0)
    share = torch.bincount(tokens, minlength=5) / n
    torch.testing.assert_close(share.double(), p, atol=1.01 / n, rtol=0)
    torch.testing.assert_close(logps, p.log()[tokens])


def test_how_a_response_ends():
    """With its end token, which is part of it, or after max_new_tokens."""
    model = tiny_model()
    for response in sum(sampled(model), []):
        is_end = np.isin(response.ids, ENDS)
        assert not is_end[:-1].any() and len(response.logps) == len(response.ids)
        assert response.ended == ("eos" if is_end[-1] else "length")
        assert is_end[-1] or len(response.ids) == 16
    forced = sampled(model, ends=range(259))
    assert all(len(r.ids) == 1 and r.ended == "eos" for each in forced for r in each)


def test_a_prompt_is_computed_once(monkeypatch):
    """For its n responses, and an ended response is computed no further."""
    model = tiny_model()
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].numel())
    )
    samples = engine_of(model).sample(PROMPTS[:1], 8, SEED)
    generated = sum(len(r.ids) for r in samples.responses[0])
    assert generated == samples.n_tokens
    assert seen[0] == len(PROMPTS[0].ids)
    # a response's last token is not computed, since nothing follows it
    assert sum(seen[1:]) == generated - 8
    assert samples.tokens_per_sec > 0


FAMILIES = ["llama", "mistral_sw", "qwen2_sw", "gemma3", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_computes_the_same_log_probabilities(family):
    """Of trees of a prompt with its responses, packed, and of padded rows; with the head in chunks
    or the model's own. Two of the families have windows of 16 tokens, fewer than their rows.
    """
    model = family_model(family)
    groups = sampled(model, n=3)
    examples = [
        Example(prompt.ids, tuple(r.ids for r in each), prompt.source)
        for prompt, each in zip(PROMPTS, groups, strict=True)
    ]
    batch = pack(examples, pad_token_id=0, longest=64)
    # a batch numbers all first responses before all second ones
    own = np.concatenate([each[i].logps for i in range(3) for each in groups])
    model.eval()
    use_tree_attention(model)
    for path in (ForwardPath(True, True), ForwardPath(True, False), ForwardPath(False, False)):
        with torch.no_grad():
            got = response_token_logps(model, batch, path, DRAWN.temperature)
        in_order = got.each[got.response.argsort(stable=True)]
        np.testing.assert_allclose(in_order.numpy(), own, atol=2e-5, err_msg=str(path))


@pytest.mark.parametrize("plain_head", [True, False])
def test_gradients_at_a_temperature(plain_head):
    """Those of log softmax(logits / T), by autograd through transformers' own logits."""
    model = tiny_model("gpt2").double().eval()
    ids = torch.tensor([[40, 41, 42, 50, 51]])
    logits = model(ids).logits[0, 2:4] / 0.6
    (-torch.nn.functional.cross_entropy(logits, ids[0, 3:], reduction="sum")).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    example = Example(ids[0, :3].numpy(), (ids[0, 3:].numpy(),), "")
    batch = pack([example], pad_token_id=0, longest=8)
    response_token_logps(model, batch, ForwardPath(False, plain_head), 0.6).each.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


REFUSED = [
    ({"top_k": 50}, "rollout.top_k=50: .* not of a truncated one; leave rollout.top_k out"),
    ({"top_p": 0.9}, "rollout.top_p=0.9"),
    ({"stop": ("x",)}, "rollout.stop="),
    ({"temperature": 0.0}, "rollout.temperature=0.0: must be above 0"),
    ({"temperature": None}, "rollout.temperature=None"),
    ({"max_new_tokens": 0}, "rollout.max_new_tokens=0: must be 1"),
    ({"mode": "greedy"}, "rollout.mode=greedy"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        engine_of(tiny_model(), replace(DRAWN, **options))


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(UserError, match="MambaForCausalLM takes no cache of keys and values"):
        engine_of(family_model("mamba"))


def test_prompts_that_are_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="my.jsonl:2: the prompt has no tokens"):
        sampled(model, prompts_of(3, 0))
    with pytest.raises(UserError, match="my.jsonl:1: .* 49 tokens, .* leaves room for 48"):
        sampled(model, prompts_of(49, 3))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(UserError, match="no finite probabilities"):
        sampled(model)
