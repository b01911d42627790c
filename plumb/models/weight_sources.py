"""Where a model's weights come from, one class for each kind: the files of a folder or hub name, a
GGUF file, a policy.pt, a sequence-classification folder, a seed, another model.

Loading, sharding and exporting use what all of them offer (WeightSource) and never ask for the
kind. A source can wrap another one: NewHead, CutFromWhole, and those of adapter_sources.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from plumb.console import rank0_print, to_dict
from plumb.errors import UserError
from plumb.models import source_trust
from plumb.models.adapter_sources import Adapted, Merged, Rounded, SameBase, WithHead
from plumb.models.adapters import (
    BASE,
    Adapter,
    AdapterKnobs,
    adapters_of,
    base_name,
    holds_adapters,
    inject,
    read_adapters,
)
from plumb.models.forward_path import DTYPES
from plumb.models.quantized_base import (
    Dequantized,
    check_bitsandbytes,
    quantize_layer,
    quantized_layers,
)
from plumb.models.scalar_head import (
    HEADS,
    holds_scores,
    initial_weight,
    is_head,
    put_scalar_head,
    scores,
)
from plumb.models.sharded_load import (
    Initialisation,
    Parts,
    WeightMismatch,
    WeightSource,
    blank,
    parameters_on_meta,
    seeded_parts,
    sharded_parts,
    stored_parts,
)
from plumb.models.weight_files import Weights, locate, open_weights
from plumb.runs.lineage import Start, start_of_archive
from plumb.runs.policy_file import load_policy_state


@dataclass(frozen=True)
class Blueprint:
    """Describe the causal LM that weights are for.

    `hf_config` is corrected by a source whose files hold a head apart from the embedding, so that
    what is built or saved with it later has them separate, too.
    """

    hf_config: Any
    dtype: torch.dtype
    # what transformers is told about the code of a model's repository
    code: Mapping[str, Any] = field(default_factory=dict)

    def build(self, hf_config: Any) -> PreTrainedModel:
        """Return a causal LM of this config, usually a copy of `self.hf_config`."""
        return AutoModelForCausalLM.from_config(hf_config, dtype=self.dtype, **self.code)


def blueprint_of(spec: DictConfig, hf_config: Any) -> Blueprint:
    """Return the blueprint of the model that the options `spec` (model.*) name."""
    pins = source_trust.pinned(spec, spec.name_or_path)
    code = {key: value for key, value in pins.items() if key != "revision"}
    return Blueprint(hf_config, DTYPES[spec.policy_dtype], code)


@contextmanager
def open_source(
    spec: DictConfig, hf_config: Any, scalar: bool, seed: int
) -> Iterator[WeightSource]:
    """Open the weights that the options `spec` (model.*) name; files stay open within the context.

    `scalar`: of a reward model; `seed`: of a new scalar head and of random weights. Raises
    UserError for weights that do not exist, UnsafeFile for files that are damaged.
    """
    with ExitStack() as stack:
        source = _source_of(spec, hf_config, scalar, seed, stack)
        yield NewHead(source, seed) if scalar else source


@contextmanager
def open_adapted(
    spec: DictConfig, hf_config: Any, scalar: bool, seed: int, knobs: AdapterKnobs
) -> Iterator[WeightSource]:
    """Open the weights that the options `spec` (model.*) name, with adapters by `knobs`; otherwise
    as `open_source`.
    """
    with ExitStack() as stack:
        previous: list[Adapter] = []
        # what is quantized here stays so
        spec = cast(DictConfig, OmegaConf.merge(spec, {"quantize": None}))
        if knobs.previous == "merge":
            source = _source_of(spec, hf_config, scalar, seed, stack)
        else:
            state = load_archive(spec.archive, scalar) if spec.archive else Weights()
            if not holds_adapters(state):
                raise UserError(
                    f"adapter_previous={knobs.previous}: model.archive={spec.archive} holds no"
                    " adapter; leave adapter_previous as it is"
                )
            source, previous = _base_of(spec, state, hf_config, scalar, seed, stack)
        if scalar:
            source = NewHead(source, seed)
        yield Adapted(
            source=CutIfNeeded(source),
            knobs=knobs,
            block_name=spec.block_name,
            seed=seed,
            previous=previous,
        )


def _source_of(
    spec: DictConfig, hf_config: Any, scalar: bool, seed: int, stack: ExitStack
) -> WeightSource:
    """Return the source of a model's own weights, as quantized layers compute with them where
    `spec` says so; `stack` closes its files.

    `spec.dtypes`, if it has such: the types that the weights had before `policy_dtype`, one after
    the other.
    """
    first, *others = [*_types(spec, "dtypes"), spec.policy_dtype]
    spec = _with(spec, policy_dtype=first, dtypes=())
    source = _full_source_of(spec, hf_config, scalar, seed, stack)
    if spec.get("quantize"):
        check_bitsandbytes(spec.quantize)
        source = Dequantized(source, spec.quantize, spec.block_name)
    return _rounded(source, first, others)


def _types(spec: DictConfig, name: str) -> list[str]:
    """Return what `spec` has as `dtypes` or `base_dtypes`: the types that its weights, or those
    that its adapters belong to, had before.
    """
    return list(spec.get(name) or [])


def _with(spec: DictConfig, **values: Any) -> DictConfig:
    """Return the options `spec` (model.*) with these values, some of which may be no options."""
    return OmegaConf.create(to_dict(spec) | values)


def _rounded(source: WeightSource, dtype: str, others: Sequence[str]) -> WeightSource:
    """Return a source whose weights are of the type `dtype`, rounded to each of the others in
    turn.
    """
    for before, after in pairwise((dtype, *others)):
        if before != after:
            source = Rounded(source, DTYPES[after])
    return source


def _full_source_of(
    spec: DictConfig, hf_config: Any, scalar: bool, seed: int, stack: ExitStack
) -> WeightSource:
    blueprint = blueprint_of(spec, hf_config)
    if spec.archive:  # if it holds every weight, the base model's are not read
        state = load_archive(spec.archive, scalar)
        if holds_adapters(state):
            source, adapters = _base_of(spec, state, hf_config, scalar, seed, stack)
            return Merged(source, adapters, f"model.archive={spec.archive}")
        return PolicyFile(
            blueprint,
            state,
            origin=f"model.archive={spec.archive}",
            fix="give the model it was trained from",
        )
    if spec.architecture:
        return Seeded(blueprint, seed)
    place = locate(spec.name_or_path)
    if "gguf_file" in place:
        return GgufFile(blueprint, place)
    files = stack.enter_context(open_files(hf_config, place, spec.revision))
    if scalar and is_classifier(hf_config):
        return Classifier(blueprint, files, spec.name_or_path)
    quantized = getattr(hf_config, "quantization_config", None) is not None
    kind = QuantizedFiles if quantized else ModelFiles
    return kind(
        blueprint,
        files,
        name=place["pretrained_model_name_or_path"],
        revision=spec.revision,
        # the heads that are about to be replaced
        spare=frozenset(f"{head}.weight" for head in HEADS) if scalar else frozenset(),
    )


def _base_of(
    spec: DictConfig,
    state: Weights,
    hf_config: Any,
    scalar: bool,
    seed: int,
    stack: ExitStack,
) -> tuple[WeightSource, list[Adapter]]:
    """Return the source of what the adapters of a policy.pt belong to, and these adapters. `state`:
    that file's, which `spec` names as its archive.

    The root of all runs that led to it is the model that `spec` names, wherever it was at the time.
    The base is read in the type that it had in the run, and is compared in it.
    """
    origin = f"model.archive={spec.archive}"
    adapters = read_adapters(state, origin)
    dtype = str(state[BASE].dtype).removeprefix("torch.")
    start = start_of_archive(spec.archive) or Start(None, None, (dtype,), seed)
    base = _with(
        spec,
        archive=start.archive,
        quantize=start.quantize,
        policy_dtype=dtype,
        dtypes=start.dtypes,
        base_dtypes=(),
    )
    source = _source_of(base, hf_config, scalar, start.seed, stack)
    name = start.archive or (None if spec.architecture else spec.name_or_path)
    source = SameBase(
        source,
        adapters,
        expected=state[BASE],
        origin=origin,
        base=name or f"random weights of seed {start.seed}",
    )
    source = _rounded(source, dtype, [*_types(spec, "base_dtypes"), spec.policy_dtype])
    if holds_scores(state):
        (head,) = (tensor for name, tensor in state.items() if is_head(name))
        source = WithHead(source, head)
    return source, adapters


@contextmanager
def open_files(hf_config: Any, place: Mapping[str, Any], revision: str | None) -> Iterator[Weights]:
    """Open the weight files of a folder or hub name (see `locate`) within the context."""
    explicit = getattr(hf_config, "transformers_weights", None)
    with open_weights(place["pretrained_model_name_or_path"], revision, explicit) as files:
        yield files


def is_classifier(hf_config: Any) -> bool:
    """Return whether this is the config of a sequence-classification model: an exported reward
    model, or any other.
    """
    return any(
        str(name).endswith("ForSequenceClassification")
        for name in getattr(hf_config, "architectures", None) or ()
    )


# ---- files of a folder or hub name ----


@dataclass(frozen=True)
class ModelFiles:
    """Read the weight files of a causal LM's folder or hub name."""

    blueprint: Blueprint
    files: Weights
    name: str
    revision: str | None
    spare: frozenset[str]  # names that may be missing

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        blank(self.blueprint.hf_config, self.files, self.blueprint.build)
        model, report = fill_by_transformers(
            AutoModelForCausalLM, self.blueprint, self.files, device_map
        )
        # which transformers drew at random
        if absent := sorted({*report["missing_keys"]} - self.spare):
            raise UserError(
                f"model.name_or_path={self.name}: its files hold no {absent[0]} ({len(absent)} are"
                f" missing), so it is not a complete {type(model).__name__}; give a causal LM"
            )
        self._read_generation_config(model)
        return model

    def in_parts(self) -> Parts:
        try:
            model = blank(self.blueprint.hf_config, self.files, self.blueprint.build)
            self._read_generation_config(model)
            return Parts(model, stored_parts(model, self.files, strict=False, apart=self.spare))
        except WeightMismatch as error:
            raise UserError(
                f"model.name_or_path={self.name}: {error}; give a complete causal LM"
            ) from None

    def _read_generation_config(self, model: PreTrainedModel) -> None:
        """Read the generation config as transformers does for a folder or hub name: from
        generation_config.json, otherwise from config.json.
        """
        revision = self.revision or "main"
        with suppress(OSError):
            try:
                model.generation_config = GenerationConfig.from_pretrained(
                    self.name, revision=revision
                )
            except OSError:
                model.generation_config = GenerationConfig.from_pretrained(
                    self.name,
                    config_file_name="config.json",
                    revision=revision,
                    _from_model_config=True,
                )


