"""The demo: its data is what its README says, the generator makes these bytes, and its two stages
run end to end.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import report
from plumb.reports import curves
from plumb.reports.outcome import reward_line
from plumb.rollouts.answered import Answered
from plumb.runs import history

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
SPLITS = {
    name: [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text().splitlines()]
    for name in ("train", "test")
}


def test_enough_prompts_and_none_of_the_held_out_ones_in_training():
    prompts = {name: {row["prompt"] for row in rows} for name, rows in SPLITS.items()}
    assert len(prompts["train"]) >= 400 and len(prompts["test"]) >= 100
    assert not prompts["train"] & prompts["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_preference_is_not_built_in(split):
    """No cue but the words: like lengths in tokens, the same last character, and SFT targets of
    both kinds in equal shares.
    """
    from transformers import AutoTokenizer

    rows, tokenizer = SPLITS[split], AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    chosen, rejected = (
        [len(ids) for ids in tokenizer([r[key] for r in rows])["input_ids"]]
        for key in ("chosen", "rejected")
    )
    assert 0.45 < sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(rows) < 0.55
    assert abs(sum(chosen) / sum(rejected) - 1) < 0.05
    assert {r[key][-1] for r in rows for key in ("chosen", "rejected")} == {"."}
    assert all(
        r["sft_target"] in (r["chosen"], r["rejected"]) and r["chosen"] != r["rejected"]
        for r in rows
    )
    assert 0.4 < sum(r["sft_target"] == r["chosen"] for r in rows) / len(rows) < 0.6


def test_the_generator_makes_these_bytes(tmp_path):
    shutil.copy(DEMO / "make_data.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "make_data.py"], check=True, capture_output=True)
    for name in ("train.jsonl", "test.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_the_rewards_know_both_styles(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))
    import rewards

    for row in SPLITS["test"]:
        for key, wanted in (("chosen", 1), ("rejected", 0)):
            answered = Answered(
                prompt=row["prompt"],
                response=row[key],
                target="",
                n_tokens=9,
                ended="eos",
                source="",
            )
            assert rewards.courteous(answered) == rewards.helpful(answered) == wanted, row[key]


def test_both_stages_and_the_summary(pictures, warm, tmp_path, monkeypatch, capsys):
    """demo/run.py's own steps on a few examples; the whole demo takes minutes."""
    monkeypatch.syspath_prepend(str(DEMO))
    import run

    monkeypatch.setattr(sys, "executable", str(warm.python))
    short = [
        "n_examples=32",
        "n_eval_examples=40",
        "n_epochs=null",
        "eval_every=16",
        "sample_max_new_tokens=8",
    ]
    run.stage("SFT", "exp=demo_sft", tmp_path / "sft", *short)
    run.stage("DPO", "exp=demo_dpo", tmp_path / "dpo", f"model.archive='{tmp_path}/sft'", *short)
    run.summary(
        tmp_path / "sft", tmp_path / "dpo", run.draw_curves([tmp_path / "sft", tmp_path / "dpo"])
    )
    out = capsys.readouterr().out
    assert (
        "on 150 held-out pairs" in out and "reward accuracy" in out and out.count("before  ") == 6
    )
    assert (tmp_path / "dpo/LATEST/policy.pt").is_file()

    # the same with rewards in place of pairs
    own = ["batch_size=4", "n_examples=8", "rollout.n=2", "rollout.max_new_tokens=8"]
    start = f"model.archive='{tmp_path}/sft'"
    run.stage("GRPO", "exp=demo_grpo", tmp_path / "grpo", start, *short, *own)
    run.stage("PPO", "exp=demo_ppo", tmp_path / "ppo", start, *short, *own)
    assert any("critic_train/loss" in record for record in history.read_metrics(tmp_path / "ppo"))
    assert "held-out reward" in reward_line(history.read_metrics(tmp_path / "grpo"))
    drawn = curves.panels([curves.named(history.read_run(tmp_path / "grpo"))], further=False)
    assert drawn[1:] == curves.ROLLOUTS and (tmp_path / "grpo/curves.png").is_file()

    # it knows the names and files that training writes
    report.main(report.parser().parse_args([str(tmp_path / "dpo")]))
    page = (tmp_path / "dpo/report.html").read_text()
    missing = [
        p.title for p in (*curves.LEARNING, *curves.FURTHER) if f'="{p.title} over' not in page
    ]
    assert not missing and "policy, after 32 examples" in page and "no metrics" not in page
    chain = history.lineage(history.read_run(tmp_path / "dpo"))
    assert [stage.name for stage in chain] == [
        "demo_dpo",
        "demo_sft",
        "a new model",
    ] and "step-32" in chain[1].what
    with pytest.raises(SystemExit) as error:
        # a stage that fails stops the demo with its exit code
        run.stage("again", "exp=demo_sft", tmp_path / "sft")
    assert error.value.code == 2
