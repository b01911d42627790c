"""Checkpoints: whole after a kill, readable by the 2023 code and from it, refused when they are
something else.
"""

import os
import subprocess
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from plumb.errors import StorageError, UserError
from plumb.models import load
from plumb.runs import checkpoints, durable_files, policy_file, policy_path

ROOT = Path(__file__).parents[2]


def save(run_dir, examples, parts, metrics, keep=None, best_by="loss/eval", interim=False):
    """A checkpoint of these states, as a run would save it."""
    saver = checkpoints.Saver(run_dir, in_background=False, keep=keep, best_by=best_by)
    manifest = checkpoints.Manifest(
        step=examples,
        examples=examples,
        finished=False,
        evaluation_due=False,
        metrics=dict(metrics or {}),
        fingerprint={},
        decisions={},
        logs={},
        order="",
    )
    run_dir.mkdir(exist_ok=True)
    name = f"{'interim' if interim else 'step'}-{examples}"
    saver.save(
        name,
        {part: partial(dict, state) for part, state in parts.items()},
        {"policy.w": torch.ones(2)},
        manifest,
        0,
    )


PARTS = {
    "policy": {"w": torch.arange(6.0)},
    "optimizer": {"state": {}, "param_groups": []},
    "scheduler": {"last_epoch": 3},
}


def test_the_2023_form(tmp_path):
    save(tmp_path, 64, PARTS, {"loss/eval": 0.5})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-64"]
    for name in PARTS:
        content = torch.load(tmp_path / "LATEST" / f"{name}.pt", weights_only=True)
        assert set(content) == {"step_idx", "state", "metrics"} and content["step_idx"] == 64
        assert content["metrics"] == {"loss/eval": 0.5}
    save(tmp_path, 128, PARTS, None)
    assert os.readlink(tmp_path / "LATEST") == "step-128"
    assert torch.load(tmp_path / "LATEST" / "policy.pt", weights_only=True)["metrics"] == {}


def test_what_is_pruned(tmp_path):
    """Interim checkpoints when a newer one is valid; evaluated ones beyond `keep`, except the
    best; never a file that the run did not write.
    """
    losses = {10: 0.5, 20: 0.2, 30: 0.3, 40: 0.4, 50: 0.6}

    def kept(keep, metric="loss/eval"):
        run = tmp_path / f"{keep}{metric[:4]}"
        (run / "step-5").mkdir(parents=True)  # without a manifest
        for n, loss in losses.items():
            save(run, n, PARTS, {"loss/eval": loss, "rewards_eval/accuracies": loss}, keep, metric)
            save(run, n + 5, PARTS, {}, keep, metric, interim=True)
            assert checkpoints.latest_valid(run).path.name == f"interim-{n + 5}"
        return {p.name for p in run.iterdir()} - {"step-5", "LATEST"}

    assert kept(None) == {"step-10", "step-20", "step-30", "step-40", "step-50", "interim-55"}
    assert kept(1) == {"step-20", "step-50", "interim-55"}
    assert kept(2) == {"step-20", "step-40", "step-50", "interim-55"}
    assert kept(1, "rewards_eval/accuracies") == {"step-50", "interim-55"}


def test_archive_may_be_a_file_a_run_a_step_or_a_pattern(tmp_path):
    old, new = tmp_path / "sft_2026-01-01", tmp_path / "sft_2026-01-02"
    for i, run in enumerate((old, new)):
        save(run, 10, PARTS, None)
        save(run, 20, PARTS, None)
        os.utime(run / "step-20" / "policy.pt", (1000 + i, 1000 + i))
    resolve = lambda text: policy_path.resolve_archive(str(text)).resolve()
    newest = (new / "step-20/policy.pt").resolve()
    assert resolve(new) == resolve(new / "LATEST") == resolve(new / "LATEST/policy.pt") == newest
    assert resolve(old / "step-10") == (old / "step-10/policy.pt").resolve()
    assert resolve(tmp_path / "sft_*") == newest and resolve(tmp_path / "*" / "LATEST") == newest
    (new / "LATEST").unlink()
    assert resolve(new) == newest  # without the pointer, the highest step
    with pytest.raises(
        UserError, match="model.archive=.*nothing: no such file, run directory or pattern"
    ):
        resolve(tmp_path / "nothing")


