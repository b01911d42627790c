"""Export a policy.pt as a Hugging Face folder: safetensors, config, tokenizer, generation config
and a model card. Adapters are merged; peft_folder.py writes them as they are.

Tensors go from the memory-mapped file to the shards one at a time. A reward model becomes a
sequence-classification model, whose `score` is read at the last token that is not the pad token; so
its pad token is one that no text ends with.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jinja2 import TemplateError, TemplateSyntaxError
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from plumb.console import quiet, rank0_print, to_dict
from plumb.errors import UnsafeFile, UserError
from plumb.losses.registry import build_loss
from plumb.models.adapters import BASE, UNMERGED, holds_adapters
from plumb.models.find import ModelRef, find_model, open_model, template_of
from plumb.models.forward_path import DTYPES
from plumb.models.load import load_config, load_tokenizer
from plumb.models.model_card import card
from plumb.models.scalar_head import head_name, put_scalar_head
from plumb.models.sharded_load import ReadPart, WeightSource, parameters_on_meta
from plumb.models.weight_files import Weights
from plumb.models.weight_sources import Blueprint, PolicyFile, open_source, parts_of
from plumb.runs import durable_files
from plumb.runs.policy_file import load_policy_state
from plumb.runs.state_files import write_safetensors

GB = 10**9
PROBE = (
    "Tell me about lighthouses.\n\nThey warn ships, and they are painted so that one is told from"
    " another."
)


class Weight(NamedTuple):
    """Describe a tensor of a file."""

    name: str  # in the file
    shape: list[int]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def export(
    ref: ModelRef,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_gb: float = 5.0,
    chat_template: str | None = None,
    overwrite: bool = False,
    check: bool = False,
) -> None:
    """Write the folder `out`, which gets its name once it is complete. `dtype`: of the weights;
    None: as stored. `chat_template`: hh, a name or a file, which becomes the default of the export;
    None: the run's. The tokenizer's other named templates are kept.

    `check`: load it with transformers and compare. Raises UserError for what cannot be exported or
    written, and leaves nothing behind.
    """
    if ref.archive is None:
        raise UserError(
            f"{ref.name}: already a model's folder or name; give a policy.pt, a checkpoint or a run"
        )
    if ref.scalar and (ref.config.get("loss") or {}).get("read") == "mean":
        raise UserError(
            f"{ref.name}: it was trained with loss.read=mean, and transformers reads a score at"
            " the last token; train with loss.read=last, or score with score.py"
        )
    out = out.resolve()  # "." has no name beside which to write
    if out.exists() and not (overwrite and _replaceable(out, ref)):
        fix = "; --overwrite replaces an exported folder only" if overwrite else ", or --overwrite"
        raise UserError(f"--out {out}: already exists; give another name{fix}")
    state = load_policy_state(str(ref.archive))
    hf_config, tokenizer = load_config(ref.config), load_tokenizer(ref.config)
    set_template(tokenizer, template_of(ref, chat_template, tokenizer))
    pad = use_pad_of_its_own(tokenizer) if ref.scalar else 0
    stored = DTYPES[dtype] if dtype else stored_dtype(state)
    with _opened(ref, hf_config, state, stored) as source:
        weights = [*weights_of(ref, hf_config, source, stored, pad)]
        with durable_files.new_folder(out, "--out") as partial_out:
            hf_config.save_pretrained(partial_out)
            tokenizer.save_pretrained(partial_out)
            if not ref.scalar:
                generation_config(ref.config, hf_config, tokenizer).save_pretrained(partial_out)
            text = card(ref, hf_config, tokenizer)
            (partial_out / "README.md").write_text(text, encoding="utf-8")
            write_shards(partial_out, weights, max_shard_gb * GB)
            if check:
                compare(ref, partial_out, dtype)
    rank0_print(
        f"exported {ref.archive} to {out}: {hf_config.architectures[0]},"
        f" {sum(w.bytes for w in weights) / GB:.2f} GB"
    )


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Make a template, if one is given, the default; other named templates are kept. Raise
    UserError for one that is not valid Jinja.
    """
    if template:
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else None
        tokenizer.chat_template = template if named is None else named | {"default": template}
        check_syntax(tokenizer)


