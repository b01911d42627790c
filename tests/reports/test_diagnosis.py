"""Each rule of the diagnosis on curves that it is for, and on curves that look a little like them;
a healthy run.
"""

import math

import pytest
from conftest import ROOT
from made_up_runs import ALWAYS, HEALTHY, bent, falling, run, wave

from plumb.reports import diagnosis
from plumb.reports.diagnosis import RULES, diagnose, healthy, verdict

NAN = math.nan
ON_SAMPLES = {
    "ratio_{}/mean": ALWAYS(1.0),
    "rollout_{}/reward": falling(0.0, 2.0),
    "kl_{}/k1": falling(0.0, 6.0),
}
EXPLAINED = "critic_{}/explained_variance"
LENGTH = "rewards_{}/accuracies/length "
TWICE = "To {prompt} is fine. To {prompt} is fine, I think, but look around."
WRONG = {  # rule -> runs that it is for
    "stopped": [
        run(status={"state": "failed", "code": 5, "reason": "no space"}),
        run(status={"state": "stopped", "code": 143}),
    ],
    "silent": [run(status={"state": "running"}, silent_secs=2 * 3600)],
    "not_finite": [
        run(train={"loss/{}": lambda t: NAN if t > 0.9 else 0.5}),
        run(train={"grad_norm": lambda t: math.inf if t == 1 else 1}),
        run(status={"state": "failed", "code": 4}),
    ],
    "no_gradient": [
        run(train={"grad_norm": ALWAYS(0.0)}),
        run(train={"grad_norm": lambda t: 1.0 if t < 0.5 else 1e-12}),
    ],
    "flat": [
        run(held_out={"loss/{}": ALWAYS(0.6931)}),
        run(held_out={"loss/{}": falling(0.6931, 0.6930)}, train={"lr": ALWAYS(5e-7)}),
    ],
    "at_chance": [
        run(held_out={"rewards_{}/accuracies": ALWAYS(value)}) for value in (0.5, 0.54, 0.1)
    ],
    "chosen_falls": [
        run(held_out={"logps_{}/chosen": falling(-59, -95)}),
        run(held_out={"logps_{}/chosen": falling(-70, -78)}),
        run(held_out={"logps_{}/chosen": None}, train={"logps_{}/chosen": falling(-59, -95)}),
    ],
    "huge_margin": [run(train={"rewards_{}/margins": falling(0, 36)})],
    "overfits": [
        run(held_out={"loss/{}": bent(0.69, 0.6, 0.66)}),
        run(held_out={"loss/{}": falling(0.69, 0.8)}),
        run(held_out={"loss/{}": bent(300, 280, 290)}),
    ],
    "by_heart": [
        run(
            train={"rewards_{}/accuracies": ALWAYS(1.0)},
            held_out={"rewards_{}/accuracies": ALWAYS(0.7)},
        )
    ],
    "diverges": [
        run(train={"loss/{}": bent(0.7, 0.5, 2.0)}),
        run(train={"loss/{}": falling(200, 260)}),
    ],
    "in_warmup": [run(n=40, config={"warmup_steps": 150})],
    "clipped": [run(train={"grad_norm": ALWAYS(50)})],
    "by_length": [run(held_out={f"{LENGTH}32-63": ALWAYS(0.5), f"{LENGTH}64-127": ALWAYS(0.9)})],
    "longer": [
        run(
            texts=(
                "To {prompt}, be slow.",
                "To {prompt}, be slow and careful and kind, whoever asks you for it.",
            )
        )
    ],
    "repeats": [
        run(texts=("To {prompt}, be slow.", "helps helps helps helps helps helps helps helps {i}")),
        run(texts=("To {prompt}, be slow.", "水水水水水水水水水{i}")),
    ],
    "alike": [
        run(texts=("To {prompt}, be slow.", "I can not help.")),
        run(texts=("To {prompt}, be slow.", " ")),
    ],
    "negative_kl": [run(train={"kl_{}/k1": falling(0.0, -2.0)})],
    "all_equal": [run(train={"rollout_{}/equal_rewards": falling(0.5, 1.0)})],
    "far_from_reference": [
        run(train=ON_SAMPLES | {"kl_{}/k1": falling(0.0, 90.0)}),
        run(train=ON_SAMPLES, held_out={"rollout_{}/reward": bent(0.0, 2.0, 1.0)}),
    ],
    "entropy_falls": [run(train={"entropy/{}": bent(3.0, 0.1, 0.01)})],
    "never_ends": [run(train={"rollout_{}/eos": falling(0.3, 0.0)})],
    "disagrees": [run(train={"rollout_{}/logps_difference": ALWAYS(0.04)})],
    "used_too_often": [run(train={"clip_{}/low": ALWAYS(0.2), "clip_{}/high": ALWAYS(0.2)})],
    "critic_explains_nothing": [
        run(train={EXPLAINED: falling(-0.3, 0.05)}),
        run(train={EXPLAINED: bent(0.0, 0.6, -2.0)}),
    ],
    "critic_explodes": [run(train={"critic_{}/loss": bent(1.0, 0.4, 40.0)})],
    "not_held_out": [run(held_out={})],
    "too_short": [run(n=5, config={"warmup_steps": 2}), run(n=0)],
}
RIGHT = {  # rule -> runs that are not to be confused with those; the healthy one is none for any
    "negative_kl": [run(train={"kl_{}/k1": lambda t: 0.1 * wave(60 * t)}), run(train=ON_SAMPLES)],
    "all_equal": [run(train={"rollout_{}/equal_rewards": falling(1.0, 0.5)})],
    "far_from_reference": [
        run(train=ON_SAMPLES, held_out={"rollout_{}/reward": falling(0.0, 2.0)}),
        run(train=ON_SAMPLES | {"rollout_{}/reward": falling(2, 1), "kl_{}/k1": falling(0, 90)}),
    ],
    "entropy_falls": [run(train={"entropy/{}": falling(3.0, 1.0)})],
    "never_ends": [run(train={"rollout_{}/eos": falling(0.0, 0.9)})],
    "disagrees": [run(train={"rollout_{}/logps_difference": ALWAYS(0.004)})],
    "used_too_often": [run(train={"clip_{}/low": ALWAYS(0.1), "clip_{}/high": ALWAYS(0.1)})],
    "critic_explains_nothing": [
        run(train={EXPLAINED: falling(-0.5, 0.6)}),  # it begins with a head of 0
        run(n=40, train={EXPLAINED: ALWAYS(0.0)}),  # and has had few steps
    ],
    "critic_explodes": [
        run(train={"critic_{}/loss": falling(4.0, 0.1)}),
        run(train={"critic_{}/loss": falling(1.0, 2.0)}),
        run(train={"critic_{}/loss": lambda t: 50.0 if 0.85 < t < 0.87 else 1.0}),
    ],
    "stopped": [run(status={"state": "running"})],
    "silent": [run(status={"state": "running"}, silent_secs=60), run(silent_secs=10**6)],
    "not_finite": [
        run(train={"logps_{}/rejected": ALWAYS(-math.inf)})
    ],  # no answer left: odd, and not this
    "no_gradient": [
        run(train={"grad_norm": lambda t: 1e-12 if t < 0.5 else 1e-3}),
        run(train={"grad_norm": None}),
    ],
    "flat": [
        run(held_out={"loss/{}": falling(0.6931, 0.685)}),
        run(held_out={"loss/{}": bent(0.6931, 0.6, 0.6931)}),  # it did move
        run(held_out={}),
    ],
    "at_chance": [
        run(held_out={"rewards_{}/accuracies": lambda t: 0 if t == 0 else 0.6}),
        run(held_out={}),
    ],
    "chosen_falls": [
        run(held_out={"logps_{}/chosen": falling(-70, -74)}),  # common in DPO
        run(held_out={"logps_{}/chosen": falling(-700, -710)}),
        run(held_out={"logps_{}/chosen": falling(-70, -95), "rewards_{}/margins": falling(0, -1)}),
        run(
            train={"logps_{}/chosen": falling(-20, -40)}
        ),  # by another batch; the held-out ones rise
    ],
    "huge_margin": [
        run(train={"rewards_{}/margins": falling(0, 8)}),
        run(train={"rewards_{}/margins": None}),
    ],
    "overfits": [
        run(held_out={"loss/{}": bent(0.6931, 0.006, 0.0064)}),  # its noise
        run(
            held_out={"loss/{}": bent(0.69, 0.6, 0.66)}, train={"loss/{}": bent(0.69, 0.6, 0.66)}
        ),  # both rise
        run(held_out={}),
    ],
    "by_heart": [
        run(
            train={"rewards_{}/accuracies": ALWAYS(1.0)},
            held_out={"rewards_{}/accuracies": ALWAYS(0.95)},
        ),
        run(
            train={"rewards_{}/accuracies": ALWAYS(0.9)},
            held_out={"rewards_{}/accuracies": ALWAYS(0.7)},
        ),
    ],
    "diverges": [
        run(train={"loss/{}": lambda t: 0.5 + 0.3 * wave(round(59 * t))}),
        run(train={"loss/{}": bent(0.7, 0.5, 0.52)}),
    ],
    "in_warmup": [
        run(n=40, config={"warmup_steps": 150}, status={"state": "running"}),
        run(config={"warmup_steps": 59}),
    ],
    "clipped": [
        run(train={"grad_norm": lambda t: 50 if t < 0.5 else 5}),
        run(config={"max_grad_norm": None}),
    ],
    "by_length": [run(held_out={f"{LENGTH}32-63": ALWAYS(0.8), f"{LENGTH}64-127": ALWAYS(0.9)})],
    "longer": [
        run(
            texts=(
                "To {prompt}, be slow and look twice.",
                "To {prompt}, be slow and look at it twice.",
            )
        ),
        run(
            texts=("rubbish", "To {prompt}, be slow."),
            held_out={k: None for k in HEALTHY if k.startswith("rewards")},
        ),  # SFT
    ],
    "repeats": [
        run(texts=(TWICE, TWICE)),
        run(texts=("no no no no no no no no", "To {prompt}, be slow.")),
    ],
    "alike": [run(texts=("To {prompt}, be slow.", "Sure: {prompt}."))],
    "not_held_out": [run(n=3, held_out={})],
    "too_short": [run(n=10)],
}
NAMES = {rule.check.__name__ for rule in RULES}


