"""Say in one line what a run on the policy's own responses has changed."""

from __future__ import annotations

from collections.abc import Sequence

from plumb.runs.history import Record, is_evaluation

REWARD = "rollout_eval/reward"
KL = "kl_train/k1"
LAST = 0.05  # the share of the steps whose mean KL is given; a single step's is noise


def reward_line(records: Sequence[Record]) -> str | None:
    """Return the reward on held-out prompts at the first and at the last evaluation, and the KL at
    the end, from the records of metrics.jsonl. None without two such evaluations.

    >>> reward_line([{"rollout_eval/reward": 0.25}, {"rollout_eval/reward": 0.75}])
    'held-out reward 0.25 -> 0.75'
    """
    rewards = [record[REWARD] for record in records if REWARD in record]
    if len(rewards) < 2:
        return None
    line = f"held-out reward {rewards[0]:.3g} -> {rewards[-1]:.3g}"
    kls = [r[KL] for r in records if KL in r and not is_evaluation(r)]
    if not kls:
        return line
    last = kls[-max(1, round(LAST * len(kls))) :]
    return f"{line}, at a KL to the reference of {sum(last) / len(last):.2g} nats per response"
