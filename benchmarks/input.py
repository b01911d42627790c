"""Measure the input pipeline: tokenization, warm starts, batch assembly, and a file as large as
StackExchange.

    python benchmarks/input.py --hh /path/to/hh-rlhf --tokenizer /path/to/tokenizer.json
    python benchmarks/input.py --hh /path/to/hh-rlhf --tokenizer /path/to/tokenizer.json \
        --questions 10800000   # StackExchange's size: about an hour, and 8 GB of disk

Each measurement runs in its own process, on one core, and prints one line; all lines also go to
--out as JSON:
    cold      load_examples for the first time: pairs tokenized per second, peak memory
    warm      load_examples again, at the size of the whole of HH (--pairs): seconds, imports not
              counted (target: below 1)
    assembly  examples[i] for 64 random indices, then microbatches as tensors: pairs per second
              (target: above 50,000)
    questions the two loads for a synthetic file in StackExchange's form with --questions
              questions: pairs per second, peak memory
The HH files hold 4,664 pairs; they are repeated up to --pairs with a number before each prompt's
first word, so that there are no duplicates and lengths stay realistic. Rates are per second of CPU
time; memory is the peak resident set, GB (1e9 bytes), including mapped files in use.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 8192  # tokens of a microbatch


# ---- the data ----


def write_hh(folder: Path, out: Path, n: int) -> None:
    """Write n pairs in the form of Anthropic/hh-rlhf, row by row: the real ones, numbered."""
    files = sorted(folder.rglob("*.jsonl.gz"))
    rows = [
        json.loads(line)
        for file in files
        for line in gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
    ]
    if not rows:
        raise SystemExit(f"--hh {folder}: contains no *.jsonl.gz")
    with out.open("w", encoding="utf-8") as lines:
        for i, row in zip(range(n), itertools.cycle(rows), strict=False):
            numbered = {
                key: row[key].replace("\n\nHuman: ", f"\n\nHuman: {i} ", 1)
                for key in ("chosen", "rejected")
            }
            lines.write(json.dumps(numbered) + "\n")


def write_questions(out: Path, n: int, seed: int = 0) -> None:
    """Write n short questions with two or three scored answers in the form of
    HuggingFaceH4/stack-exchange-preferences, row by row.
    """
    rng = np.random.default_rng(seed)
    words = np.array(
        [
            "alpha",
            "loop",
            "server",
            "proof",
            "kernel",
            "matrix",
            "error",
            "list",
            "graph",
            "value",
            "string",
            "why",
        ]
    )
    texts = [
        f"<p>{' '.join(words[rng.integers(0, len(words), n_words)])}</p>"
        for n_words in rng.integers(3, 9, 4099)
    ]
    orders = [rng.permutation(6)[: 2 + i % 2].tolist() for i in range(101)]
    with out.open("w", encoding="utf-8") as lines:
        for i in range(n):
            answers = [
                {
                    "answer_id": 4 * i + j,
                    "author": "a",
                    "author_id": j,
                    "author_profile": "",
                    "pm_score": score,
                    "selected": j == 0,
                    "text": texts[(7 * i + 13 * j) % 4099],
                }
                for j, score in enumerate(orders[i % 101])
            ]
            row = {
                "qid": i,
                "question": f"<p>{i}</p>" + texts[i % 4099],
                "answers": answers,
                "date": "2020",
                "metadata": [],
            }
            lines.write(json.dumps(row) + "\n")


def tokenizer_from(file: Path) -> Any:
    """Return the Hugging Face tokenizer of a tokenizer.json (or gzipped); EOS is <|endoftext|>."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = file.read_bytes()
    backend = Tokenizer.from_str((gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def load(name: str, data: Path, folder: Path, tokenizer: Any) -> Any:
    """Return the training examples that `train.py loss=dpo datasets=[name] dataset_paths.name=data`
    would use.
    """
    from hydra import compose, initialize_config_dir

    from plumb.data.prepare import load_examples

    overrides = [
        "loss=dpo",
        "exp_name=input",
        f"datasets=[{name}]",
        f"+dataset_paths.{name}={data}",
        f"local_dirs=[{folder}]",
    ]
    overrides += ["loss.beta=0.1", "max_length=512", "max_prompt_length=256", "n_eval_examples=64"]
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        config = compose("config", overrides=overrides)
    return load_examples(config, tokenizer, "pair")[0]


# ---- the measurements, in child processes ----


def peak_gb() -> float:
    """Return this process's peak resident set, GB."""
    return (
        int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024 / 1e9
    )


def measure_load(options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of one load_examples, its pairs, and the peak memory before and after."""
    from plumb.data import prepare  # noqa: F401  (its imports are not measured)

    tokenizer = tokenizer_from(options.tokenizer)
    before = peak_gb()
    cpu = time.process_time()
    start = time.perf_counter()
    examples = load(options.name, options.data, options.folder, tokenizer)
    secs = time.perf_counter() - start
    cpu = time.process_time() - cpu
    n = len(examples)
    return {
        "pairs": n,
        "secs": secs,
        "cpu_secs": cpu,
        "pairs_per_cpu_sec": n / cpu,
        "gb_before": before,
        "peak_gb": peak_gb(),
    }


def measure_assembly(options: argparse.Namespace) -> dict[str, float]:
    """Return pairs per CPU second from indices to microbatches of tensors, for 200 batches of 64:
    the median of 5 rounds and the range.
    """
    examples = load(options.name, options.data, options.folder, tokenizer_from(options.tokenizer))
    rng = np.random.default_rng(0)
    rates, fetch_rates = [], []
    for _ in range(5):
        batches = rng.integers(0, len(examples), (200, 64))
        start = time.process_time()
        for batch in batches.tolist():
            for i in batch:
                examples[i]
        middle = time.process_time()
        for batch in batches:
            assemble(examples, batch)
        rates.append(batches.size / (time.process_time() - middle))
        fetch_rates.append(batches.size / (middle - start))
    low, *_, high = sorted(rates)
    rate, fetched_rate = float(np.median(rates)), float(np.median(fetch_rates))
    return {"pairs_per_cpu_sec": rate, "lowest": low, "highest": high, "only_fetched": fetched_rate}


def assemble(examples: Any, indices: np.ndarray) -> Any:
    """Return one batch as microbatches of tensors, from its indices. Only this function knows the
    API of batching.
    """
    from plumb.batching.feed import Feed
    from plumb.batching.microbatches import Packing

    return Feed(
        examples, Packing(True, BUDGET, world_size=1, pad_token_id=0, longest=512), rank=0
    ).step(indices)


# ---- the parent ----


def child(
    kind: str, options: argparse.Namespace, name: str, data: Path, folder: Path
) -> dict[str, float]:
    """Run one measurement in its own process."""
    command = [
        sys.executable,
        __file__,
        "--child",
        kind,
        "--tokenizer",
        str(options.tokenizer),
        "--name",
        name,
    ]
    command += ["--data", str(data), "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} of {name} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measurements(
    options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (name, numbers) of each measurement."""
    hh = folder / "hh.jsonl"
    write_hh(options.hh, hh, options.pairs)
    cold = child("load", options, "hh", hh, folder / "cache")
    # the held-out rows are tokenized too
    yield (
        "cold",
        cold | {"rows_per_cpu_sec": options.pairs / cold["cpu_secs"]},
    )
    for _ in range(3):
        yield "warm", child("load", options, "hh", hh, folder / "cache")
    yield "assembly", child("assembly", options, "hh", hh, folder / "cache")
    if options.questions:
        se = folder / "se.jsonl"
        start = time.perf_counter()
        write_questions(se, options.questions)
        yield (
            "written",
            {
                "questions": options.questions,
                "secs": time.perf_counter() - start,
                "gb": se.stat().st_size / 1e9,
            },
        )
        yield "questions, cold", child("load", options, "se", se, folder / "cache")
        yield "questions, warm", child("load", options, "se", se, folder / "cache")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hh", type=Path, help="folder with the .jsonl.gz files of Anthropic/hh-rlhf"
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="a tokenizer.json, gzipped or not"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=160_800,
        help="pairs of the HH file (default %(default)s, the size of HH)",
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=0,
        help="questions of the StackExchange-like file (default: none)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".cache/benchmarks/input"),
        help="folder (default %(default)s)",
    )
    for name in ("--child", "--name", "--data", "--folder"):
        parser.add_argument(
            name, type=str if name in ("--child", "--name") else Path, help=argparse.SUPPRESS
        )
    options = parser.parse_args()
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.child:
        print(
            json.dumps({"load": measure_load, "assembly": measure_assembly}[options.child](options))
        )
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, (options.out / "input.jsonl").open("w") as log:
        for what, numbers in measurements(options, Path(folder)):
            log.write(json.dumps({"what": what, **numbers}) + "\n")
            log.flush()
            print(
                f"{what:16s}",
                *(f"{key} {value:,.2f}" for key, value in numbers.items()),
                sep="  ",
                flush=True,
            )


if __name__ == "__main__":
    main()
