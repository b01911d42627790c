"""What vLLM is asked for, and what becomes of its answers, with a stand-in that samples by
transformers: vLLM itself is not installed where the tests run.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, SIZES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from plumb.data.prompts import NumberedPrompt
from plumb.errors import UserError
from plumb.models.adapter_sources import Adapted
from plumb.models.adapters import UNMERGED
from plumb.models.weight_sources import Blueprint, Seeded
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.vllm_engine import VllmEngine, VllmModel

TEMPERATURE = 0.7
ENDS = [*range(3, 60)]
PROMPTS = [NumberedPrompt(np.array([70, 71, 72][: i + 1]), i, f"my.jsonl:{i}") for i in range(3)]


class StandIn:
    """Behave as vllm.LLM does in what the engine uses."""

    def __init__(self, model, **options):
        config = AutoConfig.from_pretrained(model)
        assert config.architectures == ["LlamaForCausalLM"]
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self.model.load_weights = lambda weights: self.model.load_state_dict(dict(weights))
        self.options = options
        self.n_resets = 0

    def apply_model(self, function):
        return [function(self.model)]

    def reset_prefix_cache(self):
        self.n_resets += 1

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        return [
            SimpleNamespace(outputs=[self._one(prompt["prompt_token_ids"], of_one)])
            for prompt, of_one in zip(prompts, params, strict=True)
        ]

    def _one(self, prompt, params):
        generator = torch.Generator().manual_seed(params.seed)
        ids, logprobs, reason = [], [], "length"
        while len(ids) < params.max_tokens and reason == "length":
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
            logps = (logits / params.temperature).log_softmax(0)
            token = int(torch.multinomial(logps.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(logps[token]))})
            reason = "stop" if token in params.stop_token_ids else "length"
        return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    vllm = SimpleNamespace(LLM=StandIn, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    decoding = Decoding("sample", max_new_tokens=8, temperature=TEMPERATURE)
    model = VllmModel(torch.float32, longest=32, batch_size=16, memory=0.3)
    return VllmEngine(decoding, ENDS, model)


def ids_of(samples):
    return [[response.ids.tolist() for response in group] for group in samples.responses]


@torch.no_grad()
def are_of(policy, samples):
    """Whether the log-probabilities of responses are those of the policy, to 1e-5."""
    for prompt, group in zip(PROMPTS, samples.responses, strict=True):
        for response in group:
            row = torch.tensor([[*prompt.ids, *response.ids]])
            logps = (policy(row).logits[0, :-1] / TEMPERATURE).log_softmax(1)
            own = logps[range(len(prompt.ids) - 1, row.shape[1] - 1), response.ids]
            if response.logps != pytest.approx(own.tolist(), abs=1e-5):
                return False
    return True


def test_responses_are_the_policys(engine):
    """Log-probabilities are those of the present weights at the temperature, the end token is part
    of a response, and draws depend on seed, prompt and number, not on the other prompts.
    """
    policy = tiny_model("llama").eval()
    engine.load(policy)
    before = engine.sample(PROMPTS, 4, (5, 1))
    with torch.no_grad():
        policy.lm_head.weight.mul_(3)
    engine.load(policy)
    samples = engine.sample(PROMPTS, 4, (5, 1))
    assert ids_of(samples) != ids_of(before)
    assert engine.model.llm.n_resets == 2
    assert {"eos", "length"} == {r.ended for group in samples.responses for r in group}
    assert are_of(policy, samples)
    for group in samples.responses:
        assert len({tuple(response.ids) for response in group}) > 1
        assert all((r.ended == "eos") == (r.ids[-1] in ENDS) for r in group)
    assert ids_of(engine.sample(PROMPTS[1:2], 2, (5, 1)))[0] == ids_of(samples)[1][:2]
    assert ids_of(engine.sample(PROMPTS, 4, (5, 2))) != ids_of(samples)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_are_merged(quantize, engine):
    """Into the weights that vLLM gets, which are those that quantized layers compute with."""
    if quantize:
        pytest.importorskip("bitsandbytes")
    config = AutoConfig.for_model("llama", **SIZES | FAMILIES["llama"] | {"attention_dropout": 0.0})
    source = Seeded(Blueprint(config, torch.float32), 0)
    knobs = replace(UNMERGED, rank=4, init="olora", previous="merge", quantize=quantize)
    policy = Adapted(source=source, knobs=knobs, block_name=None, seed=0).whole()
    engine.load(policy)
    before = engine.sample(PROMPTS, 2, (5, 1))
    assert are_of(policy, before)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1)
    engine.load(policy)
    assert are_of(policy, engine.sample(PROMPTS, 2, (5, 1))) and not are_of(policy, before)


def test_what_vllm_refuses_ends_in_one_line(engine, monkeypatch):
    def refuse(model, **options):
        raise ValueError("no kernel for this GPU\nand more lines")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
    with pytest.raises(
        UserError, match="^rollout.engine=vllm: ValueError: no kernel for this GPU;"
    ):
        engine.load(tiny_model("llama"))
    with pytest.raises(UserError, match=r"rollout\.top_k=5"):
        VllmEngine(Decoding("sample", max_new_tokens=8, temperature=1.0, top_k=5), ENDS, None)
