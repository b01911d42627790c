"""The losses on the policy's own samples, by hand."""

import dataclasses
import math

import pytest
import torch
from losses import knobs_of

from plumb.losses import registry
from plumb.losses.contract import Largest, LossOutput, Rollouts, TokenLogps
from plumb.losses.policy_gradient import k1, k3
from plumb.losses.registry import build_loss
from plumb.training.metrics import Means

# ratios to the policy that sampled: of one prompt's samples of 2 tokens and 1, and of another's
# of 1; advantages 1, -1 and 2
RATIOS = [1.5, 1.0, 0.5, 1.1]
RESPONSE = [0, 0, 2, 1]
ADVANTAGES = [1.0, 2.0, -1.0]


def rollouts(each, old=None, advantages=ADVANTAGES, by_token=None):
    each = torch.as_tensor(each, dtype=torch.float64)
    return Rollouts(
        responses=TokenLogps(each, torch.tensor(RESPONSE), 3),
        example=torch.tensor([0, 1, 0]),
        n=2,
        old=each.detach() if old is None else torch.as_tensor(old, dtype=torch.float64),
        advantages=torch.tensor(advantages),
        token_advantages=None if by_token is None else torch.tensor(by_token),
    )


def policy_at(ratios=RATIOS, **options):
    old = torch.tensor([-1.0, -2, -3, -4], dtype=torch.float64)
    each = old + torch.tensor(ratios, dtype=torch.float64).log()
    return rollouts(each.requires_grad_(), old, **options)


def bound(name, **knobs):
    return build_loss(knobs_of(name) | knobs)


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        # tokens: -min(1.5, 1.2), -1, and 1 * max(0.5, 0.8), halved: means (-2.2 / 2 + 0.8) / 2
        ({"normalizer": "sequence"}, [(-1.1 + 0.8) / 2, -2.2]),
        ({"normalizer": 4}, [(-2.2 + 0.8) / 4 / 2, -2.2 / 4]),
        # divided by the 4 tokens of the batch outside of the loss
        ({"normalizer": "token"}, [-2.2 + 0.8, -2.2]),
        ({"normalizer": "token", "clip_high": None}, [-2.5 + 0.8, -2.2]),
        ({"normalizer": "token", "clip_low": None}, [-2.2 + 0.5, -2.2]),
        # sqrt(1.5) = 1.22 is beyond the bound; the product of a sequence is 1.5
        ({"ratio": "sequence"}, [(-1.2 + 0.8) / 2, -2.2]),
        ({"ratio": "sequence", "clip_high": 1.0}, [(-math.sqrt(1.5) + 0.8) / 2, -2.2]),
        ({"ratio": "sequence", "normalizer": 1, "clip_high": 1.0}, [(-1.5 + 0.8) / 2, -2.2]),
    ],
)
def test_normalizers_ratios_and_bounds(knobs, expected):
    given = {"kl": "none", "beta": None, **knobs}
    assert bound("grpo", **given).compute(policy_at()).losses.tolist() == pytest.approx(expected)
    assert bound("rloo", **{"normalizer": "sequence", "ratio": "token", **given}).compute(
        policy_at()
    ).losses.tolist() == pytest.approx(expected)


def test_a_bound_stops_the_gradient_on_its_side_alone():
    """Ratios 1.5 and 0.5, which are also the gradients' sizes: 1.5 is held where the advantage is
    positive, 0.5 where it is negative.
    """
    for advantage, expected in ((1.0, [0, 0.5]), (-1.0, [1.5, 0])):
        policy = policy_at([1.5, 1, 0.5, 1], advantages=[advantage] * 3)
        bound("dapo", clip_high=0.2).compute(policy).losses.sum().backward()
        assert policy.responses.each.grad[[0, 2]].abs().tolist() == pytest.approx(expected)


