"""Learn shortest walks in a graph of 21 nodes from the policy's own samples: `nice python
benchmarks/random_walks.py`.

A Llama of 0.3 million parameters imitates random walks (loss=sft), and then learns by the reward of
its own walks (walks.py), with each of `--losses`, from each of `--seeds`. All runs go through
train.py, and have the same prompts, samples and learning rate. The reward is measured on walks from
all nodes but the goal, and on those from the nodes that are no prompt of the training, at
temperature 1, without top-k or top-p.

Prints a table: the reward before and after, how many samples were drawn until it was at least
`TARGET`, and seconds. `--out FOLDER` also writes random_walks.md and random_walks.png there.
`--smoke`: smaller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from walks import HELD_OUT, LONGEST, NODES, random_walks

from plumb.runs.history import read_metrics

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.9  # of the reward; 1 is the best: all walks are shortest
END = "."
WALKS = 1000  # that are imitated
SAMPLES = 8  # of a prompt
REWARD = "rollout_eval/reward"
SEEN = "seen"
UNSEEN = "unseen"  # first nodes that are no prompt of the training
USES = 4  # of each sample
EVAL_SAMPLES = 32  # of a prompt
MODEL = (
    "{model_type: llama, vocab_size: 22, hidden_size: 96, intermediate_size: 256,"
    " num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 4,"
    " max_position_embeddings: 32, bos_token_id: null, eos_token_id: 21}"
)
LOSSES = {
    "rloo": ["loss.kl=none", "loss.beta=null"],
    "grpo": ["loss.kl=none", "loss.beta=null"],
    "ppo": ["loss.kl=none", "loss.beta=null", "loss.critic=policy", "loss.critic_lr=1e-3"],
}


class Size(NamedTuple):
    """Hold how much is trained."""

    epochs: int  # of SFT
    rollouts: int
    eval_every: int  # rollouts


class Result(NamedTuple):
    """Hold what a run of a loss from a seed came to."""

    loss: str
    seed: int
    samples: list[int]  # drawn for training until each evaluation
    all: list[float]  # the mean reward then, on walks from all nodes
    unseen: list[float]  # and on those from nodes that are no prompt of the training
    secs: float
    secs_sampling: float  # of them, in rollouts

    def samples_to(self, target: float) -> str:
        """Return the samples drawn until the first evaluation with this reward, from all nodes."""
        values = zip(self.samples, self.all, strict=True)
        reached = [n for n, value in values if value >= target]
        return f"{reached[0]:,}" if reached else "never"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--losses", nargs="+", default=[*LOSSES], choices=LOSSES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--lr", type=float, default=4e-4)
    at = parser.parse_args()
    size = Size(1, 2, 1) if at.smoke else Size(8, at.rollouts, 5)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), 40 if at.smoke else WALKS)
        for seed in at.seeds:
            start = time.perf_counter()
            sft = imitate(data, seed, size)
            print(f"seed {seed}: SFT took {time.perf_counter() - start:.0f} s", flush=True)
            for loss in at.losses:
                results.append(learn(data, sft, loss, seed, size, at.lr))
                print(table(results[-1:]), flush=True)
    print(table(results))
    if at.out:
        at.out.mkdir(parents=True, exist_ok=True)
        (at.out / "random_walks.md").write_text(table(results) + "\n", encoding="utf-8")
        draw(results, at.out / "random_walks.png")


def write_data(folder: Path, n_walks: int) -> Path:
    """Write a tokenizer with a token for each node, walks to imitate, the prompts of the training,
    and those of the evaluation. Return the folder.
    """
    vocabulary = {token: i for i, token in enumerate([*NODES, END])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without spaces
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder / "tokenizer")
    walks = random_walks(n_walks, seed=0)
    rows = {
        "walks": [{"prompt": walk[0], "completion": walk[1:]} for walk in walks],
        "train": [{"prompt": node} for node in NODES[1:] if node not in HELD_OUT],
        SEEN: [{"prompt": node} for node in NODES[1:] if node not in HELD_OUT],
        UNSEEN: [{"prompt": node} for node in HELD_OUT],
    }
    for name, own in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def imitate(data: Path, seed: int, size: Size) -> Path:
    """Train a random model on the walks. Return the run directory."""
    return run(
        data,
        f"sft_{seed}",
        "loss=sft",
        f"datasets=['{data}/walks.jsonl']",
        f"eval_datasets=['{data}/walks.jsonl']",
        f"n_epochs={size.epochs}",
        f"seed={seed}",
        "batch_size=50",
        "lr=2e-3",
        "warmup_steps=20",
        "eval_every=100000",
    )


def learn(data: Path, sft: Path, loss: str, seed: int, size: Size, lr: float) -> Result:
    """Train an SFT run's policy on the reward of its own walks."""
    n_prompts = len(NODES) - 1 - len(HELD_OUT)
    start = time.perf_counter()
    run_dir = run(
        data,
        f"{loss}_{seed}",
        f"loss={loss}",
        *LOSSES[loss],
        f"model.archive='{sft}'",
        f"datasets=['{data}/train.jsonl']",
        f"eval_datasets=['{data}/{SEEN}.jsonl','{data}/{UNSEEN}.jsonl']",
        f"plugins=['{ROOT}/benchmarks/walks.py']",
        "reward.terms={optimality: {function: optimality}}",
        f"rollout.n={SAMPLES}",
        f"rollout.max_new_tokens={LONGEST}",
        f"rollout.uses={USES}",
        f"rollout.batch_size={n_prompts * SAMPLES}",
        f"rollout.eval_n={EVAL_SAMPLES}",
        "rollout.eval_temperature=1",
        "n_epochs=null",
        f"n_examples={n_prompts * size.rollouts}",
        f"batch_size={n_prompts}",
        f"seed={seed}",
        f"lr={lr}",
        "warmup_steps=0",
        f"eval_every={n_prompts * size.eval_every * USES}",
    )
    records = read_metrics(run_dir)
    evaluations = [r for r in records if REWARD in r]
    unseen = next(key for key in evaluations[0] if key.startswith(REWARD) and UNSEEN in key)
    return Result(
        loss=loss,
        seed=seed,
        samples=[int(r["step"]) // USES * SAMPLES for r in evaluations],
        all=[r[REWARD] for r in evaluations],
        unseen=[r[unseen] for r in evaluations],
        secs=time.perf_counter() - start,
        secs_sampling=sum(r.get("rollout_train/secs", 0.0) for r in records),
    )


def run(data: Path, name: str, *options: str) -> Path:
    """Run train.py with what all runs have in common. Return the run directory."""
    common = [
        f"exp_name={name}",
        f"local_run_dir='{data}/{name}'",
        f"local_dirs=['{data}']",
        f"model.tokenizer_name_or_path='{data}/tokenizer'",
        "model.name_or_path=null",
        f"model.architecture={MODEL}",
        "max_length=16",
        "max_prompt_length=4",
        "optimizer=AdamW",
        "eval_batch_size=20",
        "sample_during_eval=false",
        "wandb.enabled=false",
        "save_every_minutes=null",
        "keep_checkpoints=1",
        "keep_best=null",
    ]
    command = [sys.executable, str(ROOT / "train.py"), *common, *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(done.stdout.decode()[-3000:])
    return data / name


def table(results: Sequence[Result]) -> str:
    """Return the results as a table."""
    lines = [
        f"| loss | seed | reward before | after | from unseen nodes, before | after | samples to"
        f" {TARGET} | seconds | of them in rollouts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        rewards = (r.all[0], r.all[-1], r.unseen[0], r.unseen[-1])
        cells = [r.loss, str(r.seed), *(f"{x:.2f}" for x in rewards), r.samples_to(TARGET)]
        lines.append(f"| {' | '.join([*cells, f'{r.secs:.0f}', f'{r.secs_sampling:.0f}'])} |")
    return "\n".join(lines)


def draw(results: Sequence[Result], file: Path) -> None:
    """Draw the rewards of all runs: the mean over seeds, and thinly each seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = {"all first nodes": "all", "first nodes that are no prompt": "unseen"}
    for axis, (title, kind) in zip(axes, panels.items(), strict=True):
        for loss, colour in zip(LOSSES, ("#0072B2", "#E69F00", "#009E73"), strict=True):
            own = [r for r in results if r.loss == loss]
            for r in own:
                axis.plot(r.samples, getattr(r, kind), color=colour, alpha=0.3, linewidth=0.8)
            if own:
                columns = zip(*(getattr(r, kind) for r in own), strict=True)
                means = [statistics.mean(values) for values in columns]
                axis.plot(own[0].samples, means, color=colour, linewidth=2, label=loss)
        axis.axhline(TARGET, color="#777777", linewidth=0.9, linestyle=":")
        axis.set_title(f"reward, {title}", fontsize=10)
        axis.set_xlabel("samples drawn", fontsize=8)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
