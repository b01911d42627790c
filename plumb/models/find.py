"""Find a model by whatever name its user has for it: a name on the hub, a folder, a .gguf file, a
run, one of its checkpoints, a policy.pt.

The commands other than train.py open models with this. What a policy.pt does not say (architecture,
tokenizer) comes from the config.yaml of its run, ours or the original repository's, or from the
`base` that the user gives.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from plumb.console import rank0_print
from plumb.data.tokenization import template_text
from plumb.distributed.device import pick_device
from plumb.errors import UserError
from plumb.models.adapters import AdapterKnobs
from plumb.models.load import load_config, load_policy, load_tokenizer
from plumb.models.scalar_head import holds_scores
from plumb.models.weight_sources import is_classifier
from plumb.paths import CONFIG, ROOT
from plumb.runs.policy_file import load_policy_state
from plumb.runs.policy_path import PEFT_FOLDER, is_peft_folder, resolve_archive
from plumb.runs.safe_yaml import check_config_file
from plumb.runs.state_files import copy_stored


@dataclass(frozen=True)
class ModelRef:
    """Hold where a model is, before it is loaded."""

    name: str  # as the user gave it
    # model.*, seed and device, as load_policy takes them; of a run: all that its config.yaml holds
    config: DictConfig
    archive: Path | None  # its policy.pt
    run_dir: Path | None  # the run that wrote it
    scalar: bool  # a reward model


class Opened(NamedTuple):
    """Hold a frozen model on its device, in eval mode."""

    ref: ModelRef
    # a causal LM; with a scalar head (see models/scalar_head.py) if `ref.scalar`
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def find_model(
    name: str, base: str | None = None, tokenizer: str | None = None, dtype: str | None = None
) -> ModelRef:
    """Find out what `name` is. `base`: the model that a policy.pt without a config.yaml was trained
    from; it and `tokenizer` override what the run says. `dtype`: of the weights; None: float32.

    Raises UserError if there is no such model, and for a policy.pt whose base model is unknown.
    """
    config = OmegaConf.create({"seed": 0, "device": None, "trainer": "BasicTrainer"})
    config.model = OmegaConf.load(CONFIG / "model/blank_model.yaml")
    path = Path(name).expanduser()
    archive = None
    run_dir = None
    is_model = (
        (path / "config.json").is_file() or path.suffix == ".gguf" or list(path.glob("*.gguf"))
    )
    if is_peft_folder(path):
        raise UserError(f"{name}: {PEFT_FOLDER}")
    if not is_model and (path.exists() or any(c in name for c in "*?[") or path.suffix == ".pt"):
        try:
            archive = resolve_archive(name)
        except UserError:
            raise UserError(
                f"{name}: not a model's folder, run, checkpoint or policy.pt; give one, or a"
                f" name on"
                " the hub"
            ) from None
        file = archive.resolve()
        run_dir = next(
            (
                folder
                for folder in (file.parent.parent, file.parent)
                if (folder / "config.yaml").is_file()
            ),
            None,
        )
        try:
            own = _config_of(run_dir) if run_dir else None
        except UserError:  # perhaps of something else
            if base is None:
                raise
            run_dir = own = None
        if own is not None:
            config = cast(DictConfig, OmegaConf.merge(config, own))
        elif base is None:
            raise UserError(
                f"{archive}: no config.yaml beside it says which model this is; give the model"
                " it was trained from: --base NAME_OR_PATH"
            )
    if base is not None or archive is None:
        if (base or name) != config.model.get("name_or_path"):  # they are of what it was
            config.model.revision, config.model.trust_remote_code = None, False
        config.model = OmegaConf.merge(
            config.model, {"name_or_path": base or name, "architecture": None}
        )
    config.model.archive = str(archive) if archive else None
    config.model.policy_dtype = dtype or "float32"
    config.model.quantize = None  # that is about what its run started from
    if tokenizer is not None:
        config.model.tokenizer_name_or_path = tokenizer
    scalar = (
        holds_scores(load_policy_state(str(archive)))
        if archive
        else is_classifier(load_config(config))
    )
    return ModelRef(
        name=name,
        config=config,
        archive=archive,
        run_dir=run_dir,
        scalar=scalar,
    )


def _config_of(run_dir: Path) -> DictConfig:
    """Return a run's config.yaml. One of the original repository has fewer options, and paths of
    its own machine, which are left out.
    """
    try:
        check_config_file(run_dir / "config.yaml")  # it came with the weights and is not trusted
        config: Any = OmegaConf.create(yaml.safe_load((run_dir / "config.yaml").read_text("utf-8")))
        if not (config.model.get("name_or_path") or config.model.get("architecture")):
            raise ValueError("it names no model")
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, AttributeError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"{run_dir}/config.yaml: cannot be read ({problem}); give the model with --base"
            " NAME_OR_PATH"
        ) from None
    # relative to where the run was started, which is mostly here
    for knob in ("name_or_path", "tokenizer_name_or_path", "archive"):
        if (
            (location := config.model.get(knob))
            and not Path(location).exists()
            and (ROOT / location).exists()
        ):
            config.model[knob] = str(ROOT / location)
    config.device = None
    config.trainer = "BasicTrainer"
    config.setdefault("add_bos", False)  # runs of 2023, which do not record it, had none
    return config


def start_of(ref: ModelRef) -> DictConfig:
    """Return what the run of a policy started from, as load_policy takes it: its reference. Raise
    UserError for a model that is not from a run.
    """
    if ref.run_dir is None:
        raise UserError(
            f"{ref.name}: its run is unknown, and so is its reference; give --reference MODEL"
        )
    config = copy.deepcopy(ref.config)
    run = _config_of(ref.run_dir)
    config.model.archive = run.model.get("archive")
    config.model.quantize = run.model.get("quantize")
    # it had the precision of the run; where adapters went on, or had others put beside them, only
    # what they belong to had
    dtypes = [run.model.get(name) for name in ("policy_dtype", "reference_dtype")]
    kept = run.get("adapter_previous", "merge") != "merge"
    config.model["base_dtypes" if kept else "dtypes"] = [dtype for dtype in dtypes if dtype]
    return config


def move_reference(ref: ModelRef, reference: PreTrainedModel) -> None:
    """Give the reference, loaded as the model that the policy's run started from, the weights that
    it had at the policy's checkpoint; print a note if they are not saved there.
    """
    if not ref.config.get("reference_update_every") or ref.archive is None:
        return
    files = sorted(ref.archive.resolve().parent.glob("state-*-of-*.safetensors"))
    if not files or not copy_stored(files, "reference.", dict(reference.named_parameters())):
        rank0_print(
            f"note: the reference of {ref.name} moved, and its weights are not saved with this"
            " checkpoint (only a live one's are); comparing with the model that the run"
            " started from"
        )


def open_model(
    ref: ModelRef, device: str | None = None, adapter: AdapterKnobs | None = None
) -> Opened:
    """Load a model that was found, on `device` (None: the GPU if there is one, otherwise the CPU).
    `adapter`: see load_policy. Raise UserError if that fails.
    """
    check_device(device)
    ref.config.device = device
    tokenizer = load_tokenizer(ref.config)
    model: Any = load_policy(ref.config, scalar=ref.scalar, adapter=adapter)
    return Opened(ref, model.to(pick_device(ref.config)).eval().requires_grad_(False), tokenizer)


def n_parameters(ref: ModelRef) -> int:
    """Return the number of a model's parameters, from its config alone; without a head of one row.
    Raise UserError for a config that cannot be read.
    """
    kind = AutoModel if ref.scalar else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(copy.deepcopy(load_config(ref.config)))
    return sum(p.numel() for p in model.parameters())


def check_device(device: str | None) -> None:
    """Raise UserError for a device that does not exist, or that can hold no numbers."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device}: not usable here ({str(error).splitlines()[0]}); leave it out to"
            " pick one"
        ) from None


def template_of(
    ref: ModelRef, option: str | None, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Return --chat-template, otherwise what the run was trained with; None: the tokenizer's, or
    HH's.
    """
    named = option or ref.config.get("chat_template")
    whose = f"--chat-template {option}" if option else f"{ref.name}: its chat template {named}"
    return template_text(named, whose, tokenizer)
