"""Train with every loss from the same SFT weights, and with four of them on flipped labels:
`nice python benchmarks/losses.py`.

Part `losses`: the demo's model and data, the YAML's own knobs (a required one has a usual value),
one learning rate for all. Part `noise`: 30 % of the pairs flipped, three seeds; on the demo's data,
and on UltraFeedback's pairs where --ultrafeedback is a folder with `noisy` and `processed`.

Each finished run adds a line to OUT/records.jsonl, and is not run again. The tables and the picture
(losses.md and losses.png in --results) are made from these lines. `--smoke`: a few steps of each.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from list_losses import knobs_of, written_knobs  # noqa: E402

import plumb  # noqa: E402
import plumb.losses  # noqa: E402, F401
from eval import evaluate_on  # noqa: E402
from plumb.losses.registry import LOSSES, build_loss  # noqa: E402
from plumb.runs.checkpoints import latest_valid  # noqa: E402
from train import train_on  # noqa: E402

Row = dict[str, Any]
Record = dict[str, Any]

COMMON = [
    "model=demo",
    "max_length=128",
    "max_prompt_length=64",
    "optimizer=AdamW",
    "batch_size=16",
    "eval_batch_size=50",
    "tokens_per_microbatch=4096",
    "eval_every=1000000",
    "do_first_eval=false",
    "do_last_eval=false",
    "sample_during_eval=false",
    "save_optimizer_pt=false",
    "eval_share=0",
    "n_eval_examples=0",
    "resume=auto",
]
# share of labels that are flipped, and that the losses assume to be flipped
FLIPPED = 0.3
NOISE: dict[str, list[str]] = {
    "dpo": ["loss=dpo", "loss.beta=0.1"],
    "cDPO": ["loss=dpo", "loss.beta=0.1", f"loss.label_smoothing={FLIPPED}"],
    "robust": ["loss=robust", "loss.beta=0.1", f"loss.label_smoothing={FLIPPED}"],
    "ipo": ["loss=ipo", "loss.beta=0.1"],
}


class Size(NamedTuple):
    """Hold the sizes of all parts.

    Example: Size(n_train=32, n_test=10, n_examples=16, seeds=(0,)).
    """

    n_train: int = 2000
    n_test: int = 150
    sft_epochs: int = 4
    n_examples: int = 320  # of a run of part `losses`
    n_noise: int = 320  # pairs of a run of part `noise`
    noise_epochs: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)


class World(NamedTuple):
    """Hold data, and the SFT model that every run on them starts from and is compared with."""

    name: str
    train: list[Row]
    test: list[Row]
    sft: Path


class Results:
    """Keep the lines of records.jsonl: a run that has one is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        if path.is_file():
            self.records = [json.loads(line) for line in path.read_text().splitlines()]

    def add(self, key: Record, run: Callable[[], Record]) -> None:
        """Run, unless there is a line with this key, and add the line. Another process may run
        other keys at the same time.
        """
        if any(key.items() <= record.items() for record in self.records):
            return
        result = run()
        self.records.append(key | result)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(key | result) + "\n")
        print(key | result, flush=True)


# ---- data ----


