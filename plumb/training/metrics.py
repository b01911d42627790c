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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch import Tensor

from plumb.console import rank, rank0_print
from plumb.errors import StorageError
from plumb.losses.bound import Loss
from plumb.losses.contract import Largest, Metric
from plumb.training import trl_names
from plumb.training.run_console import Console

Record = dict[str, float]


Split = Literal["train", "eval", "eval_ema"]  # eval_ema: held-out examples, the policy's average


def logged_name(name: str, split: Split) -> str:
    """Return the name under which a metric is logged, that of the original DPO repository.

    >>> logged_name("loss", "train"), logged_name("rewards/chosen", "eval")
    ('loss/train', 'rewards_eval/chosen')
    """
    kind, slash, which = name.partition("/")
    return f"{kind}_{split}/{which}" if slash else f"{kind}/{split}"


class Means:
    """Accumulate named metrics over examples, summed in float64 on the device; one all-reduce gives
    all of them.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, type[Metric]] = {}
        self.sums: dict[str, Tensor] = {}  # of the metric's columns, each [c]

    def add(
        self, metrics: Mapping[str, Metric], weight: float = 1.0, weights: Tensor | None = None
    ) -> None:
        """Add the metrics of a microbatch. `weight` 0: this rank has no part of it. `weights` [B]:
        how often each example counts; None: once.
        """
        for name, metric in metrics.items():
            columns = metric.columns()
            if weights is not None:
                columns = columns * weights[:, None].to(columns)
            self.kinds[name] = type(metric)
            if isinstance(metric, Largest):
                of_batch = metric.columns().amax(0)
                self.sums[name] = torch.maximum(self.sums.get(name, of_batch), of_batch)
            else:
                self.sums[name] = self.sums.get(name, 0) + weight * columns.sum(0)

    def pack(self) -> Tensor:
        """Return the sums of all metrics, in a row.  [C] float64"""
        return torch.cat(list(self.sums.values()))

    def reduce(self) -> Record:
        """Return the metrics over all ranks; {} if nothing was added."""
        return _reduced([self])[0] if self.sums else {}


def metric_values(kinds: Mapping[str, type[Metric]], sums: Sequence[Sequence[float]]) -> Record:
    """Return the value of each metric from the sums of its columns, if it counted anything."""
    values = {name: kind.value(own) for (name, kind), own in zip(kinds.items(), sums, strict=True)}
    return {name: value for name, value in values.items() if value is not None}


def _reduced(steps: Sequence[Means]) -> list[Record]:
    """Return {name: value} for each step, with one all-reduce and one copy to the host for all. A
    mean over nothing is left out. All steps have the same metrics; their largest values take a
    second all-reduce.
    """
    if not steps:
        return []
    packed = torch.stack([means.pack() for means in steps])  # [S, C]
    if dist.is_initialized():
        kinds, of_step = steps[0].kinds, steps[0].sums
        places = [kinds[name] is Largest for name, own in of_step.items() for _ in own]
        largest = packed[:, places].clone()
        dist.all_reduce(packed)
        if any(places):
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            packed[:, places] = largest
    widths = [len(sums) for sums in steps[0].sums.values()]
    return [
        metric_values(steps[0].kinds, [sums.tolist() for sums in row.split(widths)])
        for row in packed.cpu()
    ]


class TrainingLog:
    """Keep one record per optimizer step. Steps wait on the device until `flush`, which happens at
    most every minimum_log_interval_secs.

    metrics.jsonl gets every step; the console and wandb get the latest at each flush (the original
    lost the steps in between).
    """

    def __init__(self, sinks: Sequence[Sink], minimum_interval_secs: float):
        self.sinks = sinks
        self.interval = minimum_interval_secs
        self.waiting: list[tuple[Means, Record]] = []
        self.last_flush = float("-inf")

    def step(self, means: Means, counters: Record) -> None:
        self.waiting.append((means, counters))

    def due(self) -> bool:
        """Return whether it is time to flush, by this rank's clock. Ranks must agree before they
        flush.
        """
        return time.monotonic() - self.last_flush > self.interval

    def flush(self) -> None:
        if not self.waiting:
            return
        # a step without microbatches has none, on every rank
        records = iter(_reduced([means for means, _ in self.waiting if means.sums]))
        for i, (means, counters) in enumerate(self.waiting):
            own = next(records) if means.sums else {}
            record = {logged_name(name, "train"): value for name, value in own.items()}
            for sink in self.sinks:
                if i == len(self.waiting) - 1 or sink.every_step:
                    sink.write({**record, **counters}, int(counters["counters/examples"]))
        self.waiting = []
        self.last_flush = time.monotonic()

    def training(
        self, loss: Loss, unit: str, done: int, n_steps: int
    ) -> AbstractContextManager[None]:
        """Show the steps that are made inside on the console; `done` were made before, and `unit`
        is what an example is called.
        """
        consoles = (sink for sink in self.sinks if isinstance(sink, Console))
        console = next(consoles, None)
        return nullcontext() if console is None else console.training(loss, unit, done, n_steps)

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

    def rollouts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep responses that the policy was trained on: rows of prompt, answers and scores."""
        for sink in self.sinks:
            if isinstance(sink, JsonLines):
                sink.rollouts(rows)

    def mark(self) -> dict[str, int]:
        """Sync everything logged to disk. Return the bytes of each log file."""
        self.flush()
        return {
            name: n
            for sink in self.sinks
            if isinstance(sink, JsonLines)
            for name, n in sink.mark().items()
        }

    def close(self, failed: bool) -> None:
        """Close the sinks. After a failure, which may be this rank's alone, nothing is reduced,
        since the others may be gone.
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


class JsonLines:
    """Write files in the run directory: metrics.jsonl (one object per step and evaluation, `step` =
    examples seen), samples.jsonl, with samples.md for reading, and rollouts.jsonl (one object per
    prompt).
    """

    FILES = ("metrics.jsonl", "samples.jsonl", "samples.md", "rollouts.jsonl")

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

    def rollouts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self.writing(), open(self.run_dir / "rollouts.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

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
    """Return a Markdown quotation of preformatted text, whatever it holds.

    >>> print(_quoted("Hi <b>\\n``` there"))
    > ````
    > Hi <b>
    > ``` there
    > ````
    """
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return "\n".join("> " * depth + line for line in (fence, *text.strip("\n").split("\n"), fence))


# what wandb gets beside a record, by wandb.aliases
ALIASES: dict[str | None, Callable[[Record], Record]] = {
    None: lambda record: {},
    "trl": trl_names.in_trl,
}


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
        self.aliases = ALIASES[options["aliases"]]
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
        self.run.log({**record, **self.aliases(record)}, step=examples)

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
