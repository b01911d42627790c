"""Turn data sets into examples that are checked, counted and described before training.

Each case that may silently damage a run (see CASES) is counted and has a rule in `data_rules`:
keep, drop, or stop.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from plumb.console import rank, rank0_print, to_dict
from plumb.data import (
    deepspeed_chat,  # noqa: F401  registers its sets
    splits,
)
from plumb.data.examples import (
    EVERYTHING,
    Examples,
    Taking,
    cases,
    concatenate,
    contradicted,
    ranks,
    seen_before,
    slices,
    view,
)
from plumb.data.files import digest
from plumb.data.order import Schedule
from plumb.data.registry import LOADERS, Reading, get_dataset, made_of, resolve
from plumb.data.rows import EQUAL_SCORES
from plumb.data.token_store import StoreSpec, TokenStore, find_or_make, tokenizer_fingerprint
from plumb.data.token_text import continued, decode
from plumb.data.tokenization import Example, Prefixes, TextRules, automatic_bos, template_text
from plumb.distributed import collectives
from plumb.errors import UserError
from plumb.losses.bound import BALANCED, LabelWeights
from plumb.paths import get_local_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what a loss's group is called in messages
UNITS = {
    "single": "examples",
    "labelled": "labelled responses",
    "pair": "pairs",
    "list": "lists",
    "rollout": "prompts",
}
NEEDED = {
    "single": "SFT targets",
    "rollout": "prompts",
    "labelled": (
        "responses with a label (prompt, completion, label; a score is one with label_threshold),"
        " nor pairs to make them of"
    ),
    "pair": "preference pairs (chosen and rejected), which this loss needs",
    "list": "ranked lists (prompt, responses, and ranks or scores), which this loss needs",
}


UNRANKED = "lists of one response, or whose ranks are all equal"


@dataclass(frozen=True)
class Part:
    """Hold one split of one data set."""

    examples: Examples
    skipped: Mapping[str, int]  # reason -> rows that the loader left out
    cases: Counter[str]  # case -> examples it applies to, before any rule
    n_prompts: int | None = None  # of all stages together, where data_split gives each its own
    store: TokenStore | None = None  # it counts what was left out of the rows


def load_examples(
    config: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    group: str,
    keep: bool = True,
    prefixes: tuple[str, str] | None = None,
) -> tuple[Examples, Examples]:
    """Return the training and the evaluation examples of `config.datasets` (and `eval_datasets`),
    of what the loss's `group` says one holds, after the data rules.

    Training examples are in the order of the data sets; evaluation uses the first n_eval_examples
    of a seeded permutation (of the data's own order with shuffle=false), each once. Prints one
    table per data set and the first example. `keep` false: tokens that are not in the cache are
    created for this process only. `prefixes`: of undesirable and desirable responses, what the loss
    has them begin with.
    """
    train, test = _load_parts(config, tokenizer, group, keep, prefixes, _wanted(config))
    examples = concatenate([part.examples for part in train.values()])
    if not examples:
        raise UserError(
            f"datasets={list(config.datasets)}: no training example is left; see eval_share and"
            " data_rules"
        )
    rank0_print(show_example(examples[0], tokenizer, sampled=group == "rollout"))
    held_back = _first(concatenate([part.examples for part in test.values()]), config)
    check_weights(examples)
    check_weights(held_back)
    return examples, held_back


def load_held_out(
    config: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    group: str,
    prefixes: tuple[str, str] | None = None,
) -> Examples:
    """Return the evaluation examples that `load_examples` returns, without reading the training
    split. Raise UserError if there are none.
    """
    wanted = [(split, name) for split, name in _wanted(config) if split == "test"]
    _, test = _load_parts(config, tokenizer, group, True, prefixes, wanted)
    examples = _first(concatenate([part.examples for part in test.values()]), config)
    if not examples:
        raise UserError(
            f"datasets={list(config.datasets)}: nothing is held out; set eval_share or"
            " eval_datasets"
        )
    rank0_print(show_example(examples[0], tokenizer, sampled=group == "rollout"))
    check_weights(examples)
    return examples


def _load_parts(
    config: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    group: str,
    keep: bool,
    prefixes: tuple[str, str] | None,
    wanted: list[tuple[str, str]],
) -> tuple[dict[str, Part], dict[str, Part]]:
    """Return the training and the evaluation splits by data set, of these (split, name), after the
    data rules. Prints their tables.
    """
    rules = TextRules(
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        response_truncation=config.response_truncation,
        add_bos=config.add_bos,
        eos_in_text=config.eos_in_text,
    )
    bos = automatic_bos(tokenizer) if rules.add_bos else None
    taking = Taking(config.list_pairs, config.unpair, config.soft_labels)
    only_evaluation = all(split == "test" for split, _ in wanted)
    stores = token_stores(config, tokenizer, rules, wanted, group, keep, prefixes)
    parts: dict[str, dict[str, Part]] = {"train": {}, "test": {}}
    for (split, name), store in zip(wanted, stores, strict=True):
        # or it is the held-out part of a training set
        separate = split == "train" or config.eval_datasets is not None or only_evaluation
        if separate:
            rank0_print(store.form)
        skipped = store.skipped if group != "list" else _check_lists(store, config.data_rules)
        keep_end = config.truncation_mode or store.truncation
        examples = view(store, group, rules, keep_end, bos, taking)
        if not examples and separate:
            _check_empty(store, group, split)
        examples, n_prompts = _of_stage(examples, name, split, config)
        parts[split][name] = Part(
            examples=examples,
            skipped=skipped,
            cases=Counter(),
            n_prompts=n_prompts,
            store=store,
        )

    train, test = parts["train"], parts["test"]
    held_out = _prompts(test.values())
    for name in dict.fromkeys([*train, *test]):
        for some, leaks in ((train, held_out), (test, _prompts([]))):
            if name in some:
                some[name] = apply_rules(some[name], leaks, config.data_rules, name)
        stage = f"data_split={config.data_split} stage={config.stage}"
        rank0_print(
            describe(
                name,
                train.get(name),
                test.get(name),
                config.data_rules,
                config.eos_in_text,
                stage,
                sampled=group == "rollout",
            )
        )
        own = train[name].examples if name in train and name not in LOADERS else None
        if own and (note := joint_note(name, own, tokenizer)):
            rank0_print(note)
    return train, test


def _wanted(config: DictConfig) -> list[tuple[str, str]]:
    """Return (split, name) of every data set that training and evaluation read."""
    names = {"train": config.datasets, "test": config.eval_datasets}
    if config.eval_datasets is None:
        names["test"] = config.datasets
    return [(split, name) for split in names for name in dict.fromkeys(map(resolve, names[split]))]


def _check_empty(store: TokenStore, group: str, split: str) -> None:
    """Raise UserError for a data set without an example, unless it has no rows either."""
    if store.first_bad and split == "train":
        raise UserError(
            f"datasets: no row of {store.name} is usable; the first error: {store.first_bad}"
        )
    if store.n_rows:
        raise UserError(f"datasets: {store.name} holds no {NEEDED[group]}; its form: {store.form}")


def _prompts(parts: Iterable[Part]) -> np.ndarray:
    """Return the digests of these parts' prompts, sorted, without the empty one, which cannot leak
    into training.
    """
    digests = [part.examples.digest(0) for part in parts]
    unique = np.unique(np.concatenate([np.empty(0, np.uint64), *digests]))
    return unique[unique != digest("")]


def _of_stage(
    examples: Examples, name: str, split: str, config: DictConfig
) -> tuple[Examples, int | None]:
    """Return the stage's share and the number of prompts of all stages; all examples and None if
    data_split does not apply to this set.
    """
    shares = splits.weights_of(config.data_split, name)
    if shares is None:
        return examples, None
    try:
        return splits.cut(examples, shares, config.stage, config.split_seed)
    except ValueError as n:
        raise UserError(
            f"data_split={config.data_split}: {name} ({split}) has fewer prompts ({n}) than there"
            " are stages; give it more (see eval_share and eval_datasets), or data_split=null"
        ) from None


def token_stores(
    config: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules,
    wanted: list[tuple[str, str]],
    group: str,
    keep: bool,
    prefixes: tuple[str, str] | None,
) -> list[TokenStore]:
    """Return the tokens of each (split, name): rank 0 finds or makes them, then every rank maps the
    same files.
    """
    template = template_text(
        config.chat_template, f"chat_template={config.chat_template}", tokenizer
    )
    local_dir = get_local_dir(config.local_dirs)
    reading = Reading(
        role_map=to_dict(config.role_map),
        split_names=to_dict(config.split_names),
        bad_row=config.data_rules["bad_row"],
        group=group,
        label_threshold=config.label_threshold,
        plain_prompts=config.plain_prompts,
        revisions=to_dict(config.dataset_revisions),
    )
    shares = dict.fromkeys(("train", "test"), config.eval_share)
    if config.eval_datasets is not None:  # a file is all training or all evaluation
        shares = {"train": 0.0, "test": 1.0}

    def make() -> list[tuple[str, bool]]:
        made, identity = [], tokenizer_fingerprint(tokenizer)
        for split, name in wanted:
            path, share = config.dataset_paths.get(name), shares[split]
            field_map = to_dict(config.field_map) if name not in LOADERS else {}
            asked: dict[str, Any] = {"path": path, "field_map": field_map, "eval_share": share}
            data = get_dataset(name, split, cache_dir=str(local_dir), reading=reading, **asked)
            spec = StoreSpec(
                data=data,
                split=split,
                tokenizer=tokenizer,
                identity=identity,
                rules=rules,
                template=template,
                inputs=made_of(name, split, str(local_dir), path, reading, field_map),
                options=asked | reading.options(),
                prefixes=prefixes and Prefixes(*prefixes, config.unpair),
            )
            folder, kept = find_or_make(spec, local_dir / "token_cache", keep)
            made.append((str(folder), kept))
        return made

    made = collectives.from_rank0(make)
    try:
        stores = [TokenStore(Path(folder)) for folder, _ in made]
    except ValueError as problem:
        raise UserError(
            f"local_dirs={list(config.local_dirs)}: rank {rank()} cannot read the token cache that"
            f" rank 0 made ({problem}); name a folder that all processes share"
        ) from None
    collectives.barrier()  # what is mapped stays readable when its files are gone
    for folder, kept in made:
        if not kept and rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return stores


def _first(examples: Examples, config: DictConfig) -> Examples:
    """Return the n_eval_examples of an evaluation, or all if there are fewer (the original repeated
    rows, or never returned).
    """
    n = config.n_eval_examples
    if n is not None and n > len(examples):
        what = (
            f"only {len(examples)} exist; each is used once"
            if examples
            else "none exist; nothing will be evaluated"
        )
        rank0_print(f"n_eval_examples={n}: {what} (see eval_share and eval_datasets)")
    schedule = Schedule(
        len(examples),
        batch_size=1,
        n_epochs=1,
        n_examples=n,
        shuffle=config.shuffle,
        seed=config.seed,
    )
    return examples.select(schedule.order(0)[: schedule.n_examples])


def _check_lists(store: TokenStore, rules: Mapping[str, str]) -> Mapping[str, int]:
    """Return what is left out, lists that rank nothing included. Raises UserError for the first
    list of one response where data_rules.bad_row=stop.
    """
    (single,) = (store.lists[:, 2] < 2).nonzero()
    if len(single) and rules["bad_row"] == "stop":
        raise UserError(
            f"{_source_of(store, store.lists[single[0], 0])}: a list of one response, which ranks"
            " nothing; fix or remove the row, or set data_rules.bad_row=drop"
        )
    left_out = int((~ranks(store)).sum())
    # equal scores form no pair, but are part of their list
    skipped = {reason: n for reason, n in store.skipped.items() if reason != EQUAL_SCORES}
    return {**skipped, UNRANKED: left_out} if left_out else skipped


def _source_of(store: TokenStore, row: int) -> str:
    _, file, number = store.rows[row].tolist()
    return f"{store.files[file]}:{number}"


def check_margins(loss: str, *splits: Examples) -> None:
    """Raise UserError if an example has no scores, for a loss (its name) that uses the data's own
    score differences.
    """
    for examples in splits:
        unknown = np.flatnonzero(np.isnan(examples.margins()))
        if len(unknown):
            raise UserError(
                f"{examples[int(unknown[0])].source}: no scores for its two responses, which"
                f" loss={loss} compares; add score_chosen and score_rejected, or take a loss that"
                " needs none (loss=reward: with loss.margin=0)"
            )


def check_weights(examples: Examples) -> None:
    """Raise UserError if every example has weight 0."""
    if len(examples) and (examples.extras().example["weights"] == 0).all():
        raise UserError(
            f"{examples[0].source}: all rows of its split have weight 0, so nothing counts; give"
            " some a weight above 0"
        )


def check_unweighted(*splits: Examples) -> None:
    """Raise UserError for rows with a weight, for a run on the policy's own responses, in which
    every prompt counts the same.
    """
    for examples in splits:
        (weighted,) = (~np.isnan(examples.extras().example["weights"])).nonzero()
        if len(weighted):
            raise UserError(
                f"{examples[int(weighted[0])].source}: its row has a weight, and a run on the"
                " policy's own responses uses none; remove the field 'weight', or repeat prompts"
            )


def check_soft_labels(loss_name: str, *splits: Examples) -> None:
    """Raise UserError for data with soft labels, which this loss would ignore."""
    for examples in splits:
        for table in examples.tables:
            (soft,) = (~np.isnan(table.store.p_chosen)).nonzero()
            if len(soft):
                source = _source_of(table.store, table.store.pairs[soft[0], 0])
                raise UserError(
                    f"{source}: p_chosen={table.store.p_chosen[soft[0]]:g}, which this loss"
                    f" ({loss_name}) would ignore; train with loss=dpo or another loss that uses"
                    " soft labels, or set soft_labels=ignore"
                )


def check_label_smoothing(values: Mapping[str, float], examples: Examples) -> None:
    """Raise UserError for a label smoothing of no pair, since each has a soft label. `values`: of
    these knobs, by their full names.
    """
    p_chosen = examples.extras().example.get("p_chosen", np.full(1, nan))
    for name, label_smoothing in values.items():
        if label_smoothing and not np.isnan(p_chosen).any():
            raise UserError(
                f"{name}={label_smoothing:g}: every training pair has a soft label (p_chosen),"
                f" which takes its place; set {name}=0, or soft_labels=ignore"
            )


def check_list_pairs(list_pairs: str, *splits: Examples) -> None:
    """Raise UserError for a choice of pairs where no list has more than one."""
    stores = [table.store for examples in splits for table in examples.tables]
    if list_pairs != EVERYTHING.list_pairs and not any(
        (store.lists[:, 2] > 2).any() for store in stores
    ):
        raise UserError(
            f"list_pairs={list_pairs}: no data set has a list of more than two ranked responses;"
            f" leave list_pairs={EVERYTHING.list_pairs}"
        )


def check_label_threshold(label_threshold: float | None, *splits: Examples) -> None:
    """Raise UserError for a threshold where no response has a label or a score."""
    stores = [table.store for examples in splits for table in examples.tables]
    if label_threshold is not None and not any(len(store.labelled) for store in stores):
        raise UserError(
            f"label_threshold={label_threshold:g}: no data set has responses with a label (prompt,"
            " completion, label), whose scores it would read; leave label_threshold=null"
        )


def label_counts(examples: Examples) -> tuple[float, float]:
    """Return how many undesirable and how many desirable responses there are, each as often as its
    row weighs.
    """
    extras = examples.extras().example
    weights = np.nan_to_num(extras["weights"].astype(np.float64), nan=1.0)
    undesirable, desirable = (float(weights[extras["labels"] == x].sum()) for x in (0, 1))
    return undesirable, desirable


def balanced_weight(examples: Examples, weights: LabelWeights) -> float:
    """Return the number that a balanced weight stands for: with it, weight times count is the same
    for both kinds of responses. Raise UserError where one kind is missing.
    """
    counts = label_counts(examples)
    name = weights.balanced
    if not all(counts):
        which = "desirable" if counts[1] else "undesirable"
        raise UserError(
            f"{name}={BALANCED}: all training responses are {which}, and no weight balances them;"
            " add the other kind"
        )
    this = weights.names.index(str(name))
    other = 1 - this
    return float(weights.values[other]) * counts[other] / counts[this]


def balance_note(examples: Examples, weights: LabelWeights) -> str:
    """Return how the labels are balanced by the two weights, which are numbers, and what to set
    where they are not; "" where the ratio of weights times counts lies in [1, 4/3] (section 4 of
    arXiv:2402.01306).
    """
    undesirable, desirable = label_counts(examples)
    if not (undesirable and desirable):
        which = "desirable" if desirable else "undesirable"
        return f"labels: all responses are {which}; such a loss needs both kinds"
    w_u, w_d = map(float, weights.values)
    ratio = w_d * desirable / (w_u * undesirable)
    if 0.995 <= ratio <= 4 / 3 + 0.005:
        return ""
    of_undesirable, of_desirable = weights.names
    name, value = (of_desirable, w_d / ratio) if ratio < 1 else (of_undesirable, w_u * ratio)
    return (
        f"labels: weight times count of desirable over undesirable responses is {ratio:.3g}, and"
        f" 1 to 1.33 is usual (arXiv:2402.01306, section 4); {name}={value:.3g}, or"
        f" {name}={BALANCED}, makes it 1"
    )


def apply_rules(part: Part, held_out: np.ndarray, rules: Mapping[str, str], name: str) -> Part:
    """Keep, drop, or stop at the examples of each case; the cases are counted before anything is
    dropped.

    `held_out`: sorted digests of the eval split's prompts. Raises UserError with the first example
    for which a rule says stop.
    """
    examples = part.examples
    of_split = {"duplicate": seen_before(examples), "contradictory": contradicted(examples)}
    keep = np.ones(len(examples), bool)
    counts: Counter[str] = Counter()
    for here in slices(len(examples)):
        some = examples[here]
        by_case = cases(some) | {case: is_case[here] for case, is_case in of_split.items()}
        by_case["prompt_in_eval"] = _is_in(some.digest(0), held_out)
        counts += Counter({case: int(is_case.sum()) for case, is_case in by_case.items()})
        stops = [
            (int(is_case.argmax()), case)
            for case, is_case in by_case.items()
            if rules[case] == "stop" and is_case.any()
        ]
        if stops:
            i, case = min(stops)
            raise UserError(
                f"{some[i].source}: {case.replace('_', ' ')}, and data_rules.{case}=stop; fix the"
                f" row, or set data_rules.{case}=drop or keep"
            )
        for case, is_case in by_case.items():
            if rules[case] == "drop":
                keep[here] &= ~is_case
    if len(examples) and not keep.any():
        why = f"; {unused}" if (unused := unused_of([part])) else ""
        raise UserError(
            f"datasets: data_rules leave no example of {name}: {dict(counts)} of"
            f" {len(examples)}{why}"
        )
    return replace(part, examples=examples if keep.all() else examples.select(keep), cases=counts)


def _is_in(digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return which of the digests are among the known ones, which are sorted."""
    if not len(known):
        return np.zeros(len(digests), bool)
    return known[np.minimum(np.searchsorted(known, digests), len(known) - 1)] == digests


def describe(
    name: str,
    train: Part | None,
    test: Part | None,
    rules: Mapping[str, str],
    eos: str,
    stage: str = "",
    sampled: bool = False,
) -> str:
    """Return the table printed once per data set before training: what is used, and how many
    examples each case has. `sampled`: responses are yet to be sampled.
    """
    columns = [(title, part) for title, part in (("train", train), ("eval", test)) if part]
    parts = [part for _, part in columns]
    examples = [part.examples for part in parts]
    unit = next((unit_of(some) for some in examples if some), "examples")
    labels = {"response_truncated": "response truncated (EOS lost)"}
    if sampled:
        unit = UNITS["rollout"]
        labels = {"empty_response": "without an answer", "response_truncated": "answer truncated"}
    rows = [(name, *(title for title, _ in columns), "")]

    def add(label: str, values: Iterable[int], rule: str = "") -> None:
        numbers = list(values)
        if not rule or any(numbers):
            rows.append((label, *(f"{n:,}" for n in numbers), rule))

    add(f"{unit} used", (len(some) for some in examples))
    add("different prompts" if sampled else "prompts", map(_n_prompts, examples))
    if any(part.n_prompts is not None for part in parts):
        add("  of all stages'", (part.n_prompts or 0 for part in parts), stage)
    add("prompt tokens", (int(some.lengths[:, 0].sum()) for some in examples))
    if not sampled:
        add("response tokens", (int(some.lengths[:, 1:].sum()) for some in examples))
    stores = [part.store for part in parts if part.store]
    taken = [store.taken for store in stores]
    if any(taken):
        rows.append(
            ("split", *(name.partition(" ")[0] for name in taken), taken[0].partition(" ")[2])
        )
    for case, rule in rules.items():
        kept = (
            {"strip": "kept, without the EOS", "keep": "kept"}[eos]
            if case == "eos_in_text"
            else "kept"
        )
        add(
            f"  {labels.get(case, case.replace('_', ' '))}",
            (part.cases[case] for part in parts),
            kept if rule == "keep" else "dropped",
        )
    for label, texts in distributions(examples):
        rows.append((label, *texts, ""))
    for reason in sorted({reason for part in parts for reason in part.skipped}):
        add(f"  {reason}", (part.skipped.get(reason, 0) for part in parts), "not loaded")
    for change in sorted({change for store in stores for change in store.altered}):
        add(f"  {change}", (store.altered.get(change, 0) for store in stores), "kept, as rendered")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left, *right = widths[:-1]
    lines = [
        "  ".join(
            [f"{label:<{left}}", *(f"{x:>{w}}" for x, w in zip(numbers, right, strict=True)), rule]
        ).rstrip()
        for label, *numbers, rule in rows
    ]
    first_bad = next(
        (f"the first bad row: {store.first_bad}" for store in stores if store.first_bad), ""
    )
    return "\n".join([*lines, *(f"  {note}" for note in (first_bad, unused_of(parts)) if note)])


def _n_prompts(examples: Examples) -> int:
    return len(np.unique(examples.digest(0)))


def distributions(splits: Sequence[Examples]) -> list[tuple[str, list[str]]]:
    """Return the lines of the table that describe labels, weights, soft labels and margins: (name,
    a text for each split).
    """
    columns = [some.extras() for some in splits]
    lines = []
    if any("labels" in own.example for own in columns):
        for name, label in (("desirable", 1), ("undesirable", 0)):
            numbers = [
                int((own.example.get("labels", np.empty(0)) == label).sum()) for own in columns
            ]
            lines.append((f"  {name}", [f"{n:,}" for n in numbers]))
    for name in ("weights", "p_chosen", "margins"):
        known = [own.example.get(name, np.empty(0)) for own in columns]
        known = [some[~np.isnan(some)] for some in known]
        if any(map(len, known)):
            lines.append((f"  {name}", [f"of {len(some):,}" for some in known]))
            for at, share in (("min", 0), ("1/4", 0.25), ("1/2", 0.5), ("3/4", 0.75), ("max", 1)):
                quantiles = [
                    f"{np.quantile(some, share):.4g}" if len(some) else "" for some in known
                ]
                lines.append((f"    {at}", quantiles))
    tied = [_n_tied(own.response.get("levels")) for own in columns]
    if any(tied):
        lines.append(("  lists with ties", [f"{n:,}" for n in tied]))
    return lines


def _n_tied(levels: np.ndarray | None) -> int:
    """Return in how many lists two responses rank alike; levels [n, k], NaN for none."""
    if levels is None:
        return 0
    return int((levels[:, 1:] == levels[:, :-1]).any(1).sum())


def unit_of(examples: Examples) -> str:
    """Return what these examples are called."""
    if "labels" in examples.extras().example:
        return UNITS["labelled"]
    return UNITS["single" if examples.k == 1 else "pair" if examples.k == 2 else "list"]


def unused_of(parts: Iterable[Part]) -> str:
    """Return the fields of the rows and their messages that are not part of any text; "" if there
    are none.
    """
    names = sorted(
        {name or "(a column without a name)" for p in parts if p.store for name in p.store.unused}
    )
    return (
        f"fields that neither the form nor the chat template reads: {', '.join(names)}"
        if names
        else ""
    )


# A prompt's last and a response's first characters that read as one word or sentence: neither is
# white space, and the prompt does not end with what may be a turn marker. Not for scripts that
# write no spaces.
GLUED = re.compile(r"[^\s:>\]})|#][a-zA-Z0-9]", re.ASCII)
LOOKED_AT = 32  # examples, of which most have to be glued


def joint_note(name: str, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a note on prompts and responses with nothing between them, as in "...water?You may";
    "" if most of the first examples have white space or a turn marker there.
    """
    first = examples[:LOOKED_AT]
    joints = []
    for i in np.flatnonzero(~cases(first)["prompt_truncated"]):
        example = first[int(i)]
        prompt = example.prompt.tolist()
        response = example.responses[0].tolist()[:-1]  # without the EOS
        if prompt and response:
            before = decode([prompt], tokenizer)[0]
            after = continued(prompt, [response], tokenizer)[0]
            joints.append((before[-12:], after[:8]))
    glued = [joint for joint in joints if GLUED.fullmatch(joint[0][-1:] + joint[1][:1])]
    if 2 * len(glued) <= len(joints):
        return ""
    before, after = glued[0]
    return (
        f"note: {name}: neither white space nor a turn marker between prompt and response:"
        f" ...{before!r} + {after!r}...; write it into the texts, or set plain_prompts=chat to make"
        " them turns of the chat template"
    )


def show_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, sampled: bool = False
) -> str:
    """Return the example as the model sees it: the text its ids decode to, including special
    tokens. `sampled`: its responses are yet to be sampled, so its own is only for rewards.

    The trained part is green on a terminal, and between [[ and ]] elsewhere.
    """
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    first = f"first example ({example.source}), {len(example.prompt)} prompt tokens; "
    if sampled:
        on = off = ""
    lines = [f"{first}{'responses are sampled' if sampled else f'trained: {on}marked{off}'}"]
    prompt = example.prompt.tolist()
    responses = [response.tolist() for response in example.responses]
    if sampled:  # an end token alone is no answer
        responses = [response for response in responses if len(response) > 1]
    lines.append("  " + decode([prompt], tokenizer)[0].replace("\n", "\n  "))
    names = {1: ["answer, for rewards" if sampled else "target"], 2: ["chosen", "rejected"]}.get(
        len(responses), [f"rank {i}" for i, _ in enumerate(responses, 1)]
    )
    texts = continued(prompt, responses, tokenizer)
    for name, response, text in zip(names, responses, texts, strict=True):
        lines.append(f"  {name} ({len(response)} tokens): {on}{text}{off}".replace("\n", "\n  "))
    return "\n".join(lines)