SAVER = """
import resource, sys, torch
sys.path[:0] = ["tests/runs", "tests/support"]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from pathlib import Path
from test_checkpoints import save
save(Path(sys.argv[1]), 2, {"policy": {"w": torch.zeros(1 << 20)}}, None)
"""


def test_a_file_size_limit_in_the_middle_of_torch_save(tmp_path):
    """A real limit, in a real process; torch's own zip writer might abort it."""
    save(tmp_path, 1, PARTS, None)
    done = subprocess.run(
        [sys.executable, "-c", SAVER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        "StorageError" in done.stderr
        and "step-2 could not be written (File too large)" in done.stderr
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-1"]


def test_a_full_disk_leaves_one_line_and_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, PARTS, None)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable_files.os, "fsync", full)
    with pytest.raises(
        StorageError,
        match="step-2 could not be written .No space left on device.; it takes .* free some space",
    ):
        save(tmp_path, 2, PARTS, None)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["LATEST", "step-1"]


def folder(family: str, path: Path) -> Path:
    tiny_model(family).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_policy_pt_goes_round(family, old, tmp_path, compose):
    """Saved in either format and read back to the same logits."""
    path = folder(family, tmp_path / "m")
    policy = load.load_policy(compose(f"model.name_or_path={path}"))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    state = policy_file.as_in_2023(policy, policy.state_dict()) if old else policy.state_dict()
    save(tmp_path / "run", 8, {"policy": state}, None)
    again = load.load_policy(compose(f"model.name_or_path={path}", f"model.archive={tmp_path}/run"))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(policy.eval()(ids).logits, again.eval()(ids).logits)
    if not old:
        policy.load_state_dict(policy_file.load_policy_state(str(tmp_path / "run")), strict=True)


# What transformers 4.29.2, the 2023 repository's, has in the state dict of each model's first layer
# beside its parameters, and its name of GPT-NeoX's head. Read off that version;
# policy_format=repo2023 files were loaded by it, strictly, once by hand.
KEPT = {
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": (1, 1, 256, 256),
        "gpt_neox.layers.0.attention.masked_bias": (),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (1,),
        "embed_out.weight": (259, 32),
    },
    "gpt2": {"transformer.h.0.attn.bias": (1, 1, 256, 256), "transformer.h.0.attn.masked_bias": ()},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)},
}


@pytest.mark.parametrize("family", KEPT)
def test_the_2023_format_has_the_names_and_buffers_of_transformers_4_29(family):
    model = tiny_model(family)
    state = policy_file.as_in_2023(model, model.state_dict())
    extra = {
        k: tuple(v.shape)
        for k, v in state.items()
        if k not in model.state_dict() and ".1." not in k
    }
    assert extra == KEPT[family]
    assert ("lm_head.weight" in state) == (family != "gpt_neox")


def test_a_policy_pt_of_2023(tmp_path, compose):
    """Pythia as transformers 4.29 named it: embed_out, and buffers that are computed today; an
    OrderedDict, plain torch.save.
    """
    path = folder("gpt_neox", tmp_path / "m")
    model = load.load_policy(compose(f"model.name_or_path={path}"))
    state = OrderedDict(
        (k, v + 1) for k, v in policy_file.as_in_2023(model, model.state_dict()).items()
    )
    torch.save(
        {"step_idx": 19968, "state": state, "metrics": {"loss/eval": 1.5}}, tmp_path / "policy.pt"
    )
    policy = load.load_policy(
        compose(f"model.name_or_path={path}", f"model.archive={tmp_path}/policy.pt")
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(policy.get_parameter(name).data, parameter.data + 1)
