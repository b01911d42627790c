"""Learn shortest walks with TRL's trainers: the other contender of random_walks.py.

    python benchmarks/trl_walks.py rloo|grpo|ppo SETTING.json OUT.json

SETTING.json holds a `Setting`, OUT.json gets a `Learned`. RLOO and GRPO are those of trl 1.16; PPO
is trl.experimental.ppo, which left TRL after 1.11, so that it needs an environment of its own.

Each rollout is one batch of all its samples, and each use of it one optimizer step on this batch.
What takes time and changes nothing is off: gradient checkpointing, mixed precision, logging,
saving, TRL's own evaluation and sample tables. The KL has no weight here, so there is no reference
model; TRL's PPO cannot do without one, and gets a stand-in that computes nothing. Evaluations are
ours, the same as Plumb's, and count neither as time nor as draws of the training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from walks import optimality

from plumb.rollouts.answered import Answered

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}


class Setting(NamedTuple):
    """Hold what all contenders have in common."""

    model: str  # folder: the policy after SFT, with its tokenizer
    prompts: list[str]  # of the training
    eval_prompts: list[str]
    n: int  # samples of a prompt in a rollout
    eval_n: int  # and at an evaluation
    uses: int  # of each sample
    max_new_tokens: int
    rollouts: int
    eval_every: int  # rollouts
    seed: int
    lr: float
    critic_lr: float
    max_grad_norm: float


class Learned(NamedTuple):
    """Hold what a run came to."""

    version: str
    rollouts: list[int]  # made until each evaluation
    rewards: list[dict[str, float]]  # of each first node then
    # CPU time of each rollout (sampling, rewards, what the update needs of them), and of its steps
    rollout_secs: list[float]
    update_secs: list[float]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("loss", choices=TRAINERS)
    parser.add_argument("setting", type=Path)
    parser.add_argument("out", type=Path)
    at = parser.parse_args()
    setting = Setting(**json.loads(at.setting.read_text()))
    datasets.disable_progress_bars()
    transformers.set_seed(setting.seed)
    record = Record(setting, uses=1 if at.loss == "ppo" else setting.uses)
    with tempfile.TemporaryDirectory() as folder:
        TRAINERS[at.loss](setting, record, folder).train()
    at.out.write_text(json.dumps(record.learned()._asdict()), encoding="utf-8")


class Record(TrainerCallback):
    """Evaluate the policy every few rollouts, and add up the seconds of the training."""

    def __init__(self, setting: Setting, uses: int):
        self.setting = setting
        self.uses = uses  # that on_step_end is called for, of each rollout
        self.policy: Any = None
        self.tokenizer: Any = None
        self.rollouts: list[int] = []
        self.rewards: list[dict[str, float]] = []
        self.rollout_secs: list[float] = []
        self.update_secs: list[float] = []
        self.begun = 0.0  # the present step
        self.rollout_began = 0.0
        self.in_rollout = 0.0  # seconds of the present step that were its rollout's

    def on_train_begin(self, args, state, control, **_):
        self.evaluate(0)

    def on_step_begin(self, args, state, control, **_):
        self.begun = time.process_time()

    def on_step_end(self, args, state, control, **_):
        secs = time.process_time() - self.begun - self.in_rollout
        self.in_rollout = 0.0
        if len(self.update_secs) < len(self.rollout_secs):
            self.update_secs.append(0.0)
        self.update_secs[-1] += secs
        rollouts, rest = divmod(state.global_step, self.uses)
        if rest == 0 and rollouts % self.setting.eval_every == 0:
            self.evaluate(rollouts)

    def rollout_begins(self) -> None:
        self.rollout_began = time.process_time()

    def rollout_ends(self) -> None:
        self.in_rollout = time.process_time() - self.rollout_began
        self.rollout_secs.append(self.in_rollout)

    @torch.no_grad()
    def evaluate(self, rollouts: int) -> None:
        """Measure the mean reward of walks from each first node, at temperature 1."""
        at = self.setting
        state = torch.get_rng_state()
        torch.manual_seed(at.seed)
        self.policy.eval()
        ids = self.tokenizer(at.eval_prompts, return_tensors="pt").input_ids
        walks = self.policy.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=transformers.GenerationConfig(
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=at.eval_n,
                max_new_tokens=at.max_new_tokens,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            ),
        )[:, ids.shape[1] :]
        self.policy.train()
        torch.set_rng_state(state)
        prompts = [prompt for prompt in at.eval_prompts for _ in range(at.eval_n)]
        rewards = rewards_of(self.tokenizer, prompts, walks.tolist())
        groups = [rewards[i : i + at.eval_n] for i in range(0, len(rewards), at.eval_n)]
        means = [sum(group) / at.eval_n for group in groups]
        self.rollouts.append(rollouts)
        self.rewards.append(dict(zip(at.eval_prompts, means, strict=True)))

    def learned(self) -> Learned:
        """Return the result."""
        import trl

        return Learned(
            version=trl.__version__,
            rollouts=self.rollouts,
            rewards=self.rewards,
            rollout_secs=self.rollout_secs,
            update_secs=self.update_secs,
        )


def rewards_of(
    tokenizer: Any, prompts: Sequence[str], responses: Sequence[Sequence[int]]
) -> list[float]:
    """Return the rewards of responses, which may have padding after their end token."""
    end = tokenizer.eos_token_id
    rewards = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = list(response)
        ended = end in ids
        own = ids[: ids.index(end)] if ended else ids
        answered = Answered(
            prompt=prompt,
            response=tokenizer.decode(own, skip_special_tokens=True),
            target="",
            n_tokens=len(own) + ended,
            ended="eos" if ended else "length",
            source="",
        )
        rewards.append(optimality(answered))
    return rewards


def critic_free(name: str, setting: Setting, record: Record, folder: str, **own: Any) -> Any:
    """Return TRL's trainer of this name, a loss that needs no critic."""
    import trl

    class Timed(getattr(trl, f"{name}Trainer")):  # type: ignore[misc]
        """Time the rollouts, which TRL makes in the first step on each."""

        def _generate_and_score_completions(self, inputs):
            record.rollout_begins()
            output = super()._generate_and_score_completions(inputs)
            record.rollout_ends()
            return output

    record.tokenizer = AutoTokenizer.from_pretrained(setting.model)
    record.policy = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)

    def reward(prompts, completion_ids, **_):
        return rewards_of(record.tokenizer, prompts, completion_ids)

    arguments = getattr(trl, f"{name}Config")(
        output_dir=folder,
        per_device_train_batch_size=len(setting.prompts) * setting.n,
        num_generations=setting.n,
        num_iterations=setting.uses,
        max_completion_length=setting.max_new_tokens,
        max_steps=setting.rollouts * setting.uses,
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        learning_rate=setting.lr,
        weight_decay=0.01,  # torch's default
        max_grad_norm=setting.max_grad_norm,
        seed=setting.seed,
        **COMMON,
        **own,
    )
    return Timed(
        model=record.policy,
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": setting.prompts}),
        processing_class=record.tokenizer,
        callbacks=[record],
    )


