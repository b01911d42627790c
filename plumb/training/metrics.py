"""Keep metrics on the device while training, reduce them over ranks once per log line, and write
them to every sink.

Names are those of the original DPO repository (`rewards_train/accuracies`, `loss/eval`, ...), so
that its dashboards work.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from plumb.console import rank, rank0_print
from plumb.errors import StorageError

Record = dict[str, float]
SQUARES = (  # of both scores of a pair; becomes their spread where means are taken
    "rewards_{}/squares"
)


class Means:
    """Accumulate named means over examples, summed in float64 on the device; one all-reduce gives
    all of them.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}  # each a scalar
        self.counts: dict[str, float | Tensor] = {}

    def add(
        self,
        values: Mapping[str, Tensor],
        weight: float = 1.0,
        counts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`values`: per-example tensors [B], each example counted as 1 unless `counts` [B] says
        otherwise (the tokens of a loss per token).

        Weight 0 leaves them out: a rank that only keeps the others company.
        """
        for name, value in values.items():
            counted = (counts or {}).get(name)
            count = value.numel() if counted is None else counted.detach().double().sum()
            self.sums[name] = self.sums.get(name, 0) + weight * value.detach().double().sum()
            self.counts[name] = self.counts.get(name, 0) + weight * count

    def pack(self) -> Tensor:
        """[2, M] float64: sums, counts."""
        sums = torch.stack(list(self.sums.values()))
        known = [0.0 if isinstance(n, Tensor) else n for n in self.counts.values()]
        counts = torch.tensor(known, dtype=sums.dtype).to(sums.device)
        for i, n in enumerate(self.counts.values()):
            if isinstance(n, Tensor):
                counts[i] = n
        return torch.stack([sums, counts])

    def reduce(self) -> Record:
        """Return the means over all ranks; {} if nothing was added."""
        return _means(list(self.sums), [self.pack()])[0] if self.sums else {}


def _means(names: list[str], packs: list[Tensor]) -> list[Record]:
    """[2, M] per record -> {name: mean} per record, with one all-reduce and one copy to the host
    for all. A mean over nothing is left out.
    """
    packed = torch.stack(packs)  # [S, 2, M]
    if dist.is_initialized():
        dist.all_reduce(packed)
    sums, counts = packed.unbind(1)
    empty = (counts == 0).tolist()
    return [
        {name: mean for name, mean, none in zip(names, row, nothing, strict=True) if not none}
        for row, nothing in zip((sums / counts).tolist(), empty, strict=True)
    ]


def with_spread(record: Record, split: str) -> Record:
    """Return the record with `rewards_<split>/spread`, the standard deviation of all scores, in
    place of the mean of their squares, if that is there.
    """
    squares = record.pop(SQUARES.format(split), None)
    if squares is not None:
        mean = (record[f"rewards_{split}/chosen"] + record[f"rewards_{split}/rejected"]) / 2
        record[f"rewards_{split}/spread"] = max(0.0, squares - mean**2) ** 0.5
    return record


class TrainingLog:
    """Keep one record per optimizer step. Steps wait on the device until `flush`, at most every
    minimum_log_interval_secs.

    metrics.jsonl gets every step; the console and wandb get the latest at each flush (the original
    lost the steps in between).
    """

    def __init__(self, sinks: Sequence[Sink], minimum_interval_secs: float):
        self.sinks = sinks
        self.interval = minimum_interval_secs
        self.waiting: list[tuple[list[str], Tensor, Record]] = []
        self.last_flush = float("-inf")

    def step(self, means: Means, counters: Record) -> None:
        self.waiting.append((list(means.sums), means.pack(), counters))

    def due(self) -> bool:
        """Return whether it is time to flush, by this rank's clock. Ranks must agree before they
        do.
        """
        return time.monotonic() - self.last_flush > self.interval

    def flush(self) -> None:
        if not self.waiting:
            return
        records = _means(self.waiting[0][0], [pack for _, pack, _ in self.waiting])
        for i, (means, (_, _, counters)) in enumerate(zip(records, self.waiting, strict=True)):
            record = with_spread(means, "train")
            for sink in self.sinks:
                if i == len(records) - 1 or sink.every_step:
                    sink.write({**record, **counters}, int(counters["counters/examples"]))
        self.waiting = []
        self.last_flush = time.monotonic()

    def evaluation(self, record: Record, examples: int) -> None:
        self.flush()
        for sink in self.sinks:
            sink.write(record, examples)

    def wandb_id(self) -> str | None:
        return next((str(sink.run.id) for sink in self.sinks if isinstance(sink, Wandb)), None)

    def samples(self, name: str, rows: list[tuple[int, str, str]], examples: int) -> None:
        """Log sample tables: `name` is policy_samples or reference_samples, rows (step, prompt,
        sample).
        """
        for sink in self.sinks:
            sink.table(name, rows, examples)

    def mark(self) -> dict[str, int]:
        """Sync everything logged to the disk. Return the bytes of each log file."""
        self.flush()
        return {
            name: n
            for sink in self.sinks
            if isinstance(sink, JsonLines)
            for name, n in sink.mark().items()
        }

    def close(self, failed: bool) -> None:
        """Close the sinks. After a failure, which may be this rank's alone, the others can't be
        asked for their part.
        """
        if not (failed and dist.is_initialized()):
            self.flush()
        for sink in self.sinks:
            sink.close(failed)


# ---- sinks ----


class Sink(Protocol):
    every_step: bool

    def write(self, record: Record, examples: int) -> None: ...
    def table(self, name: str, rows: list[tuple[int, str, str]], examples: int) -> None: ...
    def close(self, failed: bool) -> None: ...


class Console:
    """Print one readable line per record, above the progress bar."""

    every_step = False
    SHOWN = {
        "loss": "loss/{}",
        "reward acc": "rewards_{}/accuracies",
        "margin": "rewards_{}/margins",
        "chosen": "rewards_{}/chosen",
        "rejected": "rewards_{}/rejected",
        "logp": "logps_{}/chosen",
        "grad norm": "grad_norm",
        "ex/s": "examples_per_second",
        "tok/s": "tokens_per_second",
        "padding": "padding",
        "MFU": "mfu",
        "GB": "peak_memory_gb",
        "waited": "data_wait_secs",
    }

    def write(self, record: Record, examples: int) -> None:
        split = "eval" if "loss/eval" in record else "train"
        shown = {label: record.get(key.format(split)) for label, key in self.SHOWN.items()}
        line = "  ".join(
            f"{label} {_brief(value)}" for label, value in shown.items() if value is not None
        )
        left = (
            f"  {tqdm.format_interval(record['seconds_left'])} left"
            if "seconds_left" in record
            else ""
        )
        tqdm.write(f"{split:>5} {examples:>7,}  {line}{left}")

    def table(self, name: str, rows: list[tuple[int, str, str]], examples: int) -> None:
        # the rest stands in samples.jsonl
        for _, prompt, sample in rows[:2] if name == "policy_samples" else []:
            tqdm.write(f"      sample  ...{prompt[-60:]!r} -> {sample[:160]!r}")

    def close(self, failed: bool) -> None:
        pass


def _brief(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


class JsonLines:
    """Write files in the run directory: metrics.jsonl (one object per step and evaluation, `step` =
    examples seen), and samples.jsonl, with samples.md for reading.
    """

    FILES = ("metrics.jsonl", "samples.jsonl", "samples.md")

    every_step = True

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")

    def write(self, record: Record, examples: int) -> None:
        with self.writing():
            self.file.write(json.dumps({"step": examples, **record}) + "\n")
            self.file.flush()

    def table(self, name: str, rows: list[tuple[int, str, str]], examples: int) -> None:
        with self.writing(), open(self.run_dir / "samples.jsonl", "a", encoding="utf-8") as file:
            for step, prompt, sample in rows:
                file.write(
                    json.dumps({"table": name, "step": step, "prompt": prompt, "sample": sample})
                    + "\n"
                )
        with self.writing(), open(self.run_dir / "samples.md", "a", encoding="utf-8") as file:
            file.write(f"## {name.replace('_', ' ')} after {examples:,} examples\n\n")
            file.writelines(
                f"{_quoted(prompt)}\n\n{_quoted(sample, 2)}\n\n" for _, prompt, sample in rows
            )

    def mark(self) -> dict[str, int]:
        """Return {file: bytes}, all of them synced to the disk."""
        lengths = {}
        for path in (self.run_dir / name for name in self.FILES):
            if path.exists():
                with self.writing(), open(path, "rb") as file:
                    os.fsync(file.fileno())
                    lengths[path.name] = file.seek(0, os.SEEK_END)
        return lengths

    def close(self, failed: bool) -> None:
        with suppress(OSError):  # a line that could not be written has been reported
            self.file.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"local_run_dir={self.run_dir}: metrics.jsonl or samples.jsonl: {error.strerror};"
                " checkpoints are valid; free some space and resume with resume=auto"
            ) from None


def _quoted(text: str, depth: int = 1) -> str:
    """As a Markdown quotation of preformatted text, whatever it holds.

    >>> print(_quoted("Hi <b>\\n``` there"))
    > ````
    > Hi <b>
    > ``` there
    > ````
    """
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return "\n".join("> " * depth + line for line in (fence, *text.strip("\n").split("\n"), fence))


class Wandb:
    """Log to Weights & Biases: online if this machine is logged in, offline otherwise. Never
    prompts, and never stops a run.
    """

    every_step = False

    def __init__(self, config: Mapping[str, Any], run_dir: Path, resumed: str | None):
        """Start a wandb run; `resumed` is the id of the run that is resumed."""
        import wandb

        self.wandb = wandb
        options = config["wandb"]
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        arguments = {
            "entity": options["entity"],
            "project": options["project"],
            "name": config["exp_name"],
        }
        arguments |= {"config": dict(config), "dir": str(run_dir)}
        if resumed is not None:
            arguments |= {"id": resumed, "resume": "allow"}
        # Its metadata would hold the command line as it was typed; env.json has it without secrets.
        quiet = wandb.Settings(silent=True, init_timeout=30, x_disable_meta=True)
        for attempt in dict.fromkeys((mode, "offline", "disabled")):
            try:
                self.run = wandb.init(**arguments, mode=attempt, settings=quiet)
                break
            except (
                Exception
            ) as error:  # wandb's own errors, and pydantic's for a WANDB_MODE that does not exist
                rank0_print(f"wandb: {attempt} failed ({str(error).splitlines()[0]})")
        hint = (
            f"; upload later with: wandb sync {self.run.dir.rsplit('/files', 1)[0]}"
            if attempt == "offline"
            else ""
        )
        rank0_print(f"wandb: {attempt}{hint}")

    def write(self, record: Record, examples: int) -> None:
        self.run.log(record, step=examples)

    def table(self, name: str, rows: list[tuple[int, str, str]], examples: int) -> None:
        table = self.wandb.Table(
            columns=["step", "prompt", "sample"], data=[list(row) for row in rows]
        )
        self.run.log({name: table}, step=examples)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _logged_in() -> bool:
    """Return whether there is an API key in the environment or in netrc, without importing wandb's
    prompt.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def make_sinks(config: Mapping[str, Any], run_dir: Path, wandb_id: str | None = None) -> list[Sink]:
    """Return the sinks that rank 0 writes to; other ranks write nowhere. debug and
    wandb.enabled=false leave wandb out. `wandb_id`: of the run that is resumed.
    """
    if rank() != 0:
        return []
    sinks: list[Sink] = [Console(), JsonLines(run_dir)]
    if config["wandb"]["enabled"] and not config["debug"]:
        sinks.append(Wandb(config, run_dir, wandb_id))
    return sinks
