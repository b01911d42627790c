"""Load policy, reference and tokenizer: from the hub, folders, GGUF files, a policy.pt, or a seed;
sharded or not.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import transformers
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plumb.console import rank0_print, to_dict
from plumb.data.tokenization import Example, named_templates, trees_of
from plumb.distributed import sharding, tensor_parallel
from plumb.errors import UnsafeFile, UserError
from plumb.models import sharded_load, source_trust
from plumb.models.blocks import block_class
from plumb.models.forward_path import DTYPES, use_tree_attention
from plumb.models.scalar_head import (
    HEADS,
    ScalarHead,
    holds_scores,
    initial_weight,
    put_scalar_head,
    scores,
)
from plumb.models.weight_files import Weights, open_weights
from plumb.runs.policy_file import load_policy_state

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
            **_source(name), **source_trust.pinned(config.model, name)
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
            hf_config = AutoConfig.from_pretrained(
                **_source(name), **source_trust.pinned(spec, name)
            )
        source_trust.check_settings(hf_config, _origin(config))
    no_dropout(hf_config)
    return hf_config


def load_policy(
    config: DictConfig,
    device_map: Any = None,
    layout: sharding.Layout | None = None,
    scalar: bool = False,
) -> PreTrainedModel:
    """The policy in float32 (or `model.policy_dtype`), with the weights of `model.archive` where
    one is given; with a `layout`, this rank's part of it, and no more than that was ever read.
    `scalar`: a reward model, with the scalar head that the archive or a sequence-classification
    folder has, or else a new one.

    Weights come from a hub name, a folder, a GGUF file or folder (dequantised), or, with
    `model.architecture`, from a seeded random initialisation. Dropout is off: in the config, which
    functional dropout reads, before the modules are built. Raises UserError, in one line, for what
    cannot be found or does not fit.
    """
    spec = config.model
    name = config.model.name_or_path
    dtype = DTYPES[config.model.policy_dtype]
    source, code = {} if spec.architecture else _source(name), source_trust.pinned(spec, name)
    if code["trust_remote_code"]:
        rank0_print(
            f"running the code of {name} at {spec.revision}, as model.trust_remote_code=true says"
        )
    hf_config = load_config(config)
    with _model_errors(config):
        if layout is not None:
            model = _load_sharded(config, hf_config, source | code, dtype, layout, scalar)
        elif spec.archive:  # the checkpoint replaces every weight, so the base model's are not read
            rank0_print(f"starting from {spec.archive}")
            state = archive_weights(spec.archive, scalar)
            if holds_scores(state):
                model = _scorer_of_state(
                    hf_config, state, dtype, f"model.archive={spec.archive}", code
                )
            else:
                model = _from_archive(hf_config, state, dtype, device_map, spec.archive, code)
        elif scalar and is_classifier(hf_config):
            model = _scorer_of_classifier(hf_config, source | code, dtype, name)
        elif spec.architecture:
            torch.manual_seed(config.seed)
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
        elif "gguf_file" in source:
            model = _from_gguf(hf_config, source, dtype, device_map)
        else:
            model = _from_files(
                hf_config, source | code, dtype, device_map, spare=HEADS if scalar else ()
            )
    if scalar and not scores(model):
        put_scalar_head(model, config.seed)
    _check_finite(model, f"model.archive={spec.archive}" if spec.archive else _origin(config))
    if layout is None:
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
    if layout is None:
        reference: Any = copy.deepcopy(policy)
        # not buffers: rotary frequencies stay in float32, as transformers loads them
        for p in reference.parameters():
            p.data = p.data.to(dtype or p.dtype)
        return reference.eval().requires_grad_(False)
    with sharded_load.parameters_on_meta():
        reference = AutoModelForCausalLM.from_config(
            copy.deepcopy(policy.config), dtype=dtype or policy.dtype
        )
    reference.generation_config = policy.generation_config
    reference.eval().requires_grad_(False)
    use_tree_attention(reference)
    buffers = dict(policy.named_buffers())
    for name, buffer in reference.named_buffers():
        buffer.data = buffers[name].clone()
    return _placed(reference, config, layout, sharded_load.shards_source(policy))


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


# ---- loading ----


def _source(name: str) -> dict[str, Any]:
    """Return the arguments that make transformers read `name`: a hub name, a folder, or a GGUF file
    (or a folder with only that).
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.name_or_path={name}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if (
        path.is_dir()
        and not (path / "config.json").exists()
        and not (path / "tokenizer_config.json").exists()
    ):
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(
                f"model.name_or_path={name}: a folder with neither config.json nor exactly one"
                " .gguf file"
            )
        return {"pretrained_model_name_or_path": str(path), "gguf_file": files[0].name}
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"model.name_or_path={name}: no such folder")
    return {"pretrained_model_name_or_path": str(path) if path.exists() else name}


