"""Measure the host's work for each optimizer step on one of many ranks, and for the cache of
reference log-probabilities.

    python benchmarks/host_work.py    # 64 ranks x 64 pairs, digests of 2 M pairs: some minutes
    python benchmarks/host_work.py --smoke    # the same at tiny sizes: a second

All ranks are simulated in one process on one thread; times are those of one rank, since ranks work
in parallel. Pairs have lengths like those of HH (lognormal; medians of 120 and 66 tokens, cut to
256 each), and are in a store in memory.

    feed       the feeding thread: indices -> plan -> this rank's microbatches as tensors
    thread     the training thread's computations from lengths: the loss's denominator, tokens,
               operations for the MFU
    digests    of prompts with responses, the keys of cached log-probabilities

Each is compared with the baseline "every example", which is what each rank did before: it creates
and reads all examples of the global batch one by one, and rank 0 alone digests all responses. Both
must give the same plans, numbers and digests, and the parts of all ranks must add up to the batch;
otherwise the benchmark ends with an error. The two alternate, round after round. The table, written
to --out as Markdown, shows the median and the range over the rounds, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from plumb.batching.feed import Feed, Step
from plumb.batching.layout import pack
from plumb.batching.microbatches import Packing, split_into_microbatches
from plumb.data.examples import Examples, Table
from plumb.data.tokenization import Example, trees_of
from plumb.models.reference_cache import response_digests
from plumb.training.budget import Cost

COST = Cost(body=2_500_000_000, head=130_000_000, attention=80_000)  # of about 2.8B parameters


class Result(NamedTuple):
    """Hold the times of one piece of work."""

    what: str
    before: list[float]  # seconds, one for each round
    after: list[float]


def store_of(n: int, seed: int = 0) -> Examples:
    """Return n pairs as `view` would, none longer than 256 + 256 tokens."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(4.8, 0.6, n), 8, 256).astype(np.int64)
    responses = np.clip(rng.lognormal(4.2, 0.8, (n, 2)), 2, 256).astype(np.int64)
    lengths = np.column_stack([prompts, responses])
    starts = np.concatenate([[0], lengths.ravel().cumsum()])
    texts = np.arange(3 * n, dtype=np.int32).reshape(n, 3)
    store: Any = SimpleNamespace(
        ids=rng.integers(0, 50_000, starts[-1], dtype=np.uint16),
        starts=starts,
        rows=np.column_stack([texts[:, 0], np.zeros(n, np.int32), np.arange(n, dtype=np.int32)]),
        files=["pairs.jsonl"],
    )
    items = np.column_stack([np.arange(n, dtype=np.int32), texts[:, 1:]])
    return Examples([Table(store, items, True)], None, np.arange(n), lengths.astype(np.int32))


# ---- the baseline "every example" ----


def n_tokens(example: Example) -> int:
    return sum(len(prompt) + sum(map(len, responses)) for prompt, responses in trees_of(example))


