"""Steps on the policy's own responses: their extras by definition, what is refused, and a policy
that learns from them.
"""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from losses import knobs_of
from tiny import tiny_model, tiny_tokenizer

from plumb.batching.microbatches import Packing
from plumb.data.order import Block
from plumb.data.tokenization import Example
from plumb.errors import UserError
from plumb.losses.advantage_rules import AdvantageRule
from plumb.losses.registry import build_loss
from plumb.models.forward_path import ForwardPath, use_tree_attention
from plumb.models.logps import response_token_logps
from plumb.models.scalar_head import put_scalar_head
from plumb.rollouts.advantages import scaled
from plumb.rollouts.by_critic import ByCritic
from plumb.rollouts.critic import Critic
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.engine import Samples
from plumb.rollouts.gae import advantages_by_token
from plumb.rollouts.kl_control import KlControl
from plumb.rollouts.learning import ByAdvantage, ByPairs, SampledLogps, by_lists
from plumb.rollouts.policy_engine import PolicyEngine
from plumb.rollouts.rewards import Measured, Rewards, RunningScale, Term, build_rewards, reward
from plumb.rollouts.rollout import Rollout
from plumb.rollouts.source import Position, RolloutSource, Sampler
from plumb.rollouts.token_reader import TokenReader
from plumb.training.metrics import Means
from plumb.training.objective import Scorer

TEMPERATURE = 0.8
ENDS = (2, *range(3, 20))
PATH = ForwardPath(packed=True, plain_head=True)
CPU = torch.device("cpu")
LEAVE_ONE_OUT = AdvantageRule("leave_one_out", "none", kl_weight=0.0, equal_rewards="keep")
DATA = [
    Example(
        np.array(tiny_tokenizer()(text)["input_ids"]), (np.array([70, 71, 2]),), f"my.jsonl:{i}"
    )
    for i, text in enumerate(["What is it?", "Why?", "Say something long.", "Go on"], 1)
]


@reward
def brief(answered):
    return -answered.n_tokens


def logps_of(model, temperature=TEMPERATURE):
    @torch.no_grad()
    def read(batch):
        return response_token_logps(model, batch, PATH, temperature).each

    return read


def source_of(policy, reward, budget=64, **changed):
    """The source of steps of one batch each. `reward`: Rewards, or a function."""
    use_tree_attention(policy)
    packing = Packing(packed=True, budget=budget, world_size=1, pad_token_id=0, longest=64)
    engine = PolicyEngine(
        decoding=Decoding("sample", max_new_tokens=6, temperature=TEMPERATURE),
        ends=ENDS,
        pad_token_id=0,
        longest=64,
        batch_size=32,
        precision=nullcontext,
    )
    values = {
        "n": 3,
        "seed": 0,
        "number": lambda: 0,
        "rule": LEAVE_ONE_OUT,
        "policy_logps": logps_of(policy),
        "reference_logps": None,
        "learn": None,
    } | changed
    sampler = Sampler(
        examples=DATA,
        tokenizer=tiny_tokenizer(),
        engine=engine,
        ends=ENDS,
        bos=None,
        n=values["n"],
        seed=values["seed"],
        rewards=reward if isinstance(reward, Rewards) else Rewards([Term("r", 1.0, reward)]),
        policy=policy,
        rank=0,
        n_ranks=1,
    )
    logps = SampledLogps(
        read=TokenReader(packing, 0),
        policy=values["policy_logps"],
        reference=values["reference_logps"],
        tolerance=1e-4,
    )
    kept = []
    source = RolloutSource(
        sampler=sampler,
        learn=values["learn"] or ByAdvantage(values["rule"], logps),
        packing=packing,
        rank=0,
        context=None,
        position=lambda: Position(values["number"](), values["number"]()),
        block_at=lambda n_seen: Block(n_seen, source.indices),
        keep=kept.extend,
        follower=values["learn"] if isinstance(values["learn"], ByCritic) else None,
    )
    source.kept = kept
    return source