def _load_sharded(
    config: DictConfig,
    hf_config: Any,
    source: dict,
    dtype: torch.dtype,
    layout: sharding.Layout,
    scalar: bool,
) -> PreTrainedModel:
    """Return what load_policy returns without a layout, with each rank creating or reading only its
    own part.
    """
    spec, build = config.model, _builder(dtype=dtype, **_code(source))
    with ExitStack() as stack:
        try:
            if spec.archive:
                rank0_print(f"starting from {spec.archive}")
            if spec.archive or not spec.architecture:
                model, weights = _stored(config, hf_config, source, build, scalar, stack)
            else:
                with torch.random.fork_rng(devices=[]), sharded_load.Initialisation() as drawn:
                    torch.manual_seed(config.seed)
                    model = build(copy.deepcopy(hf_config))
                weights = sharded_load.seeded_source(model, drawn.of(model))
        except NotImplementedError as error:
            rank0_print(f"every process reads the whole model before it keeps its part: {error}")
            whole = load_policy(config, scalar=scalar)
            with sharded_load.parameters_on_meta():
                model = build(copy.deepcopy(whole.config))
            if scalar:
                put_scalar_head(model)
                cast(Any, model).get_output_embeddings().drawn = (
                    cast(Any, whole).get_output_embeddings().drawn
                )
            model.generation_config = whole.generation_config
            weights = sharded_load.stored_source(
                model, Weights(whole.state_dict(), archive=True), strict=True
            )
        if scalar and not scores(model):
            weights = _with_new_head(model, weights, config.seed)
        use_tree_attention(model)
        return _placed(model, config, layout, weights)


def check_weights(config: DictConfig, scalar: bool) -> None:
    """Compare names and shapes of the weights with the model's; values are read only to see whether
    a head is tied.

    Raises UserError for a policy.pt or a folder that load_policy would refuse for them, UnsafeFile
    for one that is damaged.
    """
    spec = config.model
    if spec.architecture and not spec.archive:
        return
    hf_config = load_config(config)
    source = (
        {}
        if spec.architecture
        else _source(spec.name_or_path) | source_trust.pinned(spec, spec.name_or_path)
    )
    with _model_errors(config), ExitStack() as stack, suppress(NotImplementedError):
        _stored(config, hf_config, source, _builder(**_code(source)), scalar, stack)


def _stored(
    config: DictConfig,
    hf_config: Any,
    source: dict[str, Any],
    build: Callable[[Any], PreTrainedModel],
    scalar: bool,
    stack: ExitStack,
) -> tuple[PreTrainedModel, sharded_load.Source]:
    """Return the model of a policy.pt, folder or hub name without its values, and where these are;
    files stay open in `stack`.

    Raises NotImplementedError if weights have to be computed as a whole, UserError for those of
    another model.
    """
    spec = config.model
    try:
        if spec.archive:
            stored = archive_weights(spec.archive, scalar)
            model = sharded_load.blank(hf_config, stored, build)
            if holds_scores(stored):
                put_scalar_head(model)
            return model, sharded_load.stored_source(model, stored, strict=True)
        if "gguf_file" in source:
            raise NotImplementedError("GGUF is dequantized as a whole")
        if scalar and is_classifier(hf_config):
            raise NotImplementedError("its score is renamed as a whole")
        if getattr(hf_config, "quantization_config", None) is not None:
            raise NotImplementedError("its weights are quantized")
        stored = stack.enter_context(_opened(hf_config, source))
        model = sharded_load.blank(hf_config, stored, build)
        _read_generation_config(model, source)
        spare = {f"{head}.weight" for head in HEADS} if scalar else set[str]()
        return model, sharded_load.stored_source(model, stored, strict=False, apart=spare)
    except sharded_load.WeightMismatch as error:
        if spec.archive:
            raise UserError(
                f"model.archive={spec.archive}: {error}; give the model it was trained from"
            ) from None
        raise UserError(
            f"model.name_or_path={spec.name_or_path}: {error}; give a complete causal LM"
        ) from None


