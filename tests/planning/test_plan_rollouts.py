"""plan=true for runs on the policy's own responses: the same numbers as real ones hold."""

import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_plan import planned  # noqa: F401  a fixture
from tiny import tiny_model

from plumb.data.prompts import NumberedPrompt
from plumb.models.adapters import knobs_of
from plumb.models.chunked_head import linear_logps_and_entropy, step_bytes
from plumb.models.load import load_policy
from plumb.planning import activations, plan, rollouts
from plumb.planning.rollouts import AtOnce
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.gathered_engine import UnshardedCopy
from plumb.rollouts.policy_engine import PolicyEngine
from plumb.training import run_plan
from plumb.training.rollout_memory import Beside, PolicySize, copy_bytes, copy_dtype

SHORT = ["rollout.max_new_tokens=4", "do_first_eval=false", "do_last_eval=false"]
BY_RULE = "reward.terms={brief: {rule: shorter}}"


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("longest", [12, 60])
def test_sampling_holds_what_is_planned(family, longest):
    """Every storage that sampling makes, counted as long as it is alive; no response ends. Two
    layers of hidden size 32, so that what is not planned, such as masks, is a tenth.
    """
    model = tiny_model(family).eval()
    engine = PolicyEngine(
        decoding=Decoding("sample", max_new_tokens=20, temperature=1.0),
        ends=[],
        pad_token_id=0,
        longest=longest + 20,
        batch_size=24,
        precision=nullcontext,
    )
    engine.load(model)
    rng = np.random.default_rng(0)
    prompts = [
        NumberedPrompt(rng.integers(3, 259, longest - i % 3), i, f"prompt {i}") for i in range(3)
    ]
    with activations._Counter([*model.parameters(), *model.buffers()], 0) as counter:
        engine.sample(prompts, 8, [0, 0])
    sampled = AtOnce(n_prompts=3, n=8, prompt=longest, response=20)
    by_plan = rollouts.sampling_bytes(model.config, torch.float32, sampled, 259)
    assert 0.88 <= sum(counter.most) / sum(by_plan) <= 1.0


@pytest.mark.parametrize("entropy", ["shown", "trained"])
@pytest.mark.parametrize("n", [64, 512])  # positions; in one chunk, and in more than are kept
def test_the_entropy_holds_what_is_planned(entropy, n):
    """Beside the log-probabilities, in the head, forward and backward."""
    width, vocabulary, chunk = 64, 4096, 2**20
    hidden = torch.randn(n, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64)
    with activations._Counter([hidden, weight], 0) as counter:
        both = linear_logps_and_entropy(
            hidden, weight, None, targets, gradient=entropy == "trained", chunk=chunk
        )
        both.sum().backward()
    by_plan = step_bytes(n, width, vocabulary, 4, chunk, entropy=entropy)
    assert sum(counter.most) == pytest.approx(by_plan, rel=0.04)


@pytest.fixture
def built(trainer_of):
    """`built(name, *overrides)`: the trainer of a short run that has ended."""
    few = [BY_RULE, "batch_size=2", "n_examples=2", "rollout.n=2", *SHORT]
    return lambda name, *overrides: trainer_of(name, *few, *overrides)[0]


@pytest.mark.parametrize(
    "precision", ["policy_dtype=float64", "fsdp_policy_mp=bfloat16", "quantize=nf4"]
)
def test_a_copy_with_adapters_holds_what_is_planned(precision, tiny_model, planned):  # noqa: F811
    """That which is sampled from, where the policy is sharded: in the plan, and in the run's own
    count. A block of scales counts in full in each of the small matrices, beside one number.
    """
    own = [f"model.name_or_path={tiny_model}", "model.architecture=null", "max_length=256"]
    adapter = ["adapter=lora", "adapter_init=pissa", f"model.{precision}", "max_prompt_length=64"]
    config, loss = planned("loss=grpo", BY_RULE, "trainer=FSDPTrainer", *own, *adapter)
    policy = load_policy(config, adapter=knobs_of(config))
    copied = UnshardedCopy(torch.device("cpu"), copy_dtype(config)).updated(policy)
    held = sum(p.numel() * p.element_size() for p in copied.parameters())
    made = plan.make_plan(config, loss, plan.read_model(config, loss), plan.read_data(config, loss))
    quantized = "quantize" in precision
    assert made.memory.kinds["what samples"][0] == pytest.approx(held, rel=0.01 * quantized)
    assert copy_bytes(config, replace(PolicySize.of(policy), sharded=True)) == held


def test_a_critic_holds_what_is_planned(built, tiny_model, planned, data):  # noqa: F811
    """Its weights, and the state of its optimizer after one step; in the same run's plan."""
    ppo = ["loss=ppo", "loss.critic=policy", "optimizer=AdamW", f"datasets=[{data}]"]
    trainer = built("run", *ppo)
    critic = trainer.train_feed.follower.critic
    weights = sum(p.numel() * p.element_size() for p in critic.model.parameters())
    states = critic.optimizer.state.values()
    state = sum(x.numel() * x.element_size() for held in states for x in held.values() if x.dim())

    own = [f"model.name_or_path={tiny_model}", "model.architecture=null", "max_length=256"]
    config, loss = planned(*ppo, BY_RULE, *own, "max_prompt_length=64")
    made = plan.make_plan(config, loss, plan.read_model(config, loss), plan.read_data(config, loss))
    (of_critic,) = set(made.memory.kinds["critic, optimizer state"])
    head = 32 * 4  # one row, which is not planned, with two numbers of state
    assert of_critic == weights + state - 3 * head


