"""Losses: hand-derived values, the papers' gradients, limits, and the 2023 code's own numbers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import load, needs_golden
from losses import knobs_of

from plumb.data.extras import Extras
from plumb.losses import registry
from plumb.losses.contract import Labelled, Lists, Logps, LossOutput, Mean, Pairs, TokenLogps
from plumb.losses.registry import LOSSES, build_loss, loss
from plumb.losses.unpaired import kl_to_reference, reward_shift
from plumb.training.objective import LOSS_INPUTS, _reward_metrics


def logps(*values: float, dtype=torch.float64) -> Logps:
    return Logps(torch.tensor(values, dtype=dtype), torch.ones(len(values)))


def pairs(chosen, rejected) -> Pairs:
    return Pairs(logps(*chosen), logps(*rejected))


DPO = knobs_of("dpo") | {"beta": 0.1}
IPO = knobs_of("ipo") | {"beta": 0.1}


def test_dpo_by_hand():
    """h = (-10 - -20) - (-30 - -20) = 20; beta h = 2; loss = log(1 + e^-2); rewards 0.1 * 10 and
    0.1 * -10.
    """
    out = build_loss(DPO).compute(pairs([-10], [-30]), pairs([-20], [-20]))
    assert out.losses.item() == pytest.approx(math.log1p(math.exp(-2)))
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx((1.0, -1.0))


def test_conservative_dpo_by_hand():
    """(1 - e) log(1 + e^-2) + e log(1 + e^2), e = 0.25."""
    out = build_loss(DPO | {"label_smoothing": 0.25}).compute(
        pairs([-10], [-30]), pairs([-20], [-20])
    )
    assert out.losses.item() == pytest.approx(
        0.75 * math.log1p(math.exp(-2)) + 0.25 * math.log1p(math.exp(2))
    )


def test_nll_keeps_the_chosen_likely():
    """log(1 + e^-2) as above, + 0.5 * 10 nats over 4 tokens; its gradient pulls the chosen
    log-probability up by 0.5 / 4.
    """
    chosen = Logps(torch.tensor([-10.0], requires_grad=True), torch.tensor([4]))
    rejected = logps(-30)
    losses = (
        build_loss(DPO | {"nll": 0.5}).compute(Pairs(chosen, rejected), pairs([-20], [-20])).losses
    )
    assert losses.item() == pytest.approx(math.log1p(math.exp(-2)) + 0.5 * 10 / 4)
    losses.backward()
    assert chosen.sum.grad.item() == pytest.approx(-0.1 / (1 + math.exp(2)) - 0.5 / 4)
    with pytest.raises(ValueError, match="loss.nll=-1"):
        build_loss(DPO | {"nll": -1})


def test_ipo_by_hand():
    """h = 20, 1 / (2 beta) = 5: (20 - 5)^2 = 225; smoothed by 0.25: 0.75 * 225 + 0.25 * (20 + 5)^2
    = 325.
    """
    policy, reference = pairs([-10], [-30]), pairs([-20], [-20])
    assert build_loss(IPO).compute(policy, reference).losses.item() == pytest.approx(225)
    assert build_loss(IPO | {"label_smoothing": 0.25}).compute(
        policy, reference
    ).losses.item() == pytest.approx(325)


def test_dpo_gradient_is_the_papers():
    """d loss / d log pi(y_w) = -beta sigmoid(r_l - r_w), and minus that for y_l (below Eq. 7 of
    arXiv:2305.18290).
    """
    policy, reference = pairs([-10.0, -3], [-12.0, -1]), pairs([-11.0, -3.5], [-11.0, -4])
    policy.chosen.sum.requires_grad_(), policy.rejected.sum.requires_grad_()
    out = build_loss(DPO).compute(policy, reference)
    out.losses.sum().backward()
    weight = torch.sigmoid(out.rejected_rewards - out.chosen_rewards)
    torch.testing.assert_close(policy.chosen.sum.grad, -0.1 * weight)
    torch.testing.assert_close(policy.rejected.sum.grad, 0.1 * weight)


@pytest.mark.parametrize(
    "knobs, expected",
    [(DPO, math.log(2)), (DPO | {"label_smoothing": 0.3}, math.log(2)), (IPO, 25.0)],
)
def test_policy_equal_to_reference(knobs, expected):
    """h = 0: DPO gives log 2 whatever the smoothing, IPO 1 / (2 beta)^2; all rewards 0."""
    same = pairs([-7, -90], [-3, -2])
    out = build_loss(knobs).compute(same, same)
    assert out.losses.tolist() == pytest.approx([expected] * 2)
    assert out.chosen_rewards.tolist() == out.rejected_rewards.tolist() == [0, 0]


def test_reference_free_needs_no_reference():
    bound = build_loss(DPO | {"reference_free": True})
    assert not bound.needs_reference and build_loss(DPO).needs_reference
    constant = pairs([-5, -5], [-5, -5])
    policy = pairs([-10, -4], [-8, -9])
    torch.testing.assert_close(
        bound.compute(policy, None).losses, build_loss(DPO).compute(policy, constant).losses
    )


def test_sft_is_the_summed_negative_log_probability():
    bound = build_loss({"name": "sft", "average_over": "examples"})
    assert bound.compute(logps(-3, -40)).losses.tolist() == [3, 40]
    assert bound.group == "single" and not bound.needs_reference
    assert build_loss({"name": "sft", "average_over": "tokens"}).average_over == "tokens"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"name": "dpoo"}, "loss.name=dpoo: no such loss; known: "),
        ({"gamma": 1}, "loss.gamma=1: loss dpo has no such knob"),
        ({"beta": "abc"}, "loss.beta=abc: expected a number"),
        ({"beta": 0}, "loss.beta=0: must be above 0"),
        ({"label_smoothing": 0.5}, "loss.label_smoothing=0.5"),
        ({"reference_free": 1}, "loss.reference_free=1: expected true or false"),
    ],
)
def test_a_knob_that_would_be_ignored_is_an_error(change, said):
    with pytest.raises(ValueError) as error:
        build_loss(DPO | change)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_missing_knob():
    with pytest.raises(ValueError, match="loss.label_smoothing: loss dpo needs it"):
        build_loss({k: v for k, v in DPO.items() if k != "label_smoothing"})


def test_every_loss_says_where_it_comes_from():
    assert all(entry.function.__doc__ for entry in LOSSES.values())


@needs_golden
def test_preference_losses_equal_the_2023_code():
    """32 rows x 7 variants x 3 betas x 2 precisions: losses and gradients of the mean; rewards
    except reference_free's.

    reference_free rewards differ on purpose: 2023 reported them against a reference that the loss
    did not use.
    """
    golden = load("preference_loss.json.gz")
    for case in golden["cases"]:
        dtype = getattr(torch, case["dtype"])
        inputs = {
            k: torch.tensor(v, dtype=dtype) for k, v in golden["inputs"][case["dtype"]].items()
        }
        free = case["kwargs"].get("reference_free", False)
        smoothing = case["kwargs"].get("label_smoothing", 0.0)
        knobs = {"beta": case["beta"], "label_smoothing": smoothing, "reference_free": free}
        bound = build_loss((IPO if case["kwargs"].get("ipo") else DPO) | knobs)
        policy = [
            inputs[f"policy_{side}_logps"].clone().requires_grad_()
            for side in ("chosen", "rejected")
        ]
        n = torch.ones(len(policy[0]))
        reference = Pairs(
            *(Logps(inputs[f"reference_{side}_logps"], n) for side in ("chosen", "rejected"))
        )
        out = bound.compute(Pairs(*(Logps(p, n) for p in policy)), None if free else reference)
        out.losses.mean().backward()
        rtol = 1e-5 if dtype == torch.float32 else 1e-12

        def same(ours, theirs, rtol=rtol, dtype=dtype):
            torch.testing.assert_close(
                ours, torch.tensor(theirs, dtype=dtype), rtol=rtol, atol=rtol
            )

        same(out.losses.detach(), case["losses"])
        same(policy[0].grad, case["grad_policy_chosen_of_mean"])
        same(policy[1].grad, case["grad_policy_rejected_of_mean"])
        if not free:
            same(out.chosen_rewards, case["chosen_rewards"])
            same(out.rejected_rewards, case["rejected_rewards"])


@needs_golden
def test_losses_equal_the_peers_where_they_agree():
    """The same pairs through the 2023 code, TRL and torchtune: plain DPO by all of them, cDPO by
    the 2023 code and torchtune.
    """
    golden = load("losses.json.gz")
    checked = 0
    for case in golden["cases"]:
        hyper, name = case["hyperparameters"], case["name"]
        ours = case["source"] in ("reference", "torchtune") and name in ("dpo", "cdpo", "ipo")
        if not ours or set(hyper) - {"beta", "label_smoothing"}:
            continue
        dtype = getattr(torch, case["dtype"])
        inputs = golden["inputs"][case["dtype"]]
        n = torch.ones(golden["pairs"])
        policy, reference = (
            Pairs(
                *(
                    Logps(torch.tensor(inputs[f"{m}_{s}_logps"], dtype=dtype), n)
                    for s in ("chosen", "rejected")
                )
            )
            for m in ("policy", "reference")
        )
        knobs = (IPO if name == "ipo" else DPO) | hyper
        out = build_loss(knobs).compute(policy, reference)
        torch.testing.assert_close(
            out.losses, torch.tensor(case["losses"], dtype=dtype), rtol=1e-5, atol=1e-6
        )
        checked += 1
    assert checked >= 6


# ---- the contract ----


def test_the_old_spelling_gets_the_new_one():
    with pytest.raises(ValueError, match=r'@loss\(data="pairs"\): write group="pair" instead'):
        loss(data="pairs")
    with pytest.raises(ValueError, match="@loss.group='triple'.: write one of single, labelled"):
        loss(group="triple")


def test_the_signature_decides_what_a_loss_gets(monkeypatch):
    """Two pairs in one row, of 2 + 1 and 1 + 2 tokens: their positions lie tree by tree, so the
    chosen tokens are the 1st, 2nd and 4th. A sum over tokens is what a loss on sums gets.
    """
    monkeypatch.setattr(registry, "LOSSES", dict(LOSSES))

    @loss(group="pair")
    def largest(policy: Pairs[TokenLogps], reference: None = None) -> LossOutput:
        return LossOutput(policy.chosen.sum(policy.chosen.each**2))

    bound = build_loss({"name": "largest"})
    assert bound.reads == "token_logps" and build_loss(DPO).reads == "logps"
    each = torch.tensor([-1.0, -2, -3, -4, -5, -6])
    tokens = TokenLogps(each, torch.tensor([0, 0, 2, 1, 3, 3]), 4)
    assert tokens.sum().tolist() == [-3, -4, -3, -11]
    two = SimpleNamespace(n_responses=np.array([2, 2]), extras=Extras())
    both = LOSS_INPUTS["pair"](tokens, two)
    assert both.chosen.each.tolist() == [-1, -2, -4] and both.chosen.response.tolist() == [0, 0, 1]
    assert both.rejected.sum().tolist() == [-3, -11]
    assert bound.compute(both).losses.tolist() == [1 + 4, 16]


def test_a_metric_that_could_not_be_logged_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "LOSSES", dict(LOSSES))
    bare = torch.zeros(1)
    for metrics, line in (
        ({"kl/z0": (bare, bare)}, "its metric 'kl/z0' is a tuple; write Mean"),
        ({"kl_{}/z0": Mean(bare)}, "its metric 'kl_{}/z0' must have a name like 'kl'"),
    ):

        @loss(group="single")
        def old(policy: Logps, reference: None = None, metrics=metrics) -> LossOutput:
            return LossOutput(-policy.sum, metrics=metrics)

        with pytest.raises(ValueError, match=f"loss.name=old: {line}"):
            build_loss({"name": "old"})


# ---- simpo ----

SIMPO = knobs_of("simpo") | {"beta": 2.0, "gamma": 0.5}


def of(sums, tokens, grad=False) -> Logps:
    return Logps(torch.tensor(sums, dtype=torch.float64, requires_grad=grad), torch.tensor(tokens))


def test_simpo_by_hand():
    """Rewards 2 * -4 / 4 = -2 and 2 * -9 / 6 = -3, though the sums differ by 5; ahead by 1 - 0.5:
    log(1 + e^-0.5).
    """
    bound = build_loss(SIMPO)
    out = bound.compute(Pairs(of([-4.0], [4]), of([-9.0], [6])))
    assert out.losses.item() == pytest.approx(math.log1p(math.exp(-0.5)))
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (-2, -3)
    assert not bound.needs_reference
    for change, line in (({"beta": 0}, "loss.beta=0: must be"), ({"gamma": -1}, "loss.gamma=-1")):
        with pytest.raises(ValueError, match=line):
            build_loss(SIMPO | change)


def test_simpo_gradient_is_the_papers():
    """-beta s (grad log pi(y_w) / |y_w| - grad log pi(y_l) / |y_l|), with the weight s =
    sigmoid(r_l - r_w + gamma) (section 2.4 of arXiv:2405.14734).
    """
    policy = Pairs(of([-4.0, -3], [4, 2], grad=True), of([-9.0, -1], [6, 5], grad=True))
    out = build_loss(SIMPO).compute(policy)
    out.losses.sum().backward()
    weight = torch.sigmoid(out.rejected_rewards - out.chosen_rewards + 0.5)
    torch.testing.assert_close(policy.chosen.sum.grad, -2 * weight / policy.chosen.tokens)
    torch.testing.assert_close(policy.rejected.sum.grad, 2 * weight / policy.rejected.tokens)


def golden_pairs(golden, dtype):
    """The golden file's pairs, policy and reference, with their lengths."""
    inputs = golden["inputs"][dtype]
    return (
        Pairs(
            *(
                Logps(
                    torch.tensor(inputs[f"{model}_{side}_logps"], dtype=getattr(torch, dtype)),
                    torch.tensor(inputs[f"{side}_lengths"]),
                )
                for side in ("chosen", "rejected")
            )
        )
        for model in ("policy", "reference")
    )


