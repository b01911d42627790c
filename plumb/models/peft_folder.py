"""Write the adapter of a policy.pt as a folder that peft reads: adapter_config.json and
adapter_model.safetensors, with the tokenizer. What it belongs to must be a model's folder or a name
on the hub.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from plumb.console import rank0_print
from plumb.errors import UnsafeFile, UserError
from plumb.models.adapters import BASE, Adapter, Factors, read_adapters
from plumb.models.find import ModelRef, open_model
from plumb.models.load import load_config, load_tokenizer
from plumb.models.sharded_load import parameters_on_meta
from plumb.runs import durable_files
from plumb.runs.lineage import start_of_archive
from plumb.runs.policy_file import load_policy_state

TOLERANCE = 1e-5  # of the largest logit


def export_adapter(ref: ModelRef, out: Path, *, overwrite: bool, check: bool) -> None:
    """Write the folder `out`, which gets its name once it is complete. Several adapters, as those
    of adapter_init=pissa or adapter_previous=stack, become one of the sum of their ranks.

    `check`: load it with peft and compare with the merged model. Raises UserError for what has no
    such form, and leaves nothing behind.
    """
    adapters = _adapters(ref)
    base = _base(ref)
    if out.exists() and not (overwrite and (out / "adapter_config.json").is_file()):
        fix = "; --overwrite replaces such a folder only" if overwrite else ", or --overwrite"
        raise UserError(f"--peft {out}: already exists; give another name{fix}")
    tokenizer = load_tokenizer(ref.config)
    with durable_files.new_folder(out, "--peft") as partial_out:
        _write(partial_out, ref, adapters, base)
        tokenizer.save_pretrained(partial_out)
        if check:
            _compare(ref, partial_out, base, tokenizer)
    rank0_print(f"exported the adapter of {ref.archive} to {out}; its base is {base}")


def _adapters(ref: ModelRef) -> list[Adapter]:
    """Return the adapters of a policy.pt. Raise UserError for what a PEFT folder cannot hold."""
    merged = "write the merged model with --out"
    state = load_policy_state(str(ref.archive)) if ref.archive else {}
    adapters = read_adapters(state, ref.name)
    if not adapters:
        raise UserError(f"{ref.name}: holds no adapter; write the model with --out")
    if ref.scalar:
        raise UserError(
            f"{ref.name}: a reward model, whose head is no part of a PEFT folder; {merged}"
        )
    if len(adapters) > 1 and any(adapter.dora for adapter in adapters):
        raise UserError(f"{ref.name}: several adapters, one of DoRA, are not one; {merged}")
    return adapters


def _base(ref: ModelRef) -> str:
    """Return the folder or name of the model that the adapters of a policy.pt belong to. Raise
    UserError if it is neither.
    """
    start = start_of_archive(str(ref.archive))
    archive = None if start is None else start.archive
    name = None if ref.config.model.architecture else ref.config.model.name_or_path
    if start is not None and start.quantize:
        raise UserError(
            f"{ref.name}: its adapter belongs to weights of model.quantize={start.quantize},"
            " which peft would not compute with; write the merged model with --out"
        )
    if archive or not name or str(name).endswith(".gguf"):
        what = archive or name or "a model of random weights"
        raise UserError(
            f"{ref.name}: its adapter belongs to {what}, which is not a model's folder or a name on"
            " the hub; write the merged model with --out"
        )
    return str(name)


def _write(folder: Path, ref: ModelRef, adapters: Sequence[Adapter], base: str) -> None:
    """Write the folder's files: all modules with one rank and scaling 1, since vLLM reads the rank
    and the scaling of all of them together, and none of a single module.
    """
    from peft import LoraConfig

    modules = sorted({name for adapter in adapters for name in adapter.modules})
    ones = {name: _as_one(name, adapters) for name in modules}
    rank = max(factors.a.shape[0] for factors in ones.values())
    ones = {name: _of_rank(rank, factors) for name, factors in ones.items()}
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(load_config(ref.config))
    linear = [name for name in modules if isinstance(model.get_submodule(name), nn.Linear)]
    tables = [name for name in modules if isinstance(model.get_submodule(name), nn.Embedding)]
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=ref.config.model.revision,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        use_dora=adapters[0].dora,
        target_modules=modules,
        fan_in_fan_out=len(linear) + len(tables) < len(modules),
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, factors in ones.items():
        stem = f"base_model.model.{name}"
        if name in tables:
            tensors |= {
                f"{stem}.lora_embedding_A": factors.a,
                f"{stem}.lora_embedding_B": factors.b,
            }
        else:
            tensors |= {f"{stem}.lora_A.weight": factors.a, f"{stem}.lora_B.weight": factors.b}
        if factors.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = factors.magnitude
    contiguous = {name: x.contiguous() for name, x in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", {"format": "pt"})


def _as_one(module: str, adapters: Sequence[Adapter]) -> Factors:
    """Return the factors of the one adapter of scaling 1 that has the effect of all those of a
    module: sum of s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...].
    """
    own = [(a.scaling, a.factors(module)) for a in adapters if module in a.modules]
    a = torch.cat([factors.a for _, factors in own])
    b = torch.cat([scaling * factors.b for scaling, factors in own], 1)
    return Factors(a, b, own[0][1].magnitude)


def _of_rank(rank: int, factors: Factors) -> Factors:
    """Return factors with the same effect and this rank, which is no lower: the rest is 0."""
    more = rank - factors.a.shape[0]
    a, b = F.pad(factors.a, (0, 0, 0, more)), F.pad(factors.b, (0, more))
    return Factors(a, b, factors.magnitude)


@torch.no_grad()
def _compare(ref: ModelRef, folder: Path, base: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UnsafeFile unless peft reads the folder as the model that merging gives: logits of a
    text in float32. Holds one model at a time.
    """
    from peft import PeftModel

    text = "Tell me about lighthouses.\n\nThey warn ships."
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    merged: Any = open_model(ref, "cpu").model.float()
    expected = merged(ids).logits
    del merged
    gc.collect()
    revision = ref.config.model.revision
    # as its run read it
    dtype = load_policy_state(str(ref.archive))[BASE].dtype
    own: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, revision=revision).float()
    with warnings.catch_warnings():  # peft asks by transformers' old name of checkpointing
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        read: Any = PeftModel.from_pretrained(own, str(folder)).eval()
    off, largest = float((read(ids).logits - expected).abs().max()), float(expected.abs().max())
    if not off <= TOLERANCE * max(largest, 1):
        raise UnsafeFile(
            f"--peft {folder}: peft reads the adapter as another one (off by {off:.1g} of"
            f" {largest:.1g}); nothing is kept; please report this"
        )
    rank0_print(f"checked: peft loads the folder and computes the same, to {off:.0e}")