def check_syntax(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a chat template that is not valid Jinja."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error}; fix it"
        ) from None
    except TemplateError:  # its own raise_exception: it wants other turns
        pass


def _replaceable(folder: Path, ref: ModelRef) -> bool:
    """Return whether this is a model's folder that holds neither what this was trained from nor the
    policy.pt.
    """
    assert ref.archive is not None
    base = ref.config.model.name_or_path
    sources = [ref.archive, *([Path(base).expanduser()] if base else [])]
    return (folder / "config.json").is_file() and not any(
        s.resolve().is_relative_to(folder.resolve()) for s in sources
    )


def rehearse(config: DictConfig, run_dir: Path) -> None:
    """Do what export_run will do at the end of training, in a temporary folder and without weights.

    Raises UserError, with the option's name, for a model, tokenizer or place that cannot be
    exported.
    """
    out, what = run_dir / "hf", f"export={config.export}"
    if out.exists() and not (out / "config.json").is_file():
        raise UserError(f"{what}: {out} already exists and is not a model's folder; move it away")
    scalar = build_loss(to_dict(config.loss)).reads == "scores"
    ref = ModelRef(
        name=str(run_dir),
        config=config,
        archive=None,
        run_dir=run_dir,
        scalar=scalar,
    )
    hf_config, tokenizer = load_config(config), load_tokenizer(config)
    set_template(tokenizer, template_of(ref, None, tokenizer))
    if type(hf_config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"{what}: the code of this model ({hf_config.model_type}) is not part of transformers,"
            " so a folder of it cannot be read back; leave export out"
        )
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config))
    if scalar:
        put_scalar_head(model)
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there), tempfile.TemporaryDirectory() as folder:
            pad = use_pad_of_its_own(tokenizer) if scalar else 0
            state = model.state_dict(keep_vars=True)
            stored = stored_dtype(state)
            with _opened(ref, hf_config, state, stored) as source:
                for _ in weights_of(ref, hf_config, source, stored, pad):
                    pass
            hf_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if not scalar:
                generation_config(config, hf_config, tokenizer).save_pretrained(folder)
            find_model(folder)
            load_tokenizer(find_model(folder).config)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    except OSError as error:
        raise UserError(
            f"{what}: {run_dir} cannot be written ({error.strerror or error}); set local_dirs"
        ) from None
    except Exception as error:  # whatever transformers does not know how to write
        first = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"
        raise UserError(
            f"{what}: a {type(model).__name__} cannot be written as a folder ({first}); leave"
            " export out"
        ) from None


def export_run(run_dir: Path) -> None:
    """Export the newest checkpoint into the folder `hf` in a run's directory, unless it is there
    already.
    """
    ref, out = find_model(str(run_dir / "LATEST")), run_dir / "hf"
    assert ref.archive is not None
    made = out / "config.json"
    if not made.is_file() or made.stat().st_mtime < ref.archive.stat().st_mtime:
        export(ref, out, overwrite=True, check=True)


# ---- the weights ----


@contextmanager
def _opened(
    ref: ModelRef, hf_config: Any, state: Mapping[str, Tensor], stored: torch.dtype
) -> Iterator[WeightSource]:
    """Open the weights of a policy.pt that holds this state, with the adapters that it may hold
    merged into what they belong to.
    """
    if holds_adapters(state):
        spec = copy.deepcopy(ref.config.model)
        spec.policy_dtype = str(stored).removeprefix("torch.")
        with open_source(spec, hf_config, ref.scalar, ref.config.seed) as source:
            yield source
        return
    yield PolicyFile(
        Blueprint(hf_config, stored),
        Weights(state, archive=True),
        origin=f"model.archive={ref.archive}",
        fix="give the model it was trained from with --base",
    )


