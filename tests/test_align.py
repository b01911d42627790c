"""align.sh: what it asks of each command, what it skips, and the whole chain for real, at its
smallest.
"""

import json
import os
import subprocess

import pytest
from conftest import ROOT
from shell import BASH, commands_of

import eval as eval_command
import report
import sample
import score
from plumb.runs.history import status

pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")
PARSERS = {"eval.py": eval_command, "sample.py": sample, "score.py": score, "report.py": report}


@pytest.fixture
def asked(tmp_path):
    """`asked(*arguments, **environment)`: the command lines that the script would run."""

    def run(*arguments, **environment):
        return commands_of("align.sh", tmp_path, *arguments, OUT=f"{tmp_path}/out", **environment)

    return run


def test_every_command_composes(asked, compose, tmp_path, monkeypatch):
    """Of the demo, and of a model and data of one's own; what follows the script's name goes to
    every stage.
    """
    monkeypatch.chdir(ROOT)
    for environment in (
        {},
        {
            "MODEL": "gpt2-large",
            "DATASETS": "hh,shp",
            "REWARD_ARGS": "lr=1e-4 n_epochs=2",
            "BETA": "0.3",
        },
    ):
        done, lines = asked("seed=7", **environment)
        assert done.returncode == 0, done.stderr
        stages = [line for line in lines if line[:2] == ["-u", "train.py"]]
        names = [("sft", "sft"), ("reward", "reward"), ("dpo", "policy")]
        for line, (name, stage) in zip(stages, names, strict=True):
            config = compose(*line[2:])
            assert (config.loss.name, config.stage, config.data_split, config.seed) == (
                name,
                stage,
                "4,1,1",
                7,
            )
            assert config.local_run_dir == f"{tmp_path}/out/{name}" and config.resume == "auto"
            assert config.model.archive == (None if name == "sft" else f"{tmp_path}/out/sft")
        if environment:
            assert config.loss.beta == 0.3 and list(config.datasets) == ["hh", "shp"]
            assert compose(*stages[1][2:]).n_epochs == 2
        others = [line for line in lines if line not in stages]
        assert [line[0] for line in others] == ["eval.py"] * 3 + [
            "sample.py",
            "score.py",
            "report.py",
        ]
        for script, *words in others:
            PARSERS[script].parser().parse_args(words)
    done, lines = asked(MODEL="gpt2-large")
    assert done.returncode != 0 and "give DATASETS=" in done.stderr and not lines


@pytest.mark.parametrize(
    ("method", "loss", "preferences"),
    [("ppo", "ppo", None), ("grpo", "grpo", None), ("online", "dpo", "best-worst")],
)
def test_methods_on_own_responses(asked, compose, tmp_path, monkeypatch, method, loss, preferences):
    """The last stage learns by the rewards of the reward stage; it is evaluated on pairs."""
    monkeypatch.chdir(ROOT)
    for environment in ({}, {"MODEL": "gpt2-large", "DATASETS": "hh", "BETA": "0.3"}):
        done, lines = asked(METHOD=method, MAX_NEW_TOKENS="32", **environment)
        assert done.returncode == 0, done.stderr
        stages = [line for line in lines if line[:2] == ["-u", "train.py"]]
        config = compose(*stages[-1][2:])
        assert (config.loss.name, config.rollout.preferences) == (loss, preferences)
        assert config.local_run_dir == f"{tmp_path}/out/{method}" and config.stage == "policy"
        assert config.rollout.max_new_tokens == 32
        assert config.reward.terms == {"reward": {"model": f"{tmp_path}/out/reward"}}
        assert config.loss.beta == 0.3 or not environment
        evaluated = [line for line in lines if line[0] == "eval.py"][-1]
        assert evaluated[1] == f"{tmp_path}/out/{method}"
        assert ("loss=dpo" in evaluated) == (method != "online")