def rloo(setting: Setting, record: Record, folder: str) -> Any:
    return critic_free("RLOO", setting, record, folder)


def grpo(setting: Setting, record: Record, folder: str) -> Any:
    """Return GRPO as in its paper and in Plumb: TRL's default `loss_type` is dapo."""
    return critic_free("GRPO", setting, record, folder, loss_type="grpo", scale_rewards="group")


def ppo(setting: Setting, record: Record, folder: str) -> Any:
    """Return TRL's last PPO. It neither bounds the gradient norm nor can do without a reference and
    a reward model.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    record.tokenizer = AutoTokenizer.from_pretrained(setting.model, padding_side="left")
    record.policy = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    critic = AutoModelForSequenceClassification.from_pretrained(
        setting.model, num_labels=1, dtype=torch.float32
    )
    nn.init.zeros_(critic.score.weight)
    rows = [record.tokenizer(prompt) for prompt in setting.prompts for _ in range(setting.n)]
    arguments = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=len(rows),
        local_rollout_forward_batch_size=len(rows),
        num_ppo_epochs=setting.uses,
        total_episodes=setting.rollouts * len(rows),
        response_length=setting.max_new_tokens,
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.0,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        gamma=1.0,
        lam=0.95,
        num_sample_generations=0,
        seed=setting.seed,
        **COMMON,
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": list(record.policy.parameters()), "lr": setting.lr},
            {"params": list(critic.parameters()), "lr": setting.critic_lr},
        ]
    )
    # a rollout is from the beginning of the sampling to the whitening of the advantages
    sample, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def timed_sample(*arguments, **options):
        record.begun = time.process_time()
        record.rollout_begins()
        return sample(*arguments, **options)

    def timed_whiten(*arguments, **options):
        whitened = whiten(*arguments, **options)
        record.rollout_ends()
        return whitened

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = timed_sample, timed_whiten
    return PPOTrainer(
        args=arguments,
        processing_class=record.tokenizer,
        model=record.policy,
        ref_model=NoReference(len(record.tokenizer)),
        reward_model=RuleAsModel(record.tokenizer),
        value_model=critic,
        train_dataset=datasets.Dataset.from_list(
            [{"input_ids": row.input_ids, "attention_mask": row.attention_mask} for row in rows]
        ),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)),
        callbacks=[record],
    )


class NoReference(nn.Module):
    """Stand for the reference model where the KL has no weight: all tokens are equally likely."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocab_size))


class RuleAsModel(nn.Module):
    """Offer the reward as what TRL's PPO expects, a classifier: its "hidden states" are rewards."""

    base_model_prefix = "model"

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer = tokenizer
        self.score = nn.Identity()

    @property
    def model(self) -> Any:
        return self.hidden_states

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Return the reward of each row [R, T, 1] at each of its positions. A prompt is a token."""
        prompts = self.tokenizer.batch_decode(input_ids[:, :1])
        pad = self.tokenizer.pad_token_id
        responses = input_ids.masked_fill(~attention_mask.bool(), pad)[:, 1:].tolist()
        rewards = torch.tensor(rewards_of(self.tokenizer, prompts, responses))
        return SimpleNamespace(hidden_states=[rewards[:, None, None].expand(*input_ids.shape, 1)])


TRAINERS = {"rloo": rloo, "grpo": grpo, "ppo": ppo}


if __name__ == "__main__":
    main()
