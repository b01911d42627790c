"""Tokenize real HH pairs once, so that all contenders train on the same ids and none needs a
tokenizer or a network.

    python benchmarks/make_tokens.py --data /path/to/hh-rlhf/harmless-base/test.jsonl.gz \
        --tokenizer /path/to/tokenizer.json --out .cache/benchmarks/harmless.npz

Prompt and responses are tokenized separately, EOS ends each response, and the 2023 truncation
applies (--max-length, --max-prompt-length; HH keeps the end of a long prompt). Pairs whose two
texts split into different prompts are skipped, and so are pairs with an empty response. The order
is a seeded permutation of the file's. Columns of the output, all flat int32 with offsets: prompt,
chosen, rejected.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

FIELDS = ("prompt", "chosen", "rejected")
MARK = "\n\nAssistant:"


class Pair(NamedTuple):
    """Hold one preference pair as token ids; lengths in tokens."""

    prompt: np.ndarray  # [P] int32
    chosen: np.ndarray  # [C] int32, ending in EOS unless it was cut
    rejected: np.ndarray  # [R] int32


class Tokens(NamedTuple):
    """Hold tokenized pairs."""

    pairs: list[Pair]
    vocab_size: int  # ids are below this


def read_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the texts (prompt, chosen, rejected) of an Anthropic/hh-rlhf file; the prompt ends
    after the last "Assistant:".
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            texts = [row[name].rpartition(MARK) for name in ("chosen", "rejected")]
            (head, mark, chosen), (other, _, rejected) = texts
            if head == other and chosen.strip() and rejected.strip():
                yield head + mark, chosen, rejected


def cut(
    prompt: list[int], responses: Sequence[list[int]], max_length: int, max_prompt_length: int
) -> tuple[list[int], ...]:
    """Truncate as in 2023, keeping the prompt's end.

    >>> cut([1, 2, 3, 4, 5, 6], ([7, 8, 0], [9, 0]), max_length=8, max_prompt_length=4)
    ([3, 4, 5, 6], [7, 8, 0], [9, 0])
    >>> cut([1, 2], ([3, 4, 5, 6, 7, 8, 0],), max_length=8, max_prompt_length=4)
    ([1, 2], [3, 4, 5, 6])
    """
    longest = max(map(len, responses))
    if len(prompt) + longest > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longest > max_length:
        responses = [r[: max_length - max_prompt_length] for r in responses]
    return (prompt, *responses)


def tokenize(
    texts: Sequence[tuple[str, str, str]], tokenizer_file: Path, eos: str, limits: tuple[int, int]
) -> Tokens:
    """Return the ids of every pair. Needs only the `tokenizers` library; tokenizer.json may be
    gzipped.
    """
    from tokenizers import Tokenizer

    raw = tokenizer_file.read_bytes()
    tokenizer = Tokenizer.from_str(
        (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    )
    end = tokenizer.token_to_id(eos)
    if end is None:
        raise SystemExit(f"--eos {eos}: {tokenizer_file} has no such token")
    encoded = tokenizer.encode_batch(
        [text for pair in texts for text in pair], add_special_tokens=False
    )
    ids = iter([e.ids for e in encoded])
    pairs = []
    for _ in texts:
        prompt = next(ids)
        chosen = [*next(ids), end]
        rejected = [*next(ids), end]
        pairs.append(
            Pair(*(np.asarray(x, np.int32) for x in cut(prompt, (chosen, rejected), *limits)))
        )
    return Tokens(pairs, tokenizer.get_vocab_size())


def save(path: Path, tokens: Tokens) -> None:
    """Write the columns, about 0.4 MB per thousand HH pairs."""
    columns: dict[str, np.ndarray] = {"vocab_size": np.asarray(tokens.vocab_size)}
    for i, name in enumerate(FIELDS):
        parts = [pair[i] for pair in tokens.pairs]
        columns[name] = np.concatenate(parts)
        columns[f"{name}_offsets"] = np.cumsum([0, *map(len, parts)])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **columns)


def load(path: Path) -> Tokens:
    """Return what `save` wrote, as int32 arrays that share three buffers."""
    with np.load(path) as columns:
        split = [np.split(columns[name], columns[f"{name}_offsets"][1:-1]) for name in FIELDS]
        return Tokens(
            [Pair(*parts) for parts in zip(*split, strict=True)], int(columns["vocab_size"])
        )


def synthetic(n: int, vocab_size: int, seed: int = 0, scale: float = 1.0) -> Tokens:
    """Return random ids with lengths like HH harmless-base (means of 118, 41, 50 tokens at scale
    1), for --smoke and for tests.
    """
    rng = np.random.default_rng(seed)

    def column(mean: float, longest: int) -> list[np.ndarray]:
        lengths = np.clip(rng.lognormal(np.log(mean * scale * 0.78), 0.7, n), 2, longest).astype(
            int
        )
        return [rng.integers(1, vocab_size, length, dtype=np.int32) for length in lengths]

    return Tokens(
        [
            Pair(*parts)
            for parts in zip(column(118, 256), column(41, 256), column(50, 256), strict=True)
        ],
        vocab_size,
    )


def describe(tokens: Tokens) -> str:
    """Return a line with the mean lengths in tokens, and the cost of padding every pair of a batch
    of 64 to its longest row.
    """
    lengths = np.array([[len(x) for x in pair] for pair in tokens.pairs])  # [n, 3]
    means, unique = lengths.mean(0), lengths.sum(1)
    rows = lengths[:, :1] + lengths[:, 1:]  # [n, 2] tokens of prompt + response
    starts = range(0, len(rows) - len(rows) % 64, 64)
    padded = (
        np.mean([2 * rows[s : s + 64].max() for s in starts]) if len(starts) else 2 * rows.max()
    )
    return (
        f"{len(tokens.pairs):,} pairs; mean tokens: prompt {means[0]:.1f}, chosen {means[1]:.1f},"
        f" rejected {means[2]:.1f}; unique {unique.mean():.1f}, prompt twice"
        f" {rows.sum(1).mean():.1f}, padded to the longest of 64 pairs {padded:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a .jsonl.gz of Anthropic/hh-rlhf")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="a tokenizer.json, gzipped or not"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--eos",
        default="<|endoftext|>",
        help="the token that ends a response (default %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=512,
        help="tokens of prompt + response (default %(default)s)",
    )
    parser.add_argument(
        "--max-prompt-length",
        type=int,
        default=256,
        help="tokens kept of a long prompt (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the order (default %(default)s)"
    )
    options = parser.parse_args()
    texts = list(read_pairs(options.data))
    texts = [texts[i] for i in np.random.default_rng(options.seed).permutation(len(texts))]
    tokens = tokenize(
        texts, options.tokenizer, options.eos, (options.max_length, options.max_prompt_length)
    )
    save(options.out, tokens)
    print(f"{options.out}: {describe(tokens)}")


if __name__ == "__main__":
    main()
