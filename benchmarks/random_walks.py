"""Learn shortest walks in a graph of 21 nodes from the policy's own samples: `nice python
benchmarks/random_walks.py`.

A Llama of 0.3 million parameters imitates random walks (loss=sft), and then learns by the reward of
its own walks (walks.py), with each of `--losses`, from each of `--seeds`: with Plumb, through
train.py, and with TRL (trl_walks.py), one after the other. Both start from the same weights, and
have the same prompts, rewards, numbers of samples and settings. The reward is measured on walks
from all nodes but the goal, and on those from the nodes that are no prompt of the training, at
temperature 1, without top-k or top-p.

`--trl PYTHON` and `--trl-ppo PYTHON` are interpreters whose environments have TRL: RLOO and GRPO
are those of trl 1.16.0, PPO that of trl 1.11.0, after which TRL removed it (see README.md). Where
there is none, its runs are skipped.

Prints two tables: of each run, the reward before and after, and how many samples were drawn until
it was at least `TARGET`; of each trainer, milliseconds of CPU time per sample for rollout and
update. `--out FOLDER` also writes random_walks.md and random_walks.png there. `--smoke`: smaller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
PAD = "_"  # TRL's PPO trains no end token that is also the padding
WALKS = 1000  # that are imitated
SAMPLES = 8  # of a prompt
REWARD = "rollout_eval/reward"
SEEN = "seen"
UNSEEN = "unseen"  # first nodes that are no prompt of the training
USES = 4  # of each sample
PROMPTS = [node for node in NODES[1:] if node not in HELD_OUT]
EVAL_SAMPLES = 32  # of a prompt
CRITIC_LR = 1e-3
MAX_GRAD_NORM = 10.0
MODEL = (
    "{model_type: llama, vocab_size: 23, hidden_size: 96, intermediate_size: 256,"
    " num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 4,"
    " max_position_embeddings: 32, bos_token_id: null, eos_token_id: 21}"
)
LOSSES = {
    "rloo": ["loss.kl=none", "loss.beta=null"],
    "grpo": ["loss.kl=none", "loss.beta=null"],
    "ppo": ["loss.kl=none", "loss.beta=null", "loss.critic=policy", f"loss.critic_lr={CRITIC_LR}"],
}
TRL_MODULES = {"rloo": "trl", "grpo": "trl", "ppo": "trl.experimental.ppo"}


class Size(NamedTuple):
    """Hold how much is trained."""

    epochs: int  # of SFT
    rollouts: int
    eval_every: int  # rollouts


class Result(NamedTuple):
    """Hold what a run of a loss from a seed came to."""

    trainer: str
    loss: str
    seed: int
    samples: list[int]  # drawn for training until each evaluation
    all: list[float]  # the mean reward then, on walks from all nodes
    unseen: list[float]  # and on those from nodes that are no prompt of the training
    # CPU time of each rollout (sampling, rewards, what the update needs of them), and of its steps
    rollout_secs: list[float]
    update_secs: list[float]

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
    parser.add_argument("--at-once", type=int, default=1, help="so many seeds")
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--trl", default=sys.executable, help="Python with trl 1.16.0")
    parser.add_argument("--trl-ppo", default=sys.executable, help="Python with trl 1.11.0")
    at = parser.parse_args()
    size = Size(1, 2, 1) if at.smoke else Size(8, at.rollouts, 2)
    pythons = {"rloo": at.trl, "grpo": at.trl, "ppo": at.trl_ppo}
    with_trl = [loss for loss in at.losses if has_trl(loss, pythons[loss])]
    for loss in at.losses:
        if loss not in with_trl:
            print(f"{TRL_MODULES[loss]} is not installed: TRL's {loss} is skipped", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at.at_once) as pool:
        data = write_data(Path(folder), 40 if at.smoke else WALKS)

        def from_seed(seed: int) -> list[Result]:
            sft = imitate(data, seed, size)
            results = []
            for loss in at.losses:
                results.append(learn(data, sft, loss, seed, size, at.lr))
                print(rewards_table(results[-1:]), flush=True)
                if loss in with_trl:
                    results.append(learn_trl(data, sft, loss, seed, size, at.lr, pythons[loss]))
                    print(rewards_table(results[-1:]), flush=True)
            return results

        results = [result for of_seed in pool.map(from_seed, at.seeds) for result in of_seed]
    text = f"{rewards_table(results)}\n\n{seconds_table(results)}"
    print(text)
    if at.out:
        at.out.mkdir(parents=True, exist_ok=True)
        (at.out / "random_walks.md").write_text(text + "\n", encoding="utf-8")
        draw(results, at.out / "random_walks.png")


def has_trl(loss: str, python: str) -> bool:
    """Return whether this interpreter's environment has TRL's trainer for a loss."""
    code = "import sys; from importlib.util import find_spec; sys.exit(not find_spec(sys.argv[1]))"
    done = subprocess.run([python, "-c", code, TRL_MODULES[loss]], capture_output=True)
    return done.returncode == 0


def write_data(folder: Path, n_walks: int) -> Path:
    """Write a tokenizer with a token for each node, walks to imitate, the prompts of the training,
    and those of the evaluation. Return the folder.
    """
    vocabulary = {token: i for i, token in enumerate([*NODES, END, PAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without spaces
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder / "tokenizer")
    walks = random_walks(n_walks, seed=0)
    rows = {
        "walks": [{"prompt": walk[0], "completion": walk[1:]} for walk in walks],
        "train": [{"prompt": node} for node in PROMPTS],
        SEEN: [{"prompt": node} for node in PROMPTS],
        UNSEEN: [{"prompt": node} for node in HELD_OUT],
    }
    for name, own in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def imitate(data: Path, seed: int, size: Size) -> Path:
    """Train a random model on the walks. Return the run directory, beside which the policy lies as
    a folder that transformers reads, `<run directory>_model`.
    """
    run_dir = train(
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
    command(sys.executable, "export.py", run_dir, "--out", f"{run_dir}_model", "--no-check")
    return run_dir


def learn(data: Path, sft: Path, loss: str, seed: int, size: Size, lr: float) -> Result:
    """Train an SFT run's policy on the reward of its own walks."""
    run_dir = train(
        data,
        f"{loss}_{seed}",
        f"loss={loss}",
        *LOSSES[loss],
        f"model.archive='{sft}'",
        f"datasets=['{data}/train.jsonl']",
        f"eval_datasets=['{data}/{SEEN}.jsonl','{data}/{UNSEEN}.jsonl']",
        f"plugins=['{ROOT}/benchmarks/walks.py','{ROOT}/benchmarks/cpu_seconds.py']",
        "reward.terms={optimality: {function: optimality}}",
        f"rollout.n={SAMPLES}",
        f"rollout.max_new_tokens={LONGEST}",
        f"rollout.uses={USES}",
        f"rollout.batch_size={len(PROMPTS) * SAMPLES}",
        f"rollout.eval_n={EVAL_SAMPLES}",
        "rollout.eval_temperature=1",
        "n_epochs=null",
        f"n_examples={len(PROMPTS) * size.rollouts}",
        f"batch_size={len(PROMPTS)}",
        f"seed={seed}",
        f"lr={lr}",
        f"max_grad_norm={MAX_GRAD_NORM}",
        "warmup_steps=0",
        f"eval_every={len(PROMPTS) * size.eval_every * USES}",
    )
    records = read_metrics(run_dir)
    evaluations = [r for r in records if REWARD in r]
    unseen = next(key for key in evaluations[0] if key.startswith(REWARD) and UNSEEN in key)
    rollout_secs, step_secs = [], []
    for r in records:
        if "rollout_train/secs" in r:
            rollout_secs.append(r["rollout_train/secs"])
            step_secs.append(0.0)
        if "examples_per_second" in r:
            step_secs[-1] += len(PROMPTS) / r["examples_per_second"]
    return Result(
        trainer="Plumb",
        loss=loss,
        seed=seed,
        samples=[int(r["step"]) // USES * SAMPLES for r in evaluations],
        all=[r[REWARD] for r in evaluations],
        unseen=[r[unseen] for r in evaluations],
        rollout_secs=rollout_secs,
        update_secs=[a - b for a, b in zip(step_secs, rollout_secs, strict=True)],
    )


def learn_trl(
    data: Path, sft: Path, loss: str, seed: int, size: Size, lr: float, python: str
) -> Result:
    """Train the same policy in the same way with TRL."""
    setting = {
        "model": f"{sft}_model",
        "prompts": PROMPTS,
        "eval_prompts": [*NODES[1:]],
        "n": SAMPLES,
        "eval_n": EVAL_SAMPLES,
        "uses": USES,
        "max_new_tokens": LONGEST,
        "rollouts": size.rollouts,
        "eval_every": size.eval_every,
        "seed": seed,
        "lr": lr,
        "critic_lr": CRITIC_LR,
        "max_grad_norm": MAX_GRAD_NORM,
    }
    given, out = data / f"trl_{loss}_{seed}.json", data / f"trl_{loss}_{seed}_out.json"
    given.write_text(json.dumps(setting), encoding="utf-8")
    command(python, "benchmarks/trl_walks.py", loss, given, out)
    learned = json.loads(out.read_text(encoding="utf-8"))
    return Result(
        trainer=f"TRL {learned['version']}",
        loss=loss,
        seed=seed,
        samples=[n * len(PROMPTS) * SAMPLES for n in learned["rollouts"]],
        all=[statistics.mean(of.values()) for of in learned["rewards"]],
        unseen=[statistics.mean(of[node] for node in HELD_OUT) for of in learned["rewards"]],
        rollout_secs=learned["rollout_secs"],
        update_secs=learned["update_secs"],
    )


def train(data: Path, name: str, *options: str) -> Path:
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
    command(sys.executable, "train.py", *common, *options)
    return data / name


def command(*words: object) -> None:
    """Run a command of the repository; if it fails, end with what it printed."""
    done = subprocess.run(
        [str(word) for word in words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(done.stdout.decode()[-3000:])


def rewards_table(results: Sequence[Result]) -> str:
    """Return what each run has learned."""
    lines = [
        f"| loss | trainer | seed | reward before | after | from unseen nodes, before | after"
        f" | samples to {TARGET} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(results, key=lambda r: (list(LOSSES).index(r.loss), r.trainer)):
        rewards = (r.all[0], r.all[-1], r.unseen[0], r.unseen[-1])
        cells = [r.loss, r.trainer, str(r.seed), *(f"{x:.2f}" for x in rewards)]
        lines.append(f"| {' | '.join([*cells, r.samples_to(TARGET)])} |")
    return "\n".join(lines)


def seconds_table(results: Sequence[Result]) -> str:
    """Return the milliseconds of CPU time per sample of each trainer: the median of all rollouts,
    and the least and largest of the seeds' medians.
    """
    lines = [
        "| loss | trainer | rollout, ms of CPU time per sample | update | both |",
        "|---|---|---|---|---|",
    ]
    for loss in LOSSES:
        for trainer in dict.fromkeys(r.trainer for r in results if r.loss == loss):
            own = [r for r in results if (r.loss, r.trainer) == (loss, trainer)]
            rollout = [r.rollout_secs for r in own]
            update = [r.update_secs for r in own]
            both = [
                [a + b for a, b in zip(x, y, strict=True)]
                for x, y in zip(rollout, update, strict=True)
            ]
            cells = [loss, trainer, *map(milliseconds, (rollout, update, both))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(secs: Sequence[Sequence[float]]) -> str:
    """Return the median per sample, with the least and largest of the seeds' medians. `secs`: of
    each seed, of each rollout.
    """
    per_sample = 1000 / (len(PROMPTS) * SAMPLES)
    medians = [statistics.median(of_seed) * per_sample for of_seed in secs]
    middle = statistics.median(x for of_seed in secs for x in of_seed) * per_sample
    return f"{middle:.2f} ({min(medians):.2f} to {max(medians):.2f})"


def draw(results: Sequence[Result], file: Path) -> None:
    """Draw the rewards of all runs: the mean over seeds, and thinly each seed."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(2, len(LOSSES), sharex=True, sharey=True)
    panels = {"all first nodes": "all", "nodes that are no prompt": "unseen"}
    trainers = dict.fromkeys(r.trainer.split()[0] for r in results)
    colours = dict(zip(trainers, ("#0072B2", "#E69F00"), strict=False))
    for row, (title, kind) in zip(axes, panels.items(), strict=True):
        for axis, loss in zip(row, LOSSES, strict=True):
            for trainer, colour in colours.items():
                own = [r for r in results if r.loss == loss and r.trainer.startswith(trainer)]
                for r in own:
                    axis.plot(r.samples, getattr(r, kind), color=colour, alpha=0.35, linewidth=0.8)
                if own:
                    columns = zip(*(getattr(r, kind) for r in own), strict=True)
                    means = [statistics.mean(values) for values in columns]
                    label = own[0].trainer
                    axis.plot(own[0].samples, means, color=colour, linewidth=2, label=label)
            axis.axhline(TARGET, color="#777777", linewidth=0.9, linestyle=":")
            axis.set_title(f"{loss}: reward, {title}", fontsize=10)
            axis.grid(alpha=0.25)
            axis.set_ylim(0, 1.02)
    for axis in axes[0]:
        if axis.lines[:-1]:
            axis.legend(fontsize=8, loc="lower right")
    for axis in axes[-1]:
        axis.set_xlabel("samples drawn", fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
