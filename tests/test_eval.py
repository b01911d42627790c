"""eval.py says of a checkpoint what its training said, and refuses in one line what it can't
evaluate.
"""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from runs import DPO, FAST, evaluate, records
from tiny import tiny_tokenizer

from plumb.data import prepare
from plumb.data.prepare import load_examples
from plumb.errors import UserError
from plumb.losses.contract import Mean, Spread
from plumb.training.evaluator import Evaluation, eval_groups

LOSSES = {
    "sft": ["loss=sft", "loss.average_over=tokens"],
    "dpo": DPO,
    "reward": ["loss=reward", "lr=1e-3"],
}

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def trained(train_here, data, tiny_model):
    """`trained(name, *overrides)`: a short run of this loss, with two data sets. -> its
    directory
    """
    other = shutil.copy(data, data.with_name("other.jsonl"))
    base = [
        f"model.name_or_path={tiny_model}",
        f"datasets=[{data},{other}]",
        "eval_share=0.4",
        *FAST,
        "warmup_steps=0",
    ]
    return lambda name, *overrides: train_here(*base, *LOSSES[name], *overrides)


@pytest.mark.parametrize("name", LOSSES)
def test_what_training_said(name, trained, tmp_path, capsys):
    run_dir, out = trained(name), tmp_path / "numbers.json"
    evaluate(run_dir, "--out", out)
    found = json.loads(out.read_text())
    said = records(run_dir, "eval")[-1]
    counts = found["examples"]
    assert counts["all"] == 16 == counts["pairs.jsonl"] + counts["other.jsonl"] and found[
        "policy"
    ].endswith("policy.pt")
    assert found["metrics"] == pytest.approx(
        {k: v for k, v in said.items() if k != "step"}, rel=1e-4, abs=1e-6
    )
    grouped = {
        "loss/eval",
        "perplexity/eval",
        "rewards_eval/accuracies",
        "rewards_eval/margins",
    } & said.keys()
    assert len(grouped) == {"sft": 2, "dpo": 4, "reward": 3}[name]
    assert all(
        f"{metric}/pairs.jsonl" in said and f"{metric}/other.jsonl" in said for metric in grouped
    )
    assert ("perplexity/eval" in said) == (name != "reward")
    printed = capsys.readouterr().out
    assert "pairs.jsonl" in printed.splitlines()[-12:][0] or "other.jsonl" in printed


def test_the_run_s_limits_and_data_are_left_behind(trained, data, tmp_path):
    """Not those of its training: it has ended; and other data sets go without the eval_datasets of
    its own.
    """
    run_dir = trained("reward", f"eval_datasets=[{data}]", "eval_share=0")
    config = run_dir / "config.yaml"
    config.write_text(
        config.read_text()
        .replace("max_hours: null", "max_hours: 0.0001")
        .replace("export: null", "export: hf")
    )
    other, out = str(data.with_name("other.jsonl")), tmp_path / "new" / "numbers.json"
    evaluate(
        run_dir,
        f"datasets=[{other}]",
        "eval_share=0.4",
        "data_split=1,0,1",
        "stage=sft",
        "--out",
        out,
    )
    found = json.loads(out.read_text())
    assert found["datasets"] == [other] and found["examples"]["all"] == 4  # half of 8
    assert len(list(out.parent.glob("*.png"))) == 2
    with pytest.raises(UserError, match="exp=demo_dpo: the settings come from the run"):
        evaluate(run_dir, "exp=demo_dpo")


def test_the_record_by_hand():
    """16 nats over 8 tokens: e^2, not the mean of the examples' own. Scores 3, 1, -1, 1: their
    standard deviation is sqrt 2.
    """
    tokens = np.array([2.0, 6])
    kinds = {"loss": Mean, "logps/chosen": Mean, "rewards/spread": Spread}

    def evaluation(logps, counts=(1, 1)):
        columns = {
            "loss": np.array([[4.0, 12], counts]),
            "logps/chosen": np.array([logps, [1.0, 1]]),
            "rewards/spread": Spread(torch.tensor([[3.0, -1], [1, 1]])).columns().T.numpy(),
        }
        return Evaluation(kinds, columns, tokens, np.ones(2))

    by_token = evaluation([-4, -12], tokens).record({"short": np.array([True, False])})
    assert by_token["perplexity/eval"] == pytest.approx(math.exp(2))
    assert by_token["loss/eval"] == by_token["loss/eval/short"] == 2
    record = evaluation([-4, -12]).record({})
    assert record["loss/eval"] == 8
    assert record["rewards_eval/spread"] == pytest.approx(math.sqrt(2))
    # 1,000 nats per token: still a number
    hopeless = evaluation([-8e3, 0]).record({})
    assert hopeless["perplexity/eval"] == pytest.approx(math.exp(700))


def test_the_training_split_is_not_read(trained, data, tmp_path, capsys, monkeypatch):
    """Nor shown: the first example and the tables are of held-out data; the reference is named."""
    run_dir = trained("dpo")
    capsys.readouterr()
    asked = []
    find = prepare.find_or_make
    monkeypatch.setattr(
        prepare, "find_or_make", lambda spec, *rest: asked.append(spec.split) or find(spec, *rest)
    )
    evaluate(run_dir)
    shown = capsys.readouterr().out
    assert set(asked) == {"test"} and not re.search(r"\(train\)|for train|  train", shown)
    assert shown.count("reference: the model that the run started from, ") == 1