@needs_golden
def test_simpo_equals_the_peers():
    """TRL's gamma is ours; HALOs writes gamma / beta. Label smoothing is not part of the paper."""
    golden, checked = load("losses.json.gz"), 0
    for case in golden["cases"]:
        hyper = case["hyperparameters"]
        if case["name"] != "simpo" or hyper.get("label_smoothing"):
            continue
        gamma = hyper.get("simpo_gamma", hyper["beta"] * hyper.get("gamma_beta_ratio", 0))
        policy, _ = golden_pairs(golden, case["dtype"])
        out = build_loss(SIMPO | {"beta": hyper["beta"], "gamma": gamma}).compute(policy)
        expected = torch.tensor(case["losses"], dtype=out.losses.dtype)
        torch.testing.assert_close(out.losses, expected, rtol=1e-5, atol=1e-6)
        checked += 1
    assert checked == 8


# ---- lists ----

PLACKETT_LUCE = {"name": "plackett_luce", "beta": 0.5}


def lists(*rows, grad=False) -> Lists:
    """Lists of summed log-probabilities, padded to the longest."""
    k = max(map(len, rows))
    sums = [[*row, *[0.0] * (k - len(row))] for row in rows]
    exists = torch.tensor([[j < len(row) for j in range(k)] for row in rows])
    return Lists(of(sums, [[1] * k] * len(rows), grad), exists)