def one_step(source, indices):
    """The step on the prompts [n], which are a block of their own."""
    source.indices = indices
    return source.step(indices)


def lengths(answered):
    return np.array([one.n_tokens for one in answered], float)


def responses_of(step):
    """The responses' tokens by example and place, from the rows of the microbatches."""
    rows = {}
    for batch, _, where in step.microbatches:
        examples = [(place, i) for place in range(3) for i in where.tolist()]
        for (place, i), (_, _, start, n) in zip(examples, batch.spans.tolist(), strict=True):
            rows[i, place] = batch.input_ids[0, start : start + n].tolist()
    return rows


def test_a_step_by_definition():
    """Its tokens are the sampler's, in any number of microbatches; its old log-probabilities those
    of the training path, its advantages the rewards' less those of the others.
    """
    policy = tiny_model().eval()
    reference = tiny_model("qwen3").eval()
    use_tree_attention(reference)
    indices = np.array([3, 0, 2])
    steps = [
        one_step(source_of(policy, lengths, budget, reference_logps=logps_of(reference)), indices)
        for budget in (512, 48)
    ]
    assert len(steps[0].microbatches) == 1 < len(steps[1].microbatches)
    rows = responses_of(steps[0])
    assert rows == responses_of(steps[1])
    rewards = np.array([[len(rows[i, place]) for place in range(3)] for i in range(3)], float)
    expected = scaled(rewards, "leave_one_out", "none")
    for step in steps:
        assert step.indices is indices and len(step.lengths) == 3
        for batch, _, where in step.microbatches:
            of_batch = batch.extras.response["advantages"].numpy().reshape(3, -1)
            np.testing.assert_allclose(of_batch.T, expected[where])
            for name, model in (("old_logps", policy), ("reference", reference)):
                again = logps_of(model)(batch).double()
                torch.testing.assert_close(batch.extras.token[name], again, atol=1e-5, rtol=0)
    counters = steps[0].counters
    assert counters["rollout_train/reward"] == rewards.mean() == counters["rollout_train/length"]
    assert counters["rollout_train/logps_difference"] < 1e-5


def test_a_step_has_draws_of_its_own():
    """Other ones at each step and with another seed; the same again for the same step."""
    policy = tiny_model().eval()
    of = lambda number, seed: responses_of(
        one_step(source_of(policy, lengths, number=lambda: number, seed=seed), np.arange(2))
    )
    first = of(0, 0)
    assert of(0, 0) == first != of(1, 0) and of(0, 1) != first


def test_what_a_reward_is_given():
    seen = []
    reward = lambda answered: seen.extend(answered) or lengths(answered)
    one_step(source_of(tiny_model(), reward), np.array([1]))
    assert len(seen) == 3 and {one.source for one in seen} == {"my.jsonl:2"}
    assert {one.prompt for one in seen} == {"Why?"}
    assert {one.target for one in seen} == {tiny_tokenizer().decode([70, 71])}
    assert all("</s>" not in one.response and one.ended in ("eos", "length") for one in seen)


def test_the_kl_is_taken_off_the_reward():
    """Against a reference that is the policy at another temperature."""
    policy = tiny_model().eval()
    rule = LEAVE_ONE_OUT._replace(kl_weight=0.5)
    source = source_of(policy, lengths, 512, rule=rule, reference_logps=logps_of(policy, 1.5))
    step = one_step(source, np.arange(2))
    (batch, _, _), *_ = step.microbatches
    old, reference = (batch.extras.token[name] for name in ("old_logps", "reference"))
    sums = torch.zeros(6, dtype=torch.float64).index_add_(0, batch.response, old - reference)
    tokens = torch.bincount(batch.response)
    final = (tokens - 0.5 * sums).view(3, 2).T.numpy()
    expected = scaled(final, "leave_one_out", "none")
    np.testing.assert_allclose(
        batch.extras.response["advantages"].view(3, 2).T.numpy(), expected, atol=1e-6
    )


