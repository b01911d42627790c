"""The cached reference: the same numbers as the live one, found again, and never used when it is
not the right one.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from groups import halted_after, run_in_group
from runs import DPO, FAST, STEADY, records
from safetensors import SafetensorError
from tiny import tiny_model as random_model

import trainers
from plumb.batching.layout import pack
from plumb.data.tokenization import Example
from plumb.distributed import collectives
from plumb.errors import UserError
from plumb.models import logps, reference_cache
from plumb.models.forward_path import PLAIN_PATH, ForwardPath, use_tree_attention
from plumb.models.reference_cache import (
    Computation,
    ReferenceCache,
    described,
    response_digests,
    weights_digest,
)
from plumb.runs.checkpoints import read_manifest


def example(prompt, *responses):
    return Example(np.array(prompt, np.int32), tuple(np.array(r, np.int32) for r in responses), "")


def only_file(run):
    (path,) = (run.parent / "runs").glob("*/reference_cache/*.safetensors")
    return path


def test_a_digest_belongs_to_the_ids_alone():
    a = response_digests([example([1, 2], [3], [4]), example([1], [2, 3], [4])])
    # also where prompt and response join to the same ids
    assert a.shape == (2, 2) and len(set(a.ravel().tolist())) == 4
    b = response_digests([example([1], [2, 3]), example([1, 2], [4])])
    assert b.tolist() == [[a[1, 0]], [a[0, 1]]]


def digests_by_definition(examples):
    """The 8 bytes of blake2b over the prompt's ids as int32, "|", and the response's: the keys in
    every file written so far.
    """
    return [
        [
            int.from_bytes(
                hashlib.blake2b(p.tobytes() + b"|" + r.tobytes(), digest_size=8).digest(),
                sys.byteorder,
            )
            for p, r in zip(
                e.prompt if isinstance(e.prompt, tuple) else [e.prompt] * 2,
                e.responses,
                strict=True,
            )
        ]
        for e in examples
    ]


def many_pairs(n):
    """Of all kinds: long, empty, and with a prompt for each response."""
    rng = np.random.default_rng(0)
    some = lambda most: rng.integers(0, 200_000, rng.integers(0, most)).tolist()
    pairs = [example(some(300), some(100), some(9)) for _ in range(n - 2)]
    two_prompts = Example(
        (np.array([1], np.int32), np.array([2, 3], np.int32)), pairs[0].responses, ""
    )
    return [example([], [], []), *pairs, two_prompts]


def test_digests_are_those_of_earlier_files(monkeypatch):
    pairs = many_pairs(40)
    assert response_digests(pairs).tolist() == digests_by_definition(pairs)
    monkeypatch.setattr("plumb.models.reference_cache.CHUNK", 7)
    assert response_digests(pairs).tolist() == digests_by_definition(pairs)
    assert response_digests([]).shape == (0, 1) and response_digests([]).dtype == np.uint64


def share_digests(pairs, indices, expected):
    done = []
    original = reference_cache.response_digests
    reference_cache.response_digests = lambda mine: done.append(len(mine)) or original(mine)
    assert reference_cache.digests_of_all(pairs, indices).tolist() == expected
    assert collectives.all_gather_object(done) == [[4], [3], [3]]


def test_ranks_share_the_digests():
    """Of ten pairs three ranks digest 4, 3 and 3, and each gets all of them in their order."""
    pairs, indices = many_pairs(20), np.random.default_rng(1).permutation(20)[:10]
    run_in_group(
        3, share_digests, pairs, indices, digests_by_definition([pairs[i] for i in indices])
    )


def test_the_weights_digest_sees_every_bit():
    model, same = random_model(), random_model()
    assert weights_digest(model) == weights_digest(same)
    with torch.no_grad():
        same.lm_head.weight[3, 3] = torch.nextafter(same.lm_head.weight[3, 3], torch.tensor(1.0))
    assert weights_digest(model) != weights_digest(same) != weights_digest(model.to(torch.bfloat16))


def test_a_cache_finds_what_was_added_and_nothing_else(tmp_path):
    cache = ReferenceCache(tmp_path, {"weights": "a"})
    digests = np.array([[5, 9], [2, 7]], np.uint64)
    assert np.isnan(cache.find(digests)).all()
    cache.add(digests, np.array([[-1.0, -2.0], [-3.0, -4.0]]))
    # a later value replaces an earlier one
    cache.add(np.array([[1, 5]], np.uint64), np.array([[-5.0, -6.0]]))
    again = ReferenceCache(tmp_path, {"weights": "a"})
    assert (
        again.find(np.array([9, 5, 1, 3], np.uint64)).tolist()[:3] == [-2, -6, -5]
        and np.isnan(again.find(digests + 90)).all()
    )
    assert np.isnan(ReferenceCache(tmp_path, {"weights": "b"}).find(digests)).all()


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "nonsense"])
def test_a_damaged_or_foreign_file_is_not_used(damage, tmp_path):
    cache, digests = ReferenceCache(tmp_path, {"weights": "a"}), np.arange(50, dtype=np.uint64)
    cache.add(digests, -np.arange(50.0))
    content = cache.path.read_bytes()
    if damage == "foreign":
        other = ReferenceCache(tmp_path, {"weights": "b"})
        other.add(digests, np.zeros(50))
        content = other.path.read_bytes()
    damaged = {
        "cut": content[:-9],
        "flip": content[:-1] + bytes([content[-1] ^ 1]),
        "nonsense": b"nothing of the kind",
    }
    cache.path.write_bytes(damaged.get(damage, content))
    again = ReferenceCache(tmp_path, {"weights": "a"})
    assert (
        np.isnan(again.find(digests)).all()
        and "not used, and replaced" in again.problem
        and "\n" not in again.problem
    )
    again.add(digests, -np.arange(50.0))
    assert (
        ReferenceCache(tmp_path, {"weights": "a"}).find(digests).tolist()
        == (-np.arange(50.0)).tolist()
    )


def test_cached_and_live_train_the_same(train, tmp_path, capsys):
    """Two epochs: the same losses, gradient norms and evaluations; the second run computes nothing,
    a third what is new.
    """
    options = [*DPO, "n_epochs=2", "eval_every=8"]
    live = train("live", *options, "reference=live")
    cached = train("cached", *options, "reference=cached")
    for a, b in zip(records(live), records(cached), strict=True):
        for key in (k for k in a if k.startswith(("loss", "rewards", "logps", "grad_norm"))):
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=2e-6), key
    assert "reference: 0 of 18 examples" in capsys.readouterr().out
    before = only_file(cached).stat().st_mtime_ns
    # another order
    train("again", *options, "reference=cached", "shuffle=false", "data_rules.duplicate=drop")
    said = capsys.readouterr().out
    assert "reference: 18 of 18 examples" in said and "computed now" not in said
    assert only_file(cached).stat().st_mtime_ns == before
    # other ids
    train("shorter", *options, "reference=cached", "max_length=24", "max_prompt_length=8")
    assert "reference: 18 of 18" not in capsys.readouterr().out


def test_other_weights_are_another_reference(train, tmp_path, capsys):
    first = train("first", *DPO, "n_examples=8", "reference=cached")
    capsys.readouterr()
    train("second", *DPO, "n_examples=8", "reference=cached", f"model.archive={first}")
    said = capsys.readouterr().out
    assert "reference: 0 of 8 examples" in said and "policy and reference agree" in said
    assert len(list((tmp_path / "runs").glob("*/reference_cache/*.safetensors"))) == 2


def test_another_config_is_another_reference(train, tiny_model, tmp_path, capsys):
    """The same weights with other rotary frequencies, which no state dict holds."""
    train("as_it_was", *DPO, "n_examples=8", "reference=cached")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}})
    )
    capsys.readouterr()
    train("other_theta", *DPO, "n_examples=8", "reference=cached", f"model.name_or_path={other}")
    said = capsys.readouterr().out
    assert "reference: 0 of 8 examples" in said and "policy and reference agree" in said


COMPUTATION = Computation(
    weights_dtype="float32",
    dtype="torch.float32",
    cast_by=None,
    layout="packed trees, head in chunks",
    compile=False,
    device="cpu",
)
OTHERS = {
    "weights_dtype": "bfloat16",
    "dtype": "torch.bfloat16",
    "cast_by": "FSDPTrainer",
    "layout": "padded rows, own head",
    "compile": True,
    "device": "cuda",
}


BESIDES = [
    "weights",
    "revision",
    "commit",
    "config",
    "attention",
    "version",
    "torch",
    "transformers",
]


@pytest.mark.parametrize("part", [*vars(COMPUTATION), *BESIDES])
def test_every_part_of_the_key_tells_files_apart(part, tmp_path, monkeypatch):
    """Nothing but that part is changed, and a value that the first file has is not found in the
    second.
    """

    def cache(weights="a", revision=None, computation=COMPUTATION):
        return ReferenceCache(tmp_path, described(model, weights, revision, computation))

    model, digests = random_model(), np.array([7], np.uint64)
    cache().add(digests, np.array([-3.0]))
    assert cache().find(digests).tolist() == [-3]
    model.config._name_or_path = "elsewhere"  # which is no part
    assert cache().find(digests).tolist() == [-3]
    change = {
        "weights": lambda: {"weights": "b"},
        "revision": lambda: {"revision": 40 * "a"},
        "commit": lambda: setattr(model.config, "_commit_hash", 40 * "b"),
        "config": lambda: setattr(model.config, "rms_norm_eps", 1e-3),
        "attention": lambda: model.set_attn_implementation("eager"),
        "version": lambda: monkeypatch.setattr(
            reference_cache, "VERSION", reference_cache.VERSION + 1
        ),
        "torch": lambda: monkeypatch.setattr(reference_cache.torch, "__version__", "9.9"),
        "transformers": lambda: monkeypatch.setattr(
            reference_cache.transformers, "__version__", "9.9"
        ),
    }.get(part, lambda: {"computation": replace(COMPUTATION, **{part: OTHERS[part]})})
    assert np.isnan(cache(**(change() or {})).find(digests)).all()


def test_a_commit_that_was_asked_for_is_the_one_that_was_found():
    model = random_model()
    asked = described(model, "a", 40 * "c", COMPUTATION)
    model.config._commit_hash = 40 * "c"
    assert described(model, "a", None, COMPUTATION) == asked


class AnotherTrainer(trainers.BasicTrainer):
    """Which might cast in other places."""


@pytest.mark.parametrize(
    "before, after, found",
    [
        (["model.fsdp_policy_mp=bfloat16"], "trainer", False),
        ([], "trainer", True),  # without a cast it is the same computation
        ([], "model.fsdp_policy_mp=bfloat16", False),
        ([], "model.policy_dtype=bfloat16", False),
        ([], "model.reference_dtype=bfloat16", False),
        ([], "way", False),
        ([], "tokens_per_microbatch=100", True),
        ([], "loss.beta=0.3", True),
    ],
)
def test_what_a_run_finds_of_another(before, after, found, train, monkeypatch, capsys):
    """The key of a whole run: what changes its reference's log-probabilities, and no more."""
    options = [
        *DPO,
        "n_examples=4",
        "reference=cached",
        "do_first_eval=false",
        "do_last_eval=false",
        *before,
    ]
    train("first", *options)
    capsys.readouterr()
    if after == "trainer":
        monkeypatch.setitem(trainers.TRAINERS, "BasicTrainer", AnotherTrainer)
    if after == "way":
        monkeypatch.setattr(trainers.setup, "find_forward_path", lambda *_: (PLAIN_PATH, ""))
    train("second", *options, *([after] if "=" in after else []))
    assert f"reference: {4 if found else 0} of 4 examples" in capsys.readouterr().out


