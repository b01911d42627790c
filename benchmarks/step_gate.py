"""Let a benchmark run whole steps of GRPO one at a time (whole_step.py): a reward function that
reports how long the step before took, and then waits for the order to go on.

It is a plugin for train.py. As a script, it trains with TRL:

    python benchmarks/step_gate.py SETTING.json

The folder of the environment variable STEP_GATE connects it: it writes `report_<i>` before step i,
and waits for `order_<i>`. A step is all between the rewards of two rollouts: the first one's update
and the second one's sampling. Its time is CPU time of this process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumb.rollouts.answered import Answered
from plumb.rollouts.rewards import reward

WANTED = 100  # tokens, of which a response's reward is the share that it has, at most 1


class Setting(NamedTuple):
    """Hold what TRL's run needs."""

    model: str  # a folder, with its tokenizer
    prompts: list[str]  # of each rollout
    n: int  # responses to each
    max_new_tokens: int
    microbatch: int  # responses
    rollouts: int


class Gate:
    """Count the rewards of a rollout's responses, and wait before the first of them."""

    def __init__(self) -> None:
        self.folder = Path(os.environ["STEP_GATE"])
        self.n_responses = int((self.folder / "n_responses").read_text())
        self.seen = 0
        self.n_tokens = 0  # of the rollout before
        self.began = time.process_time()

    def reward(self, n_tokens: int) -> float:
        """Return the reward of a response of this many tokens."""
        if self.seen % self.n_responses == 0:
            self.wait()
        self.seen += 1
        self.n_tokens += n_tokens
        return min(1.0, n_tokens / WANTED)

    def wait(self) -> None:
        """Report the step that ends here, and wait for the order to go on."""
        secs = time.process_time() - self.began
        i = self.seen // self.n_responses
        report = self.folder / "unfinished"
        report.write_text(json.dumps({"secs": secs, "tokens": self.n_tokens}))
        report.rename(self.folder / f"report_{i}")
        while not (self.folder / f"order_{i}").exists():
            time.sleep(0.02)
        self.n_tokens = 0
        self.began = time.process_time()


GATE = Gate()


@reward
def enough_tokens(answered: Answered) -> float:
    """Return the reward for Plumb."""
    return GATE.reward(answered.n_tokens)


def train_trl(setting: Setting, folder: str) -> None:
    """Train with TRL's GRPO at its fastest on a CPU: all responses of a rollout sampled at once, no
    recomputed activations, no reference (beta 0, TRL's default), no logs.
    """
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    n_responses = len(setting.prompts) * setting.n

    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [GATE.reward(len(ids)) for ids in completion_ids]

    arguments = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=setting.microbatch,
        gradient_accumulation_steps=n_responses // setting.microbatch,
        num_generations=setting.n,
        max_completion_length=setting.max_new_tokens,
        max_steps=setting.rollouts,
        loss_type="grpo",
        beta=0.0,
        temperature=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32),
        reward_funcs=score,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": setting.prompts}),
        processing_class=AutoTokenizer.from_pretrained(setting.model),
    ).train()


def main() -> None:
    setting = Setting(**json.loads(Path(sys.argv[1]).read_text()))
    with tempfile.TemporaryDirectory() as folder:
        train_trl(setting, folder)


if __name__ == "__main__":
    main()