def _with_new_head(
    model: PreTrainedModel, weights: sharded_load.Source, seed: int
) -> sharded_load.Source:
    """Give a model without values a scalar head, and a source that knows the head's first
    values.
    """
    head = put_scalar_head(model)
    new: Any = model.get_output_embeddings()
    new.drawn = True
    first = initial_weight(new.in_features, seed)
    return lambda name, where: first[where] if name == head else weights(name, where)


def _placed(
    model: PreTrainedModel,
    config: DictConfig,
    layout: sharding.Layout,
    weights: sharded_load.Source,
) -> PreTrainedModel:
    """Return a model without values, sharded over the ranks and filled."""
    apart = [module for module in model.modules() if isinstance(module, ScalarHead)]
    if layout.tp_size > 1:
        tensor_parallel.shard_tensor_parallel(model, layout.tp_mesh, config.model.tp_plan, apart)
    layout.shard(
        model,
        block_class(model, config.model.block_name),
        next(model.parameters()).requires_grad,
        apart,
    )
    layout.materialise(model)
    with torch.random.fork_rng(devices=[]):
        sharded_load.fill(model, weights)
    return model


def _builder(**options: Any) -> Callable[[Any], PreTrainedModel]:
    """Return a function that builds a causal LM from a config."""
    return lambda hf_config: AutoModelForCausalLM.from_config(hf_config, **options)