def test_a_critic_recomputes_its_activations(built):
    """With activation_checkpointing, which transformers heeds in train mode only: the same step."""
    options = ["loss=ppo", "loss.critic=policy", "loss.critic_lr=1e-3"]
    one, other = (
        built(f"run-{recompute}", *options, f"activation_checkpointing={recompute}")
        for recompute in (False, True)
    )
    a, b = (trainer.train_feed.follower.critic.model for trainer in (one, other))
    assert not a.training and b.training and b.is_gradient_checkpointing
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, msg=name)


def test_the_moments_by_hand():
    """A critic of 40 bytes, of which 20 are trained with a state of 8, beside a policy of 100."""
    step = plan.Memory({"weights": (100, 100, 100), "gradients": (90, 90, 90)}, 0)
    moments = rollouts.Moments(
        beside=Beside(sampler=5, rewards={"rm": 30}, critic=40, critic_trained=20),
        critic_state=8,
        cache=1000,
        computing=100,
        scoring=60,
        critic=70,
    )
    got = moments.added_to(step)
    assert got.titles[:3] == ("sampling", "scoring", "critic steps")
    beside = 5 + 30 + 40 + 8
    assert got.moments == (1200 + beside, 160 + beside, 170 + beside, *[190 + beside] * 3)


@pytest.mark.parametrize(
    ("options", "trees", "tokens"),
    [
        (["loss=rloo"], 1, 100 + 8 * 50),
        (["loss=dpo", "loss.beta=0.1", "rollout=pairs"], 1, 100 + 2 * 50),
        (["loss=dpo", "loss.beta=0.1", "rollout.preferences=margin"], 28, 28 * 200),
        (["loss=dpo", "loss.beta=0.1", "rollout.preferences=bradley-terry"], 4, 4 * 200),
        (["loss=plackett_luce", "loss.beta=0.1", "rollout=lists"], 1, 100 + 8 * 50),
    ],
)
def test_a_plan_of_trees(options, trees, tokens, planned):  # noqa: F811
    """Prompts of 100 tokens, a quarter of max_length, and 8 responses of 50."""
    lengths = ["max_length=400", "max_prompt_length=200", "rollout.max_new_tokens=50"]
    config, loss = planned(*options, BY_RULE, *lengths, "n_examples=64", "batch_size=32")
    data = plan.read_data(config, loss)
    assert data.n_trees == trees
    text = plan.show(config, loss)
    assert f"prompts of {tokens:,} tokens on average, with the responses" in text
    assert "x 8 responses of up to 50 tokens, 64 at the same time on each GPU" in text
    assert re.search(r"^time .* of which sampling \S+ \S+ at least", text, re.M), text


def test_the_time_of_sampling_by_hand():
    """4 prompts x 2 responses of 10 tokens; each token reads 1000 bytes of weights and 8 x (15 + 5)
    x 2 of keys and values at 100 bytes a second, 13.2 s for 8 responses; or it computes longer.
    """
    moments = rollouts.Moments(
        beside=Beside(0, {}), critic_state=0, cache=0, computing=0, scoring=0, critic=0
    )
    made = rollouts.Rollout(
        sampled=AtOnce(4, 2, 15, 10),
        moments=moments,
        weights=1000,
        cache=2,
        operations=7,
        of_rewards=3,
        with_advantages=True,
        critic=0.5,
    )
    assert made.sampling_secs(rollouts.Rates(1e9, 1, 100)) == 10 * 13.2 / 4
    assert made.sampling_secs(rollouts.Rates(1, 1, 100)) == 10 * 8 * 7 / 4
    assert made.scoring_secs(rollouts.Rates(1, 10, 1)) == 2 * 3 * 2 * 25 / 10
    # log-probabilities, reference, values; twice a step with the critic's, all recomputed
    assert made.passes(2, live=True, kept=0) == 1 + 1 + 0.5 + 2 * (4 + 1.5)


def test_a_reward_model_counts(planned, built, train):  # noqa: F811
    """One that is not there is taken for one of the policy's size; PPO's critic begins as it."""
    terms = "reward.terms={rm: {model: .cache/none}}"
    config, loss = planned("loss=ppo", terms, "n_examples=64")
    made = plan.make_plan(
        config, loss, model := plan.read_model(config, loss), plan.read_data(config, loss)
    )
    kinds = made.memory.kinds
    assert kinds["models of rewards"][0] == 4 * model.weights.n
    assert "models of rewards: rm; with a critic" in plan.show(config, loss)


def test_the_run_decides_as_the_plan(built, planned, tiny_model, data, monkeypatch):  # noqa: F811
    """The bytes beside the policy that the choice of tokens per microbatch takes into account."""
    seen = []
    plan_run = run_plan.plan_run

    def noting(*arguments):
        seen.append(arguments[-1])
        return plan_run(*arguments)

    monkeypatch.setattr(run_plan, "plan_run", noting)
    monkeypatch.setattr(plan, "plan_run", noting)
    built("run", "loss=ppo", "loss.critic=policy")
    own = [f"model.name_or_path={tiny_model}", "model.architecture=null", "max_length=256"]
    config, loss = planned(
        "loss=ppo",
        "loss.critic=policy",
        BY_RULE,
        *own,
        f"datasets=[{data}]",
        "max_prompt_length=64",
    )
    plan.make_plan(config, loss, plan.read_model(config, loss), plan.read_data(config, loss))
    assert seen[0] == seen[1] > 0