def weights_of(
    ref: ModelRef,
    hf_config: Any,
    source: WeightSource,
    stored: torch.dtype,
    pad: int,
) -> Iterator[Weight]:
    """Return all that the folder's files hold, by the names that transformers uses there; tied
    weights once.

    Completes `hf_config`. `stored`: the type of the weights; `pad`: a reward model's pad token.
    Raises UserError for a source that is not this model's.
    """
    parts = parts_of(source)
    model = parts.skeleton
    head = head_name(model) if ref.scalar else ""
    if ref.scalar:
        model, grown = as_classifier(model, head, hf_config, pad), {embedding_name(model)}
    else:
        grown = set[str]()
    hf_config.architectures = [type(model).__name__]
    hf_config.dtype = stored
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    # what is stored as several is read once, and written in a row
    split = lru_cache(maxsize=1)(partial(_split, model))
    for name, meta in model.state_dict(keep_vars=True).items():
        if name in tied:
            continue
        kind = torch.promote_types(stored, torch.float32) if name == "score.weight" else stored
        meta = meta.detach().to("meta", kind)
        read = partial(
            _read,
            parts.part,
            head if name == "score.weight" else name,
            kind,
            list(meta.shape) if name in grown else None,
        )
        pieces = revert_weight_conversion(model, {name: meta})
        for key, piece in pieces.items():
            yield Weight(
                key,
                list(piece.shape),
                kind,
                partial(_piece, split, name, read, key) if len(pieces) > 1 else read,
            )


def stored_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of the largest weight, since a head may have a precision of its own."""
    weights = (x for name, x in state.items() if name != BASE)
    return max(weights, key=torch.numel).dtype


def _read(part: ReadPart, name: str, dtype: torch.dtype, shape: list[int] | None) -> Tensor:
    """Return a full tensor; with `shape`, zeros are added below. Raise UnsafeFile if it is not
    finite.
    """
    tensor = part(name, ())
    if not torch.linalg.vector_norm(tensor.reshape(-1), ord=torch.inf).isfinite():
        raise UnsafeFile(
            f"{name} holds NaN or infinity; is the file damaged, or had its training diverged?"
        )
    return (
        F.pad(tensor, (0, 0, 0, shape[0] - tensor.shape[0])).to(dtype)
        if shape
        else tensor.to(dtype)
    )


def _split(model: Any, name: str, read: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return a tensor that is stored in several parts: name in the file -> part."""
    return revert_weight_conversion(model, {name: read()})


def _piece(
    split: Callable[..., dict[str, Tensor]], name: str, read: Callable[[], Tensor], key: str
) -> Tensor:
    return split(name, read)[key]


def write_shards(folder: Path, weights: list[Weight], max_bytes: float) -> None:
    """Write model.safetensors, or several files and their index if it has more than `max_bytes`."""
    shards: list[list[Weight]] = [[]]
    for weight in weights:
        if shards[-1] and sum(w.bytes for w in shards[-1]) + weight.bytes > max_bytes:
            shards.append([])
        shards[-1].append(weight)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    with tqdm(
        total=sum(w.bytes for w in weights),
        desc="exporting",
        unit="B",
        unit_scale=True,
        disable=quiet(),
    ) as progress:

        def each(shard: list[Weight]) -> Iterator[Tensor]:
            for weight in shard:
                yield weight.read()
                progress.update(weight.bytes)

        for name, shard in zip(names, shards, strict=True):
            write_safetensors(
                folder / name,
                {w.name: (w.dtype, w.shape) for w in shard},
                each(shard),
                {"format": "pt"},
            )
    if len(shards) > 1:
        places = {
            weight.name: name for name, shard in zip(names, shards, strict=True) for weight in shard
        }
        index = {"metadata": {"total_size": sum(w.bytes for w in weights)}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ---- a reward model ----


def as_classifier(model: Any, head: str, hf_config: Any, pad: int) -> Any:
    """Return the sequence-classification model with the weights of this causal LM and its head as
    `score`; without values.

    Raises UserError if transformers has none for this architecture, or one that is built
    differently.
    """
    # so that a pipeline gives the score itself, not its sigmoid
    hf_config.num_labels = 1
    hf_config.problem_type = "regression"
    hf_config.id2label = {0: "score"}
    hf_config.label2id = {"score": 0}
    hf_config.tie_word_embeddings = False
    text = hf_config.get_text_config()
    text.pad_token_id = hf_config.pad_token_id = pad
    text.vocab_size = max(text.vocab_size, pad + 1)
    try:
        with parameters_on_meta():
            made = AutoModelForSequenceClassification.from_config(copy.deepcopy(hf_config))
        same = {*made.state_dict()} - {"score.weight"} == {*model.state_dict()} - {head}
    except ValueError:
        same = False
    if not same:
        raise UserError(
            f"{type(model).__name__}: transformers has no sequence-classification model of this"
            " architecture with one `score`; a reward model of it cannot be exported"
        )
    return made


def embedding_name(model: Any) -> str:
    """Return the name of the embedding in the state dict."""
    table = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is table)


