"""Runs whose adapters are trained on quantized weights (QLoRA)."""

import json
import shutil
from functools import partial

import pytest
import torch
from groups import halted_after, run_in_group, train_until
from runs import DPO, STEADY, evaluate, outcome, records, same, state_of
from torch import nn
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM

import export as export_command
import trainers
from plumb.distributed import sharding
from plumb.errors import UserError
from plumb.models.adapters import knobs_of
from plumb.models.find import find_model, open_model, start_of
from plumb.models.load import load_policy
from plumb.models.quantized_base import (
    BYTES,
    QuantizedLinear,
    quantize,
    quantized,
    quantized_bytes,
    quantized_layers,
    rounded,
)
from plumb.rollouts.gathered_engine import UnshardedCopy
from plumb.runs.checkpoints import latest_valid
from plumb.runs.policy_file import load_policy_state

pytest.importorskip("bitsandbytes")

BRIEF = ["do_first_eval=false", "n_examples=8", "lr=1e-2", "warmup_steps=0"]
QLORA = ["adapter=lora", "adapter_rank=4", "adapter_alpha=8"]


def kept(model):
    return open_model(find_model(str(model))).model.state_dict()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_computes_with_its_rounded_weight(kind):
    """Forward and backward; in nf4 the errors are a tenth of the weights, in int8 a hundredth."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    made = QuantizedLinear(layer, kind)
    weight = rounded(layer.weight.detach(), kind)
    error = float((weight - layer.weight).abs().mean() / layer.weight.abs().mean())
    assert error < {"nf4": 0.1, "int8": 0.01}[kind]
    x = torch.randn(3, 128, requires_grad=True)
    other = x.detach().clone().requires_grad_(True)
    y = made(x)
    expected = nn.functional.linear(other, weight, layer.bias)
    torch.testing.assert_close(y, expected)
    for out in (y, expected):
        out.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    floating = [name for name, p in made.named_parameters() if p.is_floating_point()]
    assert floating == ["bias"]  # FSDP would cast any other
    own = quantized(layer.weight.detach(), kind)
    assert made.tensors().keys() == own.keys()
    for name, tensor in made.tensors().items():  # of whose bytes the digest of a start is made
        assert tensor.dtype == own[name].dtype and torch.equal(tensor, own[name])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_its_bytes(kind, tiny_model):
    """Those of its numbers and scales are what the plan counts, beside the tables of codes."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    blocks = model.model.layers
    numbers = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    n_layers = sum(type(m) is nn.Linear for m in blocks.modules())
    quantize(model, kind, None)
    codes = {"nf4": 16 * 4 + 256 * 4 + 4, "int8": 256 * 4}[kind]
    spare = n_layers * (codes + 2 * 4)  # the last block of each matrix may be cut
    assert 0 <= quantized_bytes(model) - numbers * BYTES[kind] <= spare


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_copy_to_sample_from_is_quantized(dtype, tiny_model, compose):
    """It computes with the same weights, in the precision of the copy."""
    options = [*QLORA, "adapter=dora", "model.quantize=nf4", f"model.name_or_path={tiny_model}"]
    config = compose("exp_name=x", *options)
    policy = load_policy(config, adapter=knobs_of(config))
    copied = UnshardedCopy(torch.device("cpu"), dtype).updated(policy)
    layers = quantized_layers(policy)
    assert layers.keys() == quantized_layers(copied).keys()
    for name, layer in quantized_layers(copied).items():
        assert torch.equal(layer.weight, layers[name].weight)
    ids = torch.arange(8)[None]
    if dtype is None:
        assert torch.equal(copied(ids).logits, policy(ids).logits)
    assert copied(ids).logits.dtype == (dtype or torch.float32)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_reference_is_the_quantized_start(kind, train, tiny_model, tmp_path):
    """Live and cached: the first rewards are 0, and both train the same. eval.py, which merges the
    adapter into what the quantized layers compute with, and compares with such a start, finds the
    run's own loss; so does an export.
    """
    found = {}
    for reference in ("live", "cached"):
        options = [*QLORA, f"model.quantize={kind}", f"reference={reference}", *BRIEF]
        run_dir = train(reference, *DPO, *options)
        first = records(run_dir, "train")[0]
        assert first["loss/train"] == pytest.approx(0.693147, abs=1e-4)
        found[reference] = records(run_dir, "eval")[-1]["loss/eval"]
    assert found["live"] == pytest.approx(found["cached"], abs=1e-5)
    assert not any("packed" in name or "base_layer" in name for name in state_of(run_dir))
    out = tmp_path / "eval.json"
    evaluate(run_dir, "--out", out)
    assert json.loads(out.read_text())["metrics"]["loss/eval"] == pytest.approx(
        found["cached"], abs=1e-4
    )
    command = export_command.parser().parse_args([str(run_dir), "--out", str(tmp_path / "hf")])
    export_command.main(command)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    merged, base = kept(run_dir), kept(tiny_model)
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(exported[name], merged[name])
    change = merged[name] - rounded(base[name], kind)
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 4
    with pytest.raises(UserError, match="belongs to weights of model.quantize="):
        export_command.main(
            export_command.parser().parse_args([str(run_dir), "--peft", str(tmp_path / "peft")])
        )


