"""What follows the policy: a reference that moves (TR-DPO, arXiv:2404.09656), and the average of
the policy's weights.
"""

import json
import shutil

import pytest
import torch
from groups import Halt, run_in_group, train_until
from runs import DPO, STEADY, evaluate, outcome, records, same, state_of
from torch import nn

import trainers
from plumb.data.registry import get_dataset
from plumb.errors import ResumeMismatch, UserError
from plumb.models.find import find_model
from plumb.runs import checkpoints, state_files
from plumb.scoring.scorers import knobs_of, load_scorer
from plumb.training.moving import MovingModel, PolicyAverage

# 6 steps, of 3 of 18 pairs; the reference moves before the 3rd and the 5th
SHORT = [*DPO, "batch_size=3", "do_first_eval=false", "eval_every=9"]
MOVES = [*SHORT, "reference_update_every=2"]


def linear(*weights):
    model = nn.Linear(len(weights), 1, bias=False)
    model.weight.data[:] = torch.tensor(weights)
    return model


# ---- by hand ----


def test_an_average_by_hand():
    """0.75 of the average and 0.25 of the policy: from 4, of 8: 5; of 1: 4. Within the context the
    policy is the average, behind it its own again, to the bit.
    """
    policy = linear(4.0)
    average = PolicyAverage(policy, decay=0.75)
    for value, expected in ((8.0, 5.0), (1.0, 4.0)):
        policy.weight.data[:] = value
        average.update()
        assert average.tensors()["average.weight"].item() == expected
    policy.weight.data[:] = 0.1
    with average.in_place_of_policy():
        assert policy.weight.item() == 4
    assert torch.equal(policy.weight.data, torch.tensor([[0.1]]))


def test_an_average_of_16_bit_weights_is_of_32():
    """Of 1 and the next bfloat16, 1 + 2^-7, it is 1 + 2^-17, which bfloat16 rounds to 1."""
    policy = linear(1.0).to(torch.bfloat16)
    average = PolicyAverage(policy, decay=1 - 2**-10)
    policy.weight.data[:] = 1 + 2**-7
    average.update()
    assert average.tensors()["average.weight"].item() == 1 + 2**-17


@pytest.mark.parametrize("weight, expected", [(0.25, [1.5, 4.25]), (1.0, [3.0, 2.0])])
def test_a_reference_moves_by_hand(weight, expected):
    """From (1, 5) by a quarter of the way to (3, 2); by all of it, to the bit."""
    reference = linear(1.0, 5.0)
    MovingModel(linear(3.0, 2.0), reference, every=1, weight=weight).move([])
    assert reference.weight[0].tolist() == expected


# ---- runs ----


def test_the_reference_is_the_policy_of_the_last_move(train):
    """Before the 3rd and the 5th step it is made the policy, so that their rewards are 0, and the
    loss log 2; an evaluation at such a moment still sees the one before. In between, and where the
    reference stays, they are not.
    """
    run = train("moves", *MOVES, "reference=live", "eval_every=6")
    rewards = [row["rewards_train/chosen"] for row in records(run, "train")]
    assert [abs(r) < 1e-6 for r in rewards] == [True, False, True, False, True, False]
    assert all(row["rewards_eval/chosen"] != 0 for row in records(run, "eval"))
    stays = records(train("stays", *SHORT, "reference=live"), "train")
    assert [abs(r["rewards_train/chosen"]) < 1e-6 for r in stays] == [True] + 5 * [False]


def evaluated(run, folder):
    """Return the metrics that eval.py gives a run."""
    evaluate(run, "--out", folder / "out.json")
    return json.loads((folder / "out.json").read_text())["metrics"]