def use_pad_of_its_own(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the tokenizer a pad token that no text ends with, if PAD is EOS or UNK now. Return its
    id.

    transformers scores at the rightmost token that is not PAD: if PAD were EOS, it would score at
    the token before. A special token with "pad" in its name is used if there is one; otherwise
    [PAD] is added. Padding is on the right, which is safe for learned positions too: transformers
    counts them from the row's beginning.
    """
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id, tokenizer.unk_token_id):
        special = [
            str(t)
            for t in tokenizer.added_tokens_decoder.values()
            if t.special and "pad" in str(t).lower()
        ]
        spare = [t for t in special if t not in (tokenizer.eos_token, tokenizer.unk_token)]
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else "[PAD]"})
    tokenizer.padding_side = "right"
    return int(tokenizer.pad_token_id)


# ---- what goes with it ----


def generation_config(
    config: DictConfig, hf_config: Any, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Return the base model's generation config, if it has a valid one, with the tokenizer's EOS,
    which ends answers in training, among its end tokens.
    """
    made, spec = GenerationConfig.from_model_config(hf_config), config.model
    if not spec.architecture:
        with suppress(OSError, ValueError):
            made = GenerationConfig.from_pretrained(
                spec.name_or_path, revision=spec.revision or "main"
            )
            made.validate(strict=True)
    own = made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]
    ends = list(dict.fromkeys(t for t in (*own, tokenizer.eos_token_id) if t is not None))
    made._from_model_config = False
    made.eos_token_id = ends[0] if len(ends) == 1 else ends
    made.pad_token_id = tokenizer.pad_token_id
    made.bos_token_id = made.bos_token_id or tokenizer.bos_token_id
    return made


@torch.no_grad()
def compare(ref: ModelRef, folder: Path, dtype: str | None) -> None:
    """Raise UnsafeFile unless transformers reads the folder as the same model: logits, or scores,
    of two texts in float32. Adapters are not merged in the model it is compared with, unless the
    folder's weights are 16 bits wide, to which merging rounds. Holds one model at a time.
    """
    stored = dtype or json.loads((folder / "config.json").read_text())["dtype"]
    tokenizer = load_tokenizer(find_model(str(folder)).config)
    texts = [PROBE, PROBE.partition("\n")[0]]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], *end] for text in texts]
    config = copy.deepcopy(ref.config)
    config.model.policy_dtype = stored
    holds = holds_adapters(load_policy_state(str(ref.archive)))
    beside = UNMERGED if holds and DTYPES[stored].itemsize >= 4 else None
    original: Any = open_model(replace(ref, config=config), "cpu", beside).model.float()
    expected = [original(torch.tensor([row])).logits[0] for row in ids]
    del original
    gc.collect()  # its modules know each other
    kind = AutoModelForSequenceClassification if ref.scalar else AutoModelForCausalLM
    exported: Any = kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    if ref.scalar:
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        off = max(
            float((a - b[-1]).abs().max())
            for a, b in zip(exported(**batch).logits, expected, strict=True)
        )
    else:
        off = max(
            float((exported(torch.tensor([row])).logits[0] - b).abs().max())
            for row, b in zip(ids, expected, strict=True)
        )
    largest = max(float(b.abs().max()) for b in expected)
    if not off <= (1e-4 if beside is None else 1e-5) * max(largest, 1):
        raise UnsafeFile(
            f"--out {folder}: in transformers, the exported model computes differently (by"
            f" {off:.1g} of"
            f" {largest:.1g}); nothing is kept; please report this"
        )
    rank0_print(
        f"checked: {type(exported).__name__} loaded from the folder computes the same, to {off:.0e}"
    )