@pytest.mark.parametrize(("kept", "share"), [([1], 2 / 3), ([], 1.0)])
def test_groups_of_equal_rewards_are_dropped(kept, share):
    """Where all are, the step has no microbatch."""
    with_spread = {DATA[i].source for i in kept}

    def reward(answered):
        return np.array([i if one.source in with_spread else 7 for i, one in enumerate(answered)])

    rule = LEAVE_ONE_OUT._replace(equal_rewards="drop")
    step = one_step(source_of(tiny_model(), reward, 512, rule=rule), np.arange(3))
    assert step.counters["rollout_train/equal_rewards"] == pytest.approx(share)
    assert len(step.indices) == 3 and len(step.lengths) == len(kept) == len(step.microbatches)
    assert all(m.batch.extras.response["advantages"].any() for m in step.microbatches)


def test_what_is_refused():
    policy = tiny_model().eval()
    refused = lambda source: one_step(source, np.array([1]))
    with pytest.raises(UserError, match="reward r: gives nan for the response .*my.jsonl:2"):
        refused(source_of(policy, lambda answered: lengths(answered) * np.nan))
    with pytest.raises(UserError, match="3 responses have rewards of shape"):
        refused(source_of(policy, lambda answered: np.zeros(2)))
    other = logps_of(policy, 2.0)  # the temperature is missing on one side
    with pytest.raises(UserError, match="nats per token away from the trainer's"):
        refused(source_of(policy, lengths, policy_logps=other))


# ---- blocks ----


def test_a_block_is_sampled_once_and_kept_over_a_checkpoint():
    """Two steps of a block, each of half its prompts, made before and after a checkpoint, are those
    of a block that is not interrupted; a running scale continues.
    """
    at = [0]
    scaled_rewards = lambda: Rewards([Term("r", 1.0, lengths)], scale=RunningScale())

    def source():
        of = source_of(tiny_model().eval(), scaled_rewards(), number=lambda: at[0])
        of.block_at = lambda n_seen: (
            Block(0, np.arange(4)) if n_seen < 4 else Block(4, np.arange(2))
        )
        return of

    def ids(step):
        return [m.batch.input_ids.tolist() for m in step.microbatches]

    at[0] = 0
    first = source()
    a = first.step(np.array([2, 0]))
    at[0] = 2
    b, tensors = first.step(np.array([1, 3])), first.tensors()
    again = source()
    again.restore(tensors)
    c = again.step(np.array([1, 3]))
    assert a.counters and not b.counters and not c.counters
    assert len(first.kept) == 4 and not again.kept
    assert ids(b) == ids(c) != ids(a)
    for one, other in zip(b.microbatches, c.microbatches, strict=True):
        for kind in ("response", "token"):
            for name, column in getattr(one.batch.extras, kind).items():
                assert torch.equal(column, getattr(other.batch.extras, kind)[name]), name
    at[0] = 4  # the block is used up: only the scale is left of it
    assert list(first.tensors()) == ["rollout.scale"]
    assert first.tensors()["rollout.scale"].tolist()[0] == 12


# ---- preferences ----


def test_pairs_of_the_policys_own_responses():
    """Each rule, from the rewards 0, 3 and 1 of three responses, and 2, 2 and 2."""
    tree = Example(np.array([1, 2]), tuple(np.array([i, 9]) for i in range(3)), "a:1")
    rewards = np.array([0.0, 3, 1, 2, 2, 2])
    rollout = Rollout(
        number=5,
        prompts=np.array([7, 4]),
        trees=[tree, tree._replace(source="a:2")],
        samples=Samples([], 0.0),
        answered=[],
        measured=Measured(rewards, rewards, {}),
    )
    pairs = lambda rule, margin=0.0: [
        (int(prompt), int(tree.responses[0][0]), int(tree.responses[1][0]))
        for made in [ByPairs(rule, margin, 0)(rollout)]
        for prompt, tree in zip(made.prompts, made.trees, strict=True)
    ]
    assert pairs("best-worst") == [(7, 1, 0)]
    assert pairs("margin") == [(7, 1, 0), (7, 2, 0), (7, 1, 2)]
    assert pairs("margin", 2) == [(7, 1, 0), (7, 1, 2)]
    assert ByPairs("margin", 0.0, 0)(rollout).columns.example["margins"].tolist() == [3, 1, 2]
    lists = by_lists(rollout)
    assert lists.prompts.tolist() == [7]
    assert [int(r[0]) for r in lists.trees[0].responses] == [1, 2, 0]
    assert lists.columns.response["levels"].tolist() == [[0, 1, 2]]