def test_a_run_is_compared_with_the_reference_that_it_had(train, data, tmp_path, capsys):
    """eval.py and score.py give the run's last evaluation: a live reference's weights are in the
    checkpoint. A cached one's are nowhere, and a comparison with the start says so.
    """
    live = train("live", *MOVES, "reference=live")
    last = records(live, "eval")[-1]
    shown = evaluated(live, tmp_path)
    for name in ("loss/eval", "rewards_eval/chosen", "rewards_eval/margins"):
        assert shown[name] == pytest.approx(last[name], abs=1e-5), name
    ref = find_model(str(live))
    rows = list(get_dataset(str(data), "test", eval_share=0.1).rows)
    scores = load_scorer(ref, knobs_of(ref, {}), device="cpu").score(rows, "keep_end").scores
    assert scores.mean(0)[0] == pytest.approx(last["rewards_eval/chosen"], abs=1e-4)
    assert "moved, and its weights are not saved" not in capsys.readouterr().out
    cached = train("cached", *MOVES, "reference=cached")
    from_start = evaluated(cached, tmp_path)
    assert "note: the reference of" in (printed := capsys.readouterr().out)
    assert "started from" in printed
    assert from_start["rewards_eval/margins"] != records(cached, "eval")[-1]["rewards_eval/margins"]


def test_stored_weights_are_copied_in_whatever_type(tmp_path):
    """Two parts in bfloat16, into float32; not what is stored under another name."""
    stored = torch.tensor([[1.5], [2.25]], dtype=torch.bfloat16)
    files = []
    for i, row in enumerate(stored):
        part = state_files.Part([2, 1], [i, 0], row[None])
        files.append(tmp_path / f"state-{i}-of-2.safetensors")
        state_files.write_tensors(files[-1], {"reference.weight": part, "other.weight": part})
    model = linear(0.0)
    weight = torch.zeros(2, 1)
    assert state_files.copy_stored(files, "reference.", {"weight": weight})
    assert weight.tolist() == [[1.5], [2.25]]
    assert not state_files.copy_stored(files, "average.", {"weight": weight})
    with pytest.raises(ResumeMismatch, match="reference.weight is .2, 1. BF16, and here .1, 1."):
        state_files.copy_stored(files, "reference.", dict(model.named_parameters()))
    with pytest.raises(ResumeMismatch, match="lacks reference.bias"):
        state_files.copy_stored(files, "reference.", {"bias": weight})


def test_a_cached_reference_moves_as_a_live_one(train):
    """Also where each step moves it, and over an epoch's end."""
    for options in (
        [*MOVES],
        [*SHORT, "reference_update_every=1", "n_epochs=2"],
    ):
        shown = []
        for reference in ("live", "cached"):
            run = train(f"{reference}{len(options)}", *options, STEADY, f"reference={reference}")
            shown.append(records(run))
            shutil.rmtree(run.parent / "runs")
        for live, cached in zip(*shown, strict=True):
            for split in ("train", "eval"):
                for name in (f"loss/{split}", f"rewards_{split}/chosen", "grad_norm"):
                    if name in live:
                        assert cached[name] == pytest.approx(live[name], rel=1e-3, abs=2e-5)


def test_the_average_is_evaluated_and_saved(train, tmp_path):
    """policy_ema.pt of every step is 0.5 of the one before and 0.5 of the policy; the first, of the
    base. What eval.py says of the last is what the run said.
    """
    run = train("ema", *SHORT, "eval_every=3", "ema_decay=0.5", "do_first_eval=true")
    states = [
        [torch.load(folder / f"{name}.pt", weights_only=True)["state"] for name in NAMES]
        for folder in reversed(checkpoints.listed(run))
    ]
    assert len(states) == 6
    for (_, before), (policy, average) in zip(states, states[1:], strict=False):
        for name in average:
            torch.testing.assert_close(average[name], (before[name] + policy[name]) / 2)
    evaluations = records(run, "eval")
    assert evaluations[0]["loss/eval_ema"] == evaluations[0]["loss/eval"]
    last = evaluations[-1]
    assert last["loss/eval_ema"] != last["loss/eval"]
    for name, split in (("policy", "eval"), ("policy_ema", "eval_ema")):
        evaluate(run / f"LATEST/{name}.pt", "--out", tmp_path / f"{name}.json")
        told = (tmp_path / f"{name}.json").read_text()
        assert f'"loss/eval": {last[f"loss/{split}"]}' in told


NAMES = ("policy", "policy_ema")


