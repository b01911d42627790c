"""Load policy, reference, classifier and tokenizer by the options model.*, sharded or not.

Where weights come from is in weight_sources.py; whether data fits the model is in limits.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from omegaconf import DictConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plumb.console import rank0_print, to_dict
from plumb.distributed import sharding, tensor_parallel
from plumb.errors import UnsafeFile, UserError
from plumb.models import source_trust
from plumb.models.adapters import AdapterKnobs
from plumb.models.blocks import block_class
from plumb.models.forward_path import use_tree_attention
from plumb.models.limits import check_positions
from plumb.models.scalar_head import ScalarHead
from plumb.models.sharded_load import WeightSource, fill
from plumb.models.weight_files import locate
from plumb.models.weight_sources import (
    CutIfNeeded,
    FrozenCopy,
    blueprint_of,
    fill_by_transformers,
    open_adapted,
    open_files,
    open_source,
)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load_tokenizer(config: DictConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `model.tokenizer_name_or_path`, otherwise of `model.name_or_path`;
    PAD is EOS if it has none.
    """
    knob = "tokenizer_name_or_path" if config.model.tokenizer_name_or_path else "name_or_path"
    name = config.model[knob]
    with _one_line_errors(f"model.{knob}", name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            **locate(name), **source_trust.pinned(config.model, name)
        )
    source_trust.check_templates(tokenizer, f"model.{knob}={name}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(config: DictConfig) -> Any:
    """Return the transformers config of the model, by name or by `model.architecture`, with dropout
    off. Raises UserError as for weights.
    """
    spec, name = config.model, config.model.name_or_path
    with _model_errors(config):
        if spec.architecture:
            hf_config = AutoConfig.for_model(**to_dict(spec.architecture))
        else:
            place = locate(name)
            read = _config_of_gguf if "gguf_file" in place else AutoConfig.from_pretrained
            hf_config = read(**place, **source_trust.pinned(spec, name))
        source_trust.check_settings(hf_config, _origin(config))
    no_dropout(hf_config)
    return hf_config


def _config_of_gguf(pretrained_model_name_or_path: str, gguf_file: str, **_: Any) -> Any:
    """Return what AutoConfig.from_pretrained does; it parses the file's vocabulary: here, once."""
    changed = Path(pretrained_model_name_or_path, gguf_file).stat().st_mtime_ns
    return copy.deepcopy(_parsed_gguf(pretrained_model_name_or_path, gguf_file, changed))


@lru_cache(maxsize=4)
def _parsed_gguf(folder: str, file: str, changed_ns: int) -> Any:
    return AutoConfig.from_pretrained(folder, gguf_file=file)


def load_policy(
    config: DictConfig,
    device_map: Any = None,
    layout: sharding.Layout | None = None,
    scalar: bool = False,
    adapter: AdapterKnobs | None = None,
) -> PreTrainedModel:
    """Return the policy in float32 (or `model.policy_dtype`), with the weights of `model.archive`
    where one is given; with a `layout`, this rank's part of it, and no more than that was ever
    read. `scalar`: a reward model, with the scalar head that the archive or a
    sequence-classification folder has, or else a new one. `adapter`: the options of an adapter to
    train in place of the weights; without, the adapters of an archive are merged.

    Weights come from a hub name, a folder, a GGUF file or folder (dequantized), or, with
    `model.architecture`, from a seeded random initialisation. Dropout is off: in the config, which
    functional dropout reads, before the modules are built. Raises UserError, in one line, for what
    does not exist or does not match the model.
    """
    spec = config.model
    if source_trust.pinned(spec, spec.name_or_path)["trust_remote_code"]:
        rank0_print(
            f"running the code of {spec.name_or_path} at {spec.revision}, as"
            " model.trust_remote_code=true says"
        )
    hf_config = load_config(config)
    if spec.archive:
        rank0_print(f"starting from {spec.archive}")
    how = (spec, hf_config, scalar, config.seed)
    opened = open_source(*how) if adapter is None else open_adapted(*how, adapter)
    with _model_errors(config), opened as source:
        if layout is None:
            model = source.whole(device_map)
        else:
            model = _sharded(source, spec, layout)
    _check_finite(model, f"model.archive={spec.archive}" if spec.archive else _origin(config))
    use_tree_attention(model)
    return model


@torch.no_grad()
def _check_finite(model: nn.Module, what: str) -> None:
    """Raise UnsafeFile for weights that are NaN or infinite: a damaged file, or a run that
    diverged.
    """
    if bad := sharding.not_finite(model.named_parameters()):
        raise UnsafeFile(
            f"{what}: {bad} holds NaN or infinity; is the file damaged, or had its training"
            " diverged?"
        )


def load_reference(
    policy: PreTrainedModel,
    dtype: torch.dtype | None,
    config: DictConfig,
    layout: sharding.Layout | None,
) -> PreTrainedModel:
    """Return a frozen copy of the policy as it is before the first step, in its dtype unless
    `model.reference_dtype` says otherwise. Each rank copies its part of a sharded policy.
    """
    source = FrozenCopy(policy, dtype)
    return source.whole() if layout is None else _sharded(source, config.model, layout)


def check_weights(config: DictConfig, scalar: bool) -> None:
    """Compare names and shapes of the weights with the model's; values are read only to see whether
    a head is tied and, of what an adapter belongs to, whether it is that.

    Raises UserError for a policy.pt or a folder that load_policy would refuse for them, UnsafeFile
    for one that is damaged.
    """
    spec = config.model
    if spec.architecture and not spec.archive:
        return
    hf_config = load_config(config)
    with (
        _model_errors(config),
        open_source(spec, hf_config, scalar, config.seed) as source,
        suppress(NotImplementedError),
    ):
        source.in_parts()


def _sharded(source: WeightSource, spec: DictConfig, layout: sharding.Layout) -> PreTrainedModel:
    """Return the source's model sharded over the ranks, each of which reads its own part only;
    `spec`: the options model.*.
    """
    parts = CutIfNeeded(source).in_parts()
    model = parts.skeleton
    use_tree_attention(model)
    apart = [module for module in model.modules() if isinstance(module, ScalarHead)]
    if layout.tp_size > 1:
        tensor_parallel.shard_tensor_parallel(model, layout.tp_mesh, spec.tp_plan, apart)
    layout.shard(
        model,
        block_class(model, spec.block_name),
        any(p.requires_grad for p in model.parameters()),
        apart,
    )
    layout.materialise(model)
    with torch.random.fork_rng(devices=[]):
        fill(model, parts.part)
    return model


def no_dropout(hf_config: Any) -> None:
    """Set every dropout probability of a transformers config to 0 (nested configs too).

    The original code only switched off nn.Dropout modules; attention dropout in Llama and others is
    functional and stayed on.
    """
    for key, value in list(vars(hf_config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            no_dropout(value)
        elif isinstance(value, float) and ("dropout" in key or "pdrop" in key):
            setattr(hf_config, key, 0.0)


def has_scalar_head(config: DictConfig) -> bool:
    """Return whether a sequence-classification model is a causal LM whose one score per token is a
    plain matrix, so that load_policy's `scalar` can read it. Only its config is read.
    """
    hf_config = load_config(config)
    with _model_errors(config), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(hf_config)
    head = getattr(model, "score", None)
    plain_head = isinstance(head, nn.Linear) and head.bias is None and head.out_features == 1
    return plain_head and type(hf_config) in AutoModelForCausalLM._model_mapping


def load_classifier(config: DictConfig) -> PreTrainedModel:
    """Return a sequence-classification model of any class, as it is. Raises UserError, in one line,
    for what cannot be loaded.
    """
    spec = config.model
    hf_config = load_config(config)
    with (
        _model_errors(config),
        open_files(hf_config, locate(spec.name_or_path), spec.revision) as files,
    ):
        blueprint = blueprint_of(spec, hf_config)
        model, _ = fill_by_transformers(AutoModelForSequenceClassification, blueprint, files)
    _check_finite(model, _origin(config))
    return model


def _origin(config: DictConfig) -> str:
    """Return the option that says where the model comes from, and its value."""
    knob = "architecture" if config.model.architecture else "name_or_path"
    return f"model.{knob}={config.model[knob]}"


def _model_errors(config: DictConfig) -> AbstractContextManager[None]:
    knob, _, value = _origin(config).partition("=")
    return _one_line_errors(knob, value, "model")


@contextmanager
def _one_line_errors(knob: str, value: Any, what: str) -> Iterator[None]:
    """Turn what transformers and the hub raise for a name that does not resolve into one line."""
    try:
        yield
    except UnpicklingError:  # of torch.load with weights_only
        raise UnsafeFile(
            f"{knob}={value}: its weights are a pickle with more than tensors, which could run"
            " code; convert them to safetensors at their source"
        ) from None
    except (UserError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as error:  # whatever a file can make transformers, tokenizers, safetensors or the hub raise
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(str(value)).exists()
        off = " (the hub is switched off: HF_HUB_OFFLINE)" if offline else ""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
            type(error).__name__
        ]
        first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        fix = "give a hub name or a local folder"
        raise UserError(
            f"{knob}={value}: the {what} cannot be loaded{off}: {first[:200]}; {fix}"
        ) from None


def check_length(config: DictConfig) -> None:
    """Raise UserError if max_length exceeds the model's positions. Reads no weights."""
    hf_config = load_config(config)
    code = (
        {}
        if config.model.architecture
        else source_trust.pinned(config.model, config.model.name_or_path)
    )
    code = {name: value for name, value in code.items() if name != "revision"}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), **code)
    except Exception:  # what is wrong with the model is reported where it is loaded
        return
    check_positions(model, config.max_length, "max_length")


def note_coarse_weights(model: nn.Module, stochastic_rounding: bool, can_round: bool) -> None:
    """Print a note on weights that are too coarse for small learning rates. `can_round`: whether
    the run may round them stochastically.
    """
    first = next(model.parameters())
    whole = all(p.requires_grad for p in model.parameters())
    coarse = first.dtype in (torch.bfloat16, torch.float16) and not stochastic_rounding
    if whole and coarse:
        rounding = "stochastic_rounding=true keeps them on average, and " if can_round else ""
        rank0_print(
            f"note: {str(first.dtype)[6:]} weights round small updates away; {rounding}"
            "model.policy_dtype=float32 with model.fsdp_policy_mp=bfloat16 keeps them"
        )
