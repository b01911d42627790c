"""Refuse, in one line each, everything that can be refused before a model is loaded or a directory
created.

What needs no torch is checked first, so that a mistyped knob is refused within a second.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from plumb.console import rank0_print, to_dict, under_torchrun
from plumb.data import (
    deepspeed_chat,  # noqa: F401  registers its sets
    splits,
)
from plumb.data.registry import LOADERS, check_name, check_revisions, dataset_names, resolve
from plumb.errors import UserError
from plumb.models import source_trust
from plumb.paths import CONFIG, local_root
from plumb.runs.history import flatten
from plumb.runs.identity import CONTENTS
from plumb.runs.policy_path import resolve_archive
from plumb.settings.hydra_guard import on_command_line
from plumb.settings.mistakes import hint
from plumb.settings.optimizer_checks import check_optimizer
from plumb.settings.plugins import import_plugins
from plumb.settings.rollout_checks import check_rollout
from plumb.settings.schema import KNOBS, Kind, defaults, knob_of, owner_of

if TYPE_CHECKING:
    from plumb.losses.registry import Loss

# The factor beyond the usual values of a knob: tiny models need other learning rates than papers
FAR = 10
# How much larger learning rates of adapters are, at least, than those of full fine-tuning; and the
# least of these for a loss whose usual ones are not known
ADAPTER_LR = 10
LEAST_LR = 1e-6

EXAMPLE = "python train.py exp_name=first model.name_or_path=gpt2 datasets=[hh]"


def validate(config: DictConfig, trains: bool = True) -> Loss:
    """Check every knob, alone and against the others, and return the loss with its knobs bound.
    Raises UserError with one line.

    `trains`: false for a model that is only evaluated, which may be float16.
    """
    check_knobs(config, trains)
    from plumb.losses.advantage_rules import GaeRule

    loss = _check_loss(config, trains)
    if trains and loss.live_reference and config.reference == "cached":
        raise UserError(
            f"reference=cached: this loss ({loss.name}) compares token by token, and a cached"
            " reference has only the sum of each response; set reference=live"
        )
    _check_with_torch(config)
    if trains:
        has_critic = isinstance(loss.advantages, GaeRule)
        check_optimizer(config, has_critic)
        if has_critic and config.activation_offload:
            raise UserError(
                f"activation_offload=true: is not made for the critic of this loss ({loss.name});"
                " set activation_checkpointing=true in its place"
            )
    mismatched = loss.context is not None and loss.context.examples == "mismatched"
    if trains and mismatched and config.batch_size < 2:
        raise UserError(
            f"batch_size={config.batch_size}: this loss ({loss.name}) pairs prompts with responses"
            " to other prompts of the batch; set 2 or more (32 is usual)"
        )
    for name in filter(None, (weights.balanced for weights in loss.label_weights)):
        if not trains:
            raise UserError(
                f"{name}=balanced: a training run computes this number from its data; give a number"
            )
    values = {**dict(flatten(to_dict(config.loss))), "lr": config.lr}
    if trains:
        _check_adapter(config, loss)
    factor = 1 if config.adapter == "none" else ADAPTER_LR
    if trains and (unusual := unusual_values(loss, values, factor)):
        rank0_print(f"note: {unusual}")
    return loss


def unusual_values(loss: Loss, values: Mapping[str, Any], lr_factor: float = 1) -> str:
    """Return in one line which values are far outside the usual range of this loss: below 1 / FAR
    of the least or above FAR times the largest; "" if none is. `values`: lr, and the loss's knobs.
    `lr_factor`: how much larger learning rates are than those of full fine-tuning.
    """
    unusual = []
    for knob, (least, largest) in loss.usual.items():
        if knob == "lr":
            least, largest = lr_factor * least, lr_factor * largest
        if not least / FAR <= values[knob] <= largest * FAR:
            name = knob if knob == "lr" else f"loss.{knob}"
            unusual.append(f"{name}={values[knob]} ({least:g} to {largest:g})")
    if not unusual:
        return ""
    return (
        f"unusual for loss={loss.name}: {', '.join(unusual)}; in brackets is what its authors and"
        " later work used"
    )


def check_knobs(config: DictConfig, trains: bool = True) -> None:
    """Check everything that does not need torch (a plugin may import it). Raises UserError."""
    if config.plan == "largest_model" and OmegaConf.is_missing(config.model, "name_or_path"):
        config.model.name_or_path = "any"  # the question is which
    # local_run_dir contains exp_name, which may be missing
    composed = OmegaConf.masked_copy(config, [str(k) for k in config if k != "local_run_dir"])
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        flags = [f"{k}=..." for k in missing]
        of_loss = any(k.startswith("loss.") for k in missing)
        name = f"loss={config.loss.name} loss.beta=0.1" if of_loss else "loss=sft"
        example = f"{EXAMPLE} {name}"
        if of_loss:
            example += f" (config/loss/{config.loss.name}.yaml has the usual values)"
        raise UserError(
            f"missing: {', '.join(missing)}; add {' '.join(flags)}, for instance: {example}"
        )
    for name, value in _leaves(config, ""):
        knob = knob_of(name)
        if knob is None:
            raise UserError(
                f"{name}={value}: no such knob{hint(f'{name}={value}')}; see config/config.yaml and"
                " config/model/blank_model.yaml"
            )
        fits, expected = knob.check
        if not fits(value):
            raise UserError(f"{name}={value}: expected {expected}{_instead(name, value)}")
    _across(config)
    if trains:
        _precision(config)
    import_plugins(config.plugins)
    _data_sets(config)
    splits.check(config)


def _instead(name: str, value: Any) -> str:
    """Return what to write for a text where a list is expected, and for a stage that is a loss."""
    if name == "adapter_targets" and value in ("all-linear", "all"):  # of peft, LLaMA-Factory
        return "; null is all linear layers of the blocks"
    knob = knob_of(name)
    if knob is not None and knob.check[1].startswith("a list") and isinstance(value, str):
        return f"; write {name}=[{value}]"
    if name == "stage" and (CONFIG / "loss" / f"{value}.yaml").is_file():
        return f"; the objective is chosen by loss={value}"
    return ""


def _check_loss(config: DictConfig, trains: bool) -> Loss:
    """Bind the loss's knobs, and refuse settings that do not fit it. Return the loss."""
    from plumb.losses.registry import build_loss

    try:
        loss = build_loss(to_dict(config.loss))
    except ValueError as error:
        raise UserError(str(error)) from None
    if trains:
        check_rollout(config, loss)
    needs_pairs = loss.group not in ("single", "rollout") and config.rollout.preferences is None
    for name in map(resolve, (*config.datasets, *(config.eval_datasets or ()))):
        if needs_pairs and name in LOADERS and not LOADERS[name].pairs:
            raise UserError(
                f"datasets={list(config.datasets)}: {name} has SFT targets only, and this loss"
                f" ({loss.name}) needs pairs; train on it with loss=sft"
            )
    if config.export and loss.reads == "scores" and loss.read == "mean":
        raise UserError(
            f"export={config.export}: loss.read=mean has no form in transformers, which reads a"
            " score at the last token; leave export=null, or set loss.read=last"
        )
    for name, knob in KNOBS.items():
        if knob.head and loss.reads != "scores" and config[name] != defaults()[name]:
            raise UserError(
                f"{name}={config[name]}: is for a reward model's head, and this loss ({loss.name})"
                f" has none; leave {name} as it is"
            )
    _check_group_knobs(config, loss)
    _check_moving_reference(config, loss)
    if config.reference != "auto" and not loss.needs_reference:
        raise UserError(
            f"reference={config.reference}: this loss ({loss.name}) needs no reference; leave"
            " reference=auto"
        )
    return loss