# By VERSION of models/reference_cache.py: log-probabilities, in nats, of the model and the
# responses of `by_formula`.
OF_VERSION = {1: [-16.959669048755323, -27.85639450930868, -10.995860099409281, 0.0]}


def by_formula():
    """A GPT-2 in float64 whose weights no generator draws, and a batch of two prompts with two
    responses each, one empty.
    """
    model = random_model("gpt2").double().eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(
                0.3
                * torch.sin(
                    torch.arange(p.numel(), dtype=torch.float64) * (0.7 + 0.1 * i) + i
                ).view_as(p)
            )
    rows = [example([5, 9, 40], [7, 8, 2], [100, 2]), example([30], [31, 32, 33, 34, 2], [])]
    return model, pack(rows, pad_token_id=0, longest=16)


@pytest.mark.parametrize("forward_path", [ForwardPath(True, True), PLAIN_PATH])
def test_the_version_of_log_probabilities(forward_path):
    """If this fails, cached references of earlier versions are no longer what is computed: raise
    VERSION, and add its numbers.

    To 1e-9 nats: float64 rounds sums of these sizes to some 1e-14, on any machine.
    """
    model, batch = by_formula()
    use_tree_attention(model)
    with torch.no_grad():
        found = logps.response_logps(model, batch, forward_path).sum.tolist()
    assert found == pytest.approx(OF_VERSION[reference_cache.VERSION], abs=1e-9, rel=0), found


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """safetensors has an error of its own for it; nothing half-written is left."""

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr("plumb.models.reference_cache.save_file", full)
    with pytest.raises(UserError, match="cannot be written .*No space left.*; set local_dirs"):
        ReferenceCache(tmp_path, {}).add(np.arange(3, dtype=np.uint64), np.zeros(3))
    assert not list(tmp_path.iterdir())


