"""Every source of weights gives the same values whole and in parts, by itself and wrapped."""

from dataclasses import dataclass

import pytest
import torch
from runs import run_of
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification

from plumb.models.adapters import knobs_of
from plumb.models.load import load_config
from plumb.models.scalar_head import head_name, initial_weight, put_scalar_head, scores
from plumb.models.weight_sources import (
    CutFromWhole,
    FrozenCopy,
    ModelFiles,
    Parts,
    QuantizedFiles,
    WeightSource,
    open_adapted,
    open_source,
)

RANDOM = "{model_type: llama, vocab_size: 259, hidden_size: 32, intermediate_size: 64,\
 num_hidden_layers: 2, num_attention_heads: 4}"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Kind -> (options, scalar, can it be read in parts)."""
    from gguf_writer import write_gguf

    folder = tmp_path_factory.mktemp("kinds")
    base = folder / "base"
    tiny_model("llama").save_pretrained(base)
    policy, reward = tiny_model("llama"), tiny_model("llama")
    put_scalar_head(reward, seed=5)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(
        folder / "classifier"
    )
    write_gguf(policy, folder / "model.gguf")
    name = f"model.name_or_path={base}"
    of_policy = run_of(folder, base, policy.state_dict(), "of_policy")
    of_reward = run_of(folder, base, reward.state_dict(), "of_reward")
    return {
        "folder": ([name], False, True),
        "folder, new head": ([name], True, True),
        "policy.pt": ([name, f"model.archive={of_policy}"], False, True),
        "policy.pt, new head": ([name, f"model.archive={of_policy}"], True, True),
        "policy.pt of a reward model": ([name, f"model.archive={of_reward}"], True, True),
        "seed": (["model.name_or_path=null", f"model.architecture={RANDOM}"], False, True),
        "seed, new head": (["model.name_or_path=null", f"model.architecture={RANDOM}"], True, True),
        "classifier": ([f"model.name_or_path={folder}/classifier"], True, False),
        "GGUF": ([f"model.name_or_path={folder}/model.gguf"], False, False),
        "GGUF, new head": ([f"model.name_or_path={folder}/model.gguf"], True, False),
    }


KINDS = [
    "folder",
    "folder, new head",
    "policy.pt",
    "policy.pt, new head",
    "policy.pt of a reward model",
    "seed",
    "seed, new head",
    "classifier",
    "GGUF",
    "GGUF, new head",
]


def check_parts(parts: Parts, whole):
    """Each tensor of `whole`, and its second row alone, is what `parts` reads."""
    state = whole.state_dict()
    assert parts.skeleton.state_dict(keep_vars=True).keys() == state.keys()
    assert all(p.is_meta for p in parts.skeleton.parameters())
    for name, tensor in state.items():
        for where in ((), (slice(1, 2),)):
            assert torch.equal(parts.part(name, where).to(tensor.dtype), tensor[where]), name
    assert parts.skeleton.generation_config.to_dict() == whole.generation_config.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_and_in_parts(kind, kinds, compose):
    options, scalar, has_parts = kinds[kind]
    config = compose("seed=7", *options)

    def opened():
        return open_source(config.model, load_config(config), scalar, seed=7)

    with opened() as source:
        whole = source.whole()
    assert scores(whole) == scalar
    if "new head" in kind:
        weight = whole.get_output_embeddings().weight
        assert weight.equal(initial_weight(32, seed=7))
    with opened() as source:
        if not has_parts:
            with pytest.raises(NotImplementedError, match="as a whole"):
                source.in_parts()
            source = CutFromWhole(source)
        parts = source.in_parts()
        check_parts(parts, whole)
        if scalar:
            drawn = parts.skeleton.get_output_embeddings().drawn
            assert drawn == whole.get_output_embeddings().drawn == ("new head" in kind)


@pytest.mark.parametrize("quantize", ["null", "nf4"])
def test_adapters_on_what_is_read_as_a_whole(quantize, kinds, compose):
    """A GGUF file with an adapter is cut into the parts of the whole model."""
    pytest.importorskip("bitsandbytes")
    config = compose("adapter=dora", f"model.quantize={quantize}", *kinds["GGUF"][0])
    how = (config.model, load_config(config), False, 7, knobs_of(config))
    with open_adapted(*how) as source:
        state, parts = source.whole().state_dict(), source.in_parts()
    assert parts.skeleton.state_dict(keep_vars=True).keys() == state.keys()
    for name, tensor in state.items():
        part = parts.part(name, (slice(1, 2),))
        assert torch.equal(part.to(tensor.dtype), tensor[1:2]), name


@dataclass
class Shifted:
    """A source of another kind, as an adapter is: it adds 1 to each weight of the one it wraps."""

    source: WeightSource

    def whole(self, device_map=None):
        model = self.source.whole(device_map)
        for p in model.parameters():
            p.data = p.data + 1
        return model

    def in_parts(self):
        parts = self.source.in_parts()
        return Parts(parts.skeleton, lambda name, where: parts.part(name, where) + 1)


def test_another_source_composes(kinds, compose):
    """A new kind needs no change to those that it wraps, or that wrap it."""
    config = compose(*kinds["folder"][0])
    with open_source(config.model, load_config(config), scalar=False, seed=0) as source:
        plain, whole = source.whole(), Shifted(source).whole()
        check_parts(Shifted(source).in_parts(), whole)
        check_parts(CutFromWhole(Shifted(source)).in_parts(), whole)
    name = head_name(plain)
    assert torch.equal(whole.state_dict()[name], plain.state_dict()[name] + 1)


def test_a_frozen_copy(kinds, compose):
    policy = tiny_model("llama")
    whole = FrozenCopy(policy, torch.bfloat16).whole()
    assert not any(p.requires_grad for p in whole.parameters()) and not whole.training
    assert all(
        p.dtype == torch.bfloat16 and p.equal(q.bfloat16())
        for p, q in zip(whole.parameters(), policy.parameters(), strict=True)
    )
    assert whole.model.rotary_emb.inv_freq.dtype == torch.float32
    parts = FrozenCopy(policy, None).in_parts()
    for name, tensor in policy.state_dict().items():
        assert parts.part(name, ()).equal(tensor)
    assert not any(p.requires_grad for p in parts.skeleton.parameters())


def test_quantized_files_are_read_as_a_whole(kinds, compose, tmp_path):
    config = compose(*kinds["folder"][0])
    hf_config = load_config(config)
    for quantized, kind in ((None, ModelFiles), ({"quant_method": "fp8"}, QuantizedFiles)):
        if quantized:
            hf_config.quantization_config = quantized
        with open_source(config.model, hf_config, scalar=False, seed=0) as source:
            assert type(source) is kind
    with pytest.raises(NotImplementedError, match="quantized"):
        source.in_parts()