def _check_group_knobs(config: DictConfig, loss: Loss) -> None:
    """Refuse a knob of one group of losses with a loss of another."""
    for name, group, of_group in (
        ("label_threshold", "labelled", "labelled responses"),
        ("unpair", "labelled", "labelled responses"),
        ("list_pairs", "pair", "pairs"),
    ):
        if loss.group != group and config[name] != defaults()[name]:
            raise UserError(
                f"{name}={config[name]}: is for losses on {of_group}, and this loss ({loss.name})"
                f" is not one; leave {name} as it is"
            )


def _check_adapter(config: DictConfig, loss: Loss) -> None:
    """Refuse options of an adapter that do not fit each other or the rest, and print a note on a
    learning rate of full fine-tuning.
    """
    if config.model.quantize is not None:
        _check_quantized(config)
    options = [name for name, knob in KNOBS.items() if knob.of_adapter]
    changed = [name for name in options if config[name] != defaults()[name]]
    if config.adapter == "none":
        if changed:
            raise UserError(
                f"{changed[0]}={config[changed[0]]}: is for adapter=lora and adapter=dora; leave"
                f" {changed[0]} as it is"
            )
        return
    if find_spec("peft") is None:
        raise UserError(
            f"adapter={config.adapter}: needs peft, which is not installed; pip install -r"
            " requirements-lora.txt"
        )
    if config.adapter_previous != "merge" and not config.model.archive:
        raise UserError(
            f"adapter_previous={config.adapter_previous}: is for a model.archive with an adapter;"
            " leave it as it is"
        )
    if config.adapter_previous == "continue" and not config.plan:
        _check_continued(config, {*changed} | on_command_line())
    if config.adapter == "dora" and config.trainer == "TensorParallelTrainer":
        from plumb.distributed.tensor_parallel import SPLITS_NO_DORA

        raise UserError(SPLITS_NO_DORA)
    if config.adapter == "dora" and config.adapter_init != "default":
        raise UserError(
            f"adapter_init={config.adapter_init}: is for adapter=lora; leave it as it is"
        )
    if config.model.reference_dtype not in (None, config.model.policy_dtype):
        raise UserError(
            f"model.reference_dtype={config.model.reference_dtype}: with adapter={config.adapter}"
            " the reference has the policy's own weights; set it to null"
        )
    if config.policy_format != "current":
        raise UserError(
            f"policy_format={config.policy_format}: the original repository knows no adapters; set"
            " policy_format=current"
        )
    if config.reference_update_every is not None and config.reference != "cached":
        raise UserError(
            f"reference_update_every={config.reference_update_every}: with"
            f" adapter={config.adapter} a live reference cannot move; set reference=cached, or null"
        )
    least = loss.usual.get("lr", (LEAST_LR, LEAST_LR))[0]
    if config.lr < ADAPTER_LR * least:
        rank0_print(
            f"note: lr={config.lr:g} is one of full fine-tuning; adapters usually take at least"
            f" {ADAPTER_LR} times as much, for loss={loss.name} {ADAPTER_LR * least:g} or more"
        )