def test_mixed_preference_optimization(asked, compose, tmp_path, monkeypatch):
    """DPO on the pairs of one rollout of all prompts whose margin is large; PPO on the prompts of
    the others, from the DPO policy, which is also its reference.
    """
    monkeypatch.chdir(ROOT)
    done, lines = asked(METHOD="mpo", MARGIN="0.5", POLICY_ARGS="lr=1e-5")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    first, second = (
        compose(*line[2:]) for line in [x for x in lines if x[:2] == ["-u", "train.py"]][-2:]
    )
    at = first.rollout
    assert (first.loss.name, at.preferences, at.pair_margin, at.n) == ("dpo", "margin", 0.5, 2)
    assert first.n_epochs == 1 and at.batches * first.batch_size > 10**6
    assert first.model.archive == f"{out}/sft" and first.lr == second.lr == 1e-5
    (split,) = [line for line in lines if line[:2] == ["score.py", "split"]]
    assert split[2:5] == [f"{out}/mpo-dpo/rollouts.jsonl", "--threshold", "0.5"]
    assert split[-1] == f"{out}/hard.jsonl" and list(second.datasets) == split[-1:]
    assert second.loss.name == "ppo" and second.model.archive == f"{out}/mpo-dpo"
    assert [line for line in lines if line[0] == "report.py"][0][1:5] == [
        f"{out}/{name}" for name in ("sft", "reward", "mpo", "mpo-dpo")
    ]


def test_an_unknown_method(asked):
    done, lines = asked(METHOD="sppo")
    assert done.returncode == 2 and "METHOD=sppo: expected" in done.stderr and not lines


def test_what_is_there_is_not_done_again(asked, tmp_path):
    out = tmp_path / "out"
    for name in ("sft", "reward", "dpo"):
        (out / name / "LATEST").mkdir(parents=True)
        (out / name / "LATEST/policy.pt").touch()
        (out / f"{name}.json").write_text("{}")
    (out / "samples.jsonl").write_text("{}\n")
    _, lines = asked()
    assert [line[0] for line in lines if line[0] != "-u"] == ["score.py", "report.py"]
    late = (out / "samples.jsonl").stat().st_mtime + 5
    os.utime(out / "dpo/LATEST/policy.pt", (late, late))  # trained anew
    _, lines = asked()
    assert [line[0] for line in lines if line[0] != "-u"] == [
        "eval.py",
        "sample.py",
        "score.py",
        "report.py",
    ]


def test_the_whole_chain(tmp_path, warm):
    small = {
        "SFT_ARGS": "n_epochs=null n_examples=64",
        "REWARD_ARGS": "n_epochs=null n_examples=32",
        "DPO_ARGS": "n_epochs=null n_examples=32",
    }
    env = (
        os.environ
        | small
        | {
            "PYTHON": str(warm.python),
            "OUT": f"{tmp_path}/a b",
            "N_PROMPTS": "6",
            "MAX_NEW_TOKENS": "6",
        }
    )
    words = [
        "sample_during_eval=false",
        "do_first_eval=false",
        "n_eval_examples=10",
        f"local_dirs=['{tmp_path}']",
    ]
    done = subprocess.run(
        [BASH, "align.sh", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
    )
    out = tmp_path / "a b"
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(status(out / name)["state"] == "finished" for name in ("sft", "reward", "dpo"))
    (figures,) = json.loads((out / "winrate.json").read_text())["win_rates"].values()
    assert (
        figures["n_prompts"] == 6
        and 0 <= figures["low"] <= figures["value"] <= figures["high"] <= 1
    )
    for name in ("reward", "dpo"):
        assert (
            0
            <= json.loads((out / f"{name}.json").read_text())["metrics"]["rewards_eval/accuracies"]
            <= 1
        )
    page = (out / "report.html").read_text()
    assert all(f"{out}/{name}" in page for name in ("sft", "reward", "dpo"))
    assert "win rate" in done.stdout
    assert f"dpo: wins against sft, as judged by reward: {figures['value']:.1%} [" in done.stdout
    assert "The same prompts, answered by each" in page and "as judged by reward" in page
    assert "accuracy: the chosen answer has the larger reward" in page