def test_two_runs_that_write_keep_what_both_found(tmp_path):
    a, b = ReferenceCache(tmp_path, {}), ReferenceCache(tmp_path, {})
    a.add(np.array([1], np.uint64), np.array([-1.0]))
    b.add(np.array([2], np.uint64), np.array([-2.0]))
    assert ReferenceCache(tmp_path, {}).find(np.array([1, 2], np.uint64)).tolist() == [-1, -2]


def test_a_reference_of_another_precision_is_cached_as_such(train, capsys):
    """2023 had a float16 reference beside a float32 policy: still possible, still said."""
    options = [*DPO, "n_examples=8", "model.reference_dtype=bfloat16"]
    live, cached = (
        records(train(x, *options, f"reference={x}"), "train")[0] for x in ("live", "cached")
    )
    assert (
        cached["rewards_train/chosen"] == pytest.approx(live["rewards_train/chosen"], rel=0.02) != 0
    )
    assert capsys.readouterr().out.count("DISAGREE") == 2


def test_a_cached_reference_is_no_second_model(train, monkeypatch):
    """And its samples are those of the policy before its first step."""
    monkeypatch.setattr(
        "plumb.models.load.load_reference", lambda *a: pytest.fail("a second model was made")
    )
    seen = []
    monkeypatch.setattr(
        trainers.BasicTrainer,
        "step",
        lambda self, *a: seen.append(self.scorer.reference) or step(self, *a),
    )
    run = train(
        "one_model",
        *DPO,
        "n_examples=8",
        "eval_every=4",
        "reference=cached",
        "sample_during_eval=true",
        "n_eval_model_samples=2",
        "sample_max_new_tokens=4",
    )
    assert seen == [None, None]
    tables = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    first = {
        name: [r["sample"] for r in tables if r["table"] == name and r["step"] == 0]
        for name in ("policy_samples", "reference_samples")
    }
    assert (
        len(first["policy_samples"]) == 2 and first["policy_samples"] == first["reference_samples"]
    )