def _check_continued(config: DictConfig, given: Container[str]) -> None:
    """Refuse options that are not those of the adapter whose training goes on. `given`: the names
    of those that were chosen.
    """
    from plumb.models.adapters import knobs_of, read_adapters
    from plumb.runs.policy_file import load_policy_state

    origin = f"model.archive={config.model.archive}"
    adapters = read_adapters(load_policy_state(config.model.archive), origin)
    knobs = knobs_of(config)
    if not adapters or knobs is None:
        return  # said where it is loaded
    own = adapters[-1]
    scaling = replace(knobs, rank=own.rank).scaling
    targets = knobs.targets or ()
    has = {target: [m for m in own.modules if f".{m}".endswith(f".{target}")] for target in targets}
    here = {module for modules in has.values() for module in modules}
    kind = "dora" if own.dora else "lora"
    size = f"{own.scaling:g}, alpha={own.scaling * own.rank:g} without rsLoRA"
    for name, fits, what in (
        ("adapter", knobs.kind == kind, f"is adapter={kind}"),
        ("adapter_rank", knobs.rank == own.rank, f"has rank {own.rank}"),
        ("adapter_alpha", isclose(scaling, own.scaling), f"has scaling {size}"),
        ("adapter_rslora", isclose(scaling, own.scaling), f"has scaling {size}"),
        ("adapter_init", knobs.init == "default", "has values"),
        (
            "adapter_targets",
            not targets or (all(has.values()) and here == {*own.modules}),
            f"is on {', '.join(sorted({m.rpartition('.')[2] for m in own.modules}))}",
        ),
    ):
        if not fits and (name == "adapter" or name in given):
            raise UserError(
                f"{name}={config[name]}: with adapter_previous=continue the adapter is that of"
                f" {origin}, which {what}; leave {name} out, or set that"
            )
    rank0_print(f"continuing its adapter: {kind} of rank {own.rank}, scaling {own.scaling:g}")


def _check_quantized(config: DictConfig) -> None:
    """Refuse quantized weights without an adapter, and where they are not made for the rest."""
    from plumb.models.quantized_base import check_bitsandbytes, check_torch

    kind = config.model.quantize
    for name, fits, why in (
        ("adapter", config.adapter != "none", "only an adapter can be trained on them; set lora"),
        (
            "trainer",
            config.trainer != "TensorParallelTrainer",
            "quantized weights are not split; set FSDPTrainer",
        ),
        ("compile", not config.compile, "quantized layers are not compiled; set false"),
        (
            "adapter_previous",
            config.adapter_previous == "merge",
            "what was trained before is quantized as well; set merge",
        ),
    ):
        if not fits:
            raise UserError(f"model.quantize={kind}: {name}={config[name]}: {why}")
    if config.model.policy_dtype == "float64":
        raise UserError(
            f"model.quantize={kind}: model.policy_dtype=float64: bitsandbytes quantizes float32 and"
            " bfloat16; set one of them"
        )
    check_bitsandbytes(kind)
    if config.trainer == "FSDPTrainer":
        check_torch(kind)


