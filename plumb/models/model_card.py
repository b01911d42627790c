"""Describe where a checkpoint comes from, as a model card: its run, the checkpoint that run started
from, and so on to the base model.

A card names no local path: of a path, only its last parts are kept.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import PreTrainedTokenizerBase

from plumb.console import redacted
from plumb.models.find import ModelRef
from plumb.runs.checkpoints import Damaged, Manifest, read_manifest
from plumb.runs.history import Link, chain, read_config

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


class Stage(NamedTuple):
    """Hold a checkpoint and the run that wrote it."""

    archive: Path
    config: dict[str, Any]  # of the run; {} where its config.yaml is not beside it
    manifest: Manifest | None

    @property
    def loss(self) -> str:
        return str((self.config.get("loss") or {}).get("name", "unknown loss"))


def stages(archive: Path) -> list[Stage]:
    """Return this checkpoint, the one that its run started from, and so on, as far back as they
    exist.
    """
    file, newest_first = archive.resolve(), []
    folder = next(
        (f for f in (file.parent.parent, file.parent) if (f / "config.yaml").is_file()), file.parent
    )
    links = list(chain(read_config(folder), folder, archive)) or [Link({}, folder, archive)]
    for config, _, made in links:
        manifest = None
        with suppress(Damaged):
            manifest = read_manifest(made.resolve().parent) if made else None
        newest_first.append(Stage(made or archive, config, manifest))
    return newest_first


def public(value: Any) -> Any:
    """Return a config without local paths, keys and passwords."""
    if isinstance(value, dict):
        return {
            key: public(inner)
            for key, inner in value.items()
            if key not in ("local_dirs", "local_run_dir")
        }
    if isinstance(value, list):
        return [public(inner) for inner in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or Path(value).exists()):
        return "/".join(Path(value).parts[-2:]).lstrip("/")
    return redacted(value)


def card(ref: ModelRef, hf_config: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the README.md of an exported folder: usage, training data, results, lineage."""
    assert ref.archive is not None
    chain, spec = stages(ref.archive), ref.config.model
    first = chain[0]
    name = ref.run_dir.name if ref.run_dir else ref.archive.stem
    base = (
        public(spec.name_or_path)
        if spec.name_or_path
        else "random weights of a " + hf_config.model_type
    )
    on_hub = spec.name_or_path and not Path(spec.name_or_path).expanduser().exists()
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if ref.scalar else "text-generation",
        **({"base_model": spec.name_or_path} if on_hub else {}),
        "tags": [first.loss],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"A {hf_config.architectures[0]}, trained with {first.loss} from {base}.",
        (
            f"Licence: see {f'the base model ({base})' if spec.name_or_path else 'who trained it'};"
            " the data sets have their own."
        ),
        "## Use\n\n" + (_scoring(tokenizer) if ref.scalar else _answering(tokenizer)),
    ]
    if data := {
        key: public(first.config[key])
        for key in ("datasets", "eval_datasets", "eval_share")
        if first.config.get(key)
    }:
        parts.append(
            "## Data\n\n"
            + "\n".join(f"- `{key}`: {json.dumps(value)}" for key, value in data.items())
        )
    if first.manifest is not None and first.manifest.metrics:
        rows = [
            f"| `{key}` | {value:.6g} |" for key, value in sorted(first.manifest.metrics.items())
        ]
        parts.append(
            f"## Evaluation\n\nAfter {first.manifest.examples:,} training examples, on held-out"
            " data:\n\n| metric | value |\n|---|---|\n" + "\n".join(rows)
        )
    lines = [_one_line(stage) for stage in chain] + [f"{base}: the base model"]
    parts.append("## Lineage\n\n" + "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1)))
    parts.append(
        "Exported with " + ", ".join(f"{package} {version(package)}" for package in PACKAGES) + "."
    )
    if first.config:
        parts.append(
            "## Configuration\n\n```yaml\n"
            + yaml.safe_dump(public(first.config), sort_keys=False)
            + "```"
        )
    return "\n\n".join(parts) + "\n"


def _one_line(stage: Stage) -> str:
    where = public(str(stage.archive.resolve().parent)) + "/" + stage.archive.name
    seen = (
        f", {stage.manifest.step:,} steps, {stage.manifest.examples:,} examples"
        if stage.manifest
        else ""
    )
    data = (
        f", on {json.dumps(public(stage.config['datasets']))}"
        if stage.config.get("datasets")
        else ""
    )
    return f"`{where}`: {stage.loss}{seen}{data}"


def _answering(tokenizer: PreTrainedTokenizerBase) -> str:
    form = (
        "The tokenizer has a chat template: use `apply_chat_template`."
        if tokenizer.chat_template
        else (
            "There is no chat template; prompts are used verbatim, in the format of the training"
            " data."
        )
    )
    return f"`AutoModelForCausalLM.from_pretrained(...)`. {form}"


def _scoring(tokenizer: PreTrainedTokenizerBase) -> str:
    return (
        "`AutoModelForSequenceClassification.from_pretrained(...)` gives one score. It is read at"
        f" the last token that is not `{tokenizer.pad_token}`: end the answer with"
        f" `{tokenizer.eos_token}`, as in training, and pad on the right. A score means something"
        " only beside another one for the same prompt."
    )