def test_plackett_luce_by_hand():
    """Log-ratios 4, 2, 0 times beta 0.5: r = 2, 1, 0. First of three: log(e^2 + e + 1) - 2; first
    of the two left: log(e + 1) - 1; the last costs nothing. Rewards are the best's and the worst's.
    """
    out = build_loss(PLACKETT_LUCE).compute(lists([-6, -8, -10]), lists([-10, -10, -10]))
    expected = math.log(math.e**2 + math.e + 1) - 2 + math.log(math.e + 1) - 1
    assert out.losses.item() == pytest.approx(expected)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (2, 0)


def test_a_list_of_two_is_a_pair_whatever_stands_beside_it():
    """Plackett-Luce of two is Bradley-Terry, so the loss is dpo's, also in a batch with a list of
    four; and gradients are finite, 0 in empty places.
    """
    policy, reference = lists([-6, -8], [-1, -2, -3, -4], grad=True), lists([-7, -3], [-1] * 4)
    out = build_loss(PLACKETT_LUCE).compute(policy, reference)
    two = build_loss(DPO | {"beta": 0.5}).compute(pairs([-6], [-8]), pairs([-7], [-3]))
    assert out.losses[0].item() == pytest.approx(two.losses.item())
    assert out.rejected_rewards[0] == two.rejected_rewards and out.chosen_rewards[0] == 0.5
    out.losses.sum().backward()
    grad = policy.responses.sum.grad
    assert grad.isfinite().all() and grad[0, 2:].tolist() == [0, 0]
    torch.testing.assert_close(grad.sum(1), torch.zeros(2, dtype=torch.float64))