def test_at_ratio_1_the_surrogate_has_the_policy_gradient():
    """-A grad log pi(y|x), whatever bounds and ratio; divided as the normalizer says."""
    for ratio, normalizer, divisor in (
        ("token", 1, [1, 1, 1]),
        ("sequence", 1, [1, 1, 1]),
        ("token", "sequence", [2, 1, 1]),
        ("sequence", "sequence", [2, 1, 1]),
    ):
        policy = policy_at([1.0] * 4)
        loss = bound("rloo", ratio=ratio, normalizer=normalizer, kl="none", beta=None)
        loss.compute(policy).losses.sum().backward()
        k = torch.tensor([2, 1, 2])  # samples of the example of each response
        expected = -torch.tensor(ADVANTAGES) / k / torch.tensor(divisor)
        assert policy.responses.each.grad.tolist() == pytest.approx(expected[RESPONSE].tolist())


def test_advantages_of_tokens_by_hand():
    """Ratios 1.5, 1, 0.5 and 1.1: bounded above at 1.2 where the advantage is positive, below at
    0.8 where it is negative.
    """
    policy = policy_at(by_token=[1.0, 3.0, -2.0, 0.5])
    losses = bound("ppo").compute(policy, policy).losses
    assert losses.tolist() == pytest.approx([-1.2 - 3 + 1.6, -0.55])
    policy = policy_at([1.0] * 4, by_token=[1.0, 3.0, -2.0, 0.5])
    bound("ppo").compute(policy, policy).losses.sum().backward()
    assert policy.responses.each.grad.tolist() == pytest.approx([-1, -3, 2, -0.5])


def test_the_entropy_is_taken_off_token_by_token():
    """0.5 times each token's own, beside no advantage: as it was read, and so is its gradient."""
    policy = policy_at(by_token=[0.0] * 4)
    entropy = torch.tensor([0.1, 0.2, 0.3, 0.6], requires_grad=True)
    read = dataclasses.replace(policy, responses=policy.responses._replace(entropy=entropy))
    output = bound("ppo", entropy=0.5, kl="none", beta=None).compute(read)
    assert output.losses.tolist() == pytest.approx([-0.5 * 0.6, -0.5 * 0.6])
    output.losses.sum().backward()
    assert entropy.grad.tolist() == [-0.5] * 4
    assert not output.metrics["entropy"].columns().requires_grad


def test_the_kl_in_the_loss_by_hand():
    """pi_ref / pi = 2 for every token: k3 = 2 - 1 - log 2, times the ratio; without advantages."""
    policy = policy_at(advantages=[0.0, 0, 0])
    reference = rollouts(policy.responses.each.detach() + math.log(2))
    k = 1 - math.log(2)
    losses = bound("grpo", beta=0.5).compute(policy, reference).losses
    assert losses.tolist() == pytest.approx([0.5 * k * (2.5 / 2 + 0.5) / 2, 0.5 * k * 1.1])
    losses = bound("grpo", beta=0.5, ratio="sequence").compute(policy, reference).losses
    assert losses.tolist() == pytest.approx([0.5 * k * (1.5 + 0.5) / 2, 0.5 * k * 1.1])


# ---- estimators of the KL on a vocabulary of 3 ----

PI = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
REFERENCE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
KL = float((PI * (PI / REFERENCE).log()).sum())


@pytest.mark.parametrize("estimator", [k1, k3])
def test_an_estimator_has_the_mean_of_the_exact_kl(estimator):
    assert float(PI @ estimator(PI.log(), REFERENCE.log())) == pytest.approx(KL)
    same = estimator(PI.log(), PI.log())
    assert same.abs().max() == 0


def test_k3_is_never_negative_and_varies_less():
    ours, theirs = k3(PI.log(), REFERENCE.log()), k1(PI.log(), REFERENCE.log())
    assert (ours >= 0).all() and (theirs < 0).any()
    assert PI @ (ours - KL) ** 2 < PI @ (theirs - KL) ** 2


