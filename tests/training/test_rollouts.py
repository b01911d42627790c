"""Runs that learn from the policy's own responses, through train.py."""

import json
import re

import pytest
from runs import records

import score
from plumb.errors import UserError

REWARD = "reward.terms={brief: {rule: shorter, weight: 0.5}, exact: {rule: exact}}"
FEW = [
    REWARD,
    "rollout.n=4",
    "rollout.max_new_tokens=4",
    "lr=1e-3",
    "warmup_steps=2",
    "batch_size=4",
    "n_examples=8",
    "n_eval_examples=2",
]
DPO_ONLINE = ["loss=dpo", "loss.beta=0.1", "rollout=pairs"]
KINDS = {
    "grpo": (["loss=grpo"], "ratio_train/mean"),
    "pairs": ([*DPO_ONLINE, "rollout.batches=2"], "rollout_train/pairs"),
    "lists": (["loss=softmax_dpo", "loss.beta=0.1", "rollout=lists"], "rollout_train/lists"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run(kind, train, tmp_path):
    """Its metrics, and what it keeps: a row for each prompt, which score.py split reads."""
    options, metric = KINDS[kind]
    run = train(kind, *options, *FEW)
    steps = [r for r in records(run) if "counters/updates" in r]
    held_out = [r for r in records(run) if "rollout_eval/reward" in r]
    assert len(steps) == len(held_out) == 2 and metric in steps[0]
    means = {"rollout_eval/reward/brief", "rollout_eval/reward/exact", "rollout_eval/eos"}
    assert means < held_out[0].keys()
    both = [held_out[0][f"rollout_eval/reward/{term}"] for term in ("brief", "exact")]
    assert held_out[0]["rollout_eval/reward"] == pytest.approx(0.5 * both[0] + both[1])
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(len(r["answers"]) == len(r["scores"]) == 4 for r in rows)
    by_rollout = [r for r in steps if "rollout_train/reward" in r]
    assert len(by_rollout) == (1 if kind == "pairs" else 2)
    n = len(rows) // len(by_rollout)
    scores = [score for row in rows[:n] for score in row["scores"]]
    assert by_rollout[0]["rollout_train/reward"] == pytest.approx(sum(scores) / len(scores))
    assert rows[0]["scores"][0] == -0.5 * len(rows[0]["answers"][0].strip())
    easy, hard = tmp_path / "easy.jsonl", tmp_path / "hard.jsonl"
    words = ["split", f"{run}/rollouts.jsonl", "--easy", f"{easy}", "--hard", f"{hard}"]
    score.main(score.parser().parse_args(words))
    pairs = [json.loads(line) for file in (easy, hard) for line in file.read_text().splitlines()]
    assert pairs and all(pair["chosen"] != pair["rejected"] for pair in pairs)


def test_the_first_pairs_are_labelled_by_the_reward(train):
    """The step-0 check holds with responses that are sampled, too: policy and reference agree."""
    run = train("pairs", *DPO_ONLINE, *FEW, "do_first_eval=false")
    first = next(r for r in records(run) if "loss/train" in r)
    assert first["loss/train"] == pytest.approx(0.693147, abs=1e-4)
    assert first["rewards_train/margins"] == pytest.approx(0, abs=1e-4)


def test_a_prompt_that_leaves_no_room_is_refused_before_the_first_step(train):
    line = r"pairs.jsonl:\d+: the prompt has \d+ tokens, and rollout.max_new_tokens=40 leaves 4"
    with pytest.raises(UserError, match=line):
        train(
            "long",
            "loss=grpo",
            *FEW,
            "max_length=44",
            "max_prompt_length=4",
            "rollout.max_new_tokens=40",
        )


def test_weights_of_rows_are_refused(train, data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3]["weight"] = 2
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"pairs.jsonl:\d+: its row has a weight"):
        train("weighted", "loss=grpo", *FEW)


def test_rewards_that_are_all_equal_are_counted(train, capsys):
    """Nothing is learned from them, and the run says so and goes on; with equal_rewards=drop no
    weight moves.
    """
    few = [*FEW[1:], "reward.terms={same: {rule: exact}}"]  # to which no response is
    run = train("equal", "loss=rloo", "loss.kl=none", "loss.beta=null", *few)
    assert "the responses to each prompt have the same reward" in capsys.readouterr().out
    assert all(r["rollout_train/equal_rewards"] == 1 for r in records(run, "train"))
    drop = "loss.equal_rewards=drop"
    dropped = train("dropped", "loss=rloo", "loss.kl=none", "loss.beta=null", drop, *few)
    steps = [r for r in records(dropped) if "counters/updates" in r]
    assert len(steps) == 2 and all(r["grad_norm"] == 0 and "loss/train" not in r for r in steps)


def test_the_best_checkpoint_is_that_of_the_held_out_reward(train):
    """By default; of three checkpoints, the last and the best are kept."""
    run = train(
        "run",
        "loss=rloo",
        "reward.terms={long: {rule: longer}}",
        "rollout.n=2",
        "rollout.max_new_tokens=4",
        "batch_size=4",
        "n_examples=12",
        "eval_every=4",
        "lr=1e-2",
        "warmup_steps=0",
        "keep_checkpoints=1",
    )
    held_out = [r for r in records(run) if "rollout_eval/reward" in r and r["step"]]
    rewards = {r["step"]: r["rollout_eval/reward"] for r in held_out}
    best = max(rewards, key=rewards.get)
    assert len(rewards) == 3 and best != 12
    kept = {int(folder.name.removeprefix("step-")) for folder in run.glob("step-*")}
    assert kept == {best, 12}


def test_prompts_alone_are_shown_as_such(train, tmp_path, capsys):
    """No target of an end token alone, and no empty response that was kept."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "Say {i}."}}\n' for i in range(12)))
    options = ["loss=rloo", "reward.terms={brief: {rule: length:2}}", "rollout.n=2"]
    train("run", *options, f"datasets=[{file}]", "rollout.max_new_tokens=4", "n_examples=2")
    out = capsys.readouterr().out
    assert re.search(r"^prompts used +\d+ +\d+$", out, re.M), out
    assert re.search(r"without an answer +\d+ +\d+ +kept", out)
    assert "prompt tokens; responses are sampled\n" in out
    assert "target" not in out and "empty response" not in out
