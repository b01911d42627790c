"""Sample 8 responses to each prompt: Plumb's engine beside transformers' `generate`, and the tokens
of an update: `nice python benchmarks/rollouts.py`.

The model has random weights, and a share of its vocabulary ends a response, so that lengths vary as
those of a trained policy do: on average, a response has `--mean-tokens` tokens, `--max-new-tokens`
at most. Both sample from the same prompts, sorted by length, in float32, with the batch size of
{8, 32, 128} responses (`--sizes`) at which they are fastest. `generate` samples with its own cache
and neither top-k nor top-p. Runs alternate; a run's speed is the number of sampled tokens, end
tokens included, per second of this process's CPU time; with `--device cuda`, in bfloat16 and per
second.

Then, on a CPU and without `--no-steps`, whole steps of GRPO, Plumb's train.py beside TRL's
GRPOTrainer (whole_step.py): a rollout and an optimizer step on all its responses, without a
reference. `--trl PYTHON` is an interpreter whose environment has trl 1.16.0; where there is none,
TRL is skipped.

Prints medians with their spread (least and largest), and the tokens that an update computes for a
prompt's responses: as a tree, and as rows of their own, with and without padding.
`--out FILE` also writes this to a file, and each measurement, as it comes, to a .jsonl beside it.
`--smoke`: smaller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import whole_step

from plumb.data.prompts import NumberedPrompt
from plumb.rollouts.decoding import Decoding
from plumb.rollouts.hf_engine import padded
from plumb.rollouts.policy_engine import PolicyEngine

PAD = 0
Lengths = list[list[int]]  # of each prompt's responses
Contender = Callable[[int], Lengths]  # from the run's number
Measure = Callable[[str, int, int], tuple[Lengths, float]]  # of a contender, size and run's number


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=150, help="from 2/3 to 4/3 of it")
    parser.add_argument("--mean-tokens", type=int, default=75)
    parser.add_argument("--max-new-tokens", type=int, default=150)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-steps", action="store_true", help="only the samplers")
    parser.add_argument("--trl", default=sys.executable, help="Python with trl 1.16.0")
    at = parser.parse_args()
    if at.smoke:
        small = {"rounds": 1, "prompts": 2, "n": 2, "prompt_tokens": 12, "width": 16}
        vars(at).update(small | {"sizes": [8], "mean_tokens": 4, "max_new_tokens": 6})
    transformers.logging.set_verbosity_error()
    model = make_model(at.width, at.layers, at.device)
    vocabulary = model.config.vocab_size
    ends = list(range(vocabulary - round(vocabulary / at.mean_tokens), vocabulary))
    prompts = make_prompts(at.prompts, at.prompt_tokens, vocabulary - len(ends))
    # a GPU's work is not CPU time; both contenders end with their tokens on the host
    clock = time.perf_counter if at.device == "cuda" else time.process_time
    contenders = {"Plumb": plumb, "transformers' generate": generate}
    log = at.out.with_suffix(".jsonl").open("w") if at.out else None

    def measure(name: str, size: int, i: int) -> tuple[Lengths, float]:
        run = contenders[name](model, prompts, at.n, ends, at.max_new_tokens, size)
        lengths, speed = timed(run, i, clock)
        if log:
            row = {"sampler": name, "size": size, "run": i, "tokens_per_second": speed}
            print(json.dumps(row), file=log, flush=True)
        return lengths, speed

    best = {name: fastest(measure, name, at.sizes) for name in contenders}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    responses: Lengths = []
    for i in range(at.rounds):
        for name in contenders:
            lengths, speed = measure(name, best[name], i)
            speeds[name].append(speed)
            responses += lengths if name == "Plumb" else []
    text = report(at, speeds, [len(p.ids) for p in prompts], responses)
    if at.device == "cpu" and not at.no_steps:
        text += "\n\n" + whole_steps(at, model, ends, prompts)
    print(text)
    if at.out:
        at.out.write_text(text + "\n", encoding="utf-8")


def make_model(width: int, layers: int, device: str) -> Any:
    torch.manual_seed(0)
    n_heads = max(4, width // 128)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads // 2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    with torch.device(device):
        model: Any = LlamaForCausalLM(config).eval()
    return model.to(torch.bfloat16) if device == "cuda" else model


def make_prompts(n: int, tokens: int, highest: int) -> list[NumberedPrompt]:
    """Return prompts of different lengths, from the longest to the shortest."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(tokens * 4 / 3, tokens * 2 / 3, n).astype(int)
    return [
        NumberedPrompt(rng.integers(1, highest, length), i, f"prompt {i}")
        for i, length in enumerate(lengths.tolist())
    ]