@pytest.mark.parametrize(
    "options",
    [[*QLORA, "model.quantize=nf4"], [*QLORA], []],
    ids=["quantized", "adapter", "full"],
)
def test_other_commands_round_the_base_as_the_run_did(options, train, tiny_model, tmp_path):
    """A base that is stored in float32 was rounded to bfloat16 before it was quantized. What the
    adapter is merged into is that, to the bit, and so is the reference, whatever they are read in.
    """
    run_dir = train("run", *DPO, *options, *BRIEF, "model.policy_dtype=bfloat16")
    ref = find_model(str(run_dir))
    reference = load_policy(start_of(ref)).state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    expected = kept(tiny_model)[name].bfloat16()
    if "model.quantize=nf4" in options:
        expected = rounded(expected, "nf4")
    assert torch.equal(reference[name], expected.float())
    if not options:
        return
    state = load_policy_state(str(run_dir))
    state |= {key: torch.zeros_like(x) for key, x in state.items() if "lora_B" in key}
    torch.save({"state": state}, tmp_path / "policy.pt")  # not over a file that is mapped
    (tmp_path / "policy.pt").replace(ref.archive)
    assert torch.equal(kept(run_dir)["lm_head.weight"], reference["lm_head.weight"])
    torch.testing.assert_close(kept(run_dir)[name], expected.float(), rtol=1e-6, atol=1e-8)


def test_one_run_after_another(train):
    """LoRA on nf4 -> LoRA on nf4, which quantizes what the first has become, and -> all weights."""
    first = train("first", "loss=sft", "batch_size=4", *QLORA, "model.quantize=nf4", *BRIEF)
    for name, options in (
        ("again", [*QLORA, "model.quantize=nf4"]),
        ("continued", ["adapter=lora", "adapter_previous=continue"]),
        ("full", ["lr=1e-3"]),
    ):
        run_dir = train(name, *DPO, *BRIEF, f"model.archive={first}", "reference=live", *options)
        assert records(run_dir, "train")[0]["loss/train"] == pytest.approx(0.693147, abs=1e-4)


def test_it_resumes_to_the_bit(train):
    options = [*DPO, *QLORA, "adapter=dora", "model.quantize=nf4", *BRIEF, "resume=auto"]
    options += ["save_every=4", "n_examples=12", "optimizer=AdamW8bit"]
    whole = outcome(train("whole", *options))
    with halted_after(2):
        train("halted", *options)
        pytest.fail("it was not halted")
    assert same(outcome(train("halted", *options)), whole)


