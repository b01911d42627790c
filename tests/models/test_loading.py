"""A sharded model holds, part by part, exactly what a model loaded in one piece holds; and no rank
holds more than its part.
"""

import hashlib
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, compose_config
from groups import run_in_group
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, SIZES, tiny_model

from plumb.distributed import sharding
from plumb.models import load
from plumb.models.reference_cache import weights_digest
from plumb.runs.policy_file import as_in_2023
from trainers import FSDPTrainer, TensorParallelTrainer


def same(configs, trainer):
    """The model as `trainer` loads it is the one that BasicTrainer loads, and so is a reference to
    it, of its own precision and of another one in turn.
    """
    for i, config in enumerate(configs):
        layout = trainer.make_layout(config)
        expected, policy = load.load_policy(config), load.load_policy(config, layout=layout)
        compare(expected, policy)
        for a, b in (
            (policy.generation_config, expected.generation_config),
            (policy.config, expected.config),
        ):
            a, b = a.to_dict() | {"_name_or_path": ""}, b.to_dict() | {"_name_or_path": ""}
            assert a == b, {
                key: (a.get(key), b.get(key))
                for key in a.keys() | b.keys()
                if a.get(key) != b.get(key)
            }
        dtype = (None, torch.bfloat16)[i % 2]
        of_whole = load.load_reference(expected, dtype, config, None)
        compare(of_whole, load.load_reference(policy, dtype, config, layout))
        dist.barrier()


def compare(expected, found):
    state = dict(found.state_dict(keep_vars=True))
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        got = sharding.full_tensor(state[name].detach())
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), name
    buffers = dict(found.named_buffers())
    for name, buffer in expected.named_buffers():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name
    assert [p.requires_grad for p in found.parameters()] == [
        p.requires_grad for p in expected.parameters()
    ]
    n = {
        name: sum(p.numel() for p in m.parameters())
        for name, m in (("expected", expected), ("found", found))
    }
    assert n["expected"] == n["found"]  # tied weights stay tied
    if dist.get_world_size() > 1:
        kept = sum(
            part.numel()
            for name, part, _ in sharding.parts(found)
            if name in dict(found.named_parameters())
        )
        assert kept < 0.75 * n["found"]
    assert weights_digest(found) == digest(expected)


def digest(model):
    """As one process computes it, written down once more."""
    of_all = b""
    for name, tensor in sorted(model.state_dict().items()):
        content = f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + bytes(
            tensor.contiguous().view(-1).view(torch.uint8).numpy()
        )
        of_all += hashlib.blake2b(content).digest()
    return hashlib.blake2b(of_all).hexdigest()[:32]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Everything that a policy may come from, tiny."""
    folder, tokenizer = tmp_path_factory.mktemp("sources"), ROOT / "demo/tokenizer"
    found = {}
    for family in ("llama", "gpt_neox", "gpt2", "qwen3", "gemma3_text"):
        tiny_model(family).save_pretrained(folder / family)
        found[family] = [f"model.name_or_path={folder / family}"]
    tiny_model("llama").save_pretrained(folder / "many", max_shard_size="20KB")
    assert len(list((folder / "many").glob("*.safetensors"))) > 2
    found["several files"] = [f"model.name_or_path={folder / 'many'}"]
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder / "bfloat16")
    found["other precision"] = [
        f"model.name_or_path={folder / 'bfloat16'}",
        "model.policy_dtype=float64",
    ]
    # as GPT-2 is on the hub: names of the body, without its prefix
    shutil.copytree(folder / "gpt2", folder / "bare")
    state = {
        k.removeprefix("transformer."): v
        for k, v in load_file(folder / "bare/model.safetensors").items()
    }
    save_file(state, folder / "bare/model.safetensors", {"format": "pt"})
    found["no prefix"] = [f"model.name_or_path={folder / 'bare'}"]
    policy = tiny_model("gpt_neox")
    torch.save({"step_idx": 1, "state": policy.state_dict(), "metrics": {}}, folder / "policy.pt")
    found["archive"] = [*found["gpt_neox"], f"model.archive={folder / 'policy.pt'}"]
    torch.save(
        {"step_idx": 1, "state": as_in_2023(policy, policy.state_dict()), "metrics": {}},
        folder / "2023.pt",
    )
    found["archive of 2023"] = [*found["gpt_neox"], f"model.archive={folder / '2023.pt'}"]
    tiny_model("llama").save_pretrained(folder / "pickled")
    state = load_file(folder / "pickled/model.safetensors")
    (folder / "pickled/model.safetensors").unlink()
    torch.save(state, folder / "pickled/pytorch_model.bin")
    found["no safetensors"] = [f"model.name_or_path={folder / 'pickled'}"]
    for family in ("llama", "gpt_neox", "gpt2", "qwen3"):
        sizes = ", ".join(f"{k}: {v}" for k, v in (SIZES | FAMILIES[family]).items())
        tied = ", tie_word_embeddings: true" if family == "qwen3" else ""
        found[f"random {family}"] = [
            "model.name_or_path=null",
            f"model.tokenizer_name_or_path={tokenizer}",
            "seed=3",
            f"model.architecture={{model_type: {family}, {sizes}{tied}}}",
        ]
    return found


@pytest.mark.parametrize(
    "n, trainer, options",
    [
        (3, FSDPTrainer, []),
        (4, TensorParallelTrainer, ["tp_size=2"]),
    ],
)
def test_the_same_weights_part_by_part(n, trainer, options, sources):
    cases = list(sources.values())
    if trainer is TensorParallelTrainer:
        cases = [
            sources[name]
            for name in ("llama", "gpt_neox", "qwen3", "archive of 2023", "random llama")
        ]
    configs = [compose_config("exp_name=x", *overrides, *options) for overrides in cases]
    run_in_group(n, same, configs, trainer)
