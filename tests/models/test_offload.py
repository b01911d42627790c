"""Activations in the host's RAM: the same gradients, from copies; the plan counts what stays."""

import pytest
import torch
from groups import run_in_group, train_until
from runs import DPO, STEADY, outcome, records, same
from test_blocks import llama
from tiny import LLAMA, SIZES
from transformers import AutoConfig

from plumb.errors import UserError
from plumb.models import offload
from plumb.planning import activations
from plumb.settings.validation import validate


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_come_from_the_copies(autocast, monkeypatch):
    """Bit for bit; no copy of a weight, nor of what autocast makes of one; and a copy that is
    changed changes the gradients.
    """
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    model = llama(2)
    copies, real = [], offload.to_host

    def noting(x):
        copies.append(real(x))
        return copies[-1]

    monkeypatch.setattr(offload, "to_host", noting)

    def gradients(damage=1.0):
        model.zero_grad()
        copies.clear()
        precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with offload.activations_on_host(), precision:
            loss = model(input_ids=torch.arange(30)[None], use_cache=False).logits.logsumexp(-1)
        for copy in copies:
            if copy.is_floating_point():
                copy.mul_(damage)
        loss.sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    same, other = gradients(), gradients(damage=1.5)
    weights = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
    assert copies and not any(copy.shape in weights for copy in copies if copy.dim() == 2)
    monkeypatch.setattr(offload, "LEAST_BYTES", 1 << 60)
    truth = gradients()
    assert not copies
    assert all(map(torch.equal, same, truth)) and not all(map(torch.equal, other, truth))


def test_the_plan_counts_what_stays():
    """Of 8 layers, all of whose activations would be kept, less stays than with recomputation;
    blocks that are recomputed leave their inputs, which would stay.
    """
    config = AutoConfig.for_model("llama", **(SIZES | LLAMA | {"hidden_size": 512}))
    config.num_hidden_layers = 8
    kept, recomputed, elsewhere, both = (
        sum(activations.count(config, (1, 2048), 2500, torch.float32, None, *how))
        for how in ((False, False), (True, False), (False, True), (True, True))
    )
    assert 0 < elsewhere < recomputed < kept
    inputs = 8 * 2048 * 512 * 4
    assert recomputed - inputs <= both < recomputed - inputs * 6 / 8


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_is_the_same(recompute, train, monkeypatch):
    """To the bit. Of recomputed blocks only the inputs are copied."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    copies, real = [], offload.to_host
    monkeypatch.setattr(offload, "to_host", lambda x: copies.append(x.shape) or real(x))
    options = [*DPO, f"activation_checkpointing={recompute}", "n_examples=8"]
    a, b = (
        records(train(f"off{x}", *options, f"activation_offload={x}"), "train")[-1]
        for x in ("false", "true")
    )
    assert a["loss/train"] == b["loss/train"] and a["grad_norm"] == b["grad_norm"]
    wide = {shape[-1] for shape in copies if len(shape) == 3}
    assert LLAMA["hidden_size"] in wide
    assert (LLAMA["intermediate_size"] in wide) != recompute


def test_two_processes_do_as_one(train, of_two, tmp_path, monkeypatch):
    """And copy none of the weights that FSDP has gathered."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    options = [*DPO, STEADY, "model.policy_dtype=float64", "n_examples=8", "reference=live"]
    options += ["activation_offload=true"]
    run_in_group(2, train_and_see_copies, of_two("two", *options))
    assert same(outcome(tmp_path / "two"), outcome(train("one", *options)), tolerance=1e-8)


def train_and_see_copies(config_of):
    """Train, in each process of a group, and fail for a copy of what is trained itself."""
    of_weights, real = [], offload.to_host

    def noting(x):
        source = x if x._base is None else x._base
        of_weights.append(source.is_leaf and source.requires_grad)
        return real(x)

    offload.to_host = noting
    train_until(config_of, None)
    assert of_weights and not any(of_weights)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("compile=true", "activation_offload=true: compiled blocks keep their own"),
        (
            "trainer=TensorParallelTrainer",
            "activation_offload=True: is for trainer=BasicTrainer and trainer=FSDPTrainer",
        ),
    ],
)
def test_what_is_refused(option, said, compose):
    options = ["exp_name=x", "model.name_or_path=x", "loss=sft", "n_cpu_processes=2"]
    if "Parallel" not in option:
        options.pop()
    with pytest.raises(UserError, match=said):
        validate(compose(*options, "activation_offload=true", option))
