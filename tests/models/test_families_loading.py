"""Every family's weights as each trainer loads them, from a folder whose config says the head is
tied, be that so or not.
"""

import json

import torch
import torch.distributed as dist
from conftest import compose_config
from families import FAMILIES, save_family
from groups import run_in_group
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from plumb.distributed import collectives, sharding
from plumb.models import load
from plumb.models.weight_files import Weights
from trainers import FSDPTrainer

# an expert has a tensor of its own
MERGED = (
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "jamba",
    "ernie4_5_moe",
    "minimax",
)
TOKENS = torch.arange(3, 27)[None]


def say_tied(folder):
    """Where the head is not tied, config.json says that it is; but for DBRX, which refuses that."""
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["model_type"] != "dbrx"
    (folder / "config.json").write_text(json.dumps(config))


def stored(folder):
    """Name in the files -> shape."""
    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            shapes |= {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    return shapes


@torch.no_grad()
def check(folders, expected_logits):
    """Weights and first evaluation of FSDPTrainer and BasicTrainer are those of transformers, in
    one process or several.
    """
    wrong = {}
    for name, folder in folders.items():
        try:
            config = compose_config("exp_name=x", f"model.name_or_path={folder}")
            layout = FSDPTrainer.make_layout(config)
            policy, whole = load.load_policy(config, layout=layout), load.load_policy(config)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            states = [dict(m.state_dict(keep_vars=True)) for m in (theirs, whole, policy)]
            assert states[0].keys() == states[1].keys() == states[2].keys()
            for key, tensor in states[0].items():
                for state in states[1:]:
                    assert torch.equal(sharding.full_tensor(state[key].detach()), tensor), key
            tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
            # of others the entry says nothing
            can_tie = bool(getattr(theirs, "_tied_weights_keys", None))
            for model in (whole, policy):
                assert (
                    model.get_output_embeddings().weight is model.get_input_embeddings().weight
                ) == tied
                assert bool(model.config.tie_word_embeddings) == tied or not can_tie
            if expected_logits:
                expected = theirs.eval()(TOKENS, use_cache=False).logits
                for model in (whole, policy):
                    found = model.eval()(TOKENS, use_cache=False).logits
                    off = float((found - expected).abs().max() / expected.abs().max())
                    # some roundings of float32, 6e-8 each
                    assert off < 1e-5, f"logits off by {off:.1e} of the largest"
        except Exception as error:  # all are named, not the first alone
            wrong[name] = f"{type(error).__name__}: {error}"[:300]
    assert not wrong, wrong


def check_read(folders):
    """No process reads more of a mixture of experts than its part, and a whole weight only where it
    is small.
    """
    check(folders, expected_logits=False)
    read = Weights.read
    for name, folder in folders.items():
        seen = []

        def count(self, key, where=(), seen=seen):
            seen.append((key, part := read(self, key, where)))
            return part

        Weights.read = count
        config = compose_config("exp_name=x", f"model.name_or_path={folder}")
        load.load_policy(config, layout=FSDPTrainer.make_layout(config))
        Weights.read = read
        total = sum(torch.Size(shape).numel() for shape in stored(folder).values())
        mine = sum(part.numel() for _, part in seen)
        assert mine < 0.6 * total, (name, mine, total)  # half, and rows where their number is odd
        everyones = sum(collectives.all_gather_object(mine))
        assert total <= everyones < 1.05 * total, (name, everyones, total)
    dist.barrier()


def test_every_family_is_loaded_as_transformers_loads_it(tmp_path):
    folders = {name: save_family(tmp_path / name, name) for name in FAMILIES}
    for folder in folders.values():
        say_tied(folder)
    run_in_group(1, check, folders, True, timeout=600)


def test_experts_are_read_part_by_part(tmp_path):
    run_in_group(
        2, check_read, {name: save_family(tmp_path / name, name) for name in MERGED}, timeout=300
    )
