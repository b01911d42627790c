"""Adapters of one model: their places, their first values, their effect."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, SIZES
from transformers import AutoConfig

from plumb.distributed.tensor_parallel import shard_tensor_parallel
from plumb.errors import UserError
from plumb.models import adapters
from plumb.models.adapter_sources import Adapted, Merged
from plumb.models.adapters import AdapterKnobs, Factors, StartingPolicy
from plumb.models.quantized_base import Dequantized
from plumb.models.sharded_load import fill
from plumb.models.weight_sources import Blueprint, Seeded
from plumb.rollouts.gathered_engine import UnshardedCopy

IDS = torch.arange(12)[None] * 7 % 250
LORA = AdapterKnobs(
    kind="lora",
    rank=4,
    alpha=8.0,
    rslora=False,
    init="default",
    targets=None,
    previous="merge",
)
KINDS = {
    "lora": LORA,
    "dora": replace(LORA, kind="dora"),
    "pissa": replace(LORA, init="pissa"),
    "olora": replace(LORA, init="olora", rslora=True),
}
NAMED = {
    "llama": ("lm_head", "embed_tokens", "q_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_neox": ("query_key_value",),
}


def base(family):
    """Return the source of a random model in float64, its head apart from its embedding."""
    config = AutoConfig.for_model(
        family, **(SIZES | FAMILIES[family] | {"tie_word_embeddings": False})
    )
    for knob in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, knob):
            setattr(config, knob, 0.0)
    return Seeded(Blueprint(config, torch.float64), 0)


def adapted(source, knobs, previous=()):
    return Adapted(source=source, knobs=knobs, block_name=None, seed=0, previous=previous)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def off(a, b):
    return float((logits(a) - logits(b)).abs().max())


def after_training(policy):
    """Move the trained weights of a policy, as training would."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.rand_like(p))
    return policy


def kept(policy):
    """Return what a policy.pt holds of a policy, read back."""
    state = {name: x.detach().clone() for name, x in adapters.stored(policy).items()}
    return adapters.read_adapters(state, "model.archive=x")


@pytest.mark.parametrize("kind", [*KINDS, "by name"])
@pytest.mark.parametrize("family", NAMED)
def test_start_effect_and_reference(family, kind):
    """A new adapter changes nothing, to 1e-12 in float64; trained, it has the effect of its merged
    form, and StartingPolicy computes what the base does, to the bit.
    """
    knobs = KINDS.get(kind) or replace(LORA, targets=NAMED[family])
    source = base(family)
    model = source.whole()
    policy = adapted(source, knobs).whole()
    assert off(policy, model) < 1e-12
    after_training(policy)
    assert off(policy, model) > 1e-3
    assert torch.equal(logits(StartingPolicy(policy)), logits(model))
    assert off(Merged(source, kept(policy), "x").whole(), policy) < 1e-12
    merged = source.whole()
    merged.load_state_dict(dict(adapters.merged_weights(policy)))
    assert off(merged, policy) < 1e-12
    frozen = {
        adapters.base_name(name): p for name, p in policy.named_parameters() if not p.requires_grad
    }
    own = dict(model.named_parameters())
    assert all(torch.equal(frozen[name], own[name]) for name in own)