def test_with_the_ratio_its_gradient_is_that_of_the_kl():
    """In expectation over samples; without the ratio, it is that of KL(pi_ref || pi)."""
    gradient = lambda value, logits: torch.autograd.grad(value, logits)[0]
    logits = PI.log().requires_grad_()
    log_pi = logits.log_softmax(0)
    exact = gradient((log_pi.exp() * (log_pi - REFERENCE.log())).sum(), logits)
    log_pi = logits.log_softmax(0)
    forward = gradient(-(REFERENCE * log_pi).sum(), logits)
    log_pi = logits.log_softmax(0)
    estimate = k3(log_pi, REFERENCE.log())
    ratio = (log_pi - log_pi.detach()).exp()
    with_ratio = gradient(PI @ (ratio * estimate), logits)
    torch.testing.assert_close(with_ratio, exact)
    log_pi = logits.log_softmax(0)
    without = gradient(PI @ k3(log_pi, REFERENCE.log()), logits)
    torch.testing.assert_close(without, forward)
    assert not torch.allclose(exact, forward, atol=0.01)


# ---- metrics and knobs ----


def test_metrics_by_hand():
    policy = policy_at()
    reference = rollouts(policy.responses.each.detach() + math.log(2))

    def value(metric):
        columns = metric.columns()
        over = columns.amax(0) if isinstance(metric, Largest) else columns.sum(0)
        return metric.value(over.tolist())

    got = {k: value(m) for k, m in bound("grpo").compute(policy, reference).metrics.items()}
    old = [r - 1 - math.log(r) for r in RATIOS]
    assert got == pytest.approx(
        {
            "ratio/mean": sum(RATIOS) / 4,
            "ratio/max": max(RATIOS),
            "clip/low": 1 / 4,
            "clip/high": 1 / 4,
            "kl/old": sum(old) / 3,
            "entropy": (10 - sum(map(math.log, RATIOS))) / 4,
            "kl/k1": -4 * math.log(2) / 3,
            "kl/k3": 4 * (1 - math.log(2)) / 3,
            "kl/k3_token": 1 - math.log(2),
        }
    )


def test_the_entropy_that_was_read_is_logged():
    """As a mean over tokens, in place of the estimate."""
    policy = policy_at()
    entropy = torch.tensor([0.1, 0.2, 0.3, 0.6])
    read = dataclasses.replace(policy, responses=policy.responses._replace(entropy=entropy))
    metric = bound("grpo", kl="none", beta=None).compute(read, None).metrics["entropy"]
    assert metric.value(metric.columns().sum(0).tolist()) == pytest.approx(1.2 / 4)


def test_the_largest_ratio_of_a_sequence_and_of_a_step():
    """Of a prompt's responses, the product of 1.5 and 1 and the ratio 0.5; of two microbatches, the
    larger one.
    """
    whole = {"ratio": "sequence", "normalizer": 1, "kl": "none", "beta": None}
    metric = bound("grpo", **whole).compute(policy_at(), None).metrics["ratio/max"]
    assert metric.values.tolist() == pytest.approx([1.5, 1.1])
    means = Means()
    for largest in (0.9, 1.7, 1.2):
        means.add({"ratio/max": Largest(torch.tensor([largest, 0.1], dtype=torch.float64))})
    assert means.reduce() == {"ratio/max": 1.7}


def test_a_ratio_that_would_overflow_stays_finite():
    policy = rollouts([-1.0] * 4, [-1e4, -1e4, -1.0, -1e4])
    out = bound("rloo").compute(policy, policy)
    assert out.losses.isfinite().all()