def test_bradley_terry_labels_have_their_probability():
    """The second of two responses, whose reward is larger by 1, is preferred with probability
    sigmoid(1) = 0.731: in 4,000 draws to 4 standard errors of 0.007.
    """
    n = 4000
    tree = Example(np.array([1]), (np.array([5]), np.array([6])), "a:1")
    rewards = np.tile([0.0, 1.0], n)
    rollout = Rollout(
        number=0,
        prompts=np.arange(n),
        trees=[tree] * n,
        samples=Samples([], 0.0),
        answered=[],
        measured=Measured(rewards, rewards, {}),
    )
    made = ByPairs("bradley-terry", 0.0, 0)(rollout)
    share = np.mean([tree.responses[0][0] == 6 for tree in made.trees])
    assert len(made) == n and abs(share - 1 / (1 + np.exp(-1))) < 0.028
    again = ByPairs("bradley-terry", 0.0, 0)(rollout)
    assert [t.responses[0][0] for t in again.trees] == [t.responses[0][0] for t in made.trees]


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_a_policy_learns_from_its_samples(name):
    """From responses of any length to short ones, by the loss as its YAML has it. The steps are
    sampled one by one, each from the weights that the one before has left; so every ratio is 1.
    The first one's KL to the reference, the policy before it, is 0.
    """
    loss = build_loss(knobs_of(name))
    policy = tiny_model().eval()
    reference = copy.deepcopy(policy)
    use_tree_attention(reference)
    n = [0]
    source = source_of(
        policy,
        build_rewards({"terms": {"brief": {"function": "brief", "weight": 0.5}}}),
        256,
        n=16,
        rule=loss.advantages,
        reference_logps=logps_of(reference),
        learn=by_critic(policy, reference) if name == "ppo" else None,
        number=lambda: n[0],
    )
    scorer = Scorer(
        policy=policy,
        reference=None,
        loss=loss,
        forward_path=PATH,
        precision=nullcontext,
        device=CPU,
        temperature=TEMPERATURE,
    )
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-2)
    records = []
    source.indices = np.arange(4)
    for step in source.ahead([np.arange(4)] * 12, CPU):
        means = Means()
        for batch, weight, _ in step.microbatches:
            scored = scorer(batch)
            n_each = len(step.lengths)
            if loss.average_over == "tokens":
                n_each = step.lengths.n_scored()
            (scored.weighted_losses().sum() / n_each).backward()
            means.add(scored.metrics, weight, scored.weights)
        optimizer.step()
        optimizer.zero_grad()
        n[0] += 1
        records.append({**means.reduce(), **step.counters, "parts": len(step.microbatches)})
    assert records[0]["parts"] > 1
    assert all(abs(record["ratio/mean"] - 1) < 1e-5 for record in records)
    assert abs(records[0]["kl/k1"]) < 1e-5 < 0.1 < records[-1]["kl/k1"]
    rewards = [record["rollout_train/reward"] for record in records]
    assert rewards[0] < -2 and np.mean(rewards[-3:]) > -1, rewards


# ---- a critic ----


def by_critic(policy, reference=None, lr=1e-2, **knobs):
    """What learns with a critic that begins as the policy."""
    loss = build_loss(knobs_of("ppo") | knobs)
    use_tree_attention(policy)
    model = copy.deepcopy(policy)
    put_scalar_head(model, seed=0)
    critic = Critic(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=lr),
        lr=lr,
        lr_factor=lambda: 1.0,
        forward_path=ForwardPath(packed=True, plain_head=False),
        precision=nullcontext,
        device=CPU,
        value_clip=loss.advantages.value_clip,
        value_weight=1.0,
        max_grad_norm=10.0,
        n_copies=1,
    )
    logps = SampledLogps(
        read=TokenReader(
            Packing(packed=True, budget=64, world_size=1, pad_token_id=0, longest=64), 0
        ),
        policy=logps_of(policy),
        reference=None if reference is None else logps_of(reference),
        tolerance=1e-4,
    )
    return ByCritic(loss.advantages, logps, critic, KlControl.of(loss.advantages))