REFUSED = {
    "adapter=none: only an adapter can be trained on them": [],
    "compile=True: quantized layers are not compiled": [*QLORA, "compile=true"],
    "TensorParallelTrainer: quantized weights are not split": [
        *QLORA,
        "trainer=TensorParallelTrainer",
        "n_cpu_processes=2",
    ],
    "policy_dtype=float64": [*QLORA, "model.policy_dtype=float64"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message, train):
    with pytest.raises(UserError, match=f"model.quantize=nf4: .*{message}"):
        train("refused", *DPO, "model.quantize=nf4", *REFUSED[message])


def in_halves(base, *runs):
    """Train these runs, (config, halt) each, in the processes of a group. Each process must have
    loaded about half of what is packed, and compute with the rounded weights of `base`.
    """
    place = trainers.FSDPTrainer.place
    full = AutoModelForCausalLM.from_pretrained(base)

    def measured(self, model):
        layers = quantized_layers(model)
        kept = [p for layer in layers.values() for p in layer.parameters(recurse=False)]
        mine, whole = (sum(x.nbytes for x in some) for some in (map(sharding.local, kept), kept))
        assert 0.48 < mine / whole < 0.52
        for name, layer in layers.items():
            weight = full.get_submodule(name.removesuffix(".base_layer")).weight
            expected = rounded(weight.detach(), layer.kind)
            layer.register_forward_pre_hook(partial(computes_with, expected))
        return place(self, model)

    trainers.FSDPTrainer.place = measured
    for config_of, halt in runs:
        train_until(config_of, halt)


def computes_with(expected, layer, inputs):
    assert torch.equal(layer.weight, expected)


def test_two_processes_do_as_one(train, of_two, tiny_model, tmp_path):
    """Each of two gloo ranks has half of what is packed. The adapters are those of one process, up
    to rounding in float32, and to the bit those of the two when they are killed and resumed. The
    digest of the start is the same, so that either can continue the other's run.
    """
    options = [*DPO, *QLORA, STEADY, *BRIEF, "adapter=dora", "model.quantize=nf4", "resume=auto"]
    options += ["reference=live", "save_every=4"]
    mixed = ["model.quantize=int8", "reference=cached", "model.fsdp_policy_mp=bfloat16"]

    runs = [("two", None), ("halted", 2), ("halted", None)]
    runs = [(of_two(name, *options), halt) for name, halt in runs]
    runs.append((of_two("mixed", *options, *mixed, "n_examples=4"), None))
    run_in_group(2, in_halves, tiny_model, *runs)
    one = train("one", *options)
    two = outcome(tmp_path / "two")
    assert same(two, outcome(one), tolerance=1e-6)
    assert same(outcome(tmp_path / "halted"), two)
    starts = [latest_valid(run).manifest.fingerprint["weights"] for run in (one, tmp_path / "two")]
    assert starts[0] == starts[1]
    for name, rounding in (("two", 0), ("mixed", 1e-3)):
        first = records(tmp_path / name, "train")[0]
        assert abs(first["rewards_train/chosen"]) <= rounding
        assert abs(first["rewards_train/rejected"]) <= rounding
    out = tmp_path / "eval.json"
    evaluate(tmp_path / "two", "--out", out)
    assert json.loads(out.read_text())["metrics"]["loss/eval"] == pytest.approx(
        records(tmp_path / "two", "eval")[-1]["loss/eval"], abs=1e-4
    )


def test_weights_that_are_not_finite_are_refused(train, tiny_model, tmp_path):
    """As without quantization; int8 has no NaN, and would hide it."""
    path = shutil.copytree(tiny_model, tmp_path / "damaged")
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    model.save_pretrained(path)
    with pytest.raises(UserError, match="layers.1.mlp.down_proj.weight holds NaN"):
        train("x", *DPO, *QLORA, "model.quantize=int8", f"model.name_or_path={path}")


def test_a_torch_that_does_not_shard_them_is_refused(train, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    with pytest.raises(UserError, match="torch 2.11.0 shards no quantized weights; install torch"):
        train("old", *DPO, *QLORA, "model.quantize=nf4", "trainer=FSDPTrainer")