def _check_moving_reference(config: DictConfig, loss: Loss) -> None:
    """Refuse settings with which the reference could not move as configured."""
    every = config.reference_update_every
    weight = config.reference_update_weight
    spec = config.model
    if every is None:
        if weight != 1:
            raise UserError(
                f"reference_update_weight={weight}: the reference never moves; set"
                " reference_update_every, or leave it at 1"
            )
        return
    if not loss.needs_reference:
        raise UserError(
            f"reference_update_every={every}: this loss ({loss.name}) needs no reference; set it to"
            " null"
        )
    if weight < 1 and config.reference == "cached":
        raise UserError(
            f"reference_update_weight={weight}: is not the policy's weights, and a cached reference"
            " has none of its own; set reference=live, or 1 to copy the policy"
        )
    dtype = spec.reference_dtype or spec.policy_dtype
    if weight < 1 and dtype in ("bfloat16", "float16"):
        raise UserError(
            f"reference_update_weight={weight}: {dtype} weights round small moves away; set"
            " model.reference_dtype=float32, or 1 to copy the policy"
        )
    if config.reference == "cached" and dtype != spec.policy_dtype:
        raise UserError(
            f"reference_update_every={every}: a cached reference is recomputed by the policy, in"
            f" {spec.policy_dtype}; set model.reference_dtype=null, or reference=live"
        )


def _check_with_torch(config: DictConfig) -> None:
    """Refuse a device that torch refuses."""
    import torch

    if config.device is not None:
        try:
            torch.empty(0, device=config.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device={config.device}: not usable here ({str(error).splitlines()[0]}); null"
                " picks one"
            ) from None


def _leaves(config: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every knob but the loss's, which its own signature checks."""
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
    """Refuse knobs about a data set that does not exist or does not take them."""
    for name, path in config.dataset_paths.items():
        if path is not None and name not in dataset_names():
            raise UserError(
                f"dataset_paths.{name}={path}: no such data set; known:"
                f" {', '.join(dataset_names())}"
            )
    ptx = config.rollout.ptx_datasets or ()
    names = [resolve(name) for name in (*config.datasets, *(config.eval_datasets or ()), *ptx)]
    for name in names:
        check_name(name)
    check_revisions(config.dataset_revisions or {}, names)
    if config.field_map and all(name in LOADERS for name in names):
        raise UserError(
            f"field_map={dict(config.field_map)}: named data sets have their own fields; field_map"
            " is for files given by path, and other sets of the hub"
        )


def _precision(config: DictConfig) -> None:
    """Refuse float16 wherever gradients pass through it. A reference, which has none, may be
    float16, and so may an export.
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
    """Refuse values that contradict each other."""
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"max_prompt_length={config.max_prompt_length}: must be below"
            f" max_length={config.max_length}, or no room is left for a response"
        )
    if config.n_epochs is None and config.n_examples is None:
        raise UserError(
            "n_epochs=null and n_examples=null: give one of them, or training would never end"
        )
    if config.activation_offload and config.compile:
        raise UserError(
            "activation_offload=true: compiled blocks keep their own activations; set compile=False"
        )
    if config.trainer == "TensorParallelTrainer" and config.compile:
        raise UserError(
            "compile=true: trainer=TensorParallelTrainer does not compile; set it to false"
        )
    for name, knob in KNOBS.items():
        if config.trainer not in knob.trainers and config[name] != defaults()[name]:
            raise UserError(
                f"{name}={config[name]}: is for trainer={' and trainer='.join(knob.trainers)};"
                f" leave {name} as it is"
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
            f"device={config.device}: a plan is for GPUs; leave it out, and set plan_gpu"
        )
    for name in ("plan_gpus", "plan_nodes", "plan_gpu_gb"):
        if config[name] is not None and not config.plan:
            raise UserError(
                f"{name}={config[name]}: is for plan=true, which trains nothing; leave it out to"
                " train"
            )
    if config.model.archive and not config.plan:  # the run that writes it may not have started
        resolve_archive(config.model.archive)
    if config.chat_template is not None:
        from plumb.data.tokenization import template_text

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
    if config.wandb.aliases is not None and (config.debug or not config.wandb.enabled):
        reason = "debug=true" if config.debug else "wandb.enabled=False"
        raise UserError(
            f"wandb.aliases={config.wandb.aliases}: is about what wandb gets, and {reason}; leave"
            " it out"
        )
    for name, off, why in (
        ("resume", "never", "would resume a run and not save it"),
        ("export", None, "has none to write"),
    ):
        if config.debug and config[name] != off:
            raise UserError(f"debug=true: writes no checkpoint, so {name}={config[name]} {why}")
    if config.resume_allow and config.resume == "never":
        raise UserError(
            f"resume_allow={list(config.resume_allow)}: nothing is resumed with resume=never; add"
            " resume=auto"
        )
    for name in config.resume_allow:
        owner = owner_of(name)
        if owner is None and name not in CONTENTS:
            others = ", ".join(CONTENTS)
            raise UserError(
                f"resume_allow={list(config.resume_allow)}: {name} is neither a knob nor one of"
                f" {others}"
            )
        if owner in KNOBS and KNOBS[owner].kind is Kind.STATE:
            raise UserError(
                f"resume_allow={list(config.resume_allow)}: {name} cannot change within a run,"
                " whose checkpoints would not fit; start another run from it with model.archive=RUN"
            )
