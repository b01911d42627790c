"""Everything that can be refused before a model is loaded or a directory made is refused here, in
one line each.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from plumb.console import redact, to_dict, under_torchrun
from plumb.data import (
    deepspeed_chat,  # noqa: F401  registers its sets
    splits,
)
from plumb.data.registry import LOADERS, dataset_names, resolve
from plumb.data.tokenization import template_text
from plumb.errors import UserError
from plumb.losses.registry import Loss, build_loss
from plumb.models import source_trust
from plumb.models.forward_path import DTYPES
from plumb.paths import local_root
from plumb.runs import directory
from plumb.runs.policy_file import resolve_archive
from plumb.training.budget import CARDS
from plumb.training.optimizers import OPTIMIZERS, make_optimizer

Check = tuple[Callable[[Any], bool], str]  # what a value must satisfy, and how to say it


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(low: int) -> Check:
    return (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low,
        f"a whole number of at least {low}",
    )


def number(test: Callable[[float], bool], said: str) -> Check:
    return lambda v: _number(v) and test(v), said


def one_of(*values: Any) -> Check:
    return lambda v: v in values and type(v) in {type(x) for x in values}, "one of " + ", ".join(
        map(str, values)
    )


def maybe(check: Check) -> Check:
    return lambda v: v is None or check[0](v), f"{check[1]}, or null"


def names(at_least: int) -> Check:
    def fits(v: Any) -> bool:
        return (
            isinstance(v, ListConfig)
            and len(v) >= at_least
            and all(TEXT[0](x) for x in v)
            and len({*v}) == len(v)
        )

    return fits, "a list such as [hh] or [hh,my.jsonl], nothing twice"


def _texts_by_text(value: Any) -> bool:
    return isinstance(value, DictConfig) and all(
        TEXT[0](text) for pair in value.items() for text in pair
    )


def _of_splits(value: Any) -> bool:
    return _texts_by_text(value) and {*value} <= {"train", "test"}


TEXT: Check = lambda v: isinstance(v, str) and v != "" and min(v) >= " ", "a text, in one line"
FLAG: Check = lambda v: isinstance(v, bool), "true or false"
NAME: Check = (  # of a directory, of which the command line may choose the last part only
    lambda v: (
        isinstance(v, str)
        and bool(re.fullmatch(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}", v))
        and redact(v) == v
    ),
    "a text of 1 to 100 letters, digits, '.', '_' and '-', and no key or password",
)
MAPPING: Check = lambda v: isinstance(v, DictConfig), "a mapping such as '{a: b}'"
RULE, DTYPE = one_of("keep", "drop", "stop"), one_of(*DTYPES)
POSITIVE = number(lambda v: v > 0, "a number above 0")
KEPT: Callable[[Any], bool] = lambda v: isinstance(v, bool) or (_number(v) and 0 < v < 1)

SHARDED = ("FSDPTrainer", "TensorParallelTrainer")
TRAINERS = ("BasicTrainer", *SHARDED)
# Knobs of some trainers only: where one would be ignored, another value than its default is
# refused.
SEVERAL: list[tuple[str, Any, tuple[str, ...]]] = [
    ("fsdp_shard_size", None, SHARDED),
    ("fsdp_cpu_offload", False, SHARDED),
    ("fsdp_reduce", "auto", SHARDED),
    ("tp_size", None, SHARDED[1:]),
    ("router_aux_loss", 0, ("BasicTrainer", "FSDPTrainer")),
]
HEAD: list[tuple[str, Any]] = [("head_init", "fit"), ("head_pairs", 4000), ("head_lr", None)]
KNOBS: dict[str, Check] = {
    "exp_name": NAME,
    "seed": whole(0),
    "debug": FLAG,
    "local_dirs": names(1),
    "local_run_dir": TEXT,
    "wandb.enabled": FLAG,
    "wandb.entity": maybe(TEXT),
    "wandb.project": TEXT,
    "plugins": names(0),
    "plan": FLAG,
    "plan_gpus": maybe(whole(1)),
    "plan_nodes": maybe(whole(1)),
    "plan_gpu": one_of(*CARDS),
    "plan_gpu_gb": maybe(POSITIVE),
    "plan_mfu": number(lambda v: 0 < v <= 1, "a number in (0, 1]"),
    "datasets": names(1),
    "eval_datasets": maybe(names(1)),
    "field_map": maybe(MAPPING),
    "role_map": maybe((_texts_by_text, "a mapping such as '{model: assistant}'")),
    "split_names": maybe(
        (_of_splits, "a mapping such as '{train: train_prefs, test: test_prefs}'")
    ),
    "data_split": maybe(
        (
            splits.is_data_split,
            "three numbers, of which one is above 0, such as 5,0,5; or '{hh: [5,0,5]}'",
        )
    ),
    "stage": maybe(one_of(*splits.STAGES)),
    "split_seed": whole(0),
    "eval_share": number(lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "chat_template": maybe(TEXT),
    "max_length": whole(2),
    "max_prompt_length": whole(1),
    "truncation_mode": maybe(one_of("keep_start", "keep_end")),
    "response_truncation": one_of("fixed", "fill"),
    "add_bos": FLAG,
    "eos_in_text": one_of("strip", "keep"),
    "shuffle": FLAG,
    "n_epochs": maybe(whole(1)),
    "n_examples": maybe(whole(1)),
    "n_eval_examples": maybe(whole(0)),
    "trainer": one_of(*TRAINERS),
    "batch_size": whole(1),
    "gradient_accumulation_steps": whole(1),
    "eval_batch_size": whole(1),
    "optimizer": one_of(*OPTIMIZERS),
    "optimizer_args": maybe(MAPPING),
    "lr": POSITIVE,
    "head_lr": maybe(POSITIVE),
    "head_init": one_of("fit", "zero", "random"),
    "head_pairs": whole(1),
    "warmup_steps": whole(0),
    "lr_schedule": one_of("constant", "linear", "cosine"),
    "min_lr_ratio": number(lambda v: 0 <= v <= 1, "a number in [0, 1]"),
    "router_aux_loss": number(lambda v: v >= 0, "a number of at least 0"),
    "max_grad_norm": POSITIVE,
    "tokens_per_microbatch": maybe(whole(1)),
    "compile": FLAG,
    "reference": one_of("auto", "live", "cached"),
    "activation_checkpointing": (KEPT, "true, false, or a share in (0, 1)"),
    "device": maybe(TEXT),
    "fsdp_shard_size": maybe(whole(1)),
    "fsdp_cpu_offload": FLAG,
    "fsdp_reduce": one_of("auto", "last", "each"),
    "tp_size": maybe(whole(1)),
    "model.tp_plan": maybe(MAPPING),
    "fsdp_port": maybe(whole(1)),
    "n_cpu_processes": maybe(whole(1)),
    "policy_format": one_of("current", "repo2023"),
    "export": maybe(one_of("hf")),
    "resume": one_of("never", "auto", "must"),
    "resume_allow": names(0),
    "max_hours": maybe(POSITIVE),
    "timeout_minutes": POSITIVE,
    "keep_checkpoints": maybe(whole(1)),
    "keep_best": maybe(TEXT),
    "save_every": maybe(whole(1)),
    "save_every_minutes": maybe(POSITIVE),
    "async_save": FLAG,
    "save_optimizer_pt": FLAG,
    "eval_every": whole(1),
    "do_first_eval": FLAG,
    "do_last_eval": FLAG,
    "sample_during_eval": FLAG,
    "n_eval_model_samples": whole(0),
    "sample_max_new_tokens": maybe(whole(1)),
    "sample_temperature": maybe(number(lambda v: v >= 0, "a number of at least 0")),
    "minimum_log_interval_secs": number(lambda v: True, "a number of seconds"),
    "model.name_or_path": maybe(TEXT),
    "model.tokenizer_name_or_path": maybe(TEXT),
    "model.archive": maybe(TEXT),
    "model.revision": maybe(TEXT),
    "model.trust_remote_code": FLAG,
    "model.block_name": maybe(TEXT),
    "model.policy_dtype": DTYPE,
    "model.reference_dtype": maybe(DTYPE),
    "model.fsdp_policy_mp": maybe(one_of("bfloat16", "float16")),
    "model.architecture": maybe(MAPPING),
}
CASES = (
    "prompt_truncated",
    "response_truncated",
    "eos_in_text",
    "text_changed",
    "empty_prompt",
    "empty_response",
    "identical_pair",
    "identical_after_truncation",
    "duplicate",
    "contradictory",
    "prompt_in_eval",
)
KNOBS |= {f"data_rules.{case}": RULE for case in CASES} | {
    "data_rules.bad_row": one_of("stop", "drop")
}
# its keys are names of data sets, a plugin's too: see _data_sets
GROUPS = {"dataset_paths": maybe(TEXT)}
EXAMPLE = "python train.py exp_name=first model.name_or_path=gpt2 datasets=[hh] loss=sft"


def validate(config: DictConfig, trains: bool = True) -> Loss:
    """Check every knob, alone and against the others. -> the loss with its knobs bound. Raises
    UserError with one line.

    `trains`: false for a model that is only evaluated, which may be float16.
    """
    # which is made of exp_name
    given = OmegaConf.masked_copy(config, [str(k) for k in config if k != "local_run_dir"])
    missing = sorted(OmegaConf.missing_keys(given))
    if missing:
        flags = [f"{k}=..." for k in missing]
        raise UserError(
            f"missing: {', '.join(missing)}; add {' '.join(flags)}, for instance: {EXAMPLE}"
        )
    for knob, value in _leaves(config, ""):
        group = knob.split(".")[0]
        check = KNOBS.get(knob) or (GROUPS.get(group) if "." in knob else None)
        if check is None:
            raise UserError(
                f"{knob}={value}: no such knob; see config/config.yaml and"
                " config/model/blank_model.yaml"
            )
        if not check[0](value):
            raise UserError(f"{knob}={value}: expected {check[1]}")
    _across(config)
    if trains:
        _precision(config)
    import_plugins(config.plugins)
    _data_sets(config)
    splits.check(config)
    try:
        loss = build_loss(to_dict(config.loss))
    except ValueError as error:
        raise UserError(str(error)) from None
    for name in map(resolve, (*config.datasets, *(config.eval_datasets or ()))):
        if loss.data == "pairs" and name in LOADERS and not LOADERS[name].pairs:
            raise UserError(
                f"datasets={list(config.datasets)}: {name} has SFT targets only, and this loss"
                f" ({loss.name}) needs pairs; train on it with loss=sft"
            )
    if config.export and loss.reads == "scores" and loss.read == "mean":
        raise UserError(
            f"export={config.export}: loss.read=mean has no form in transformers, which reads a"
            " score at the last token; leave export=null, or set loss.read=last"
        )
    for knob, default in HEAD:
        if config[knob] != default and loss.reads != "scores":
            raise UserError(
                f"{knob}={config[knob]}: is for a reward model's head, and this loss ({loss.name})"
                f" has none; leave {knob} as it is"
            )
    if config.reference != "auto" and not loss.needs_reference:
        raise UserError(
            f"reference={config.reference}: this loss ({loss.name}) needs no reference; leave"
            " reference=auto"
        )
    return loss


def _leaves(config: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every knob but the loss's, which its own signature checks."""
    for key in map(
        str,
        config,
        # one at a time: local_run_dir cannot be resolved from a local_dirs that is about to be
        # refused
    ):
        name, value = f"{prefix}{key}", config[key]
        if name == "loss":
            continue
        if isinstance(value, DictConfig) and name not in KNOBS:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _data_sets(config: DictConfig) -> None:
    """The knobs that speak of a data set speak of one that exists and takes them."""
    for name, path in config.dataset_paths.items():
        if path is not None and name not in dataset_names():
            raise UserError(
                f"dataset_paths.{name}={path}: no such data set; known:"
                f" {', '.join(dataset_names())}"
            )
    names = [resolve(name) for name in (*config.datasets, *(config.eval_datasets or ()))]
    if config.field_map and all(name in LOADERS for name in names):
        raise UserError(
            f"field_map={dict(config.field_map)}: named data sets have their own fields; it is for"
            " files by path"
        )


