"""Name metrics as TRL does, for dashboards that expect its names: those of the trainers for GRPO,
RLOO and DPO of TRL 1.16, and of the one for PPO of its 1.11. transformers logs them to wandb under
train/ and eval/.
"""

from __future__ import annotations

from collections.abc import Mapping

# ours -> theirs, with {} for train or eval. The values are the same numbers, but for reward_std,
# which is theirs before reward.scale, reward.clip and penalties, and over one response less.
SAME = {
    "loss/{}": ("{}/loss", "{}/loss/policy_avg"),
    "grad_norm": ("{}/grad_norm",),
    "lr": ("{}/learning_rate", "{}/lr"),
    "rewards_{}/chosen": ("{}/rewards/chosen",),
    "rewards_{}/rejected": ("{}/rewards/rejected",),
    "rewards_{}/accuracies": ("{}/rewards/accuracies",),
    "rewards_{}/margins": ("{}/rewards/margins",),
    "logps_{}/chosen": ("{}/logps/chosen",),
    "logps_{}/rejected": ("{}/logps/rejected",),
    "rollout_{}/reward": ("{}/reward",),
    "rollout_{}/reward_std": ("{}/reward_std",),
    "rollout_{}/equal_rewards": ("{}/frac_reward_zero_std",),
    "rollout_{}/length": ("{}/completions/mean_length",),
    "rollout_{}/shortest": ("{}/completions/min_length",),
    "rollout_{}/longest": ("{}/completions/max_length",),
    "rollout_{}/logps_difference": ("{}/sampling/sampling_logp_difference/mean",),
    "rollout_{}/reward_final": ("{}/objective/scores",),
    "rollout_{}/kl": ("{}/objective/kl",),
    "kl_{}/k3_token": ("{}/kl",),
    "entropy/{}": ("{}/entropy", "{}/policy/entropy_avg"),
    "clip_{}/low": ("{}/clip_ratio/low_mean",),
    "clip_{}/high": ("{}/clip_ratio/high_mean",),
    "ratio_{}/mean": ("{}/val/ratio",),
    "critic_{}/loss": ("{}/loss/value_avg",),
    "critic_{}/clip": ("{}/val/clipfrac_avg",),
}
PPO = ("loss/policy_avg", "lr", "policy/entropy_avg", "val/ratio", "policy/clipfrac_avg")


def in_trl(record: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a record under TRL's names, as far as it has them.

    >>> in_trl({"rollout_eval/reward": 0.5, "rollout_eval/eos": 0.75})
    {'eval/reward': 0.5, 'eval/completions/clipped_ratio': 0.25}
    """
    split = "train" if "counters/updates" in record else "eval"
    found = {name.format(split): theirs for name, theirs in SAME.items()}
    named = {
        name.format(split): record[ours]
        for ours, theirs in found.items()
        if ours in record
        for name in theirs
    }
    named |= {f"{split}/{name}": value for name, value in _computed(record, split).items()}
    if "critic_train/loss" in record:
        return named
    return {name: value for name, value in named.items() if name.partition("/")[2] not in PPO}


def _computed(record: Mapping[str, float], split: str) -> dict[str, float]:
    """Return what TRL has in another form: the share that did not end, of both bounds, and the
    rewards less the KL.
    """
    values = {}
    if (ended := record.get(f"rollout_{split}/eos")) is not None:
        values["completions/clipped_ratio"] = 1 - ended
    if f"clip_{split}/low" in record:
        both = record[f"clip_{split}/low"] + record[f"clip_{split}/high"]
        values |= {"clip_ratio/region_mean": both, "policy/clipfrac_avg": both}
    if f"rollout_{split}/kl" in record:
        of_kl = -record[f"rollout_{split}/beta"] * record[f"rollout_{split}/kl"]
        values["objective/non_score_reward"] = of_kl
        values["objective/rlhf_reward"] = record[f"rollout_{split}/reward_final"] + of_kl
    term = f"rollout_{split}/reward/"
    for name in record:
        if name.startswith(term):
            values[f"rewards/{name.removeprefix(term)}/mean"] = record[name]
    return values