def _code(source: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for transformers that say whether a model's own code is run."""
    return {k: source[k] for k in ("code_revision", "trust_remote_code") if k in source}


def _opened(hf_config: Any, source: dict[str, Any]) -> AbstractContextManager[Weights]:
    """Open the weights of a folder or hub name within the context."""
    explicit = getattr(hf_config, "transformers_weights", None)
    return open_weights(source["pretrained_model_name_or_path"], source.get("revision"), explicit)


def _read_generation_config(model: PreTrainedModel, source: dict[str, Any]) -> None:
    """Read the generation config as transformers does for a folder or hub name: from
    generation_config.json, otherwise from config.json.
    """
    name, revision = source["pretrained_model_name_or_path"], source.get("revision") or "main"
    with suppress(OSError):
        try:
            model.generation_config = GenerationConfig.from_pretrained(name, revision=revision)
        except OSError:
            model.generation_config = GenerationConfig.from_pretrained(
                name, config_file_name="config.json", revision=revision, _from_model_config=True
            )


def _filled(
    auto: Any,
    hf_config: Any,
    stored: Weights,
    dtype: torch.dtype,
    code: dict[str, Any],
    device_map: Any = None,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Return a model of the class that `auto` chooses, filled by transformers with these weights,
    and transformers' report.

    transformers gets tensors and no name, so that it opens no file.
    """
    with torch.device("meta"):
        kind = type(auto.from_config(copy.deepcopy(hf_config), **code))
    model, info = kind.from_pretrained(
        None,
        config=hf_config,
        state_dict=stored,
        dtype=dtype,
        device_map=device_map,
        output_loading_info=True,
    )
    model.config.name_or_path = hf_config.name_or_path
    return model, info


def _from_files(
    hf_config: Any,
    source: dict[str, Any],
    dtype: torch.dtype,
    device_map: Any,
    spare: Iterable[str],
) -> PreTrainedModel:
    """Return the causal LM of a folder or hub name. `spare`: heads that may be missing, since they
    are about to be replaced.
    """
    name = source["pretrained_model_name_or_path"]
    with _opened(hf_config, source) as stored:
        sharded_load.blank(hf_config, stored, _builder(**_code(source)))
        model, info = _filled(
            AutoModelForCausalLM, hf_config, stored, dtype, _code(source), device_map
        )
    # which transformers drew at random
    if absent := sorted({*info["missing_keys"]} - {f"{head}.weight" for head in spare}):
        raise UserError(
            f"model.name_or_path={name}: its files hold no {absent[0]} ({len(absent)} are missing),"
            f" so it is not a complete {type(model).__name__}; give a causal LM"
        )
    _read_generation_config(model, source)
    return model


def _from_gguf(
    hf_config: Any, source: dict[str, Any], dtype: torch.dtype, device_map: Any
) -> PreTrainedModel:
    """Return a GGUF file's model, dequantized."""
    folder = source["pretrained_model_name_or_path"]
    if (Path(folder) / "adapter_config.json").exists():
        raise UserError(
            f"model.name_or_path={folder}: transformers would read adapter_config.json beside the"
            " GGUF file; move the GGUF file to a folder of its own"
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source, config=hf_config, dtype=dtype, device_map=device_map, output_loading_info=True
    )
    model, info = loaded
    if absent := sorted(info["missing_keys"]):
        raise UserError(
            f"model.name_or_path={folder}: the GGUF file holds no {absent[0]} ({len(absent)} are"
            " missing)"
        )
    return _plain(model)


def archive_weights(archive: str, scalar: bool) -> Weights:
    """Return a policy.pt's weights. Raise UserError for a reward model's if a policy is needed."""
    state = Weights(load_policy_state(archive), archive=True)
    if holds_scores(state) and not scalar:
        raise UserError(
            f"model.archive={archive}: a reward model, which has no LM head; give a"
            " policy's, or loss=reward"
        )
    return state


def _from_archive(
    hf_config: Any,
    state: Weights,
    dtype: torch.dtype,
    device_map: Any,
    archive: str,
    code: dict[str, Any],
) -> PreTrainedModel:
    """Return a model with exactly these weights; transformers renames what it has renamed since
    2023 (GPT-NeoX's embed_out).
    """
    blank = sharded_load.blank(hf_config, state, _builder(**_code(code)))
    try:
        sharded_load.stored_source(blank, state, strict=True)
    except sharded_load.WeightMismatch as error:
        raise UserError(
            f"model.archive={archive}: {error}; give the model it was trained from"
        ) from None
    return _filled(AutoModelForCausalLM, hf_config, state, dtype, _code(code), device_map)[0]


def is_classifier(hf_config: Any) -> bool:
    """Return whether this is the config of a sequence-classification model: an exported reward
    model, or any other.
    """
    return any(
        str(name).endswith("ForSequenceClassification")
        for name in getattr(hf_config, "architectures", None) or ()
    )


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
    spec, name = config.model, config.model.name_or_path
    hf_config = load_config(config)
    with _model_errors(config):
        source = _source(name) | source_trust.pinned(spec, name)
        with _opened(hf_config, source) as stored:
            dtype = DTYPES[spec.policy_dtype]
            model, info = _filled(
                AutoModelForSequenceClassification, hf_config, stored, dtype, _code(source)
            )
    _check_finite(model, _origin(config))
    return model


def _scorer_of_state(
    hf_config: Any,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    origin: str,
    code: dict[str, Any],
) -> PreTrainedModel:
    """Return a reward model with exactly these weights, its head in float32."""
    with sharded_load.parameters_on_meta():
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, **_code(code))
    head = put_scalar_head(model)
    try:
        kind = torch.promote_types(dtype, torch.float32)
        model.load_state_dict(
            {k: v.to(kind if k == head else dtype, copy=True) for k, v in state.items()},
            assign=True,
        )
    except RuntimeError as error:
        problem = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(
            f"{origin}: not the weights of this {type(model).__name__} as a reward model "
            f"({problem[0].strip()[:150]}); give the model it was trained from"
        ) from None
    return model


def _scorer_of_classifier(
    hf_config: Any, source: dict[str, Any], dtype: torch.dtype, name: str
) -> PreTrainedModel:
    """Return a Hugging Face sequence-classification model with one score as a causal LM with a
    scalar head: `score` is the head.
    """
    with _opened(hf_config, source) as stored:
        donor, _ = _filled(
            AutoModelForSequenceClassification, hf_config, stored, dtype, _code(source)
        )
    state = donor.state_dict()
    score = state.pop("score.weight", None)
    if score is None or score.shape[0] != 1 or "score.bias" in state:
        raise UserError(
            f"model.name_or_path={name}: a {type(donor).__name__} without exactly one score of its"
            " last token; give a causal LM, or a reward model with num_labels=1"
        )
    with torch.device("meta"):
        head = put_scalar_head(AutoModelForCausalLM.from_config(copy.deepcopy(hf_config)))
    return _scorer_of_state(
        hf_config, state | {head: score}, dtype, f"model.name_or_path={name}", _code(source)
    )


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same weights without the GGUF quantization record, with which transformers refuses
    to save or copy a model.
    """
    hf_config = copy.deepcopy(model.config)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        hf_config.tie_word_embeddings = False
    if hasattr(hf_config, "quantization_config"):
        del hf_config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(hf_config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    # non-persistent ones (rotary frequencies) are not in the state dict
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        plain.get_submodule(parent).register_buffer(leaf, buffer, persistent=False)
    plain.generation_config = model.generation_config
    return plain


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


def check_vocabulary(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    highest: int,
    name: str,
    examples: Iterable[Example] = (),
) -> None:
    """Raise UserError when the data's highest token id has no embedding; a PAD without one is
    replaced (see `pad_within`).
    """
    n = policy.get_input_embeddings().weight.shape[0]
    pad_within(policy, tokenizer)
    if highest < n:
        return
    token = tokenizer.convert_ids_to_tokens(highest)
    rows = ((e.source, [*tree[1], tree[0]]) for e in examples for tree in trees_of(e))
    first = next(
        (f", first in {source}" for source, ids in rows if any((x == highest).any() for x in ids)),
        "",
    )
    where = "which occurs in the data"
    if any(str(token) in text for text in named_templates(tokenizer).values()):
        where = "which its chat template writes"
    if highest == tokenizer.bos_token_id:
        where = "its BOS, which begins every prompt"
    if highest == tokenizer.eos_token_id:
        where = "its EOS, which ends every response"
    raise UserError(
        f"model.name_or_path={name}: the model has {n:,} tokens, ids 0 to {n - 1:,}, but its"
        f" tokenizer produces id {highest:,}: {token!r}, {where}{first}; give the model's own"
        " tokenizer, or add the token to the model's embeddings"
    )


def pad_within(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with EOS where PAD has no embedding in the model: padding is masked wherever it
    stands.
    """
    n, pad = model.get_input_embeddings().weight.shape[0], tokenizer.pad_token_id
    if pad is not None and pad >= n:
        rank0_print(
            f"note: PAD ({tokenizer.pad_token!r}, number {pad:,}) has no embedding in the model,"
            f" which has {n:,} tokens; EOS is used for padding instead, and masked"
        )
        tokenizer.pad_token = tokenizer.eos_token


def positions_of(model: Any) -> tuple[int, str] | None:
    """Return the number of positions a model was made for, and what limits them; None if nothing
    does.

    Positions are a table ("learned", or computed once), or rotary, which beyond their length
    compute what was never trained. ALiBi, relative positions and state-space models have no limit.
    """
    spec = model.config.get_text_config()
    n = getattr(spec, "max_position_embeddings", None) or getattr(spec, "max_seq_len", None)
    rotary = dict(getattr(spec, "rope_parameters", None) or {})
    if (
        not isinstance(n, int)
        or getattr(spec, "alibi", False)
        or getattr(spec, "position_embedding_type", "") == "nope"
    ):
        return None
    tokens = model.get_input_embeddings().weight
    tables = [*model.named_parameters(), *model.named_buffers()]
    named = ((p.shape[0], name.lower()) for name, p in tables if p is not tokens and p.ndim == 2)
    if any(rows >= n and ("wpe" in name or "pos" in name) for rows, name in named):
        return n, "a table of positions"
    if not rotary:
        return None
    kinds = [rotary, *(each for each in rotary.values() if isinstance(each, dict))]
    stretched = [
        (kind.get("original_max_position_embeddings") or n) * (kind.get("factor") or 1)
        for kind in kinds
    ]
    return max(n, *map(int, stretched)), "rotary positions"


def check_positions(model: Any, longest: int, knob: str) -> None:
    """Raise UserError if a model has fewer positions than texts may have tokens; `knob`: what says
    how many.
    """
    known = positions_of(model)
    if known and longest > known[0]:
        n, kind = known
        more = (
            ", or give its config.json rope_parameters that reach further"
            if kind.startswith("rotary")
            else ""
        )
        raise UserError(
            f"{knob}={longest}: the model has {n:,} positions ({kind}); give {knob}={n} or"
            f" less{more}"
        )


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
    except Exception:  # what is wrong with the model is said where it is loaded
        return
    check_positions(model, config.max_length, "max_length")


def describe(model: nn.Module, config: DictConfig) -> None:
    """Print what is trained, and a note on weights that are too coarse for small learning rates."""
    n = sum(p.numel() for p in model.parameters())
    first = next(model.parameters())
    kind = type(model).__name__.removeprefix("FSDP")
    rank0_print(
        f"policy: {kind}, {n / 1e6:,.1f} M parameters, {str(first.dtype)[6:]}, {config.trainer}"
    )
    if first.dtype in (torch.bfloat16, torch.float16):
        rank0_print(
            f"note: {str(first.dtype)[6:]} weights round small updates away;"
            " model.policy_dtype=float32 with model.fsdp_policy_mp=bfloat16 keeps them"
        )