def plan_of_every_example(examples: Sequence[Example], packing: Packing) -> list[list[np.ndarray]]:
    """Return microbatches of at most the budget, cut by tokens (LPT) or by length: by the
    definition, one example at a time.
    """
    n = len(examples)
    world = packing.world_size
    k = len(examples[0].responses)

    def by_tokens(n_parts: int) -> list[np.ndarray]:
        parts: list[list[int]] = [[] for _ in range(n_parts)]
        loads = [(0, i) for i in range(n_parts)]
        for index in np.argsort(-sizes, kind="stable").tolist():
            load, i = loads[0]
            parts[i].append(index)
            heapq.heapreplace(loads, (load + int(sizes[index]), i))
        return [np.array(parts[i], np.int64) for _, i in sorted(loads, key=lambda x: (-x[0], x[1]))]

    def by_length(n_parts: int) -> list[np.ndarray]:
        return np.array_split(np.argsort(-sizes, kind="stable"), n_parts)

    def cost(part: np.ndarray) -> int:
        return sizes[part].sum() if packing.packed else k * len(part) * sizes[part].max(initial=0)

    if packing.packed:
        sizes = np.array([n_tokens(e) for e in examples])
    else:
        sizes = np.array(
            [max(len(p) + len(r) for p, rs in trees_of(e) for r in rs) for e in examples]
        )
    most = -(-n // world)
    n_micro = min(most, max(1, -(-int(sizes.sum()) // (packing.budget * world))))
    while True:
        parts = (by_tokens if packing.packed else by_length)(n_micro * world)
        if n_micro == most or all(cost(part) <= packing.budget or len(part) == 1 for part in parts):
            return [parts[i : i + world] for i in range(0, len(parts), world)]
        n_micro += 1


def feed_of_every_example(
    examples: Examples, packing: Packing, rank: int, indices: np.ndarray
) -> list[Example]:
    """Do the feed's work on one rank, and drop its tensors. Return all examples of the batch."""
    batch = [examples[i] for i in indices.tolist()]
    for parts in plan_of_every_example(batch, packing):
        mine = parts[rank] if len(parts[rank]) else np.array([0])
        pack([batch[i] for i in mine], pad_token_id=packing.pad_token_id, longest=packing.longest)
    return batch


def thread_of_every_example(batch: Sequence[Example]) -> tuple[int, int, float]:
    """Return (scored tokens, tokens, operations of a forward pass) of the batch."""
    scored = sum(max(len(r) - (len(p) == 0), 0) for e in batch for p, rs in trees_of(e) for r in rs)
    tokens = responses = pairs = 0.0
    for prompt, answers in (tree for example in batch for tree in trees_of(example)):
        p = len(prompt)
        tokens, pairs = tokens + p, pairs + p * p / 2
        for c in map(len, answers):
            tokens = tokens + c
            responses = responses + c
            pairs = pairs + p * c + c * c / 2
    operations = 2 * COST.body * tokens + 2 * COST.head * responses + 4 * COST.attention * pairs
    return scored, sum(map(n_tokens, batch)), operations


def digests_of_every_example(examples: Examples) -> np.ndarray:
    """Return the digests, example by example.  [n, k] uint64"""
    digests = []
    for i in range(len(examples)):
        for prompt, responses in trees_of(examples[i]):
            of_prompt = hashlib.blake2b(
                np.asarray(prompt, np.int32).tobytes() + b"|", digest_size=8
            )
            for response in responses:
                digest = of_prompt.copy()
                digest.update(np.asarray(response, np.int32).tobytes())
                digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, examples.k)


# ---- the measurements ----


def thread(step: Step) -> tuple[int, int, float]:
    """Return what the training thread computes from a step's lengths."""
    return step.lengths.n_scored(), int(step.lengths.tokens().sum()), COST.forward(step.lengths)


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.thread_time()
    result = work(*arguments)
    return time.thread_time() - start, result


def check(same: bool, what: str) -> None:
    if not same:
        raise SystemExit(f"{what} differ from the baseline's")


def measure_step(
    examples: Examples, ranks: int, each: int, budget: int, packed: bool, rounds: int
) -> list[Result]:
    """Measure feed and thread of one rank; each round takes another rank and another batch."""
    packing = Packing(packed, budget, ranks, pad_token_id=0, longest=512)
    what = f"{ranks} x {each} pairs, {'packed' if packed else 'padded'}, {budget:,} tokens"
    feed, thread_ = Result(f"feed: {what}", [], []), Result(f"thread: {what}", [], [])
    rng = np.random.default_rng(1)
    for i in range(rounds):
        indices, rank = rng.choice(len(examples), ranks * each, replace=False), i % ranks
        before, batch = timed(feed_of_every_example, examples, packing, rank, indices)
        after, step = timed(Feed(examples, packing, rank).step, indices)
        feed.before.append(before)
        feed.after.append(after)
        before, expected = timed(thread_of_every_example, batch)
        after, numbers = timed(thread, step)
        thread_.before.append(before)
        thread_.after.append(after)
        check(numbers == expected, "numbers")
        expected_parts = [part for parts in plan_of_every_example(batch, packing) for part in parts]
        same = [
            np.array_equal(a, b)
            for a, b in zip(
                expected_parts, split_into_microbatches(step.lengths, packing, 1), strict=True
            )
        ]
        check(all(same), "plans")
    shares = [Feed(examples, packing, rank).step(indices).microbatches for rank in range(ranks)]
    of_all = np.concatenate([m.where for share in shares for m in share if m.weight])
    check(np.array_equal(np.sort(of_all), np.arange(len(indices))), "all ranks' parts")
    return [feed, thread_]


def measure_digests(examples: Examples, ranks: int, rounds: int) -> list[Result]:
    """Measure the digests of all responses on rank 0, and of a rank's own share."""
    alone = Result(f"digests: {len(examples):,} pairs, 1 rank", [], [])
    shared = Result(f"digests: {len(examples):,} pairs, {ranks} ranks", [], [])
    share = examples.select(np.array_split(np.arange(len(examples)), ranks)[0])
    for _ in range(rounds):
        before, expected = timed(digests_of_every_example, examples)
        after, result = timed(response_digests, examples)
        check(np.array_equal(result, expected), "digests")
        own, _ = timed(response_digests, share)
        alone.before.append(before)
        alone.after.append(after)
        shared.before.append(before)
        shared.after.append(own)
    return [alone, shared]


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table: time before and now, median (lowest to highest)."""

    def cell(secs: list[float]) -> str:
        unit, name = (1, "s") if min(secs) >= 1 else (1e3, "ms")
        median, low, high = (unit * x for x in (float(np.median(secs)), min(secs), max(secs)))
        return f"{median:.3g} {name} ({low:.3g} to {high:.3g})"

    rows = ["| what | every example | now | ratio |", "|---|---|---|---|"]
    for what, before, after in results:
        rows.append(
            f"| {what} | {cell(before)} | {cell(after)} |"
            f" {np.median(before) / np.median(after):.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 8, 64], help="numbers of ranks (default 1 8 64)"
    )
    parser.add_argument(
        "--each", type=int, default=64, help="pairs per rank and step (default %(default)s)"
    )
    parser.add_argument(
        "--pairs", type=int, default=200_000, help="number of pairs to digest (default %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="rounds per step; digests get a third (default %(default)s)",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: tests the code, measures nothing"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".cache/benchmarks/host_work"),
        help="folder (default %(default)s)",
    )
    options = parser.parse_args()
    if options.smoke:
        options.ranks = [1, 4]
        options.each = 4
        options.pairs = 300
        options.rounds = 3
    examples = store_of(max(options.pairs, max(options.ranks) * options.each))
    results = list[Result]()
    for ranks in options.ranks:
        results += measure_step(examples, ranks, options.each, 16_384, True, options.rounds)
    for packed, budget in ((True, 1024), (False, 16_384), (False, 1024)):
        results += measure_step(
            examples, max(options.ranks), options.each, budget, packed, options.rounds
        )
    results += measure_digests(
        examples[: options.pairs], max(options.ranks), -(-options.rounds // 3)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "host_work.md").write_text(table(results) + "\n")
    print(f"{table(results)}\n{options.out}/host_work.md")


if __name__ == "__main__":
    main()
