"""Show a run on the console: on a terminal one bar, elsewhere one line per interval; and a line
per evaluation. What is not needed at a glance (padding, MFU, waiting time) is in metrics.jsonl.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from plumb.console import bar_width, duration, on_terminal, rank0_print, shortened, significant
from plumb.losses.bound import Loss

# what a loss's group calls one example
UNITS = {"single": "examples", "labelled": "responses", "pair": "pairs", "list": "lists"}


def unit_of(loss: Loss, own_responses: bool) -> str:
    """Return what a run's examples are called: prompts, if it learns from the policy's own
    responses.
    """
    return "prompts" if own_responses else UNITS.get(loss.group, "examples")


HEAD = "{desc}  {n_fmt}/{total_fmt} steps |{bar}| {percentage:.0f}%"


class Field(NamedTuple):
    """Hold how one metric is shown."""

    label: str
    name: str  # of the metric; {}: train or eval
    text: Callable[[float], str]


def learning_rate(value: float) -> str:
    """Return a learning rate in two digits.

    >>> learning_rate(5e-7), learning_rate(1e-3), learning_rate(0)
    ('5.0e-7', '1.0e-3', '0')
    """
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if value else "0"


three_digits = partial(significant, digits=3)
# in the order of their weight: where the terminal is narrow, the last are left out
METRICS = (
    Field("loss", "loss/{}", significant),
    Field("mean reward", "rollout_{}/reward", significant),
    Field("accuracy", "rewards_{}/accuracies", "{:.1%}".format),
    Field("margin", "rewards_{}/margins", three_digits),
    Field("perplexity", "perplexity/{}", three_digits),
    Field("length", "rollout_{}/length", "{:.0f} tokens".format),
    Field("lr", "lr", learning_rate),
)


class Console:
    """Show the training steps in a bar (on a terminal) or in lines, and each evaluation and two of
    its samples in lines.

    Example: `with Console().training(loss, "pairs", done=0, n_steps=400): ...`
    """

    every_step = False

    def __init__(self) -> None:
        self.unit = "examples"
        self.unit_of_loss = ""
        self.n_steps = 0
        self.bar: tqdm | None = None  # steps and the time left
        self.below: tqdm | None = None  # metrics of the last step

    @contextmanager
    def training(self, loss: Loss, unit: str, done: int, n_steps: int) -> Iterator[None]:
        """Show the steps that are made inside; `done` were made before. `unit`: see `unit_of`. The
        bar stays on the screen at the end of the run, and is removed where the run stops early.
        """
        self.n_steps = n_steps
        self.unit = unit
        if loss.group == "single":
            self.unit_of_loss = f" nats/{'token' if loss.average_over == 'tokens' else 'answer'}"
        if on_terminal():
            width = bar_width()
            self.bar = tqdm(
                total=n_steps, initial=done, desc=loss.name, bar_format=HEAD, ncols=width
            )
            self.below = tqdm(bar_format="{desc}", ncols=width)
        start = time.monotonic()
        finished = False
        try:
            yield
            finished = True
        finally:
            if self.bar is not None and self.below is not None:
                self.bar.bar_format = f"{HEAD}  in {duration(time.monotonic() - start)}"
                # what stays is written in this order; the cursor ends where the upper one began
                bars = [self.bar, self.below] if finished else [self.below, self.bar]
                for bar in bars:
                    bar.leave = finished
                    bar.close()
            self.bar = self.below = None

    def write(self, record: Mapping[str, float], examples: int) -> None:
        """Show the metrics of a step, which counts updates, or of an evaluation."""
        if "counters/updates" not in record:
            when = f"at {examples:,} {self.unit}" if examples else "before training"
            rank0_print("  ".join((f"eval {when}", *self.fields(record, "eval"))))
            return
        done = int(record["counters/updates"])
        fields = self.fields(record, "train")
        fields.insert(-1, f"{record['examples_per_second']:.3g} {self.unit}/s")
        left = f"{duration(record['seconds_left'])} left"
        if self.bar is None or self.below is None:
            fields = [f"step {done:,}/{self.n_steps:,}", *fields]
            rank0_print("  ".join((*fields, f"grad norm {significant(record['grad_norm'])}", left)))
            return
        width = bar_width()
        while len(fields) > 1 and len("  ".join(fields)) > width:
            fields.pop()
        self.bar.ncols = self.below.ncols = width
        self.bar.n = done
        self.bar.bar_format = f"{HEAD}  {left}"
        self.bar.refresh()
        self.below.set_description_str("  ".join(fields))

    def fields(self, record: Mapping[str, float], split: str) -> list[str]:
        """Return the metrics that the record has, as text."""
        texts = []
        for label, name, text in METRICS:
            value = record.get(name.format(split))
            if value is not None:
                unit = self.unit_of_loss if label == "loss" else ""
                texts.append(f"{label} {text(value)}{unit}")
        return texts

    def table(self, name: str, rows: list[tuple[int, str, str]], examples: int) -> None:
        """Show two samples of the policy, in a line each; all of them are in samples.md."""
        width = shutil.get_terminal_size().columns
        for _, prompt, sample in rows[:2] if name == "policy_samples" else []:
            rank0_print(f"  sample {shortened(prompt, width - 9, end=True)}")
            rank0_print(f"      -> {shortened(sample, width - 9) or '(nothing)'}")

    def close(self, failed: bool) -> None:
        """Do nothing: the bar is closed where it is opened."""
