"""Train reward models on HH, changing one thing at a time: python benchmarks/reward_hh.py OUT
--model FOLDER

The data are split by prompt into training, validation (for choosing) and held-out pairs (reported
once). `frozen` runs the model once and tries heads on its hidden states; `trained` trains with each
of SETTINGS through train.py and evaluates on the validation pairs; `final` trains on training and
validation pairs with the given settings, and evaluates on the held-out pairs. The output is in
benchmarks/results/reward.md. `--smoke`: a few pairs, to try it with any small model.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plumb.batching.feed import Feed  # noqa: E402
from plumb.batching.microbatches import Packing  # noqa: E402
from plumb.data.registry import get_dataset  # noqa: E402
from plumb.losses.registry import build_loss  # noqa: E402
from plumb.models.find import find_model  # noqa: E402
from plumb.models.layout_probe import Precision, choose_forward_path, ordinary_ids  # noqa: E402
from plumb.models.load import load_policy, load_tokenizer  # noqa: E402
from plumb.models.scalar_head import FOLDS, fit_head, initial_weight  # noqa: E402
from plumb.scoring.intervals import wilson  # noqa: E402
from plumb.scoring.scorers import encoded, knobs_of  # noqa: E402
from plumb.training.evaluator import all_hidden, folds_of  # noqa: E402
from plumb.training.objective import Scorer  # noqa: E402

FILES = ("harmless-base/test.jsonl.gz", "helpful-base/test.jsonl.gz")
PARTS = {"heldout": 22, "valid": 36, "train": 100}  # upper limits, of a hundred prompts
MARK = "\n\nAssistant:"
REWARD = {"name": "reward", "margin": 0.0, "label_smoothing": 0, "centering": 0.0}

# Settings of a head on frozen states; by default AdamW, linear decay after 5 steps of warmup,
# batches of 32, one epoch.
HEADS: dict[str, dict[str, Any]] = {
    "drawn, lr 2e-5": {"drawn": True, "lr": 2e-5},
    "drawn, lr 1e-3": {"drawn": True, "lr": 1e-3},
    "drawn, lr 1e-2": {"drawn": True, "lr": 1e-2},
    "drawn, defaults of 2023: RMSprop, lr 5e-7, warmup 150": {
        "drawn": True,
        "lr": 5e-7,
        "optimizer": "RMSprop",
        "warmup": 150,
    },
    "zero, lr 2e-5": {"lr": 2e-5},
    "zero, lr 2e-4": {"lr": 2e-4},
    "zero, lr 1e-3": {},
    "zero, lr 3e-3": {"lr": 3e-3},
    "zero, lr 1e-2": {"lr": 1e-2},
    "zero, lr 1e-3, 3 epochs": {"epochs": 3},
    "zero, lr 1e-3, warmup 150 of 56 steps": {"warmup": 150},
    "zero, lr 1e-3, RMSprop": {"optimizer": "RMSprop"},
    "zero, lr 1e-3, states divided by their spread": {"normed": True},
    "zero, lr 1e-3, batches of 4": {"batch": 4},
}
BASE = [
    "optimizer=AdamW",
    "lr=1e-5",
    "lr_schedule=linear",
    "warmup_steps=5",
    "batch_size=16",
    "n_epochs=1",
]
SETTINGS: dict[str, list[str]] = {
    "base": [],
    "head drawn": ["head_init=random"],
    "head zero": ["head_init=zero"],
    "head zero, head_lr 1e-3": ["head_init=zero", "head_lr=1e-3"],
    "read at the mean": ["loss.read=mean"],
    "lr 2e-6": ["lr=2e-6"],
    "lr 5e-5": ["lr=5e-5"],
    "warmup of 150": ["warmup_steps=150"],
    "RMSprop": ["optimizer=RMSprop"],
    "computed in float32": ["model.fsdp_policy_mp=null"],
    "half of the pairs": ["n_epochs=null", "n_examples=730"],
}


def split(data: Path, out: Path, tokenizer, max_length: int, most: int | None) -> dict[str, int]:
    """Write heldout.jsonl, valid.jsonl and train.jsonl: pairs that fit in max_length tokens, each
    prompt in one part.
    """
    n = dict.fromkeys(PARTS, 0)
    rows: dict[str, list[str]] = {part: [] for part in PARTS}
    for line in (
        line
        for name in FILES
        for line in gzip.decompress((data / name).read_bytes()).decode().strip().split("\n")
    ):
        row = json.loads(line)
        (prompt, chosen), (other, rejected) = (
            row[k].rsplit(MARK, 1) for k in ("chosen", "rejected")
        )
        if prompt != other or chosen == rejected or not chosen.strip() or not rejected.strip():
            continue
        lengths = [
            len(tokenizer(x, add_special_tokens=False)["input_ids"])
            for x in (prompt + MARK, chosen, rejected)
        ]
        number = int(hashlib.md5(prompt.encode()).hexdigest()[:8], 16) % 100
        part = next(part for part, end in PARTS.items() if number < end)
        if lengths[0] + max(lengths[1:]) + 1 <= max_length and (most is None or n[part] < most):
            n[part] += 1
            rows[part].append(
                json.dumps({"prompt": prompt + MARK, "chosen": chosen, "rejected": rejected}) + "\n"
            )
    for part, lines in rows.items():
        (out / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return n


@torch.no_grad()
def states(model_name: str, path: Path, max_length: int, read: str) -> tuple[Tensor, np.ndarray]:
    """Return what a scalar head would read for all pairs of a file, [n, 2, d], and folds by prompt,
    [n].
    """
    ref = find_model(model_name)
    config = knobs_of(ref, {"max_length": max_length, "max_prompt_length": max_length - 1})
    tokenizer, model = load_tokenizer(ref.config), load_policy(ref.config, scalar=True).eval()
    examples = encoded(
        [*get_dataset(str(path), "train", eval_share=0.0).rows], tokenizer, config, "keep_end"
    ).examples
    loss, device = build_loss(REWARD | {"read": read}), torch.device("cpu")
    precision = lambda: torch.autocast("cpu", torch.bfloat16)
    forward_path, line = choose_forward_path(
        model,
        device=device,
        longest=max_length,
        vocabulary=ordinary_ids(model, tokenizer),
        row_tokens=lambda forward_path: 4096,
        precisions=[Precision(precision, torch.bfloat16)],
        gradients=False,
    )
    print(line)
    scorer = Scorer(
        policy=model,
        reference=None,
        loss=loss,
        forward_path=forward_path,
        precision=precision,
        device=device,
    )
    feed = Feed(
        examples,
        Packing(
            packed=forward_path.packed,
            budget=4096,
            world_size=1,
            pad_token_id=tokenizer.pad_token_id,
            longest=max_length,
        ),
        0,
    )
    indices = np.arange(len(examples))
    with tqdm(total=len(examples), desc=read) as progress:
        return all_hidden(scorer, feed, indices, True, progress), folds_of(examples, indices)


def head_by_steps(
    z: Tensor,
    *,
    drawn: bool = False,
    lr: float = 1e-3,
    optimizer: str = "AdamW",
    warmup: int = 5,
    epochs: int = 1,
    normed: bool = False,
    batch: int = 32,
) -> Tensor:
    """Return a head [d] trained on differences of frozen states, [n, d], as train.py would."""
    unit = z.square().mean(0).sqrt() if normed else torch.ones(z.shape[1])
    weight = torch.nn.Parameter(
        initial_weight(z.shape[1], 0)[0] if drawn else torch.zeros(z.shape[1])
    )
    updater = getattr(torch.optim, optimizer)([weight], lr=lr)
    n_steps = epochs * -(-len(z) // batch)
    step = 0
    for epoch in range(epochs):
        for part in torch.from_numpy(np.random.default_rng((0, epoch)).permutation(len(z))).split(
            batch
        ):
            rising = (step + 1) / (warmup + 1)
            falling = 1 - (step - warmup) / max(1, n_steps - 1 - warmup)
            updater.param_groups[0]["lr"] = lr * (rising if step < warmup else max(0.0, falling))
            updater.zero_grad()
            (-F.logsigmoid((z[part] / unit) @ weight)).mean().backward()
            updater.step()
            step += 1
    return weight.detach() / unit


def frozen(model: str, path: Path, max_length: int) -> None:
    """Print a table of heads on frozen states: accuracy and loss on pairs of left-out folds."""
    for read in ("last", "mean"):
        hidden, folds = states(model, path, max_length, read)
        chosen, rejected = hidden[:, 0].float(), hidden[:, 1].float()
        print(
            f"\n| read at {read}: {len(hidden):,} pairs, {FOLDS} folds by prompt | accuracy | loss"
            " |\n|---|---|---|"
        )
        inner = torch.from_numpy(np.random.default_rng(0).integers(0, FOLDS, len(hidden)))
        margins: dict[str, Tensor] = {name: torch.zeros(len(hidden)) for name in ("fitted", *HEADS)}
        for fold in range(FOLDS):
            out = torch.from_numpy(folds == fold)
            heads = {
                name: head_by_steps((chosen - rejected)[~out], **options)
                for name, options in HEADS.items()
            }
            heads["fitted"] = fit_head(chosen[~out], rejected[~out], inner[~out]).weight[0].float()
            for name, head in heads.items():
                margins[name][out] = (chosen - rejected)[out] @ head
        for name, values in margins.items():
            print(
                f"| {name} | {wilson(int((values > 0).sum()), len(values))} |"
                f" {-F.logsigmoid(values).mean():.4f} |"
            )


def train(
    name: str,
    out: Path,
    model: str,
    files: list[str],
    test: Path,
    max_length: int,
    options: list[str],
) -> str:
    """Train through train.py. Return a row of the table: before the first step, and at the end."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "loss=reward",
        f"exp_name={name}",
        f"local_run_dir={out}/{name}",
        f"local_dirs=[{out}]",
        f"model.name_or_path={model}",
        f"datasets=[{','.join(files)}]",
        f"eval_datasets=[{test}]",
        f"max_length={max_length}",
        f"max_prompt_length={max_length - 1}",
        "n_eval_examples=null",
        "eval_batch_size=64",
        "model.fsdp_policy_mp=bfloat16",
        "tokens_per_microbatch=4096",
        "save_optimizer_pt=false",
        "wandb.enabled=false",
        *options,
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    records = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    n = len(test.read_text().splitlines())
    (first, *_, last) = [r for r in records if "loss/eval" in r]
    cells = [
        f"{wilson(r['rewards_eval/accuracies'] * n, n)}, {r['loss/eval']:.4f}"
        for r in (first, last)
    ]
    return f"| {name} | {' '.join(options) or 'defaults'} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared/data/hh",
        help="harmless-base and helpful-base",
    )
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["frozen", "trained", "final"],
        choices=["frozen", "trained", "final"],
    )
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS], help="settings of `trained`")
    parser.add_argument(
        "--final", nargs="*", default=[], help="options of `final`; none: train.py's defaults"
    )
    parser.add_argument("--smoke", action="store_true", help="60 pairs of each part")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    out, model = arguments.out.resolve(), arguments.model
    out.mkdir(parents=True, exist_ok=True)
    n = split(
        arguments.data,
        out,
        load_tokenizer(find_model(model).config),
        arguments.max_length,
        60 if arguments.smoke else None,
    )
    print(f"pairs of at most {arguments.max_length} tokens: {n}")
    paths = {part: out / f"{part}.jsonl" for part in PARTS}
    if "frozen" in arguments.parts:
        frozen(model, paths["train"], arguments.max_length)
    rows: list[str] = []
    if "trained" in arguments.parts:
        for name in arguments.settings:
            run, options = name.replace(" ", "_").replace(",", ""), [*BASE, *SETTINGS[name]]
            rows.append(
                train(
                    run,
                    out,
                    model,
                    [str(paths["train"])],
                    paths["valid"],
                    arguments.max_length,
                    options,
                )
            )
    if "final" in arguments.parts:
        both = [str(paths["train"]), str(paths["valid"])]
        rows.append(
            train(
                "final", out, model, both, paths["heldout"], arguments.max_length, arguments.final
            )
        )
    if rows:
        print(
            "\n".join(
                [
                    "",
                    "| run | options | accuracy and loss before training | after |",
                    "|---|---|---|---|",
                    *rows,
                ]
            )
        )


if __name__ == "__main__":
    main()