def plumb(
    model: Any,
    prompts: Sequence[NumberedPrompt],
    n: int,
    ends: list[int],
    max_new_tokens: int,
    size: int,
) -> Contender:
    """Return Plumb's engine at this batch size."""
    engine = PolicyEngine(
        decoding=Decoding("sample", max_new_tokens=max_new_tokens, temperature=1.0),
        ends=ends,
        pad_token_id=PAD,
        longest=1024,
        batch_size=size,
        precision=nullcontext,
    )
    engine.load(model)

    def run(i: int) -> Lengths:
        samples = engine.sample(prompts, n, (0, i))
        return [[len(r.ids) for r in group] for group in samples.responses]

    return run


def generate(
    model: Any,
    prompts: Sequence[NumberedPrompt],
    n: int,
    ends: list[int],
    max_new_tokens: int,
    size: int,
) -> Contender:
    """Return transformers' generate at this batch size."""
    at_once = max(1, size // n)
    is_end = torch.tensor(ends, device=model.device)

    def run(i: int) -> Lengths:
        torch.manual_seed(i)
        lengths = []
        for first in range(0, len(prompts), at_once):
            ids, mask = padded([p.ids for p in prompts[first : first + at_once]], PAD)
            new = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=n,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=PAD,
            )[:, ids.shape[1] :]
            ended = torch.isin(new, is_end)
            own = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1]).tolist()
            lengths += [own[j : j + n] for j in range(0, len(own), n)]
        return lengths

    return run


def whole_steps(
    at: argparse.Namespace, model: Any, ends: list[int], prompts: Sequence[NumberedPrompt]
) -> str:
    """Return the table of whole steps of GRPO."""
    task = whole_step.Task(
        model=model,
        ends=ends,
        prompts=[p.ids.tolist() for p in prompts],
        n=at.n,
        max_new_tokens=at.max_new_tokens,
        rounds=at.rounds,
    )
    with tempfile.TemporaryDirectory() as folder:
        return whole_step.compare(task, Path(folder), at.trl, (at.n, len(prompts) * at.n))


def timed(contender: Contender, i: int, clock: Callable[[], float]) -> tuple[Lengths, float]:
    """Return the lengths of the responses, and tokens per second."""
    start = clock()
    lengths = contender(i)
    return lengths, sum(map(sum, lengths)) / (clock() - start)


def fastest(measure: Measure, name: str, sizes: Sequence[int]) -> int:
    """Return the size at which a contender is fastest, each timed once."""
    return max(sizes, key=lambda size: measure(name, size, 0)[1])


def report(
    at: argparse.Namespace,
    speeds: dict[str, list[float]],
    prompts: Sequence[int],
    responses: Lengths,
) -> str:
    """Return both tables; `prompts`: lengths; `responses`: lengths, round after round."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = sorted(a / b for a, b in zip(*speeds.values(), strict=True))
    unit = "" if at.device == "cuda" else " of CPU time"
    lines = [
        f"{len(prompts)} prompts of {min(prompts)} to {max(prompts)} tokens, {at.n} responses to"
        f" each, of {np.mean(sum(responses, [])):.0f} tokens on average and at most"
        f" {at.max_new_tokens}; {at.rounds} rounds\n",
        f"| sampler | tokens per second{unit}, median | least | largest |",
        "|---|---|---|---|",
        *(
            f"| {name} | {medians[name]:,.0f} | {min(values):,.0f} | {max(values):,.0f} |"
            for name, values in speeds.items()
        ),
        f"| ratio of a round | {statistics.median(ratios):.2f} | {ratios[0]:.2f} |"
        f" {ratios[-1]:.2f} |\n",
        "| tokens of an update, of a prompt's responses | mean |",
        "|---|---|",
    ]
    groups = list(zip([*prompts] * at.rounds, responses, strict=True))
    trees = float(np.mean([p + sum(group) for p, group in groups]))
    rows = float(np.mean([len(group) * (p + max(group)) for p, group in groups]))
    alone = float(np.mean([len(group) * p + sum(group) for p, group in groups]))
    lines += [
        f"| as a tree | {trees:,.0f} |",
        f"| as rows of their own, without padding | {alone:,.0f} ({alone / trees:.2f} x) |",
        f"| padded to the longest of the group | {rows:,.0f} ({rows / trees:.2f} x) |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