def _precision(config: DictConfig) -> None:
    """Refuse float16 wherever gradients pass through it. (A reference, which has none, may be
    float16; so may an export.)
    """
    if config.model.policy_dtype == "float16":
        raise UserError(
            "model.policy_dtype=float16: too narrow a range for weights that are trained (an"
            " optimizer's eps of 1e-8 is 0 in it); set float32, and model.fsdp_policy_mp=bfloat16"
            " to compute in 16 bits"
        )
    if config.model.fsdp_policy_mp == "float16":
        raise UserError(
            "model.fsdp_policy_mp=float16: gradients below 6e-8, of which large batches and"
            " vocabularies have many, become 0 in it, since losses are not scaled up; set bfloat16,"
            " or null"
        )


def _across(config: DictConfig) -> None:  # noqa: C901  one check after the other, in one place
    """What no knob shows by itself."""
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"max_prompt_length={config.max_prompt_length}: must be below"
            f" max_length={config.max_length}, or no room is left for a response"
        )
    if config.n_epochs is None and config.n_examples is None:
        raise UserError(
            "n_epochs=null and n_examples=null: give one of them, or training would never end"
        )
    if not isinstance(config.activation_checkpointing, bool) and not config.compile:
        raise UserError(
            f"activation_checkpointing={config.activation_checkpointing}: a share needs"
            " compile=true"
        )
    if config.trainer == "TensorParallelTrainer" and config.compile:
        raise UserError(
            "compile=true: trainer=TensorParallelTrainer does not compile; set it to false"
        )
    for knob, default, trainers in SEVERAL:
        if config[knob] != default and config.trainer not in trainers:
            raise UserError(
                f"{knob}={config[knob]}: is for trainer={' and trainer='.join(trainers)}; leave"
                f" {knob} as it is"
            )
    if config.model.name_or_path is None and not (
        config.model.architecture and config.model.tokenizer_name_or_path
    ):
        raise UserError(
            "model.name_or_path=null: give a hub name, a folder or a .gguf file; or"
            " model.architecture and model.tokenizer_name_or_path to start from random weights"
        )
    source_trust.check_revision(config.model)
    if config.plan and config.device is not None:
        raise UserError(
            f"device={config.device}: a plan is for GPUs; leave it out, and say which with plan_gpu"
        )
    for knob in ("plan_gpus", "plan_nodes", "plan_gpu_gb"):
        if config[knob] is not None and not config.plan:
            raise UserError(
                f"{knob}={config[knob]}: is for plan=true, which trains nothing; leave it out to"
                " train"
            )
    if config.model.archive and not config.plan:  # the run that makes it may be still to come
        resolve_archive(config.model.archive)
    template_text(config.chat_template, f"chat_template={config.chat_template}")
    if (
        under_torchrun()
        and config.trainer == "BasicTrainer"
        and os.environ.get("WORLD_SIZE") != "1"
    ):
        raise UserError(
            "trainer=BasicTrainer: torchrun started several processes, each of which would train on"
            " its own; use trainer=FSDPTrainer"
        )
    if config.device is not None and config.trainer != "BasicTrainer":
        raise UserError(
            f"device={config.device}: {config.trainer} has one process per GPU and picks by itself;"
            " set device=null, and CUDA_VISIBLE_DEVICES to choose GPUs"
        )
    if config.device is not None:
        try:
            torch.empty(0, device=config.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device={config.device}: not usable here ({str(error).splitlines()[0]}); null"
                " picks one"
            ) from None
    # refuses optimizer_args that torch refuses
    make_optimizer(config, torch.nn.Linear(1, 1), torch.device("cpu"))
    run_dir, root = Path(config.local_run_dir), local_root(config.local_dirs)
    if OmegaConf.is_interpolation(config, "local_run_dir") and not run_dir.resolve().is_relative_to(
        root.resolve()
    ):
        raise UserError(
            f"local_run_dir={run_dir}: leads out of {root}, to {run_dir.resolve()}; give"
            " local_run_dir=, or fix it"
        )
    held = any((run_dir / name).exists() for name in ("metrics.jsonl", "LATEST")) or list(
        run_dir.glob("step-*")
    )
    if held and config.resume == "never":
        raise UserError(
            f"local_run_dir={config.local_run_dir}: holds a run already; give another directory, or"
            " resume=auto"
        )
    for knob, off, why in (
        ("resume", "never", "would resume a run and not save it"),
        ("export", None, "has none to write"),
    ):
        if config.debug and config[knob] != off:
            raise UserError(f"debug=true: writes no checkpoint, so {knob}={config[knob]} {why}")
    if config.resume_allow and config.resume == "never":
        raise UserError(
            f"resume_allow={list(config.resume_allow)}: nothing is resumed with resume=never; add"
            " resume=auto"
        )
    for name in config.resume_allow:
        if name not in KNOBS and name not in directory.CONTENTS and not name.startswith("loss."):
            others = ", ".join(directory.CONTENTS)
            raise UserError(
                f"resume_allow={list(config.resume_allow)}: {name} is neither a knob nor one of"
                f" {others}"
            )


def import_plugins(files: ListConfig) -> None:
    """Run the user's own Python files, so that their @dataset and @loss functions are
    registered.
    """
    for file in files:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"plugins={file}: no such file")
        name = f"plugin_{path.stem}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            if isinstance(error, ModuleNotFoundError) and error.name == "losses":
                raise UserError(
                    f"plugins={file}: losses.py is now a package: write 'from plumb.losses import"
                    " loss'"
                ) from None
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename == str(path)
            ]
            where = f"line {lines[-1]}: " if lines else ""  # a syntax error says its line itself
            raise UserError(
                f"plugins={file}: {where}{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from None
