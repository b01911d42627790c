"""Runs whose adapters are trained on quantized weights (QLoRA)."""

import json

import pytest
import torch
from groups import halted_after
from runs import DPO, evaluate, outcome, records, same, state_of
from torch import nn
from transformers import AutoModelForCausalLM

import export as export_command
from plumb.errors import UserError
from plumb.models.find import find_model, open_model
from plumb.models.quantized_base import BYTES, QuantizedLinear, quantize, quantized_bytes, rounded

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
    quantized = QuantizedLinear(layer, kind)
    weight = rounded(layer.weight.detach(), kind)
    error = float((weight - layer.weight).abs().mean() / layer.weight.abs().mean())
    assert error < {"nf4": 0.1, "int8": 0.01}[kind]
    x = torch.randn(3, 128, requires_grad=True)
    other = x.detach().clone().requires_grad_(True)
    y = quantized(x)
    expected = nn.functional.linear(other, weight, layer.bias)
    torch.testing.assert_close(y, expected)
    for out in (y, expected):
        out.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert list(dict(quantized.named_parameters())) == ["bias"]


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
    "trainer=FSDPTrainer: quantized weights are not sharded": [
        *QLORA,
        "trainer=FSDPTrainer",
    ],
    "compile=True: quantized layers are not compiled": [*QLORA, "compile=true"],
    "policy_dtype=float64": [*QLORA, "model.policy_dtype=float64"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message, train):
    with pytest.raises(UserError, match=f"model.quantize=nf4: .*{message}"):
        train("refused", *DPO, "model.quantize=nf4", *REFUSED[message])