def test_every_rule_is_tried_both_ways_and_documented():
    assert NAMES == WRONG.keys() == RIGHT.keys()
    text = (ROOT / "docs/report.md").read_text()
    for rule in RULES:
        assert rule.check.__doc__ and f"| {rule.title} | {rule.level} |" in text, rule.title


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_rule(name):
    check, rule = getattr(diagnosis, name), next(r for r in RULES if r.check.__name__ == name)
    for i, bad in enumerate(WRONG[name]):
        assert check(bad), f"{name} keeps quiet about case {i}"
        assert (rule.title, rule.level) in [(f.title, f.level) for f in diagnose(bad)]
        assert bool(healthy(diagnose(bad))) == (rule.level == "note"), i
    for i, good in enumerate(RIGHT[name]):
        assert not check(good), f"{name} takes case {i} for one of its own: {check(good)}"


@pytest.mark.parametrize("n", [60, 600])
def test_a_healthy_run(n):
    assert diagnose(run(n)) == [] and healthy([]) == "Nothing wrong was found."
    assert (
        verdict(run())
        == "finished, 60 steps, 960 examples, 90 s, held-out loss 0.2931, accuracy 0.9, margin 1.1"
    )


def test_the_worst_comes_first():
    train = {"grad_norm": ALWAYS(50), "rewards_{}/margins": falling(0, 36)}
    found = diagnose(run(train=train, held_out={"loss/{}": ALWAYS(0.6931)}))
    assert [f.level for f in found] == ["problem", "warning", "note"]


def test_a_run_that_goes_on():
    going = run(status={"state": "running", "code": None})
    going.steps[-1]["seconds_left"] = 7200.0
    assert verdict(going).startswith(
        "running, 60 steps, 960 examples, last record 5 s ago, about 2.0 h left"
    )
    assert (
        verdict(run(n=0, held_out={}, status={"state": None}))
        == "of unknown state (no status.json), no metrics yet, 90 s"
    )
