"""The table of all knobs: which values each takes, what changing it means, and which commands read
it. Defaults and meanings are in config/.

Validation, the comparison on resume, eval.py, the notes on slices, report.py and docs/options.md
derive from this table. A loss's knobs are not in it: the loss's signature declares them. Imports
neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from math import isfinite
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig

from plumb.console import redact
from plumb.data import splits
from plumb.paths import CONFIG
from plumb.planning.cards import CARDS
from plumb.runs.history import flatten

# ---- checks ----

Check = tuple[Callable[[Any], bool], str]  # what a value must satisfy, and how to describe it


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(low: int) -> Check:
    """Return the check of a whole number of at least `low`."""
    return (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low,
        f"a whole number of at least {low}",
    )


def number(test: Callable[[float], bool], description: str) -> Check:
    """Return the check of a number that passes the test."""
    return lambda v: _is_number(v) and test(v), description


def one_of(*values: Any) -> Check:
    """Return the check of one of these values."""
    kinds = {type(value) for value in values}
    return lambda v: v in values and type(v) in kinds, "one of " + ", ".join(map(str, values))


def maybe(check: Check) -> Check:
    """Return the check that also accepts null."""
    return lambda v: v is None or check[0](v), f"{check[1]}, or null"


def names(at_least: int, example: str = "[hh] or [hh,my.jsonl]") -> Check:
    """Return the check of a list of at least this many different texts, such as the example."""

    def fits(v: Any) -> bool:
        return (
            isinstance(v, ListConfig)
            and len(v) >= at_least
            and all(TEXT[0](x) for x in v)
            and len({*v}) == len(v)
        )

    return fits, f"a list such as {example}, nothing twice"


def _texts_by_text(value: Any) -> bool:
    return isinstance(value, DictConfig) and all(
        TEXT[0](text) for pair in value.items() for text in pair
    )


def _by_split(value: Any) -> bool:
    return _texts_by_text(value) and {*value} <= {"train", "test"}


TEXT: Check = lambda v: isinstance(v, str) and v != "" and min(v) >= " ", "a text, in one line"
FLAG: Check = lambda v: isinstance(v, bool), "true or false"
NAME: Check = (  # of a directory; the command line may choose its last part only
    lambda v: (
        isinstance(v, str)
        and bool(re.fullmatch(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}", v))
        and redact(v) == v
    ),
    "a text of 1 to 100 letters, digits, '.', '_' and '-', and no key or password",
)
MAPPING: Check = lambda v: isinstance(v, DictConfig), "a mapping such as '{a: b}'"
ROLES: Check = _texts_by_text, "a mapping such as '{model: assistant}'"
SPLITS: Check = _by_split, "a mapping such as '{train: train_prefs, test: test_prefs}'"
REVISIONS: Check = _texts_by_text, "a mapping such as '{owner/name: main}'"
SHARES: Check = (
    splits.is_data_split,
    "three numbers, of which one is above 0, such as 5,0,5; or '{hh: [5,0,5]}'",
)
RULE = one_of("keep", "drop", "stop")
QUESTIONS = ("fewest_gpus", "longest_rows", "largest_model")
# what a loss of each group learns from the policy's own responses
PREFERENCES = {
    "best-worst": "pair",
    "margin": "pair",
    "bradley-terry": "pair",
    "ranks": "list",
}
# The names of models/forward_path.py's DTYPES; a test compares.
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
DTYPE = one_of(*DTYPE_NAMES)
POSITIVE = number(lambda v: v > 0, "a number above 0")
FINITE = number(lambda v: True, "a number")
NOT_NEGATIVE = number(lambda v: v >= 0, "a number of at least 0")
SHARE = number(lambda v: 0 < v <= 1, "a number in (0, 1]")
PLAN: Check = (
    lambda v: isinstance(v, bool) or v in QUESTIONS,
    "true, false, " + ", ".join(QUESTIONS),
)
KEPT: Check = (
    lambda v: isinstance(v, bool) or (_is_number(v) and 0 < v < 1),
    "true, false, or a share in (0, 1)",
)


# ---- the table ----


class Kind(StrEnum):
    """The meaning of changing a knob's value, for a run that resumes."""

    BOOKKEEPING = "bookkeeping"  # may change: what is kept, logged or printed
    PLACEMENT = "placement"  # may change: where and in what pieces to compute, up to rounding
    CONTENTS = "contents"  # a path, which may change; the contents are compared
    RESULT = "result"  # must not change, unless resume_allow names it
    STATE = "state"  # must not change: what a checkpoint holds is of it