KINDS = {
    "soft, live, average": [
        *MOVES,
        "reference=live",
        "reference_update_weight=0.5",
        "ema_decay=0.5",
    ],
    "hard, cached, 16 bits": [*MOVES, "reference=cached", "model.policy_dtype=bfloat16"],
    "kto, cached": [
        *[option for option in MOVES if not option.startswith("loss")],
        "loss=kto",
        "loss.beta=0.1",
        "reference=cached",
        "ema_decay=0.5",
        "async_save=true",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_halted_after_every_step_it_ends_the_same(kind, train, monkeypatch):
    """With a save after every step: before a move, after it, at an evaluation."""
    options = [*KINDS[kind], "save_every=3", "resume=auto"]
    uninterrupted = train("uninterrupted", *options)
    step = trainers.BasicTrainer.step

    for n in range(2, 6):

        def gone(self, *arguments, n=n):
            if self.n_updates == n:
                self.saver.wait()
                raise Halt
            step(self, *arguments)

        with monkeypatch.context() as patch, pytest.raises(Halt):
            patch.setattr(trainers.BasicTrainer, "step", gone)
            train("halted", *options)
    assert same(outcome(train("halted", *options)), outcome(uninterrupted))
    names = {name.split(".")[0] for name in state_of(uninterrupted)}
    assert ("reference" in names) == ("live" in kind)
    assert ("average" in names) == ("ema_decay=0.5" in options)


def test_a_cache_that_was_lost_stops_a_resumed_run(train, tmp_path, monkeypatch):
    """The weights of a cached reference that moved are nowhere else."""
    options = [*MOVES, "reference=cached", "save_every=3", "resume=auto"]
    step = trainers.BasicTrainer.step

    def gone(self, *arguments):
        step(self, *arguments)
        if self.n_updates == 4:
            raise Halt

    with monkeypatch.context() as patch, pytest.raises(Halt):
        patch.setattr(trainers.BasicTrainer, "step", gone)
        train("lost", *options)
    for cache in tmp_path.rglob("reference_cache"):
        shutil.rmtree(cache)
    with pytest.raises(ResumeMismatch, match="of the reference are missing.*reference=live"):
        train("lost", *options)


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_two_processes_do_as_one(reference, train, of_two, tmp_path):
    """Each of two gloo ranks has half of the weights, of their average and of the reference. The
    weights are those of one process, within 1e-8 in float64 (see test_resume.py), and to the bit
    those of two that were halted in between.
    """
    options = [
        *MOVES,
        STEADY,
        f"reference={reference}",
        "ema_decay=0.5",
        "save_every=3",
        "model.policy_dtype=float64",
        *(["reference_update_weight=0.5"] if reference == "live" else []),
    ]

    def in_two(name, halt):
        run_in_group(2, train_until, of_two(name, *options, "resume=auto"), halt)
        return tmp_path / name

    two = outcome(in_two("two", None))
    assert same(two, outcome(train("one", *options)), tolerance=1e-8)
    for halt in (4, 5):
        in_two(f"halted{halt}", halt)
        assert same(outcome(in_two(f"halted{halt}", None)), two)


REFUSED = {
    "the reference never moves; set reference_update_every": ["reference_update_weight=0.5"],
    "this loss .sft. needs no reference": ["loss=sft", "reference_update_every=2"],
    "set reference=live, or 1 to copy the policy": [
        *MOVES,
        "reference_update_weight=0.5",
        "reference=cached",
    ],
    "bfloat16 weights round small moves away; set model.reference_dtype=float32": [
        *MOVES,
        "reference_update_weight=0.5",
        "model.policy_dtype=bfloat16",
    ],
    "a cached reference is recomputed by the policy, in float32": [
        *MOVES,
        "reference=cached",
        "model.reference_dtype=bfloat16",
    ],
    "ema_decay=1: expected a number in .0, 1.": ["ema_decay=1"],
    "reference_update_weight=0: expected a number in .0, 1.": ["reference_update_weight=0"],
    "reference_update_every=0: expected a whole number": ["reference_update_every=0"],
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_work_is_refused(line, train):
    with pytest.raises(UserError, match=line):
        train("refused", *REFUSED[line])
