"""Metrics by TRL's names: those of a real run, and which of them a loss gets."""

from runs import records

from plumb.training import metrics
from plumb.training.trl_names import PPO, in_trl

SHORT = ["rollout.n=2", "rollout.max_new_tokens=4", "batch_size=4", "n_examples=4"]
BY_RULE = "reward.terms={brief: {rule: shorter}, vowel: {rule: 'regex=[aeiou]'}}"


class Run:
    """What wandb.init returns."""

    def __init__(self):
        self.logged = []

    def log(self, record, step):
        self.logged.append(record)


def test_a_run_under_both_names(train):
    """What GRPO and PPO trainers of TRL log; others' names only with a critic."""
    names = {
        "train/reward": "rollout_train/reward",
        "train/kl": "kl_train/k3_token",
        "train/entropy": "entropy/train",
        "train/completions/mean_length": "rollout_train/length",
        "train/frac_reward_zero_std": "rollout_train/equal_rewards",
        "train/rewards/vowel/mean": "rollout_train/reward/vowel",
    }
    of_ppo = {f"train/{name}" for name in (*PPO, "objective/kl", "loss/value_avg")}
    for loss in ("grpo", "ppo"):
        critic = ["loss.critic=policy"] if loss == "ppo" else []
        run = train(loss, f"loss={loss}", BY_RULE, *SHORT, *critic)
        (record,) = records(run, "train")
        found = in_trl(record)
        assert all(found[theirs] == record[ours] for theirs, ours in names.items())
        assert found["train/completions/clipped_ratio"] == 1 - record["rollout_train/eos"]
        assert of_ppo & found.keys() == (of_ppo if critic else set())
    paid = found["train/objective/scores"] - found["train/objective/rlhf_reward"]
    assert abs(paid - record["rollout_train/beta"] * record["rollout_train/kl"]) < 1e-12


def test_wandb_gets_them_beside_ours():
    sink = object.__new__(metrics.Wandb)
    record = {"rollout_eval/reward": 2.0}
    for aliases, more in ((None, {}), ("trl", {"eval/reward": 2.0})):
        sink.run, sink.aliases = Run(), metrics.ALIASES[aliases]
        sink.write(record, 8)
        assert sink.run.logged == [record | more]