def test_plackett_luce_gradient():
    """d loss / d r_j = sum over places i <= j of p_i(j), less 1: p_i is the softmax over what is
    left at place i. At the reference of three: 1/3 - 1; 1/3 + 1/2 - 1; 1/3 + 1/2 + 1 - 1.
    """
    policy = lists([-5.0, -6, -7], grad=True)
    build_loss(PLACKETT_LUCE).compute(policy, lists([-5.0, -6, -7])).losses.sum().backward()
    expected = 0.5 * torch.tensor([[-2 / 3, -1 / 6, 5 / 6]], dtype=torch.float64)
    torch.testing.assert_close(policy.responses.sum.grad, expected)


def tied(levels, *rows, grad=False) -> Lists:
    return lists(*rows, grad=grad)._replace(levels=torch.tensor(levels, dtype=torch.float64))


def test_responses_that_rank_alike_do_not_compete():
    """r = 2, 1, 0.5, 0, of which the second and the third rank alike. First: all four; second: with
    the last alone, as the third; the last costs nothing. Levels of NaN are the places.
    """
    nan = float("nan")
    policy = tied([[0, 1, 1, 2], [nan] * 4], [-6, -8, -9, -10], [-6, -8, -9, -10], grad=True)
    reference = lists([-10.0] * 4, [-10.0] * 4)
    out = build_loss(PLACKETT_LUCE).compute(policy, reference)
    r = torch.tensor([2, 1, 0.5, 0], dtype=torch.float64)
    lse = lambda *places: r[list(places)].logsumexp(0)
    expected = (lse(0, 1, 2, 3) - r[0]) + (lse(1, 3) - r[1]) + (lse(2, 3) - r[2])
    strict = (lse(0, 1, 2, 3) - r[0]) + (lse(1, 2, 3) - r[1]) + (lse(2, 3) - r[2])
    torch.testing.assert_close(out.losses.detach(), torch.stack([expected, strict]))
    out.losses.sum().backward()
    assert policy.responses.sum.grad.isfinite().all()


