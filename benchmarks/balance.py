"""How evenly the tokens of a batch fall on ranks: longest first to the least loaded rank, against equal counts of pairs.

    python benchmarks/balance.py --tokens .cache/benchmarks/harmless.npz

For each number of ranks: every batch of --pairs pairs is shared out, and the rank with the most tokens is compared with the mean:
max / mean, averaged over all batches of the file; the step takes as long as its fullest rank. Tokens are unique ones (each prompt
once, plus both responses): what Plumb computes. Prints a table (target: below 1.02 up to 8 ranks at 64 pairs), writes it and a
chart to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import make_tokens
import numpy as np

RANKS = (2, 4, 8, 16, 32, 64)


def longest_first(sizes: Sequence[int], n: int) -> list[list[int]]:
    """Indices per rank: each size, longest first, to the rank that has least so far.

    >>> longest_first([5, 4, 3, 3, 3], 2)
    [[0, 3], [1, 2, 4]]
    """
    shares: list[list[int]] = [[] for _ in range(n)]
    loads = [0] * n
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += sizes[i]
    return shares


def equal_counts(sizes: Sequence[int], n: int) -> list[list[int]]:
    """Indices per rank: pair i to rank i mod n, as data loaders do."""
    return [list(range(rank, len(sizes), n)) for rank in range(n)]


def imbalance(sizes: Sequence[int], shares: Sequence[Sequence[int]]) -> float:
    """Tokens of the fullest rank over the mean of all ranks."""
    loads = [sum(sizes[i] for i in share) for share in shares]
    return max(loads) * len(loads) / sum(loads)


def measure(sizes: np.ndarray, n_pairs: int) -> dict[str, list[tuple[float, float]]]:
    """method -> (mean, worst) of max / mean over all batches, for each of RANKS that has a pair per rank."""
    batches = [sizes[s : s + n_pairs].tolist() for s in range(0, len(sizes) - n_pairs + 1, n_pairs)]
    out: dict[str, list[tuple[float, float]]] = {}
    for name, share in (("equal counts", equal_counts), ("longest first", longest_first)):
        for n in RANKS:
            if n <= n_pairs:
                found = [imbalance(batch, share(batch, n)) for batch in batches]
                out.setdefault(name, []).append((float(np.mean(found)), max(found)))
    return out


def table(results: dict[int, dict[str, list[tuple[float, float]]]]) -> str:
    """Markdown: one row per batch size and method, mean (worst) per number of ranks."""
    rows = [f"| pairs per step | shared out by | {' | '.join(f'{n} ranks' for n in RANKS)} |", "|---" * (2 + len(RANKS)) + "|"]
    for n_pairs, methods in results.items():
        for name, values in methods.items():
            cells = [f"{mean:.3f} ({worst:.2f})" for mean, worst in values] + [""] * (len(RANKS) - len(values))
            rows.append(f"| {n_pairs} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def chart(results: dict[int, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """Mean max / mean over ranks, a line per batch size and method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (n_pairs, methods), colour in zip(results.items(), ("#6a4c93", "#d98f2b", "#4c8a6a"), strict=False):
        for (name, values), style in zip(methods.items(), ("--", "-"), strict=True):
            means = [mean for mean, _ in values]
            axis.plot(RANKS[: len(means)], means, style, marker="o", color=colour, label=f"{n_pairs} pairs, {name}")
    axis.axhline(1.02, color="#999999", linewidth=1, linestyle=":")
    axis.set(xscale="log", xticks=RANKS, xticklabels=RANKS, xlabel="ranks", ylabel="tokens of the fullest rank / mean")
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="ids made by make_tokens.py")
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 256], help="of a step (default 64 256)")
    parser.add_argument("--out", type=Path, default=Path(".cache/benchmarks/balance"), help="folder (default %(default)s)")
    options = parser.parse_args()
    sizes = np.array([sum(map(len, pair)) for pair in make_tokens.load(options.tokens).pairs])
    results = {n: measure(sizes, n) for n in options.pairs}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "balance.md").write_text(table(results) + "\n")
    chart(results, options.out / "balance.png")
    print(f"{table(results)}\n{options.out}/balance.md and .png")


if __name__ == "__main__":
    main()