def test_every_checkpoint_in_one_table(trained, tmp_path, capsys):
    run_dir, out = trained("dpo", "eval_every=8"), tmp_path / "curve.json"
    capsys.readouterr()
    evaluate(run_dir, "--checkpoints", "--out", out)
    shown = capsys.readouterr().out
    by_name = json.loads(out.read_text())["metrics"]
    steps = [int(name.removeprefix("step-")) for name in by_name]
    assert len(steps) == 3 == len(list(run_dir.glob("step-*"))) and steps == sorted(steps)
    assert re.search(r"\n +" + " +".join(map(str, steps)) + r"\nloss/eval  ", shown)
    assert shown.count("first example") == 1, "the data are read once"
    assert out.with_suffix(".png").is_file()
    said = {r["step"]: r["loss/eval"] for r in records(run_dir, "eval")}
    for step, name in zip(steps, by_name, strict=True):
        assert by_name[name]["loss/eval"] == pytest.approx(said[step], rel=1e-4)
    with pytest.raises(UserError, match="not a run with checkpoints"):
        evaluate(tmp_path, "--checkpoints")


def test_another_loss_data_and_checkpoint(trained, tiny_model, data, tmp_path):
    sft = trained("sft", "eval_every=8")
    first = sorted(sft.glob("step-*"))[0]
    out = tmp_path / "a.json"
    evaluate(
        first,
        *DPO[:2],
        f"datasets=[{data}]",
        "n_eval_examples=3",
        "--reference",
        tiny_model,
        "--out",
        out,
    )
    found = json.loads(out.read_text())
    assert (
        found["examples"]["all"] == 3
        and found["loss"]["beta"] == 0.1
        and found["metrics"]["rewards_eval/chosen"] != 0
    )
    evaluate(
        tiny_model, "loss=sft", f"datasets=[{data}]", "eval_share=0.4", *FAST[:2], "--out", out
    )
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["perplexity/eval"] > 100  # random weights, 2,000 tokens


def test_a_group_is_a_data_set_whatever_its_files_are_called(compose, tmp_path):
    for i, folder in enumerate(("a/one", "b/one", "c")):
        (tmp_path / folder).mkdir(parents=True)
        for part in (1, 2) if folder == "c" else (1,):  # "c" has two files
            rows = [
                {"prompt": f"{i}{part}{j}", "chosen": "yes " * 4**part, "rejected": "no"}
                for j in range(3)
            ]
            (tmp_path / folder / f"test-{part}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
    sets = [str(tmp_path / name) for name in ("a/one", "b/one", "c")]
    config = compose(
        "exp_name=x",
        f"datasets=[{sets[2]}]",
        f"eval_datasets=[{','.join(sets)}]",
        f"local_dirs=[{tmp_path}]",
    )
    shutil.copy(tmp_path / "c/test-1.jsonl", tmp_path / "c/train.jsonl")
    groups = eval_groups(load_examples(config, TOKENIZER, "pair")[1])
    found = {
        name: int(mask.sum()) for name, mask in groups.items() if not name.startswith("length")
    }
    assert found == {"a/one": 3, "b/one": 3, "c": 6}
    assert sum(int(mask.sum()) for name, mask in groups.items() if name.startswith("length")) == 12


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["{tiny}", *DPO[:2], "datasets=[{data}]", "eval_share=0.4"],
            "so is its reference; give --reference",
        ),
        (
            ["{tiny}", "loss=reward", "datasets=[{data}]", "eval_share=0.4"],
            "a policy, but loss=reward is for a reward model",
        ),
        (["{tiny}", "datasets=[{data}]", "eval_share=0"], "nothing is held out"),
        (["{tiny}", "datasets=[{data}]", "lrr=1"], "lrr=1: no such knob"),
        (["{tiny}", "hydra.launcher=x"], "Hydra's own settings are not accepted"),
        (["{tiny}", "datasets"], "missing EQUAL"),
        (
            ["{tiny}", "datasets=['${{oc.env:HOME}}']", "loss=sft"],
            "nothing is read from the environment",
        ),
        (["{tiny}", "model=gpt2-xl"], "model=gpt2-xl: the model is"),
        (["{tiny}", "model.archive=x"], "model.archive=x: the model is"),
        (["{tiny}", "lr=1,2"], "an evaluation has one value"),
        (["{tiny}", "trainer=FSDPTrainer"], "leave it out"),
        (["{tiny}", "local_run_dir=x"], "local_run_dir=x: not applicable to evaluation"),
        (["{tiny}", "minimum_log_interval_secs=3"], "not applicable to evaluation"),
        (["{tiny}", "model.reference_dtype=float16"], "not applicable to evaluation"),
        (["{tiny}", "data_rules.prompt_in_eval=drop"], "not applicable to evaluation"),
        (
            ["{tiny}", "loss=sft", "datasets=[{data}]", "--reference", "gpt2"],
            "needs no reference; leave it out",
        ),
        (["{tiny}", "loss=sft", "datasets=[{data}]", "--out", "."], "it is a folder"),
        (["nowhere/at/all"], "no such folder"),
    ],
)
def test_refused_in_one_line(words, said, tiny_model, data):
    with pytest.raises(UserError, match=said):
        evaluate(*(word.format(tiny=tiny_model, data=data) for word in words))


def test_plugins_of_a_run_are_named_again(trained, tmp_path):
    """config.yaml comes with a run's directory, and starts no code."""
    plugin = tmp_path / "mine.py"
    plugin.write_text("")
    run_dir = trained("sft", f"plugins=[{plugin}]")
    with pytest.raises(UserError, match=r"the run imported plugins=.*mine.py\]; .*plugins=\[\]"):
        evaluate(run_dir)
    evaluate(run_dir, "plugins=[]")
    other = tmp_path / "other.py"
    other.write_text("raise RuntimeError('it ran')")
    with pytest.raises(UserError, match="it ran"):
        evaluate(run_dir, f"plugins=[{other}]")
