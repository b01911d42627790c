"""Runs with an adapter: what they start from, what they keep, and what they hand on."""

import json
import shutil
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from groups import Halt, run_in_group, train_until
from peft import PeftModel
from runs import (
    DPO,
    ROWS,
    STEADY,
    evaluate,
    outcome,
    records,
    same,
    state_of,
    trace_only,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import export as export_command
import report
import sample
import score
import trainers
from plumb.errors import UserError
from plumb.models.adapters import merged, read_adapters
from plumb.models.find import find_model, open_model, start_of
from plumb.models.load import load_config, load_policy
from plumb.models.weight_sources import open_source
from plumb.runs.policy_file import load_policy_state

LORA = ["adapter=lora", "adapter_rank=4", "adapter_alpha=8"]
BRIEF = ["do_first_eval=false", "do_last_eval=false", "n_examples=8", "save_optimizer_pt=false"]
SFT = ["loss=sft", "lr=1e-2", "warmup_steps=0", "batch_size=4", *BRIEF]
SHORT_DPO = [*DPO, "lr=1e-2", "warmup_steps=0", *BRIEF]


KEPT = {"config.json", "generation_config.json", "model.safetensors"}  # which a model writes
NAMED = ["adapter_targets=[lm_head,embed_tokens,q_proj]", "adapter_rslora=true"]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A place for the LoRA SFT run that several tests start from."""
    return tmp_path_factory.mktemp("sft") / "sft"


def weights(model):
    """Return the weights of a run's policy, its adapters merged."""
    return open_model(find_model(str(model))).model.state_dict()


def distance(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def starts_at_zero(run_dir):
    """Return whether the rewards of a run's first step are 0, up to rounding."""
    first = records(run_dir, "train")[0]
    return first["loss/train"] == pytest.approx(0.693147, abs=1e-4) and (
        abs(first["rewards_train/chosen"]) < 1e-4
    )


def sft_once(train, place):
    """Return the directory of the LoRA SFT run, which is trained once."""
    if not place.exists():
        shutil.copytree(train("sft", *SFT, *LORA), place, symlinks=True)
    return place


@pytest.mark.parametrize(
    ("previous", "reference"),
    [("merge", "live"), ("continue", "live"), ("stack", "cached")],
)
def test_the_reference_is_the_sft_policy(previous, reference, train, sft, tiny_model):
    """Base -> LoRA SFT -> LoRA DPO: the first rewards are 0 (the base in place of the SFT policy
    would give others), and eval.py, which merges both, finds the run's own loss.
    """
    start = sft_once(train, sft)
    knobs = [] if previous == "continue" else LORA[1:]
    run_dir = train(
        "dpo",
        *SHORT_DPO,
        "adapter=lora",
        *knobs,
        f"model.archive={start}",
        f"adapter_previous={previous}",
        f"reference={reference}",
        "do_last_eval=true",
    )
    assert starts_at_zero(run_dir)
    assert distance(weights(start), weights(tiny_model)) > 1e-3
    assert distance(weights(run_dir), weights(start)) > 1e-3
    out = run_dir.parent / "eval.json"
    evaluate(run_dir, "--out", out)
    found = json.loads(out.read_text())["metrics"]["loss/eval"]
    assert found == pytest.approx(records(run_dir, "eval")[-1]["loss/eval"], abs=1e-5)
    numbers = {name.split(".")[1] for name in load_policy_state(str(run_dir)) if "scaling" in name}
    assert numbers == ({"0", "1"} if previous == "stack" else {"0"})


def test_adapters_and_full_training_follow_one_another(train, sft):
    """LoRA SFT -> full DPO -> DoRA DPO. The first policy.pt has all weights again."""
    start = sft_once(train, sft)
    full = train("full", *SHORT_DPO, "lr=1e-3", f"model.archive={start}", "reference=live")
    assert starts_at_zero(full)
    assert "lm_head.weight" in load_policy_state(str(full))
    dora = train("dora", *SHORT_DPO, "adapter=dora", f"model.archive={full}", "reference=live")
    assert starts_at_zero(dora)
    assert distance(weights(dora), weights(full)) > 1e-3


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_another_start_of_the_adapter_is_the_same_policy(init, train):
    run_dir = train("run", *SHORT_DPO, *LORA, f"adapter_init={init}", "reference=live")
    assert starts_at_zero(run_dir)


def test_recomputed_and_compiled_it_trains_the_same(train, monkeypatch):
    """The live reference switches the adapter off within the same compiled blocks. They are traced
    as ever, and not translated, which takes a minute.
    """
    trace_only(monkeypatch)
    options = [*SHORT_DPO, *LORA, "reference=live", STEADY]
    plain = weights(train("plain", *options))
    for name, option in (("again", "activation_checkpointing=true"), ("compiled", "compile=true")):
        run_dir = train(name, *options, option)
        assert starts_at_zero(run_dir)
        assert distance(weights(run_dir), plain) < 1e-4


@pytest.mark.parametrize("loss", ["rloo", "ppo_openai2019"])
def test_it_learns_from_the_policys_own_samples(loss, train):
    """The reference of the KL is the start, so that the first KL is 0."""
    rollout = ["reward.terms={brief: {rule: shorter}}", "rollout.n=2", "rollout.max_new_tokens=4"]
    options = [f"loss={loss}", *LORA, "lr=1e-2", "warmup_steps=0", "batch_size=4"]
    run_dir = train(loss, *options, *BRIEF, *rollout)
    first = next(r for r in records(run_dir) if "rollout_train/reward" in r)
    kl = [value for name, value in first.items() if "kl" in name.lower() and "train" in name]
    assert kl and max(map(abs, kl)) < 1e-4
    assert not any("embed_tokens" in name for name in load_policy_state(str(run_dir)))


def test_a_checkpoint_is_small_and_resumes_to_the_bit(train, tmp_path, monkeypatch):
    """It has the adapter, its optimizer state and nothing of the base; what the base is, a run that
    resumes compares.
    """
    options = [*DPO, *LORA, "adapter_init=olora", "reference=live", "ema_decay=0.5"]
    options += ["do_first_eval=false", "save_every=8", "resume=auto", "batch_size=3"]
    uninterrupted = train("uninterrupted", *options)
    state = state_of(uninterrupted)
    assert not any("embed_tokens" in name or "base_layer" in name for name in state)
    largest = max(file.stat().st_size for file in (uninterrupted / "LATEST").iterdir())
    base = sum(x.numel() * 4 for x in weights(uninterrupted).values())
    assert largest < base / 2
    step = trainers.BasicTrainer.step

    def gone(self, *arguments):
        step(self, *arguments)
        if self.n_updates == 4:
            raise Halt

    with monkeypatch.context() as patch, pytest.raises(Halt):
        patch.setattr(trainers.BasicTrainer, "step", gone)
        train("halted", *options)
    assert same(outcome(train("halted", *options)), outcome(uninterrupted))


def test_a_reward_model_keeps_its_head(train, sft):
    """Its head is trained beside the adapter, and is in policy.pt; eval.py reads both."""
    start = sft_once(train, sft)
    options = ["loss=reward", "lr=1e-2", "warmup_steps=0", "batch_size=4", *BRIEF]
    run_dir = train("rm", *options, *LORA, f"model.archive={start}", "do_last_eval=true")
    assert find_model(str(run_dir)).scalar
    state = load_policy_state(str(run_dir))
    assert state["lm_head.weight"].shape[0] == 1 and len(state) == 1 + 2 + 2 * 14
    out = run_dir.parent / "eval.json"
    evaluate(run_dir, "--out", out)
    found = json.loads(out.read_text())["metrics"]["loss/eval"]
    assert found == pytest.approx(records(run_dir, "eval")[-1]["loss/eval"], abs=1e-5)
    export(run_dir, "--out", run_dir.parent / "classifier")
    with pytest.raises(UserError, match="a reward model, whose head is no part of a PEFT folder"):
        export(run_dir, "--peft", run_dir.parent / "peft")
    again = train(
        "again", *options, "adapter=lora", f"model.archive={run_dir}", "adapter_previous=continue"
    )
    before, after = (load_policy_state(str(d))["lm_head.weight"] for d in (run_dir, again))
    assert 0 < (before - after).abs().max() < 0.25  # in two steps of RMSprop, lr / 0.1 each


def export(*words):
    export_command.main(export_command.parser().parse_args(list(map(str, words))))


@pytest.mark.parametrize("knobs", [["adapter_init=pissa"], ["adapter=dora"], NAMED])
def test_both_exports_compute_the_same(knobs, train, tiny_model, tmp_path, capsys):
    """transformers reads the merged folder, and peft the adapter's, with its base; both are
    compared with the model, the former with its adapter unmerged, to 1e-5.
    """
    run_dir = train("run", *SFT, *LORA, *knobs)
    export(run_dir, "--out", tmp_path / "out")
    export(run_dir, "--peft", tmp_path / "peft")
    assert capsys.readouterr().out.count("checked: ") == 2
    ids = torch.tensor([[5, 6, 7, 8]])
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = base(ids).logits
    other = PeftModel.from_pretrained(base, tmp_path / "peft")(ids).logits
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert (before - one).abs().max() > 1e-3


def test_a_peft_folder_has_one_rank_and_one_scaling(train, sft, tiny_model, tmp_path):
    """All that vLLM reads of its config is r and lora_alpha, whatever single modules have: q_proj,
    of rank 4 with scaling 2 and of rank 2 with scaling 16, and the others, of rank 4.
    """
    stacked = ["adapter_previous=stack", f"model.archive={sft_once(train, sft)}"]
    more = ["adapter=lora", "adapter_rank=2", "adapter_targets=[q_proj]", *stacked]
    run_dir = train("run", *SHORT_DPO, *more)
    export(run_dir, "--peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    for option in ("model.archive", "model.name_or_path"):
        with pytest.raises(UserError, match=f"^{option}=.*: a PEFT folder, which export.py"):
            train("no", *SFT, f"{option}={tmp_path / 'peft'}")
    with pytest.raises(UserError, match="^/.*/peft: a PEFT folder, which export.py"):
        find_model(str(tmp_path / "peft"))
    base, expected = weights(tiny_model), weights(run_dir)
    for module in config["target_modules"]:
        stem = f"base_model.model.{module}.lora_"
        a, b = tensors[f"{stem}A.weight"], tensors[f"{stem}B.weight"]
        assert a.shape[0] == config["r"] == 6
        found = base[f"{module}.weight"] + config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(found, expected[f"{module}.weight"])


CONTINUED = {
    "adapter_rank=8: .*archive=.*, which has rank 4; leave": ["adapter_rank=8"],
    "adapter_alpha=16: .* has scaling 2, alpha=8 without rsLoRA;": ["adapter_alpha=16"],
    "adapter_targets=.* is on down_proj, .*, v_proj;": ["adapter_targets=[q_proj]"],
    "adapter=dora: .* is adapter=lora;": ["adapter=dora"],
    "adapter_init=pissa: .* has values;": ["adapter_init=pissa"],
}


def test_options_of_an_adapter_that_continues_are_its_own(train, sft, run_train, data, tiny_model):
    """Also those that are given and are the defaults: 16 for a rank of 4. The same are accepted."""
    start = sft_once(train, sft)
    options = [*SFT, "adapter_previous=continue", f"model.archive={start}", "adapter=lora"]
    for message, given in CONTINUED.items():
        with pytest.raises(UserError, match=message):
            train("no", *options, *given)
    train("same", *options, *LORA, "adapter_rslora=true", "adapter_alpha=4")
    places = [f"model.name_or_path={tiny_model}", f"datasets=[{data}]"]
    refused = run_train(*options, *places, "exp_name=no", "adapter_rank=16")
    assert refused.returncode == 2
    assert "adapter_rank=16: with adapter_previous=continue the adapter is" in refused.stderr


def test_what_has_no_peft_folder_is_refused(train, sft, tmp_path):
    start = sft_once(train, sft)
    run_dir = train("dpo", *SHORT_DPO, *LORA, f"model.archive={start}")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="its adapter belongs to .*sft, which is not a model's"):
        export(run_dir, "--peft", tmp_path / "peft")
    with pytest.raises(UserError, match="--peft .*there: already exists"):
        export(start, "--peft", tmp_path / "there")
    full = train("full", *SFT)
    with pytest.raises(UserError, match="holds no adapter; write the model with --out"):
        export(full, "--peft", tmp_path / "peft")


REFUSED = {
    "adapter_rank=4: is for adapter=lora and adapter=dora": ["adapter_rank=4"],
    "adapter=dora: needs whole rows of the weights": [
        "adapter=dora",
        "trainer=TensorParallelTrainer",
    ],
    "adapter_previous=stack: is for a model.archive": ["adapter=lora", "adapter_previous=stack"],
    "adapter_init=pissa: is for adapter=lora": ["adapter=dora", "adapter_init=pissa"],
    "reference_dtype=bfloat16: with adapter=lora": [
        "adapter=lora",
        "model.reference_dtype=bfloat16",
    ],
    "policy_format=repo2023": ["adapter=lora", "policy_format=repo2023"],
    "set reference=cached, or null": ["adapter=lora", "reference_update_every=2"],
    r"adapter_targets=q_proj: .* such as \[q_proj,v_proj\].*; write .*=\[q_proj\]": [
        "adapter=lora",
        "adapter_targets=q_proj",
    ],
    "adapter_targets=all-linear: .*; null is all linear": [
        "adapter=lora",
        "adapter_targets=all-linear",
    ],
    "adapter_rank=0: expected a whole number of at least 1": ["adapter=lora", "adapter_rank=0"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_options_are_refused(message, train):
    with pytest.raises(UserError, match=message):
        train("refused", *DPO, *REFUSED[message])


def test_an_archive_without_what_it_belongs_to_is_refused(train, sft, tmp_path):
    start = sft_once(train, sft)
    run_dir = train("dpo", *SHORT_DPO, *LORA, f"model.archive={start}")
    full = train("full", *SFT)
    with pytest.raises(UserError, match="adapter_previous=stack: .* holds no adapter"):
        train("no", *SFT, "adapter=lora", "adapter_previous=stack", f"model.archive={full}")
    moved = tmp_path / "moved"
    start.rename(moved)
    try:
        with pytest.raises(UserError, match="what it was trained on, .*, is no longer there"):
            open_model(find_model(str(run_dir)))
    finally:
        moved.rename(start)


def test_an_adapter_on_another_base_is_refused(train, sft, tiny_model, tmp_path):
    """Two steps of full training with a low learning rate make another base, and so do other norms
    alone; in 16 bits, and read in parts, the same weights are the same one.
    """
    start = sft_once(train, sft)
    lora = ["adapter=lora", f"model.archive={start}"]
    halves = train("halves", *SHORT_DPO, *lora, "model.policy_dtype=bfloat16")
    export(train("full", *SFT, "lr=5e-7"), "--out", tmp_path / "trained")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "same", max_shard_size="20KB")
    for name, p in model.named_parameters():
        p.data *= 1.5 if "norm" in name else 1.0
    model.save_pretrained(tmp_path / "norms")
    for folder in ("same", "norms"):  # the tokenizer
        own = lambda _, files: KEPT & {*files}
        shutil.copytree(tiny_model, tmp_path / folder, ignore=own, dirs_exist_ok=True)
    for run_dir in (start, halves):
        for base, dtype in product(("same", "norms", "trained"), (None, "bfloat16")):
            ref = find_model(str(run_dir), str(tmp_path / base), dtype=dtype)
            how = (ref.config.model, load_config(ref.config), ref.scalar, 0)
            refused = lambda base=base: pytest.raises(UserError, match=f"other weights .*{base}")
            for read in ("whole", "in_parts"):
                with open_source(*how) as source, nullcontext() if base == "same" else refused():
                    getattr(source, read)()
    bare = load_policy_state(str(start))
    del bare["adapters.base"]
    torch.save({"state": bare}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match="lacks adapters.base, by which the model"):
        open_model(find_model(str(tmp_path / "policy.pt"), str(tiny_model)))


def test_a_base_in_the_types_of_two_runs(train, sft, tiny_model):
    """An adapter of float32 weights goes on beside bfloat16 ones. Both policy and reference are
    what their run had: the base as it was rounded, and the adapter merged in float32.
    """
    start = sft_once(train, sft)
    more = ["adapter=lora", "adapter_previous=continue", "model.policy_dtype=bfloat16"]
    ref = find_model(str(train("run", *SHORT_DPO, *more, f"model.archive={start}")))
    name = "model.layers.0.mlp.down_proj"
    base = weights(tiny_model)[f"{name}.weight"].bfloat16().float()
    for archive, opened in ((start, load_policy(start_of(ref))), (ref.archive, open_model(ref)[1])):
        (adapter,) = read_adapters(load_policy_state(str(archive)), "")
        expected = merged(base, [(adapter.scaling, adapter.factors(name))])
        assert torch.equal(opened.state_dict()[f"{name}.weight"], expected)


def test_a_reference_of_a_wider_type_than_the_policy(train, tiny_model):
    """In its run it was a copy of the policy, which had been rounded before."""
    ref = find_model(
        str(
            train("run", *SHORT_DPO, "model.policy_dtype=bfloat16", "model.reference_dtype=float32")
        )
    )
    found = load_policy(start_of(ref)).state_dict()
    for name, value in weights(tiny_model).items():
        assert torch.equal(found[name], value.bfloat16().float()), name


def test_a_base_that_has_moved(train, tiny_model, tmp_path):
    """--base says where it is now, for the policy and its reference, also at the root of several
    runs.
    """
    base = shutil.copytree(tiny_model, tmp_path / "base")
    named = f"model.name_or_path={base}"
    first = train("first", *SFT, *LORA, named, "model.policy_dtype=bfloat16")
    run_dir = train("run", *SHORT_DPO, *LORA, named, f"model.archive={first}", "do_last_eval=true")
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base: no such folder"):
        evaluate(run_dir)
    out = tmp_path / "eval.json"
    evaluate(run_dir, "--base", tmp_path / "moved", "--out", out)
    found = json.loads(out.read_text())["metrics"]["loss/eval"]
    assert found == pytest.approx(records(run_dir, "eval")[-1]["loss/eval"], abs=1e-5)
    export(first, "--base", tmp_path / "moved", "--peft", tmp_path / "peft")
    # and a run that starts from there
    train(
        "again",
        *SHORT_DPO,
        *LORA,
        f"model.name_or_path={tmp_path / 'moved'}",
        f"model.archive={first}",
    )


def command(module, *words):
    module.main(module.parser().parse_args(list(map(str, words))))


def answers(model, out):
    """Return the greedy answers of a model to two prompts."""
    command(sample, model, "--prompts", out.parent / "prompts.jsonl", "--out", out, *GREEDY)
    return [json.loads(line)["answers"] for line in out.read_text().splitlines()]


def found_in(figures, name):
    """Return the figure of this name, at whatever depth."""
    if name in figures:
        return figures[name]
    return next(found_in(x, name) for x in figures.values() if isinstance(x, dict))


GREEDY = ["--mode", "greedy", "--max-new-tokens", 8]


def test_it_is_sampled_scored_and_reported(train, sft, tiny_model, tmp_path):
    """sample.py, score.py and report.py read a run with an adapter as any other: answers and
    rewards are those of the exported model, whose adapter is merged.
    """
    start = sft_once(train, sft)
    rows = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS[:2]]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    export(start, "--out", tmp_path / "merged")
    texts = [
        answers(model, tmp_path / f"{i}.jsonl")
        for i, model in enumerate((start, tmp_path / "merged", tiny_model))
    ]
    assert texts[0] == texts[1] != texts[2]
    pairs = tmp_path / "held_out.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    scores = {}
    for name, model in (("run", start), ("merged", tmp_path / "merged")):
        out = tmp_path / f"{name}.json"
        reference = ["--reference", tiny_model, "--beta", 0.1]
        command(score, "pairs", model, pairs, "--json", out, *reference)
        scores[name] = json.loads(out.read_text())
    assert found_in(scores["run"], "chosen_score") == pytest.approx(
        found_in(scores["merged"], "chosen_score"), abs=1e-4
    )
    command(report, start, "--out", tmp_path / "page.html")
    assert "lora" in (tmp_path / "page.html").read_text()


def test_a_learning_rate_of_full_training_gets_a_note(train, capsys):
    train("low", *SHORT_DPO, *LORA, "lr=1e-6")
    assert "note: lr=1e-06 is one of full fine-tuning" in capsys.readouterr().out
    train("usual", *SHORT_DPO, *LORA, "lr=1e-5")
    assert "note: lr" not in capsys.readouterr().out


def test_two_processes_do_as_one(train, of_two, tmp_path):
    """Each of two gloo ranks has half of the base and of the adapters. The adapters are those of
    one process, within 1e-8 in float64 (see test_resume.py), and to the bit those of the two when
    they are killed and resumed.
    """
    options = [*DPO, *LORA, STEADY, "model.policy_dtype=float64", "reference=live"]
    options += ["adapter_init=pissa", "do_first_eval=false", "resume=auto", "save_every=8"]

    def in_two(name, halt):
        run_in_group(2, train_until, of_two(name, *options), halt)
        return tmp_path / name

    two = outcome(in_two("two", None))
    assert same(two, outcome(train("one", *options)), tolerance=1e-8)
    in_two("halted", 3)
    assert same(outcome(in_two("halted", None)), two)