@pytest.mark.parametrize("previous", ["continue", "stack"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_a_run_starts_from(kind, previous):
    """Continued or stacked, they are the start: the same as merged, also after training."""
    source = base("llama")
    first = kept(after_training(adapted(source, KINDS[kind]).whole()))
    start = Merged(source, first, "x").whole()
    policy = adapted(source, replace(LORA, previous=previous), first).whole()
    assert off(policy, start) < 1e-12
    after_training(policy)
    assert off(policy, start) > 1e-3
    assert off(StartingPolicy(policy), start) < 1e-12
    merged = source.whole()
    merged.load_state_dict(dict(adapters.merged_weights(policy)))
    assert off(merged, policy) < 1e-12
    second = kept(policy)
    assert len(second) == len(first) + (previous == "stack")
    assert off(Merged(source, second, "x").whole(), policy) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_the_adapters(kind):
    """In one piece, to be sampled from: it computes the same, to the bit, before and after a step,
    and its base is copied once only.
    """
    source = base("gpt2")
    first = kept(adapted(source, KINDS[kind]).whole())
    policy = adapted(source, replace(LORA, previous="continue"), first).whole()
    copied = UnshardedCopy(torch.device("cpu"), None)
    assert torch.equal(logits(copied.updated(policy)), logits(policy))
    after_training(policy)
    model = copied.updated(policy)
    assert torch.equal(logits(model), logits(policy))
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        policy.get_input_embeddings().weight.zero_()
    assert copied.updated(policy).get_input_embeddings().weight.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parts_are_those_of_the_whole(family, kind):
    """A rank that fills its part gets the values that the full model has; merged ones, too, and an
    adapter on those.
    """
    source = base(family)
    policy = adapted(source, KINDS[kind])
    first = kept(after_training(policy.whole()))
    merged = Merged(source, first, "x")
    for made in (policy, merged, adapted(merged, KINDS[kind])):
        full = made.whole().state_dict()
        parts = made.in_parts()
        for name, tensor in full.items():
            where = tuple(slice(n // 2, n) for n in tensor.shape)
            assert torch.equal(parts.part(name, where), tensor[where]), name
    model = parts.skeleton.to_empty(device="cpu")
    fill(model, parts.part)


def test_parts_on_what_was_quantized_before():
    """A run on quantized weights follows another: its start is quantized again."""
    pytest.importorskip("bitsandbytes")
    config = AutoConfig.for_model("llama", **(SIZES | FAMILIES["llama"]))
    before = Dequantized(Seeded(Blueprint(config, torch.float32), 0), "nf4", None)
    policy = adapted(before, replace(LORA, quantize="nf4"))
    full, parts = policy.whole(), policy.in_parts()
    for name, tensor in full.named_parameters():
        assert torch.equal(parts.part(name, ()), tensor), name


def test_first_values_are_those_of_the_papers():
    """PiSSA: s B A is the best approximation of rank r, so that what is left has the next singular
    value as its norm. OLoRA: B is orthonormal, and B A are the first columns of Q R.
    """
    torch.manual_seed(0)
    w = torch.randn(6, 5, dtype=torch.float64)
    knobs = replace(LORA, rank=2, alpha=8.0)
    a, b, _ = adapters.first_factors(replace(knobs, init="pissa"), 0, "m", w)
    rest = torch.linalg.matrix_norm(w - knobs.scaling * b @ a, 2)
    assert rest == pytest.approx(torch.linalg.svdvals(w)[2].item())
    a, b, _ = adapters.first_factors(replace(knobs, init="olora"), 0, "m", w)
    torch.testing.assert_close(b.T @ b, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close((b @ a)[:, 0], w[:, 0])
    a, b, _ = adapters.first_factors(knobs, 0, "m", w)
    assert not b.any() and a.abs().max() <= 5**-0.5
    assert not torch.equal(a, adapters.first_factors(knobs, 0, "other", w).a)
    assert torch.equal(a, adapters.first_factors(knobs, 0, "m", w).a)


def test_dora_by_hand():
    """W = [3, 4], s B A = [3, 4]: the row of norm 10 gets the magnitude 5, so that nothing changes;
    beside a LoRA of [1, 0], whose effect is added: [4, 4].
    """
    w = torch.tensor([[3.0, 4.0]])
    factors = Factors(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5]]), torch.tensor([5.0]))
    assert torch.equal(adapters.merged(w, [(2.0, factors)]), w)
    other = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]]), None)
    merged = adapters.merged(w, [(2.0, factors), (1.0, other)])
    assert torch.equal(merged, torch.tensor([[4.0, 4.0]]))


def test_what_does_not_fit_is_refused():
    source = base("llama")
    cases = [
        (replace(LORA, targets=("q_proj", "c_attn")), "named c_attn; it has down_proj, embed"),
        (replace(LORA, rank=33), "adapter_rank=33: .* matrix of .*; give 16 or less|32 or less"),
    ]
    for knobs, message in cases:
        with pytest.raises(UserError, match=message):
            adapted(source, knobs).whole()
    tied = FAMILIES["llama"] | {"tie_word_embeddings": True}
    tied_source = Seeded(
        Blueprint(AutoConfig.for_model("llama", **(SIZES | tied)), torch.float32), 0
    )
    with pytest.raises(UserError, match="are one matrix"):
        adapted(tied_source, replace(LORA, targets=("lm_head",))).whole()
    state = adapters.stored(adapted(source, LORA).whole())
    name = "model.layers.0.self_attn.q_proj.lora_A.0.weight"
    wrong = [
        ({"adapters.0.scaling": None}, "its adapter 0 is not complete"),
        ({"adapters.base": None}, "lacks adapters.base"),
        ({name: torch.ones(3, 32)}, r"q_proj has lora_A \[3, 32\], lora_B \[32, 4\], and"),
        ({name: None, name.replace(".0.w", ".default.w"): state[name]}, "'default' has no number"),
    ]
    for change, message in wrong:
        changed = {key: x for key, x in (state | change).items() if x is not None}
        assert adapters.holds_adapters(changed)
        with pytest.raises(UserError, match=message):
            adapters.read_adapters(changed, "x")
    one = [replace(kept(adapted(source, LORA).whole())[0], modules=("nope",))]
    with pytest.raises(UserError, match="adapter of nope, which this LlamaForCausalLM has not"):
        Merged(source, one, "x").whole()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (KINDS["dora"], "adapter=dora: needs whole rows"),
        (
            replace(LORA, targets=("lm_head", "q_proj")),
            "the embedding and the head take no adapter",
        ),
        (replace(LORA, targets=("embed_tokens",)), "the embedding and the head take no adapter"),
    ],
)
def test_what_tensor_parallelism_does_not_split(knobs, message):
    model = adapted(base("llama"), knobs).in_parts().skeleton
    with pytest.raises(UserError, match=message):
        shard_tensor_parallel(model, None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_known_without_values(kind):
    source = base("gpt2")
    full = source.whole()
    policy = adapted(source, KINDS[kind]).whole()
    extra = sum(p.numel() for p in policy.parameters()) - sum(p.numel() for p in full.parameters())
    expected = extra, adapters.count_trained(policy)
    assert adapters.size_of_adapters(KINDS[kind], full, None) == expected