def test_softmax_dpo_by_hand():
    """Rewards 2, 1, 0 and a list of two: log(e^2 + e + 1) - 2 and, as for a pair, log(1 + e^-1).
    The order of the rest does not matter. Two best ones of r = 2, 1 above 0: the mean of
    log(1 + e^-2) and log(1 + e^-1).
    """
    bound = build_loss(PLACKETT_LUCE | {"name": "softmax_dpo"})
    reference = lists([-10, -10, -10], [-10, -10])
    out = bound.compute(lists([-6, -8, -10], [-6, -8]), reference)
    expected = [math.log(math.e**2 + math.e + 1) - 2, math.log1p(math.exp(-1))]
    assert out.losses.tolist() == pytest.approx(expected)
    assert bound.compute(lists([-6, -10, -8], [-6, -8]), reference).losses.tolist() == (
        pytest.approx(expected)
    )
    both = bound.compute(tied([[0, 0, 1]], [-6, -8, -10]), lists([-10, -10, -10]))
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert both.losses.item() == pytest.approx(expected)


def test_softmax_dpo_gradient():
    """beta (p_j - [j is the best]) with p the softmax of all rewards; at the reference of three,
    1/3 each.
    """
    policy = lists([-5.0, -6, -7], grad=True)
    bound = build_loss(PLACKETT_LUCE | {"name": "softmax_dpo"})
    bound.compute(policy, lists([-5.0, -6, -7])).losses.sum().backward()
    expected = 0.5 * torch.tensor([[-2 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(policy.responses.sum.grad, expected)


def test_a_batch_s_values_become_lists():
    """Responses are numbered first ones first: 0, 1 are the firsts, 2, 3 the seconds, 4 the third
    of the second list.
    """
    batch = SimpleNamespace(n_responses=np.array([2, 3]), extras=Extras())
    found = LOSS_INPUTS["list"](of([-1.0, -2, -3, -4, -5], [1, 2, 3, 4, 5]), batch)
    assert found.responses.sum.tolist() == [[-1, -3, 0], [-2, -4, -5]]
    assert found.exists.tolist() == [[True, True, False], [True, True, True]]
    assert found.worst(found.responses.sum).tolist() == [-3, -5]


# ---- kto ----

KTO = {"name": "kto", "beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 2.0}


def labelled(sums, desirable, grad=False) -> Labelled:
    return Labelled(of(sums, [1] * len(sums), grad), torch.tensor(desirable))


def test_kto_by_hand():
    """z0 = 2. Log-ratios 4 (desirable) and 6 (not): 1 - sigmoid(0.5 (4 - 2)) = sigmoid(-1), and
    2 (1 - sigmoid(0.5 (2 - 6))) = 2 sigmoid(2). Rewards 2 and 3; the first is ranked right, the
    second is not.
    """
    policy, reference = labelled([-6.0, -4], [True, False]), labelled([-10.0, -10], [True, False])
    out = build_loss(KTO).compute(policy, reference, torch.tensor(2.0))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert out.losses.tolist() == pytest.approx([sigmoid(-1), 2 * sigmoid(2)])
    assert out.rewards.tolist() == [2, 3]
    metrics = {**_reward_metrics(out, policy), **out.metrics}
    columns = {name: mean.columns().T.tolist() for name, mean in metrics.items()}
    assert columns["rewards/chosen"] == [[2, 0], [1, 0]]
    assert columns["rewards/rejected"] == [[0, 3], [0, 1]]
    assert columns["rewards/accuracies"] == [[1, 0], [1, 1]]
    assert columns["kl/z0"] == [[2, 2], [1, 1]]
    for change in ({"beta": 0}, {"desirable_weight": 0}, {"undesirable_weight": -1}):
        (knob,) = change
        with pytest.raises(ValueError, match=f"loss.{knob}="):
            build_loss(KTO | change)


def test_a_label_weight_may_be_balanced():
    """Until the data is counted, it is tried as 1; not both can follow from the other."""
    bound = build_loss(KTO | {"desirable_weight": "balanced"})
    (weights,) = bound.label_weights
    assert weights.values == (2.0, "balanced") and weights.balanced == "loss.desirable_weight"
    assert build_loss(KTO).label_weights[0].balanced is None and not build_loss(DPO).label_weights
    term = KTO | {"desirable_weight": "balanced", "weight": 1.0}
    mixture = build_loss({"name": "mix", "terms": {"a": term}})
    assert mixture.label_weights[0].balanced == "loss.terms.a.desirable_weight"
    with pytest.raises(ValueError, match="one of them follows from the other"):
        build_loss(KTO | {"desirable_weight": "balanced", "undesirable_weight": "balanced"})
    with pytest.raises(ValueError, match="^loss.desirable_weight=even: .* number, or balanced"):
        build_loss(KTO | {"desirable_weight": "even"})
    with pytest.raises(ValueError, match="^loss.beta=balanced: expected a number"):
        build_loss(KTO | {"beta": "balanced"})


def column(*values: float) -> Logps:
    return Logps(torch.tensor(values, dtype=torch.float64)[:, None], torch.ones(len(values), 1))


def test_bco_by_hand():
    """Mean log-ratios 4 and 2 of the desirable, 1 of the undesirable: the shift is (3 + 1) / 2 = 2,
    whatever their numbers. With beta 0.5: log(1 + e^-(0.5 (4 - 2))), log 2 and
    log(1 + e^(0.5 (1 - 2))). At the reference every loss is log 2.
    """
    yes = torch.tensor([True, True, False])
    shift = reward_shift(Labelled(column(4, 2, 1), yes), Labelled(column(0, 0, 0), yes))
    assert shift == 2
    bound = build_loss({"name": "bco", "beta": 0.5})
    zeros = labelled([0.0, 0, 0], yes.tolist())
    out = bound.compute(labelled([4.0, 2, 1], yes.tolist()), zeros, shift)
    expected = [math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(-0.5))]
    assert out.losses.tolist() == pytest.approx(expected)
    assert out.metrics["rewards/delta"].values.tolist() == [1, 1, 1]
    assert out.metrics["rewards/accuracies"].values.tolist() == [1, 0, 1]
    only = Labelled(column(4, 2), torch.tensor([True, True]))
    assert reward_shift(only, only._replace(responses=column(0, 0))) == 3
    same = bound.compute(zeros, zeros, torch.tensor(0.0))
    assert same.losses.tolist() == pytest.approx([math.log(2)] * 3)


def test_bco_gradient():
    """-beta sigmoid(-(beta r - delta)) for a desirable response and beta sigmoid(beta r - delta)
    for an undesirable one: that of a logistic regression with labels 1 and 0.
    """
    policy = labelled([-6.0, -9, -4], [True, False, False], grad=True)
    reference = labelled([-5.0, -9, -7], [True, False, False])
    bound = build_loss({"name": "bco", "beta": 0.5})
    bound.compute(policy, reference, torch.tensor(1.0)).losses.sum().backward()
    sums = policy.responses.sum
    p = torch.sigmoid(0.5 * (sums - reference.responses.sum - 1)).detach()
    truth = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(sums.grad, 0.5 * (p - truth))


@needs_golden
def test_bco_equals_the_peers_on_pairs():
    """TRL's bco_pair is the sum of a pair's two losses. Its recorded losses have a running mean
    of 0: a pair at the reference costs exactly 2 log 2. Ours would be the batch's.
    """
    golden, checked = load("losses.json.gz"), 0
    for case in golden["cases"]:
        if case["name"] != "bco_pair":
            continue
        yes = torch.arange(32) < 16
        policy, reference = (
            Labelled(Logps(torch.cat([side.sum for side in of_model[:2]]), torch.ones(32)), yes)
            for of_model in golden_pairs(golden, case["dtype"])
        )
        bound = build_loss({"name": "bco", "beta": case["hyperparameters"]["beta"]})
        losses = bound.compute(policy, reference, torch.tensor(0.0)).losses
        expected = torch.tensor(case["losses"], dtype=losses.dtype)
        of_pairs = losses.unflatten(0, (2, 16)).sum(0)
        torch.testing.assert_close(of_pairs, expected, rtol=1e-5, atol=1e-6)
        checked += 1
    assert checked == 4


def test_conditional_sft_is_the_likelihood_of_both_kinds():
    knobs = {"desirable_prefix": "<+>", "undesirable_prefix": "<->", "average_over": "tokens"}
    bound = build_loss({"name": "csft", **knobs})
    assert bound.compute(labelled([-6.0, -4], [True, False])).losses.tolist() == [6, 4]
    assert bound.prefixes == ("<->", "<+>") and bound.average_over == "tokens"
    for change in ({"desirable_prefix": ""}, {"undesirable_prefix": "<+>"}):
        with pytest.raises(ValueError, match="loss.desirable_prefix='.*': must be a text"):
            build_loss({"name": "csft", **knobs, **change})


def test_unlikelihood_by_hand():
    """A desirable response of p = 1/2, 1/4: log 2 + log 4. An undesirable one of p = 1/2, 3/4 with
    alpha 2: 2 (log 2 + log 4). Its gradient with respect to log p is alpha p / (1 - p): 2 and 6;
    0 where p is 1.
    """
    p = torch.tensor([0.5, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    each = p.log().requires_grad_()
    tokens = TokenLogps(each, torch.tensor([0, 0, 1, 1, 2]), 3)
    bound = build_loss({"name": "unlikelihood", "alpha": 2.0, "average_over": "tokens"})
    assert bound.reads == "token_logps"
    losses = bound.compute(Labelled(tokens, torch.tensor([True, False, False]))).losses
    most = -2 * math.log(1e-5)
    assert losses.tolist() == pytest.approx([math.log(8), 2 * math.log(8), most])
    losses.sum().backward()
    assert each.grad.tolist() == pytest.approx([-1, -1, 2, 6, 0])


def test_the_reference_point_of_kto():
    """The mean of log-ratios 3 and 1, but never below 0, and 0 of none."""
    assert kl_to_reference(column(-2.0, -4.0), column(-5.0, -5.0)) == 2
    assert kl_to_reference(column(-5.0, -5.0), column(-2.0, -4.0)) == 0
    assert kl_to_reference(column(), column()) == 0


def test_kto_gradient():
    """Through d = sigmoid(beta (r - z0)): -w_d beta d (1 - d) for a desirable response, w_u beta d
    (1 - d) for an undesirable one (the derivative of Eq. 8 of arXiv:2402.01306, where z0 is
    constant).
    """
    policy = labelled([-6.0, -9, -4], [True, False, False], grad=True)
    reference = labelled([-5.0, -9, -7], [True, False, False])
    build_loss(KTO).compute(policy, reference, torch.tensor(1.0)).losses.sum().backward()
    sums = policy.responses.sum
    d = torch.sigmoid(0.5 * (sums - reference.responses.sum - 1)).detach()
    weight = torch.tensor([-1.0, 2, 2], dtype=torch.float64)
    torch.testing.assert_close(sums.grad, weight * 0.5 * d * (1 - d))


@needs_golden
def test_kto_equals_the_peers():
    """16 desirable and 16 undesirable responses, with the peers' own KL term. TRL and HALOs give
    the same mean.
    """
    golden, checked = load("losses.json.gz"), 0
    for case in golden["cases"]:
        if case["name"] != "kto":
            continue
        knobs = {k: case["hyperparameters"][k] for k in KTO if k != "name"}
        yes = torch.arange(32) < 16
        policy, reference = (
            Labelled(Logps(torch.cat([side.sum for side in of_model[:2]]), torch.ones(32)), yes)
            for of_model in golden_pairs(golden, case["dtype"])
        )
        z0 = torch.tensor(case["KL"], dtype=policy.responses.sum.dtype)
        out = build_loss(KTO | knobs).compute(policy, reference, z0)
        assert out.losses.mean().item() == pytest.approx(case["mean_loss"], rel=1e-5)
        if "losses" in case:
            expected = torch.tensor(case["losses"], dtype=out.losses.dtype)
            torch.testing.assert_close(out.losses, expected, rtol=1e-5, atol=1e-6)
        checked += 1
    assert checked == 12


def test_sums_of_tokens_do_not_depend_on_their_order():
    """1e8 + 1 - 1e8 is 0 in float32, and 1 where the two large ones meet first; in float64 it is 1
    in every order. The gradient of each token is 1.
    """
    values, response = torch.tensor([1e8, 1.0, -1e8, 5.0]), torch.tensor([0, 0, 0, 2])
    for order in ([0, 1, 2, 3], [3, 2, 0, 1], [1, 3, 0, 2]):
        each = values[order].requires_grad_()
        sums = TokenLogps(each, response[order], 3).sum()
        assert sums.tolist() == [1.0, 0.0, 5.0] and sums.dtype == torch.float32
        sums.sum().backward()
        assert each.grad.tolist() == [1.0] * 4