BOOKKEEPING, PLACEMENT, CONTENTS, RESULT, STATE = Kind
TRAIN = ("train",)
TRAIN_AND_EVAL = ("train", "eval")
SHARDED = ("FSDPTrainer", "TensorParallelTrainer")
TRAINERS = ("BasicTrainer", *SHARDED)
AS_THE_RUN = "as the run"  # eval.py takes the run's value


@dataclass(frozen=True)
class Knob:
    """One knob of config/config.yaml or config/model.

    Example: Knob(maybe(whole(1)), PLACEMENT, TRAIN, in_eval=None, trainers=("FSDPTrainer",)).
    """

    check: Check
    kind: Kind = RESULT
    commands: tuple[str, ...] = TRAIN_AND_EVAL  # eval.py refuses one that only training reads
    in_eval: Any = AS_THE_RUN  # the value that eval.py starts from, whatever the run's is
    trainers: tuple[str, ...] = TRAINERS  # with others, another value than the default is refused
    head: bool = False  # of a reward model's head: refused likewise if a loss reads no scores
    of_adapter: bool = False  # with adapter=none, another value than the default is refused
    held_out: bool = False  # decides which held-out examples there are, or how they read
    slices: bool = False  # decides which prompts a stage's slice of a data set holds


KNOBS: dict[str, Knob] = {
    # the run
    "exp_name": Knob(NAME, BOOKKEEPING, TRAIN, in_eval="eval"),
    "seed": Knob(whole(0)),
    "debug": Knob(FLAG, BOOKKEEPING, TRAIN, in_eval=True),
    "local_dirs": Knob(names(1), BOOKKEEPING),
    "local_run_dir": Knob(TEXT, BOOKKEEPING, TRAIN),
    "resume": Knob(one_of("never", "auto", "must"), BOOKKEEPING, TRAIN, in_eval="never"),
    "resume_allow": Knob(names(0), BOOKKEEPING, TRAIN, in_eval=()),
    "max_hours": Knob(maybe(POSITIVE), BOOKKEEPING, TRAIN, in_eval=None),
    "timeout_minutes": Knob(POSITIVE, BOOKKEEPING, TRAIN),
    "wandb.enabled": Knob(FLAG, BOOKKEEPING, TRAIN, in_eval=False),
    "wandb.entity": Knob(maybe(TEXT), BOOKKEEPING, TRAIN),
    "wandb.project": Knob(TEXT, BOOKKEEPING, TRAIN),
    "wandb.aliases": Knob(one_of(None, "trl"), BOOKKEEPING, TRAIN),
    "plan": Knob(PLAN, BOOKKEEPING, TRAIN, in_eval=False),
    "plan_gpus": Knob(maybe(whole(1)), BOOKKEEPING, TRAIN),
    "plan_nodes": Knob(maybe(whole(1)), BOOKKEEPING, TRAIN),
    "plan_gpu": Knob(one_of(*CARDS), BOOKKEEPING, TRAIN),
    "plan_gpu_gb": Knob(maybe(POSITIVE), BOOKKEEPING, TRAIN),
    "plan_mfu": Knob(SHARE, BOOKKEEPING, TRAIN),
    "plugins": Knob(names(0), CONTENTS),
    # the data
    "datasets": Knob(names(1), CONTENTS),
    "eval_datasets": Knob(maybe(names(1)), CONTENTS, held_out=True),
    "dataset_revisions": Knob(maybe(REVISIONS), CONTENTS, held_out=True),
    "field_map": Knob(maybe(MAPPING), held_out=True),
    "role_map": Knob(maybe(ROLES), held_out=True),
    "split_names": Knob(maybe(SPLITS), held_out=True),
    "label_threshold": Knob(maybe(number(isfinite, "a finite number")), held_out=True),
    "unpair": Knob(FLAG, held_out=True),
    "list_pairs": Knob(one_of("all", "best-worst", "adjacent"), held_out=True),
    "soft_labels": Knob(one_of("use", "ignore")),
    "eval_share": Knob(
        number(lambda v: 0 <= v < 1, "a number in [0, 1)"), held_out=True, slices=True
    ),
    "data_split": Knob(maybe(SHARES), held_out=True),
    "stage": Knob(maybe(one_of(*splits.STAGES)), held_out=True),
    "split_seed": Knob(whole(0), held_out=True, slices=True),
    "plain_prompts": Knob(one_of("verbatim", "chat"), held_out=True, slices=True),
    "chat_template": Knob(maybe(TEXT), held_out=True, slices=True),
    "max_length": Knob(whole(2), held_out=True),
    "max_prompt_length": Knob(whole(1), held_out=True),
    "truncation_mode": Knob(maybe(one_of("keep_start", "keep_end"))),
    "response_truncation": Knob(one_of("fixed", "fill")),
    "add_bos": Knob(FLAG),
    "data_rules.prompt_truncated": Knob(RULE),
    "data_rules.response_truncated": Knob(RULE),
    "data_rules.eos_in_text": Knob(RULE),
    "data_rules.text_changed": Knob(RULE),
    "data_rules.empty_prompt": Knob(RULE),
    "data_rules.empty_response": Knob(RULE),
    "data_rules.identical_pair": Knob(RULE),
    "data_rules.identical_after_truncation": Knob(RULE),
    "data_rules.duplicate": Knob(RULE),
    "data_rules.contradictory": Knob(RULE),
    "data_rules.prompt_in_eval": Knob(RULE, RESULT, TRAIN),
    "data_rules.bad_row": Knob(one_of("stop", "drop")),
    "eos_in_text": Knob(one_of("strip", "keep")),
    "shuffle": Knob(FLAG),
    "n_epochs": Knob(maybe(whole(1)), RESULT, TRAIN),
    "n_examples": Knob(maybe(whole(1)), RESULT, TRAIN),
    "n_eval_examples": Knob(maybe(whole(0)), in_eval=None, held_out=True),
    # the training
    "trainer": Knob(one_of(*TRAINERS), PLACEMENT, TRAIN, in_eval="BasicTrainer"),
    "batch_size": Knob(whole(1), RESULT, TRAIN),
    "gradient_accumulation_steps": Knob(whole(1), PLACEMENT, TRAIN),
    "tokens_per_microbatch": Knob(maybe(whole(1)), PLACEMENT, in_eval=None),
    "head_chunk_mb": Knob(maybe(whole(1)), PLACEMENT, TRAIN, in_eval=None),
    "reference": Knob(one_of("auto", "live", "cached"), PLACEMENT, TRAIN, in_eval="auto"),
    "reference_update_every": Knob(maybe(whole(1)), RESULT, TRAIN),
    "reference_update_weight": Knob(SHARE, RESULT, TRAIN),
    "ema_decay": Knob(
        maybe(number(lambda v: 0 < v < 1, "a number in (0, 1)")), RESULT, TRAIN, in_eval=None
    ),
    "eval_batch_size": Knob(whole(1), PLACEMENT),
    "optimizer": Knob(TEXT, STATE, TRAIN),  # validation asks torch
    "optimizer_args": Knob(maybe(MAPPING), RESULT, TRAIN),
    "weight_decay_on": Knob(one_of("all", "matrices"), RESULT, TRAIN),
    "optimizer_state": Knob(one_of("full", "bfloat16"), STATE, TRAIN),
    "stochastic_rounding": Knob(FLAG, RESULT, TRAIN),
    "lr": Knob(POSITIVE, RESULT, TRAIN),
    "head_init": Knob(one_of("fit", "zero", "random"), RESULT, TRAIN, head=True),
    "head_pairs": Knob(whole(1), RESULT, TRAIN, head=True),
    "head_lr": Knob(maybe(POSITIVE), RESULT, TRAIN, head=True),
    "warmup_steps": Knob(whole(0), RESULT, TRAIN),
    "adapter": Knob(
        check=one_of("none", "lora", "dora"),
        kind=STATE,
        commands=TRAIN,
        in_eval="none",
    ),
    "adapter_rank": Knob(whole(1), STATE, TRAIN, of_adapter=True),
    "adapter_alpha": Knob(POSITIVE, STATE, TRAIN, of_adapter=True),
    "adapter_rslora": Knob(FLAG, STATE, TRAIN, of_adapter=True),
    "adapter_init": Knob(one_of("default", "pissa", "olora"), STATE, TRAIN, of_adapter=True),
    "adapter_targets": Knob(
        check=maybe(names(1, "[q_proj,v_proj]")),
        kind=STATE,
        commands=TRAIN,
        of_adapter=True,
    ),
    "adapter_previous": Knob(one_of("merge", "continue", "stack"), STATE, TRAIN, of_adapter=True),
    "lr_schedule": Knob(one_of("constant", "linear", "cosine"), RESULT, TRAIN),
    "min_lr_ratio": Knob(number(lambda v: 0 <= v <= 1, "a number in [0, 1]"), RESULT, TRAIN),
    "router_aux_loss": Knob(NOT_NEGATIVE, trainers=("BasicTrainer", "FSDPTrainer")),
    "max_grad_norm": Knob(POSITIVE, RESULT, TRAIN),
    "activation_checkpointing": Knob(KEPT, PLACEMENT, TRAIN, in_eval=False),
    "activation_offload": Knob(FLAG, PLACEMENT, TRAIN, in_eval=False, trainers=TRAINERS[:2]),
    "compile": Knob(FLAG, PLACEMENT, TRAIN, in_eval=False),
    "device": Knob(maybe(TEXT), PLACEMENT),
    "fsdp_shard_size": Knob(
        check=maybe(whole(1)),
        kind=PLACEMENT,
        commands=TRAIN,
        in_eval=None,
        trainers=SHARDED,
    ),
    "fsdp_cpu_offload": Knob(
        check=FLAG,
        kind=PLACEMENT,
        commands=TRAIN,
        in_eval=False,
        trainers=SHARDED,
    ),
    "fsdp_reduce": Knob(
        check=one_of("auto", "last", "each"),
        kind=PLACEMENT,
        commands=TRAIN,
        in_eval="auto",
        trainers=SHARDED,
    ),
    "tp_size": Knob(
        check=maybe(whole(1)),
        kind=PLACEMENT,
        commands=TRAIN,
        in_eval=None,
        trainers=SHARDED[1:],
    ),
    "fsdp_port": Knob(maybe(whole(1)), PLACEMENT, TRAIN),
    "n_cpu_processes": Knob(maybe(whole(1)), PLACEMENT, TRAIN),
    # the policy's own samples
    "rollout.preferences": Knob(maybe(one_of(*PREFERENCES)), RESULT, TRAIN),
    "rollout.pair_margin": Knob(NOT_NEGATIVE, RESULT, TRAIN),
    "rollout.n": Knob(whole(1), RESULT, TRAIN),
    "rollout.max_new_tokens": Knob(whole(1), RESULT, TRAIN),
    "rollout.temperature": Knob(POSITIVE, RESULT, TRAIN),
    "rollout.batches": Knob(whole(1), RESULT, TRAIN),
    "rollout.uses": Knob(whole(1), RESULT, TRAIN),
    "rollout.batch_size": Knob(whole(1), PLACEMENT, TRAIN),
    "rollout.engine": Knob(one_of("policy", "vllm"), RESULT, TRAIN),
    "rollout.vllm_memory": Knob(SHARE, PLACEMENT, TRAIN),
    "rollout.tolerance": Knob(POSITIVE, BOOKKEEPING, TRAIN),
    "rollout.ptx_datasets": Knob(maybe(names(1)), RESULT, TRAIN),
    "rollout.ptx_weight": Knob(POSITIVE, RESULT, TRAIN),
    "rollout.eval_n": Knob(whole(1), BOOKKEEPING, TRAIN),
    "rollout.eval_temperature": Knob(POSITIVE, BOOKKEEPING, TRAIN),
    "reward.terms": Knob(maybe(MAPPING), RESULT, TRAIN),
    "reward.scale": Knob(maybe(one_of("running")), RESULT, TRAIN),
    "reward.clip": Knob(maybe(POSITIVE), RESULT, TRAIN),
    "reward.without_eos": Knob(maybe(FINITE), RESULT, TRAIN),
    "reward.missing_eos": Knob(NOT_NEGATIVE, RESULT, TRAIN),
    "reward.overlong": Knob(maybe(MAPPING), RESULT, TRAIN),
    # evaluating, logging and saving
    "eval_every": Knob(whole(1), RESULT, TRAIN),
    "save_every": Knob(maybe(whole(1)), BOOKKEEPING, TRAIN),
    "save_every_minutes": Knob(maybe(POSITIVE), BOOKKEEPING, TRAIN),
    "keep_checkpoints": Knob(maybe(whole(1)), BOOKKEEPING, TRAIN),
    "keep_best": Knob(maybe(TEXT), BOOKKEEPING, TRAIN, in_eval=None),
    "async_save": Knob(FLAG, BOOKKEEPING, TRAIN),
    "save_optimizer_pt": Knob(FLAG, BOOKKEEPING, TRAIN),
    "policy_format": Knob(one_of("current", "repo2023"), BOOKKEEPING, TRAIN),
    "export": Knob(maybe(one_of("hf")), BOOKKEEPING, TRAIN, in_eval=None),
    "do_first_eval": Knob(FLAG, RESULT, TRAIN),
    "do_last_eval": Knob(FLAG, RESULT, TRAIN),
    "sample_during_eval": Knob(FLAG, RESULT, TRAIN, in_eval=False),
    "n_eval_model_samples": Knob(whole(0), RESULT, TRAIN),
    "sample_max_new_tokens": Knob(maybe(whole(1)), RESULT, TRAIN),
    "sample_temperature": Knob(maybe(NOT_NEGATIVE), RESULT, TRAIN),
    "minimum_log_interval_secs": Knob(
        number(lambda v: True, "a number of seconds"), BOOKKEEPING, TRAIN
    ),
    # the model
    "model.name_or_path": Knob(maybe(TEXT), CONTENTS),
    "model.tokenizer_name_or_path": Knob(maybe(TEXT), CONTENTS),
    "model.revision": Knob(maybe(TEXT)),
    "model.trust_remote_code": Knob(FLAG),
    "model.archive": Knob(maybe(TEXT), CONTENTS),
    "model.quantize": Knob(maybe(one_of("nf4", "int8")), RESULT, TRAIN, in_eval=None),
    "model.block_name": Knob(maybe(TEXT), RESULT, TRAIN),
    "model.policy_dtype": Knob(DTYPE, STATE),
    "model.fsdp_policy_mp": Knob(maybe(one_of("bfloat16", "float16"))),
    "model.reference_dtype": Knob(maybe(DTYPE), RESULT, TRAIN),
    "model.architecture": Knob(maybe(MAPPING), STATE),
    "model.tp_plan": Knob(maybe(MAPPING), RESULT, TRAIN),
}
# A checkpoint holds something of each if it is used.
HELD_IF_USED = {
    "ema_decay",
    "reference_update_every",
    "stochastic_rounding",
    "optimizer_args.momentum",
    "optimizer_args.amsgrad",
    "optimizer_args.centered",
}
# Their keys are names of data sets, including those of plugins: see validation.
GROUPS: dict[str, Knob] = {"dataset_paths": Knob(maybe(TEXT), CONTENTS)}