def demo(part: str) -> list[Row]:
    """Return the rows of the demo, with scores of 1 and 0 for losses that weigh pairs by them."""
    lines = (ROOT / f"demo/{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) | {"score_chosen": 1, "score_rejected": 0} for line in lines]


def ultrafeedback(path: Path) -> Iterator[Row]:
    """Return prompt, chosen and rejected of a gzipped file, and the chosen one as SFT target."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            pair = {side: " " + row[side].strip() for side in ("chosen", "rejected")}
            prompt = f"\n\nHuman: {row['prompt'].strip()}\n\nAssistant:"
            yield {"prompt": prompt, **pair, "sft_target": pair["chosen"]}


def flipped(rows: Sequence[Row], seed: int) -> list[Row]:
    """Return the pairs with a share FLIPPED of the labels reversed."""
    chosen = set(random.Random(seed).sample(range(len(rows)), round(FLIPPED * len(rows))))
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if i in chosen else row
        for i, row in enumerate(rows)
    ]


def on_data(name: str) -> bool:
    """Return whether a file of config/loss names a loss that learns from data, not from samples."""
    loss = knobs_of(name)["name"]
    return loss not in LOSSES or LOSSES[loss].group != "rollout"


# ---- runs ----


def trained(rows: Sequence[Row], run_dir: Path, *options: str) -> tuple[Path, float]:
    """Train, unless the run is finished already. Return its directory, and the seconds it took."""
    start = time.monotonic()
    checkpoint = latest_valid(run_dir) if run_dir.is_dir() else None
    if checkpoint is None or not checkpoint.manifest.finished:
        train_on(rows, *COMMON, f"local_run_dir='{run_dir}'", *options)
    return run_dir, time.monotonic() - start


def trained_from(world: World, rows: Sequence[Row], run_dir: Path, *options: str) -> Record:
    """Train from the world's SFT weights, and measure the result."""
    run, seconds = trained(rows, run_dir, f"model.archive='{world.sft}'", *options)
    return {"seconds": round(seconds, 1), **measured(world, run)}


def measured(world: World, run: Path) -> Record:
    """Measure a policy on held-out pairs, in the same way for every loss.

    accuracy: the share of pairs whose log pi/pi_ref is higher for chosen, pi_ref being the SFT
    model. likelier: the share whose chosen response is likelier. chosen, rejected: mean
    log-probability per token. length: mean tokens of sampled answers.
    """
    by_reward = evaluate_on(run, world.test, "loss=dpo", "loss.beta=1", reference=str(world.sft))
    means = {side: mean_logp(run, world.test, side) for side in ("chosen", "rejected")}
    return {
        "accuracy": by_reward["rewards_eval/accuracies"],
        "likelier": by_reward["logps_eval/accuracies"],
        **means,
        "length": mean_length(run, world.test),
    }


def mean_logp(run: Path, rows: Sequence[Row], side: str) -> float:
    """Return the mean log-probability per token of one side of the pairs."""
    targets = [{"prompt": row["prompt"], "completion": row[side]} for row in rows]
    rules = ("data_rules.duplicate=keep", "data_rules.contradictory=keep")
    record = evaluate_on(run, targets, "loss=sft", "loss.average_over=tokens", *rules)
    return -float(record["loss/eval"])


def mean_length(run: Path, rows: Sequence[Row], n: int = 40) -> float:
    """Return the mean number of tokens of answers to the first n prompts, at temperature 1."""
    model = plumb.open_model(run)
    prompts = [row["prompt"] for row in rows[:n]]
    answers = plumb.sample(model, prompts, max_new_tokens=64, batch_size=n)
    return statistics.mean(len(model.tokenizer(some[0])["input_ids"]) for some in answers)


def reward_model(world: World, run_dir: Path, *options: str) -> Record:
    """Train a reward model, and measure its accuracy: it has no log-probabilities."""
    run, seconds = trained(world.train, run_dir, f"model.archive='{world.sft}'", *options)
    record = evaluate_on(run, world.test)
    return {"seconds": round(seconds, 1), "accuracy": record["rewards_eval/accuracies"]}


def every_loss(
    world: World, names: Sequence[str], size: Size, lr: float, out: Path, results: Results
) -> None:
    """Train with each of these losses of config/loss; SFT imitates the chosen responses."""
    rows = [row | {"sft_target": row["chosen"]} for row in world.train]
    results.add({"part": "losses", "name": "-"}, partial(measured, world, world.sft))
    for name in names:
        options = [f"loss={name}", *written_knobs(name), f"lr={lr}", "warmup_steps=5"]
        options.append(f"n_examples={min(size.n_examples, len(world.train))}")
        bound = build_loss(knobs_of(name)) if name in LOSSES else None
        scored = bound is not None and bound.reads == "scores"
        if bound is not None and bound.live_reference:
            options.append("reference=live")
        run_dir = out / name
        run = partial(trained_from, world, rows, run_dir, *options)
        if scored:
            run = partial(reward_model, world, run_dir, *options)
        results.add({"part": "losses", "name": name, "lr": lr}, run)


def with_noise(
    world: World, names: Sequence[str], size: Size, lr: float, out: Path, results: Results
) -> None:
    """Train on flipped labels with each seed. UltraFeedback's labels are already flipped, the same
    for all seeds.
    """
    for name in names:
        for seed in size.seeds:
            rows = world.train[: size.n_noise]
            rows = flipped(rows, seed) if world.name == "demo" else rows
            options = [*NOISE[name], f"lr={lr}", "warmup_steps=5", f"seed={seed}"]
            options.append(f"n_epochs={size.noise_epochs}")
            key = {"part": "noise", "data": world.name, "name": name, "seed": seed, "lr": lr}
            run_dir = out / f"noise_{world.name}_{name}_{seed}"
            results.add(key, partial(trained_from, world, rows, run_dir, *options))


# ---- worlds ----


def demo_world(out: Path, size: Size) -> World:
    """Return the demo's pairs, and a model after SFT on them."""
    rows, test = demo("train")[: size.n_train], demo("test")[: size.n_test]
    options = ["loss=sft", "lr=1e-3", "warmup_steps=20", f"n_epochs={size.sft_epochs}"]
    run, _ = trained(rows, out / "base_demo", *options)
    return World("demo", rows, test, run)


def ultrafeedback_world(folder: Path, base: World, out: Path, size: Size) -> World:
    """Return UltraFeedback's pairs with flipped labels, and the demo's SFT model after two more
    epochs on their SFT targets, which are not flipped.
    """
    clean, test, noisy = (
        list(ultrafeedback(folder / name))[:n]
        for name, n in (
            ("processed/train_clean.jsonl.gz", size.n_train),
            ("processed/eval_clean.jsonl.gz", size.n_test),
            ("noisy/label_flip_30.jsonl.gz", size.n_train),
        )
    )
    options = [f"model.archive='{base.sft}'", "loss=sft", "lr=1e-3", "warmup_steps=20"]
    run, _ = trained(clean, out / "base_ultrafeedback", *options, "n_epochs=2")
    return World("ultrafeedback", noisy, test, run)


# ---- tables ----


def number(record: Record, key: str, form: str) -> str:
    return format(record[key], form) if key in record else "-"


def losses_table(records: Sequence[Record]) -> str:
    rows = [
        "| loss | accuracy | chosen likelier | log-prob. of chosen | of rejected | tokens of"
        " answers | s |\n|---|---|---|---|---|---|---|"
    ]
    for r in (r for r in records if r["part"] == "losses"):
        name = "before (SFT)" if r["name"] == "-" else f"`{r['name']}`"
        forms = {"accuracy": ".3f", "likelier": ".3f", "chosen": ".2f", "rejected": ".2f"}
        forms |= {"length": ".1f", "seconds": ".0f"}
        rows.append(f"| {name} | {' | '.join(number(r, k, f) for k, f in forms.items())} |")
    return "\n".join(rows) + "\n"


def spread(records: Sequence[Record], key: str) -> str:
    values = [r[key] for r in records]
    between = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{between}"


def noise_table(records: Sequence[Record]) -> str:
    rows = [
        "| data | loss | seeds | accuracy | chosen likelier | log-prob. of chosen |\n"
        "|---|---|---|---|---|---|"
    ]
    noise = [r for r in records if r["part"] == "noise"]
    for data, name in dict.fromkeys((r["data"], r["name"]) for r in noise):
        own = [r for r in noise if (r["data"], r["name"]) == (data, name)]
        cells = [spread(own, key) for key in ("accuracy", "likelier", "chosen")]
        rows.append(f"| {data} | {name} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw a row per loss: how often chosen is likelier, and both sides' log-probabilities."""
    own = [r for r in records if r["part"] == "losses" and "chosen" in r]
    own.sort(key=lambda r: r["likelier"])
    names = ["before (SFT)" if r["name"] == "-" else r["name"] for r in own]
    rows = range(len(own))
    figure = Figure(figsize=(10, 1.5 + 0.26 * len(own)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(rows, [r["likelier"] for r in own], color="#1f5fa8")
    left.set_yticks(rows, names)
    left.set_xlim(0, 1)
    left.set_xlabel("share of held-out pairs with chosen likelier")
    for side, colour in (("chosen", "#009E73"), ("rejected", "#D55E00")):
        right.plot([r[side] for r in own], rows, "o", color=colour, label=side)
    right.set_xlabel("held-out log-probability, mean per token (nats)")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=100)


BLOCK = "<!-- From here on written by benchmarks/losses.py: begin -->\n"


def write(results: Results, folder: Path) -> None:
    """Write the picture, and the tables of losses.md below its handwritten part."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "losses.md"
    text = page.read_text(encoding="utf-8").partition(BLOCK)[0] if page.is_file() else ""
    tables = f"\n## Every loss\n\n![every loss](losses.png)\n\n{losses_table(results.records)}"
    tables += f"\n## 30 % of the labels flipped\n\n{noise_table(results.records)}"
    page.write_text(text + BLOCK + tables, encoding="utf-8")
    draw(results.records, folder / "losses.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".cache/benchmarks/losses")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--parts", nargs="+", default=["losses", "noise"])
    every = sorted(file.stem for file in (ROOT / "config/loss").glob("*.yaml"))
    every = [name for name in every if on_data(name)]
    parser.add_argument("--losses", nargs="+", default=every, help="losses of part `losses`")
    parser.add_argument("--noise", nargs="+", default=[*NOISE], help="losses of part `noise`")
    parser.add_argument(
        "--ultrafeedback", type=Path, default=ROOT.parent / "shared/data/ultrafeedback"
    )
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--smoke", action="store_true", help="a few pairs and steps of each")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    size = Size()
    if options.smoke:
        size = Size(32, 10, sft_epochs=1, n_examples=16, n_noise=16, noise_epochs=1, seeds=(0,))
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / "records.jsonl")
    world = demo_world(out, size)
    if "losses" in options.parts:
        every_loss(world, options.losses, size, options.lr, out, results)
    if "noise" in options.parts:
        with_noise(world, options.noise, size, options.lr, out, results)
        if (options.ultrafeedback / "noisy").is_dir():
            other = ultrafeedback_world(options.ultrafeedback, world, out, size)
            with_noise(other, options.noise, size, options.lr, out, results)
    write(results, options.results)


if __name__ == "__main__":
    main()
