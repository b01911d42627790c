"""Measure how evenly the tokens of a batch are split over ranks: Plumb's plan (longest first, to
the emptiest part) against equal counts.

    python benchmarks/balance.py --tokens .cache/benchmarks/harmless.npz

For each number of ranks, every batch of --pairs pairs is split. Ranks wait for each other in every
microbatch, so a step takes as long as the fullest rank of each microbatch. The figure is the sum of
these, divided by the tokens per rank, averaged over all batches of the file. Only unique tokens
count (each prompt once, plus both responses), since Plumb computes only these. Prints a table
(target: below 1.02 up to 8 ranks at 64 pairs), and writes it and a chart to --out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import make_tokens
import numpy as np

from plumb.batching.microbatches import Packing, split_into_microbatches
from plumb.data.examples import Lengths, lengths_of
from plumb.data.tokenization import Example

RANKS = (2, 4, 8, 16, 32, 64)


def planned(batch: Lengths, n: int, budget: int) -> list[list[np.ndarray]]:
    """Return Plumb's microbatches, each a list of indices per rank."""
    parts = list(
        split_into_microbatches(
            batch, Packing(True, budget, world_size=n, pad_token_id=0, longest=512), at_least=1
        )
    )
    return [parts[i : i + n] for i in range(0, len(parts), n)]


def equal_counts(batch: Lengths, n: int, budget: int) -> list[list[np.ndarray]]:
    """Give pair i to rank i mod n, as data loaders do, in one microbatch."""
    return [[np.arange(rank, len(batch), n) for rank in range(n)]]


def imbalance(sizes: np.ndarray, microbatches: Sequence[Sequence[np.ndarray]]) -> float:
    """Return the tokens of the fullest rank, over all microbatches, relative to those of the mean
    rank.

    >>> imbalance(np.array([5, 4, 3]), [[np.array([0]), np.array([1, 2])]])
    1.1666666666666667
    """
    fullest = sum(max(sizes[part].sum() for part in parts) for parts in microbatches)
    return float(fullest * len(microbatches[0]) / sizes.sum())


# method -> (mean, worst) over all batches, for each of RANKS
Imbalances = dict[str, list[tuple[float, float]]]


def measure(examples: Lengths, n_pairs: int, budget: int) -> Imbalances:
    """Return the imbalance of the full batches, by both methods, for those of RANKS that are not
    more than the pairs.
    """
    batches = [examples[s : s + n_pairs] for s in range(0, len(examples) - n_pairs + 1, n_pairs)]
    methods: dict[str, Callable[..., list[list[np.ndarray]]]] = {
        "equal counts": equal_counts,
        "Plumb": planned,
    }
    out: Imbalances = {}
    for name, share in methods.items():
        for n in RANKS:
            if n <= n_pairs:
                ratios = [imbalance(batch.tokens(), share(batch, n, budget)) for batch in batches]
                out.setdefault(name, []).append((float(np.mean(ratios)), max(ratios)))
    return out


def table(results: dict[int, Imbalances]) -> str:
    """Return a Markdown table: a row per batch size and method, mean (worst) for each of RANKS."""
    rows = [
        f"| pairs per step | shared out by | {' | '.join(f'{n} ranks' for n in RANKS)} |",
        "|---" * (2 + len(RANKS)) + "|",
    ]
    for n_pairs, methods in results.items():
        for name, values in methods.items():
            cells = [f"{mean:.3f} ({worst:.2f})" for mean, worst in values] + [""] * (
                len(RANKS) - len(values)
            )
            rows.append(f"| {n_pairs} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def chart(results: dict[int, Imbalances], path: Path) -> None:
    """Draw the mean of max / mean over ranks, a line per batch size and method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (n_pairs, methods), colour in zip(
        results.items(), ("#6a4c93", "#d98f2b", "#4c8a6a"), strict=False
    ):
        for (name, values), style in zip(methods.items(), ("--", "-"), strict=True):
            means = [mean for mean, _ in values]
            axis.plot(
                RANKS[: len(means)],
                means,
                style,
                marker="o",
                color=colour,
                label=f"{n_pairs} pairs, {name}",
            )
    axis.axhline(1.02, color="#999999", linewidth=1, linestyle=":")
    axis.set(
        xscale="log",
        xticks=RANKS,
        xticklabels=RANKS,
        xlabel="ranks",
        ylabel="tokens of the fullest rank, over the mean",
    )
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, required=True, help="ids written by make_tokens.py")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[64, 256], help="pairs per step (default 64 256)"
    )
    parser.add_argument(
        "--budget",
        type=int,
        default=8192,
        help="maximum tokens of a microbatch (default %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".cache/benchmarks/balance"),
        help="folder (default %(default)s)",
    )
    options = parser.parse_args()
    examples = [
        Example(pair.prompt, pair[1:], "") for pair in make_tokens.load(options.tokens).pairs
    ]
    results = {n: measure(lengths_of(examples), n, options.budget) for n in options.pairs}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "balance.md").write_text(table(results) + "\n")
    chart(results, options.out / "balance.png")
    print(f"{table(results)}\n{options.out}/balance.md and .png")


if __name__ == "__main__":
    main()