step = trainers.BasicTrainer.step


@pytest.mark.parametrize(
    "options, expected",
    [
        (["n_epochs=1"], "live (each example is used once)"),
        (["n_epochs=3"], "cached (examples are used more than once)"),
        (["n_epochs=3", "n_examples=18"], "live (each example is used once)"),
        (["n_epochs=null", "n_examples=19"], "cached (examples are used more than once)"),
        (["n_epochs=3", "reference=live"], "live (as set)"),
    ],
)
def test_the_default_is_the_better_one_and_is_said(options, expected, train, capsys):
    train("auto", *DPO, *options)
    assert f"reference  the policy as it starts, {expected}\n" in capsys.readouterr().out


def test_short_memory_caches_and_keeps_less_of_the_head(train, tmp_path, capsys, monkeypatch):
    """And a run that resumes where there is more memory goes on as it began."""
    memory_at_hand = "plumb.training.budget.memory_at_hand"
    options = [*DPO, "n_examples=12", "save_every=4", "resume=auto"]

    def decided(name):
        return read_manifest((tmp_path / name / "LATEST").resolve()).decisions

    monkeypatch.setattr(memory_at_hand, lambda device: 0)
    with halted_after(2):
        train("short", *options)
    assert "the policy as it starts, cached (memory is short)" in capsys.readouterr().out
    short = decided("short")
    monkeypatch.setattr(memory_at_hand, lambda device: 1 << 40)
    train("short", *options)
    assert "resuming from" in capsys.readouterr().out
    assert decided("short") == short
    train("ample", *options)
    assert short["head_chunk_mb"] == 16 and decided("ample")["head_chunk_mb"] == 64
    assert short["tokens_per_microbatch"] < decided("ample")["tokens_per_microbatch"] == 1024


def test_two_processes_share_the_pass(run_train, tmp_path, data, tiny_model):
    """Each computes its part; the numbers are those of one process, which finds the file that the
    two wrote.
    """
    options = [
        f"model.name_or_path={tiny_model}",
        f"datasets=[{data}]",
        *FAST,
        *DPO,
        "reference=cached",
        "n_examples=9",
        "batch_size=3",
        STEADY,
    ]
    two = run_train(
        "exp_name=two",
        f"local_run_dir={tmp_path}/two",
        *options,
        "trainer=FSDPTrainer",
        "n_cpu_processes=2",
    )
    one = run_train("exp_name=one", f"local_run_dir={tmp_path}/one", *options)
    assert two.returncode == one.returncode == 0, two.stderr + one.stderr
    assert "reference: 0 of 9 examples" in two.stdout and "reference: 9 of 9 examples" in one.stdout
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for key in (k for k in a if k.startswith(("loss", "rewards", "logps", "grad_norm"))):
            assert a[key] == pytest.approx(b[key], rel=5e-5, abs=5e-6), key
