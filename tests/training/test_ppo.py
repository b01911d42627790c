"""PPO in complete runs: its presets, where its critic begins, and what cannot be one."""

from contextlib import nullcontext

import pytest
import torch
import yaml
from conftest import ROOT
from groups import Halt
from runs import evaluate, records, state_of
from tiny import tiny_tokenizer

from plumb.errors import UserError
from plumb.rollouts.rewards import reward_model_of
from plumb.runs import checkpoints
from plumb.training.critics import of_reward_model

# one with each kind of critic; the others differ from the first in numbers, and in kl_token
PRESETS = ("ppo", "ppo_openai2019")
SHORT = [
    "rollout.n=2",
    "rollout.max_new_tokens=4",
    "rollout.uses=2",
    "batch_size=4",
    "n_examples=4",
    "eval_every=8",
    "do_first_eval=false",
    "do_last_eval=false",
    "warmup_steps=0",
    "optimizer=AdamW",
    "optimizer_args={eps: 1e-5}",
    "lr=1e-3",
]


@pytest.fixture
def reward_model(train):
    """The directory of a reward model's run, of the policy's own family."""
    return train("rm", "loss=reward", "lr=1e-3", "batch_size=6", "n_examples=12", *SHORT[5:9])


def test_a_preset_runs_with_a_reward_model(train, reward_model, capsys):
    """Two steps on a rollout. The critic has the reward model's weights before its first
    update, so where it does not learn, it has them after the last.
    """
    for preset in PRESETS:
        terms = f"reward.terms={{rm: {{model: {reward_model}}}}}"
        run = train(preset, f"loss={preset}", terms, *SHORT, "loss.critic_lr=1e-30")
        spec = yaml.safe_load((ROOT / f"config/loss/{preset}.yaml").read_text())
        first, second = records(run, "train")
        assert first["critic_train/alone"] == second["critic_train/alone"] == 0
        assert first["rollout_train/beta"] == spec["beta"]
        assert abs(first["rollout_train/kl"]) < 1e-5
        assert first["ratio_train/mean"] == pytest.approx(1, abs=1e-5) != second["ratio_train/mean"]
        out = capsys.readouterr().out
        state = state_of(run)
        if spec["critic"] == "policy":
            assert "critic: from the policy, with a head of 0" in out
            assert state["critic.policy.lm_head.weight"].abs().max() < 1e-29
        else:
            assert f"critic: from {reward_model}" in out
            theirs = torch.load(reward_model / "LATEST/policy.pt", weights_only=True)["state"]
            for name, weight in theirs.items():
                assert torch.equal(state[f"critic.policy.{name}"], weight), name


def test_what_cannot_be_the_critic(reward_model, tiny_model):
    """Two reward models; one that reads other tokens; a model that scores whole responses only."""
    term = {"model": str(reward_model)}
    with pytest.raises(UserError, match="begins as the reward model, and reward.terms has 2; set"):
        reward_model_of({"terms": {"a": term, "b": term}})
    assert reward_model_of({"terms": {"a": term, "b": {"rule": "shorter"}}}) == str(reward_model)
    with pytest.raises(UserError, match="has another tokenizer than the policy, whose tokens"):
        of_reward_model(str(reward_model), tiny_tokenizer(), "cpu")
    with pytest.raises(UserError, match="has no score for each token that values could begin"):
        of_reward_model(str(tiny_model), tiny_tokenizer(), "cpu")


def test_its_run_is_evaluated_with_another_loss(train):
    run = train("run", "loss=ppo_openai2019", "reward.terms={brief: {rule: shorter}}", *SHORT)
    with pytest.raises(UserError, match="loss.name=ppo: is about the policy's own samples, and"):
        evaluate(run)
    evaluate(run, "loss=sft")


def test_a_data_set_is_mixed_into_the_steps(train, data, capsys):
    """Not while the critic warms up alone; the policy's first step is checked as that of any run.
    The rows are part of what a run is made of.
    """
    reward = "reward.terms={brief: {rule: shorter}}"
    options = ["loss=ppo_openai2019", "loss.critic_warmup=1", reward, *SHORT, "n_examples=8"]
    run = train("run", *options, f"rollout.ptx_datasets=[{data}]", "rollout.ptx_weight=27.8")
    assert capsys.readouterr().out.count("step 0: policy and reference agree") == 1
    rows = [r for r in records(run) if "critic_train/alone" in r]
    assert [r["critic_train/alone"] for r in rows] == [1, 1, 0, 0]
    nll = [r.get("ptx_train/nll") for r in rows]
    assert nll[:2] == [None, None] and 0 < nll[3] < nll[2]
    train_rows, _, ptx_rows = checkpoints.latest_valid(run).manifest.fingerprint["data"]
    assert train_rows == ptx_rows  # of the same file


def test_a_run_that_is_halted_in_the_critics_warmup_is_checked(train, halted_at, capsys):
    """The policy's first step comes after it, in a second start; a third one checks nothing."""
    reward = "reward.terms={brief: {rule: shorter}}"
    options = ["loss=ppo_openai2019", "loss.critic_warmup=1", reward, *SHORT, "n_examples=8"]
    checks = []
    for n in (2, 4, None):
        with halted_at(n) if n else nullcontext(), pytest.raises(Halt) if n else nullcontext():
            train("run", *options, "save_every=4", "resume=auto")
        checks.append(capsys.readouterr().out.count("step 0: policy and reference agree"))
    assert checks == [0, 1, 0]


def test_an_average_stays_where_the_policy_does(train):
    """After the first step, stop_kl leaves the second to the critic: one step of the average."""
    reward = "reward.terms={brief: {rule: shorter}}"
    options = ["loss=ppo_openai2019", reward, *SHORT, "loss.stop_kl=1e-30", "ema_decay=0.9"]
    once, twice = (train(f"uses{n}", *options, f"rollout.uses={n}") for n in (1, 2))
    assert [r["critic_train/alone"] for r in records(twice, "train")] == [0]
    assert len(records(twice)) == 2
    a, b = (
        torch.load(run / "LATEST/policy_ema.pt", weights_only=True)["state"]
        for run in (once, twice)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
