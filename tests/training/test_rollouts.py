"""Runs that learn from the policy's own responses, through train.py."""

import json
import re

import numpy as np
import pytest
import torch
from groups import halted_after
from runs import STEADY, outcome, records, same, trace_only
from torch._dynamo.utils import counters

import score
import trainers
from plumb.batching.feed import Feed
from plumb.errors import UserError
from plumb.models.logps import response_token_logps
from plumb.rollouts.policy_engine import PolicyEngine
from plumb.training.run_evaluator import EvalSampler

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


def graphs_of(kind, name, monkeypatch):
    """A list, to which each call of the method adds how many graphs it has compiled."""
    made = []
    method = getattr(kind, name)

    def counting(self, *arguments, **options):
        before = counters["stats"]["unique_graphs"]
        result = method(self, *arguments, **options)
        made.append(counters["stats"]["unique_graphs"] - before)
        return result

    monkeypatch.setattr(kind, name, counting)
    return made


COMPARED = {"loss/train", "grad_norm", "critic_train/loss", "rollout_train/reward"}


def test_compiled_blocks_learn_the_same(train, monkeypatch):
    """They are traced for the first steps, and never again: not for a rollout, nor for the samples
    of an evaluation, nor for a critic. A run that is halted within a rollout goes on to its bits.
    """
    trace_only(monkeypatch)
    torch.compiler.reset()
    steps, sampling, samples_of_evals = (
        graphs_of(kind, name, monkeypatch)
        for kind, name in (
            (trainers.BasicTrainer, "step"),
            (PolicyEngine, "sample"),
            (EvalSampler, "rows"),
        )
    )
    options = [
        "loss=ppo",
        "loss.critic=policy",
        "loss.critic_lr=1e-3",
        "rollout.uses=2",
        *FEW,
        STEADY,
    ]
    options += ["eval_every=8", "save_every=4", "resume=auto"]
    options += ["sample_during_eval=true", "n_eval_model_samples=2", "sample_max_new_tokens=6"]
    plain = records(train("plain", *options))
    compiled = train("compiled", *options, "compile=true")
    assert len(steps) == 8 and sum(steps[:4]) == 0 < steps[4] and not any(steps[6:])
    assert sampling and not any(sampling)
    assert samples_of_evals and not any(samples_of_evals)
    for a, b in zip(plain, records(compiled), strict=True):
        assert a.keys() <= b.keys()
        of_both = {k: x for k, x in a.items() if k in COMPARED}
        assert of_both == pytest.approx({k: b[k] for k in of_both}, rel=1e-3, abs=1e-5)
    with halted_after(3):
        train("halted", *options, "compile=true")
        pytest.fail("it was not halted")
    assert same(outcome(train("halted", *options, "compile=true")), outcome(compiled))


def test_the_temperature_divides_what_policy_gradients_read(trainer_of):
    """A loss on pairs reads log-probabilities at temperature 1, whatever pairs are sampled at."""
    few = [*FEW, "rollout.temperature=0.5", "n_examples=4", "lr=1e-6", "do_first_eval=false"]
    trainer, run = trainer_of("pairs", *DPO_ONLINE, *few)
    (record,) = records(run, "train")
    lessons, scorer = trainer.train_feed.lessons, trainer.scorer
    feed = Feed(lessons, trainer.packing, 0)
    step = feed.step(np.arange(len(lessons)))
    at = {1.0: 0.0, 0.5: 0.0}
    for batch, _, _ in step.microbatches:
        for temperature in at:
            each = response_token_logps(scorer.policy, batch, scorer.forward_path, temperature)
            at[temperature] += float(each.sum()[: len(batch.n_responses)].sum()) / len(lessons)
    assert record["logps_train/chosen"] == pytest.approx(at[1.0], rel=1e-4)
    assert abs(at[0.5] - at[1.0]) > 0.01
    assert trainer_of("rloo", "loss=rloo", *few)[0].scorer.temperature == 0.5


def test_a_prompt_without_tokens_is_refused(train, tmp_path):
    """By its file and row, before the first step."""
    file = tmp_path / "prompts.jsonl"
    prompts = ["Say a.", "", *(f"Say {i}." for i in range(12))]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    few = [REWARD, *FEW[1:], f"datasets=[{file}]", "eval_share=0.2", "add_bos=false"]
    with pytest.raises(UserError, match="prompts.jsonl:2: the prompt has no tokens; write one"):
        train("empty", "loss=rloo", *few)


def test_a_reward_model_with_nan_is_refused(train):
    """By the term's name, before anything is learned; nothing but the line is lost."""
    model = train("rm", "loss=reward", "lr=1e-3", "batch_size=6", "n_examples=12")
    file = (model / "LATEST/policy.pt").resolve()
    stored = torch.load(file, weights_only=True)
    stored["state"]["lm_head.weight"][0, 0] = float("nan")
    torch.save(stored, file)
    with pytest.raises(
        UserError, match=r"^reward.terms.rm.model: .* holds NaN or infinity"
    ) as line:
        train("run", "loss=rloo", *FEW[1:], f"reward.terms={{rm: {{model: {model}}}}}")
    assert "\n" not in str(line.value)


def test_a_policy_that_never_ends(train):
    """Each response has max_new_tokens tokens and no end; the penalty is taken off, and the run
    goes on.
    """
    run = train("open", "loss=rloo", *FEW, "reward.missing_eos=5", "rollout.max_new_tokens=2")
    rows = [r for r in records(run, "train") if "rollout_train/eos" in r]
    assert all(r["rollout_train/eos"] == 0 and r["rollout_train/length"] == 2 for r in rows)
    for r in rows:
        assert r["rollout_train/reward_final"] == pytest.approx(r["rollout_train/reward"] - 5)