# ---- what derives from it ----


def knob_of(name: str) -> Knob | None:
    """Return the entry of a dotted name; None if there is none, as for a loss's knobs."""
    group, dot, _ = name.partition(".")
    return KNOBS.get(name) or (GROUPS.get(group) if dot else None)


def may_change(name: str) -> bool:
    """Return whether a run may resume with another value of this knob.

    >>> may_change("max_hours"), may_change("dataset_paths.hh"), may_change("loss.beta")
    (True, True, False)
    """
    knob = knob_of(name)
    return knob is not None and knob.kind not in (RESULT, STATE)


def owner_of(name: str) -> str | None:
    """Return the knob whose value a dotted name is, or is part of; a loss's are not in the table.

    >>> owner_of("lr"), owner_of("optimizer_args.betas"), owner_of("loss.beta"), owner_of("lrr")
    ('lr', 'optimizer_args', 'loss.beta', None)
    """
    if name.startswith("loss."):
        return name
    parts = name.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((each for each in names if each in KNOBS), None)


def in_state(name: str, before: Any, after: Any) -> bool:
    """Return whether what a checkpoint holds would not fit after this change of a knob, or of a
    part of one.

    >>> in_state("optimizer", "SGD", "AdamW"), in_state("ema_decay", None, 0.99)
    (True, True)
    >>> in_state("stochastic_rounding", False, True)
    True
    >>> in_state("lr", 1e-6, 1e-5), in_state("ema_decay", 0.9, 0.99)
    (False, False)
    """
    owner = owner_of(name)
    if owner in KNOBS and KNOBS[owner].kind is STATE:
        return True
    unused = (None, False, 0, "unset")
    return name in HELD_IF_USED and (before in unused) != (after in unused)


def bookkeeping(name: str) -> bool:
    """Return whether a knob says nothing about what a run learns."""
    knob = knob_of(name)
    return knob is not None and knob.kind is BOOKKEEPING


def values_in_eval() -> dict[str, Any]:
    """Return {knob: value} of what eval.py sets, whatever the run did."""
    return {
        name: list(knob.in_eval) if isinstance(knob.in_eval, tuple) else knob.in_eval
        for name, knob in KNOBS.items()
        if knob.in_eval != AS_THE_RUN
    }


def deciding_slices() -> Sequence[str]:
    """Return the knobs that decide which prompts a stage's slice of a data set holds."""
    return [name for name, knob in KNOBS.items() if knob.slices]


def deciding_held_out() -> Sequence[str]:
    """Return the knobs that decide which held-out examples there are, or how they read."""
    return [name for name, knob in KNOBS.items() if knob.held_out]


@cache
def defaults() -> dict[str, Any]:
    """Return {dotted knob: default} of config/config.yaml, without the model's and the loss's."""
    return dict(flatten(yaml.safe_load((CONFIG / "config.yaml").read_text("utf-8"))))
