"""Answer what people ask before a run: the fewest GPUs (plan=fewest_gpus), the longest rows
(plan=longest_rows) or the largest model (plan=largest_model) that fit, with the settings to copy.

Each is found by planning one size after another, each with as few changes as make it fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig
from tqdm import tqdm

from plumb.console import bar_width, quiet
from plumb.errors import UserError
from plumb.losses.registry import Loss
from plumb.planning.plan import (
    MOST_GPUS,
    Check,
    Data,
    Model,
    accept,
    as_options,
    assumed_data,
    changed,
    gb,
    in_turn,
    layout_of,
    make_plan,
    read_data,
    read_model,
    refusal,
    savers,
)
from plumb.training.rollouts import samples_responses

Change = dict[str, Any]  # knob -> value


class Fit(NamedTuple):
    """Hold the changes with which a run fits, and what it then needs on each GPU."""

    changes: Change
    gigabytes: float


class Shape(NamedTuple):
    """Hold a published model and the sizes in its config.json."""

    name: str
    architecture: Change


def llama(
    width: int, within: int, layers: int, heads: int, key_heads: int, vocab: int = 128_256
) -> Change:
    """Return the architecture of a Llama: hidden size, MLP size and so on."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": within,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": width < 4096,
    }


def qwen3(width: int, within: int, layers: int, heads: int) -> Change:
    """Return the architecture of a Qwen3 with 8 key heads."""
    sizes = llama(width, within, layers, heads, 8, 151_936)
    own = {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40_960}
    return sizes | own


SHAPES = [
    Shape("SmolLM2 135M", llama(576, 1536, 30, 9, 3, 49_152)),
    Shape("Qwen3 0.6B", qwen3(1024, 3072, 28, 16)),
    Shape("Llama 3.2 1B", llama(2048, 8192, 16, 32, 8)),
    Shape("Llama 3.2 3B", llama(3072, 8192, 28, 24, 8)),
    Shape("Qwen3 4B", qwen3(2560, 9728, 36, 32)),
    Shape("Llama 3.1 8B", llama(4096, 14_336, 32, 32, 8)),
    Shape("Qwen3 14B", qwen3(5120, 17_408, 40, 40)),
    Shape("Qwen3 32B", qwen3(5120, 25_600, 64, 64)),
    Shape("Llama 3.1 70B", llama(8192, 28_672, 80, 64, 8)),
    Shape("Llama 3.1 405B", llama(16_384, 53_248, 126, 128, 8)),
]


def answer(config: DictConfig, loss: Loss, check: Check = accept) -> str:
    """Return the answer to the question in config.plan as text. Raise UserError if it cannot be
    given. `check`: what a change that is proposed must pass.
    """
    rows = {
        "fewest_gpus": fewest_gpus,
        "longest_rows": longest_rows,
        "largest_model": largest_model,
    }[config.plan](config, loss, check)
    title, *lines = _aligned(rows)
    return "\n".join([_what(config, loss), "", title, *lines])


def least(
    config: DictConfig,
    loss: Loss,
    model: Model,
    data: Data,
    more: Sequence[Change] = (),
    check: Check = accept,
) -> Fit | None:
    """Return the fewest changes with which the run fits, in the order of plan.savers and then
    `more`, without those that are refused; None if all together do not suffice.
    """
    for change in in_turn(config, [{}, *savers(config, loss), *more], check):
        peak = make_plan(changed(config, change), loss, model, data).memory.peak
        if peak <= gb(config) * 1e9:
            return Fit(change, peak / 1e9)
    return None


def on(config: DictConfig, n: int) -> Change:
    """Return the changes that put the run on n GPUs."""
    several = n > 1 and config.trainer == "BasicTrainer"
    change: Change = {"trainer": "FSDPTrainer"} if several else {}
    return change | {"plan_gpus": n} | ({"plan_nodes": None} if config.plan_nodes else {})