class QuantizedFiles(ModelFiles):
    """Read quantized weights, which transformers unpacks."""

    def in_parts(self) -> Parts:
        raise NotImplementedError("its weights are quantized")


@dataclass(frozen=True)
class GgufFile:
    """Read a GGUF file, dequantized."""

    blueprint: Blueprint
    place: Mapping[str, Any]  # its folder and name, as transformers takes them (see `locate`)

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        folder = self.place["pretrained_model_name_or_path"]
        if (Path(folder) / "adapter_config.json").exists():
            raise UserError(
                f"model.name_or_path={folder}: transformers would read adapter_config.json beside"
                " the GGUF file; move the GGUF file to a folder of its own"
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **self.place,
            config=self.blueprint.hf_config,
            dtype=self.blueprint.dtype,
            device_map=device_map,
            output_loading_info=True,
        )
        model, report = loaded
        if absent := sorted(report["missing_keys"]):
            raise UserError(
                f"model.name_or_path={folder}: the GGUF file holds no {absent[0]} ({len(absent)}"
                " are missing)"
            )
        return _without_quantization_record(model)

    def in_parts(self) -> Parts:
        raise NotImplementedError("GGUF is dequantized as a whole")


def _without_quantization_record(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same weights without the record of GGUF quantization, with which transformers
    refuses to save or copy a model.
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


def fill_by_transformers(
    auto: Any, blueprint: Blueprint, weights: Weights, device_map: Any = None
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Return a model of the class that `auto` chooses, filled by transformers with these weights,
    and transformers' report.

    transformers gets tensors and no name, so that it opens no file.
    """
    hf_config = blueprint.hf_config
    with torch.device("meta"):
        kind = type(auto.from_config(copy.deepcopy(hf_config), **blueprint.code))
    model, report = kind.from_pretrained(
        None,
        config=hf_config,
        state_dict=weights,
        dtype=blueprint.dtype,
        device_map=device_map,
        output_loading_info=True,
    )
    model.config.name_or_path = hf_config.name_or_path
    return model, report


# ---- a policy.pt ----


def load_archive(archive: str, scalar: bool) -> Weights:
    """Return a policy.pt's weights. Raise UserError for a reward model's if a policy is needed."""
    state = Weights(load_policy_state(archive), archive=True)
    if holds_scores(state) and not scalar:
        raise UserError(
            f"model.archive={archive}: a reward model, which has no LM head; give a"
            " policy's, or loss=reward"
        )
    return state


@dataclass(frozen=True)
class PolicyFile:
    """Read a policy.pt, of a policy or of a reward model. It holds exactly the model's weights, by
    their present names or by those of 2023, which transformers renames (GPT-NeoX's embed_out).
    """

    blueprint: Blueprint
    state: Weights
    origin: str  # how to call the file in an error
    fix: str  # what to do about one that does not match the model

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        if holds_scores(self.state):
            return _reward_model(self.blueprint, self.state, self.origin)
        self.in_parts()  # compares names and shapes
        return fill_by_transformers(AutoModelForCausalLM, self.blueprint, self.state, device_map)[0]

    def in_parts(self) -> Parts:
        try:
            model = blank(self.blueprint.hf_config, self.state, self.blueprint.build)
            if holds_scores(self.state):
                put_scalar_head(model)
            return Parts(model, stored_parts(model, self.state, strict=True))
        except WeightMismatch as error:
            raise UserError(f"{self.origin}: {error}; {self.fix}") from None


# ---- reward models ----


@dataclass(frozen=True)
class Classifier:
    """Read a Hugging Face sequence-classification model with one score as a causal LM with a scalar
    head: `score` is the head.
    """

    blueprint: Blueprint
    files: Weights
    name: str

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        donor, _ = fill_by_transformers(
            AutoModelForSequenceClassification, self.blueprint, self.files
        )
        state = donor.state_dict()
        score = state.pop("score.weight", None)
        if score is None or score.shape[0] != 1 or "score.bias" in state:
            raise UserError(
                f"model.name_or_path={self.name}: a {type(donor).__name__} without exactly one"
                " score of its last token; give a causal LM, or a reward model with num_labels=1"
            )
        with torch.device("meta"):
            hf_config = copy.deepcopy(self.blueprint.hf_config)
            head = put_scalar_head(AutoModelForCausalLM.from_config(hf_config))
        origin = f"model.name_or_path={self.name}"
        return _reward_model(self.blueprint, state | {head: score}, origin)

    def in_parts(self) -> Parts:
        raise NotImplementedError("its score is renamed as a whole")


def _reward_model(
    blueprint: Blueprint, state: Mapping[str, Tensor], origin: str
) -> PreTrainedModel:
    """Return a reward model with exactly these weights, its head in float32 or float64."""
    with parameters_on_meta():
        model = blueprint.build(blueprint.hf_config)
    head = put_scalar_head(model)
    dtype = blueprint.dtype
    of_head = torch.promote_types(dtype, torch.float32)
    try:
        model.load_state_dict(
            {k: v.to(of_head if k == head else dtype, copy=True) for k, v in state.items()},
            assign=True,
        )
    except RuntimeError as error:
        problem = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(
            f"{origin}: not the weights of this {type(model).__name__} as a reward model "
            f"({problem[0].strip()[:150]}); give the model it was trained from"
        ) from None
    return model


@dataclass(frozen=True)
class NewHead:
    """Put a new scalar head, drawn from a seed, on a model that has none."""

    source: WeightSource
    seed: int

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        model = self.source.whole(device_map)
        if not scores(model):
            put_scalar_head(model, self.seed)
        return model

    def in_parts(self) -> Parts:
        parts = self.source.in_parts()
        model = parts.skeleton
        if scores(model):
            return parts
        head = put_scalar_head(model)
        new: Any = model.get_output_embeddings()
        new.drawn = True
        first = initial_weight(new.in_features, self.seed)
        return Parts(
            model, lambda name, where: first[where] if name == head else parts.part(name, where)
        )


# ---- without files ----


@dataclass(frozen=True)
class Seeded:
    """Draw random weights from a seed, as the model's construction does."""

    blueprint: Blueprint
    seed: int

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        torch.manual_seed(self.seed)
        return self.blueprint.build(self.blueprint.hf_config)

    def in_parts(self) -> Parts:
        with torch.random.fork_rng(devices=[]), Initialisation() as drawn:
            torch.manual_seed(self.seed)
            model = self.blueprint.build(copy.deepcopy(self.blueprint.hf_config))
        return Parts(model, seeded_parts(model, drawn.of(model)))


@dataclass(frozen=True)
class FrozenCopy:
    """Copy another model, frozen: in `dtype`, or with None in the dtype that it has."""

    model: PreTrainedModel
    dtype: torch.dtype | None

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        made: Any = copy.deepcopy(self.model)
        # not buffers: rotary frequencies stay in float32, as transformers loads them
        for p in made.parameters():
            p.data = p.data.to(self.dtype or p.dtype)
        return made.eval().requires_grad_(False)

    def in_parts(self) -> Parts:
        """Return the parts that this rank has of a sharded model, whatever `where` says."""
        made = frozen_skeleton(self.model, self.dtype)
        return Parts(made, sharded_parts(self.model))


def frozen_skeleton(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return a frozen model like this one, adapters and quantized layers included, which may be
    sharded: parameters on the meta device, of this dtype or with None of those that they have, and
    copies of its buffers.
    """
    with parameters_on_meta():
        made = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), dtype=dtype or model.dtype
        )
    for name, layer in quantized_layers(model).items():
        # dequantized in the type that it has in the model, and then rounded as there
        own = base_name(f"{name}.weight").removesuffix(".weight")
        quantize_layer(made, own, layer.kind).dtype = layer.dtype
    if adapters := adapters_of(model):
        inject(made, adapters)
        for p in made.parameters():
            if p.is_floating_point():
                p.data = p.data.to(dtype or p.dtype)
    made.generation_config = model.generation_config
    made.eval().requires_grad_(False)
    buffers = dict(model.named_buffers())
    for name, buffer in made.named_buffers():
        buffer.data = buffers[name].clone()
    return made


@dataclass(frozen=True)
class CutFromWhole:
    """Cut parts from the whole model, for a source that cannot give them: every process holds all
    of it until its own part is filled.
    """

    source: WeightSource

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        return self.source.whole(device_map)

    def in_parts(self) -> Parts:
        full: Any = self.source.whole()
        with parameters_on_meta():
            model: Any = type(full)._from_config(copy.deepcopy(full.config), dtype=full.dtype)
        if scores(full):
            put_scalar_head(model)
            model.get_output_embeddings().drawn = full.get_output_embeddings().drawn
        model.generation_config = full.generation_config
        state = Weights(full.state_dict(), archive=True)
        return Parts(model, stored_parts(model, state, strict=True))


@dataclass(frozen=True)
class CutIfNeeded:
    """Give the parts of any source: cut from the whole model where it cannot give them, with a note
    that says so.
    """

    source: WeightSource

    def whole(self, device_map: Any = None) -> PreTrainedModel:
        return self.source.whole(device_map)

    def in_parts(self) -> Parts:
        note = "every process reads the whole model before it keeps its part: {}"
        return parts_of(self.source, note)


def parts_of(source: WeightSource, note: str | None = None) -> Parts:
    """Return the parts of a source; cut from the whole model where it cannot give them, which a
    `note` says, with the reason in it.
    """
    try:
        return source.in_parts()
    except NotImplementedError as error:
        if note is not None:
            rank0_print(note.format(error))
        return CutFromWhole(source).in_parts()