def columns_of(step, *names):
    """Numbers of all tokens by name, response by response, in the order of the microbatches."""
    batches = [m.batch for m in step.microbatches]
    return [torch.cat([b.extras.token[name] for b in batches]).numpy() for name in names]


def test_a_step_with_a_critic_by_definition():
    """Advantages and returns are those of the KL, the rewards on last tokens and the values before
    the first update; the critic has learned from the step when it comes.
    """
    policy = tiny_model().eval()
    reference = tiny_model("qwen3").eval()
    use_tree_attention(reference)
    learn = by_critic(policy, reference, whiten="none")
    before = copy.deepcopy(learn.critic)
    step = one_step(source_of(policy, lengths, 512, learn=learn), np.arange(3))
    ((batch, _, _),) = step.microbatches
    old, theirs, values, returns, given = columns_of(
        step, "old_logps", "reference", "values", "returns", "advantages"
    )
    np.testing.assert_allclose(values, before.values(batch).numpy(), atol=1e-5)
    assert not torch.allclose(learn.critic.values(batch), before.values(batch), atol=1e-3)
    order = np.concatenate([np.flatnonzero(batch.response == r) for r in range(9)])
    n = np.bincount(batch.response)
    kl = 0.05 * (old - theirs)
    made = advantages_by_token(n.astype(float), kl[order], values[order], n, learn.rule)
    np.testing.assert_allclose(given[order], made.values, atol=1e-6)
    np.testing.assert_allclose(returns[order], made.returns, atol=1e-6)
    assert step.counters["rollout_train/kl"] == pytest.approx((old - theirs).sum() / 9)
    assert step.counters["critic_train/returns"] == pytest.approx(returns.mean(), rel=1e-4)
    assert step.counters["critic_train/alone"] == 0


def test_the_critic_warms_up_alone():
    """On the first rollout, for each of its steps; the policy's are then the same as without."""
    policy = tiny_model().eval()
    learn = by_critic(policy, kl="none", beta=None, critic_warmup=1)
    number = [0]
    source = source_of(policy, lengths, learn=learn, number=lambda: number[0])
    weight = learn.critic.model.get_output_embeddings().weight
    for _ in range(2):
        before = weight.clone()
        step = one_step(source, np.arange(3))
        assert not step.microbatches and len(step.indices) == 3 and not len(step.lengths)
        assert step.counters["critic_train/alone"] == 1 and not torch.equal(weight, before)
    number[0] = 1
    step = one_step(source, np.arange(3))
    assert step.microbatches and step.counters["critic_train/alone"] == 0


def test_a_policy_that_moved_too_far_waits_for_the_next_rollout():
    policy = tiny_model().eval()
    learn = by_critic(policy, kl="none", beta=None, stop_kl=0.5)
    number = [0]
    source = source_of(policy, lengths, learn=learn, number=lambda: number[0])
    assert one_step(source, np.arange(3)).microbatches
    start = policy.lm_head.weight.detach().clone()
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)
    assert not one_step(source, np.arange(3)).microbatches
    state = learn.tensors()["rollout.critic"]
    with torch.no_grad():
        policy.lm_head.weight.copy_(start)
    assert not one_step(source, np.arange(3)).microbatches  # once it was, the rollout is over
    again = by_critic(policy, kl="none", beta=None, stop_kl=0.5)
    again.restore({"rollout.critic": state})
    assert again.stopped and again.n_rollouts == 1
    assert again.tensors().keys() == learn.tensors().keys()
    number[0] = 1
    assert one_step(source, np.arange(3)).microbatches