def fewest_gpus(config: DictConfig, loss: Loss, check: Check = accept) -> Iterator[Sequence[str]]:
    """Yield the rows of a table: the numbers of GPUs that suffice, up to the first that needs no
    other change. Raise UserError if the run is refused on each number of them.
    """
    sizes = [2**i for i in range(MOST_GPUS.bit_length())]
    runs = {n: changed(config, on(config, n)) for n in sizes}
    refusals = {n: refusal(run, check) for n, run in runs.items()}
    if all(refusals.values()):
        raise list(filter(None, refusals.values()))[-1]
    model, data = read_model(config, loss), read_data(config, loss)
    yield "GPUs", "GB on each", "add to the command"
    found = False
    for n, run in runs.items():
        if refusals[n] is None and (fit := least(run, loss, model, data, check=check)):
            found = True
            yield str(n), f"{fit.gigabytes:.1f}", as_options(on(config, n) | fit.changes)
            if not fit.changes:
                return
    if not found:
        yield f"up to {MOST_GPUS}", "", "no change tried here makes it fit"


def longest_rows(config: DictConfig, loss: Loss, check: Check = accept) -> Iterator[Sequence[str]]:
    """Yield the rows of a table: lengths that fit, where prompt and response share the row evenly,
    up to the model's number of positions.
    """
    if samples_responses(config, loss):
        raise UserError(
            "plan=longest_rows: is for runs on a data set's responses; for sampled ones, try"
            " rollout.max_new_tokens with plan=true"
        )
    model = read_model(config, loss)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    yield "max_length", "GB on each", "add to the command"
    for i in range(16, 38):  # 256, 384, 512, 768 and so on
        length = 2 ** (i // 2) * (2 + i % 2) // 2
        if positions is not None and length > positions:
            yield f"{length:,}", "", f"more than the model's {positions:,} positions"
            return
        half = length // 2
        rows: Change = {"max_length": length, "max_prompt_length": half}
        moved = changed(config, rows)
        data = assumed_data(moved, loss, half, length - half, "")
        last: list[Change] = [{"tokens_per_microbatch": length}, {"activation_offload": True}]
        fit = least(moved, loss, model, data, last, check)
        if fit is None:
            yield f"{length:,}", "", "does not fit"
            return
        yield f"{length:,}", f"{fit.gigabytes:.1f}", as_options(rows | fit.changes)


def largest_model(config: DictConfig, loss: Loss, check: Check = accept) -> Iterator[Sequence[str]]:
    """Yield the rows of a table: published models by size, up to the first that does not fit."""
    quarter = max(1, config.max_length // 4)
    data = assumed_data(config, loss, quarter, quarter, "")
    named = {"model.name_or_path": "any", "model.architecture": None}  # of no shape to be planned
    yield "model", "parameters", "GB on each", "add to the command"
    for shape in SHAPES:
        moved = of_shape(config, shape)
        model = read_model(moved, loss)
        size = f"{model.weights.n / 1e9:.2f} B"
        fit = least(moved, loss, model, data, check=lambda run: check(changed(run, named)))
        if fit is None:
            yield shape.name, size, "", "does not fit"
            return
        added = as_options(fit.changes) or "nothing"
        yield shape.name, size, f"{fit.gigabytes:.1f}", added


def of_shape(config: DictConfig, shape: Shape) -> DictConfig:
    """Return the config with another model."""
    change = {"architecture": shape.architecture, "name_or_path": None, "archive": None}
    return changed(config, {f"model.{name}": value for name, value in change.items()})


def _what(config: DictConfig, loss: Loss) -> str:
    gpus = "" if config.plan == "fewest_gpus" else f"{layout_of(config).n_gpus} x "
    return f"{loss.name} on {gpus}{config.plan_gpu} of {gb(config):g} GB, {config.plan}:"


def _aligned(rows: Iterator[Sequence[str]]) -> list[str]:
    """Return rows as lines whose columns begin below each other; while they are found, a terminal
    shows the last one.
    """
    table: list[tuple[str, ...]] = []
    with tqdm(rows, bar_format="{desc}", ncols=bar_width(), disable=quiet(), leave=False) as found:
        for row in found:
            table.append((*row,))
            found.set_description_str("trying what fits; last " + ", ".join(row[:1] + row[-1:]))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