@pytest.mark.parametrize(
    ("name", "knobs", "line"),
    [
        ("rloo", {"kl": "loss"}, "loss.kl=loss: expected one of reward, none"),
        ("grpo", {"kl": "reward"}, "loss.kl=reward: expected one of loss, none"),
        ("grpo", {"kl": "none"}, "loss.beta=0.04: is the weight of the KL, and kl=none"),
        ("dapo", {"kl": "loss"}, "loss.beta=null: kl=loss needs its weight"),
        ("grpo", {"beta": 0}, "loss.beta=0: must be above 0"),
        ("grpo", {"normalizer": 0}, "loss.normalizer=0: must be above 0"),
        ("grpo", {"normalizer": "batch"}, "loss.normalizer=batch: expected one of sequence, token"),
        ("grpo", {"clip_low": 1.0}, "loss.clip_low=1.0: "),
        ("grpo", {"clip_high": -0.1}, "loss.clip_high=-0.1: must be above 0"),
        ("dapo", {"ratio": "sequence"}, "loss.ratio=sequence: is one number for a response"),
        ("reinforce_pp", {"equal_rewards": "drop"}, "loss.equal_rewards=drop: with baseline="),
        ("ppo", {"kl": "none"}, "loss.beta=0.05: is the weight of the KL, and kl=none"),
        ("ppo", {"kl_target": 6.0}, "loss.kl_horizon=null: beta is controlled with both"),
        ("ppo", {"kl_horizon": 1e4}, "loss.kl_target=null: beta is controlled with both"),
        (
            "ppo_openai2019",
            {"kl": "none", "beta": None},
            "loss.kl_target=6.0: kl=none has no KL to control",
        ),
        ("ppo", {"gae_lambda": 1.1}, "loss.gae_lambda=1.1: must be above 0, and 1 at most"),
        ("ppo", {"gamma": 0.0}, "loss.gamma=0.0: must be above 0, and 1 at most"),
        ("ppo", {"value_clip": 0}, "loss.value_clip=0: must be above 0"),
        ("ppo", {"critic_warmup": -1}, "loss.critic_warmup=-1: must not be negative"),
        ("ppo", {"critic_warmup": 0.5}, "loss.critic_warmup=0.5: expected a whole number"),
        ("ppo", {"critic": "value"}, "loss.critic=value: expected one of reward, policy"),
        ("ppo", {"entropy": -1.0}, "loss.entropy=-1.0: must not be negative"),
        ("ppo", {"ratio": "token"}, "loss.ratio=token: loss ppo has no such knob; it has: normali"),
    ],
)
def test_knobs_that_do_not_fit_are_refused(name, knobs, line):
    with pytest.raises(ValueError) as error:
        bound(name, **knobs)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_loss_says_how_rewards_become_advantages():
    assert bound("rloo").advantages == ("leave_one_out", "none", 0.05, "keep")
    assert bound("dapo").advantages == ("group_mean", "group", 0.0, "drop")
    assert bound("reinforce_pp").advantages == ("batch_mean", "batch", 0.01, "keep")
    assert build_loss(knobs_of("dpo")).advantages is None
    rule = bound("ppo_mpo").advantages
    assert (rule.kl_weight, rule.kl_token, rule.gae_lambda) == (0.4, "k1_positive", 0.95)
    assert bound("ppo", kl="none", beta=None).advantages.kl_weight == 0
    assert not bound("dr_grpo").needs_reference and bound("grpo").needs_reference
    assert bound("dapo").average_over == "tokens" and bound("gspo").average_over == "examples"


def test_a_plugins_loss_must_say_how_rewards_become_advantages(monkeypatch):
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))

    @registry.loss(group="rollout")
    def reinforce(policy: Rollouts[TokenLogps], reference: None, *, scale: str) -> LossOutput:
        each = -policy.responses.each * policy.advantages[policy.responses.response]
        return LossOutput(policy.sum(policy.responses.sum(each)))

    with pytest.raises(ValueError, match="^loss.baseline: a loss on the policy's own samples need"):
        build_loss({"name": "reinforce", "scale": "none"})


def test_a_mixture_on_samples():
    """Half of each: the same advantages for both, or it is refused."""
    term = knobs_of("dapo") | {"weight": 0.5}
    terms = {"low": term, "high": term | {"clip_high": 0.6}}
    mixed = build_loss({"name": "both", "terms": terms})
    assert mixed.advantages == bound("dapo").advantages
    losses = mixed.compute(policy_at(), None, None).losses
    assert losses.tolist() == pytest.approx([(-2.28 - 2.5) / 2 + 0.8, -2.2])
    with pytest.raises(ValueError, match="loss.terms.high: how rewards become advantages is"):
        build_loss({"name": "both", "terms": terms | {"high": term | {"scale": "none"}}})
