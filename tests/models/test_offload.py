"""Activations in the host's RAM: the same gradients, from copies; the plan counts what stays."""

import pytest
import torch
from test_blocks import llama
from tiny import LLAMA, SIZES
from transformers import AutoConfig

from plumb.errors import UserError
from plumb.models import offload
from plumb.planning import activations
from plumb.settings.validation import validate


def test_gradients_come_from_the_copies(monkeypatch):
    """Bit for bit; no copy of a weight; and a copy that is changed changes the gradients."""
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
        with offload.activations_on_host(model):
            loss = model(input_ids=torch.arange(30)[None], use_cache=False).logits.logsumexp(-1)
        for copy in copies:
            if copy.is_floating_point():
                copy.mul_(damage)
        loss.sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    same, other = gradients(), gradients(damage=1.5)
    weights = {p.shape for p in model.parameters()}
    assert copies and not any(copy.shape in weights for copy in copies if copy.dim() == 2)
    monkeypatch.setattr(offload, "LEAST_BYTES", 1 << 60)
    truth = gradients()
    assert not copies
    assert all(map(torch.equal, same, truth)) and not all(map(torch.equal, other, truth))


def test_the_plan_counts_what_stays():
    """Of 8 layers, all of whose activations would be kept, less stays than with recomputation."""
    config = AutoConfig.for_model("llama", **(SIZES | LLAMA | {"hidden_size": 512}))
    config.num_hidden_layers = 8
    kept, recomputed, elsewhere = (
        sum(activations.count(config, (1, 2048), 2500, torch.float32, None, *how))
        for how in ((False, False), (True, False), (False, True))
    )
    assert 0 < elsewhere < recomputed < kept


def test_a_run_is_the_same(train, monkeypatch):
    from runs import DPO, records

    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    a, b = (
        records(train(f"off{x}", *DPO, f"activation_offload={x}"), "train")[-1]
        for x in ("false", "true")
    )
    assert a["loss/train"] == b["loss/train"] and a["grad_norm"] == b["grad_norm"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("activation_checkpointing=true", "activation_offload=true: cannot be combined with"),
        ("compile=true", "activation_offload=true: cannot be combined with compile=True"),
        ("trainer=FSDPTrainer", "is for trainer=BasicTrainer"),
    ],
)
def test_what_is_refused(option, said, compose):
    options = ["exp_name=x", "model.name_or_path=x", "loss=sft", "n_cpu_processes=2"]
    if "FSDP" not in option:
        options.pop()
    with pytest.raises(UserError, match=said):
        validate(compose(*options, "activation_offload=true", option))
