"""What a run is made of: its settings, and digests of its data, tokenizer, plugins and weights; and
whether a run that resumes is made of the same. Imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from omegaconf import DictConfig

from plumb.console import redacted, to_dict
from plumb.data.examples import Examples
from plumb.errors import ResumeMismatch
from plumb.paths import CONFIG
from plumb.runs.history import flatten

CONTENTS = ("data", "tokenizer", "weights", "plugins")  # what resume_allow may name beside knobs


def settings(config: DictConfig, may_change: Callable[[str], bool]) -> dict[str, Any]:
    """Return {knob: value} for everything that affects the result, except what is compared by its
    contents. `may_change` says which knobs do not affect it.
    """
    flat = dict(flatten(redacted(to_dict(config))))
    return {knob: value for knob, value in sorted(flat.items()) if not may_change(knob)}


def fingerprint(
    config: DictConfig,
    may_change: Callable[[str], bool],
    tokenizer: str,
    train: Examples,
    evaluation: Examples,
    weights: str,
    others: Sequence[Examples] = (),
) -> dict[str, Any]:
    """Return the run's fingerprint: its settings, and digests of data, tokenizer, plugins and the
    weights it starts from, which are also the reference's. `others`: what else it is trained on.
    """
    plugins = [
        hashlib.sha256(Path(f).expanduser().read_bytes()).hexdigest() for f in config.plugins
    ]
    data = [digest_of(examples) for examples in (train, evaluation, *others)]
    return {
        "settings": settings(config, may_change),
        "data": data,
        "tokenizer": tokenizer,
        "weights": weights,
        "plugins": plugins,
    }


def digest_of(examples: Examples) -> str:
    """Return a digest of the token ids and extras (margins, labels) of all examples in their order,
    computed from the stores' checksums, not from the texts.
    """
    digest = hashlib.sha256(repr(examples.bos).encode())
    for table in examples.tables:
        ids, starts = (table.store.checksums[name] for name in ("ids", "starts"))
        digest.update(f"{ids} {starts} {table.keep_end}".encode())
        digest.update(table.items.tobytes())
    digest.update(examples.items.tobytes() + examples.lengths.tobytes())
    # examples without scores keep the digest that they always had
    extras = examples.extras()
    for column in (*extras.example.values(), *extras.response.values()):
        if not np.isnan(column).all():
            digest.update(column.tobytes())
    return digest.hexdigest()


class Rules(NamedTuple):
    """Say what a setting is, by its dotted name."""

    # the option that it is, or is part of; None: one that no longer exists
    owner_of: Callable[[str], str | None]
    # (name, before, after) -> whether what a checkpoint holds would not fit afterwards
    in_state: Callable[[str, Any, Any], bool]


def compare(
    run_dir: Path,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    allow: Sequence[str],
    rules: Rules,
) -> list[str]:
    """Return the differences between two fingerprints or two `settings`, each as "name: old ->
    new".

    Raises ResumeMismatch, with the differences, if something differs that `allow` does not name,
    alone or with its option, or that cannot change.
    """
    flat = lambda r: r.get("settings", {}) | {name: r[name] for name in CONTENTS if name in r}
    a, b = flat(old), flat(new)
    a = _defaults(b) | a  # of knobs that were not there when the run began
    differing = [
        name
        for name in sorted(a.keys() | b.keys())
        if (name in b or rules.owner_of(name) not in (None, name))
        and a.get(name, "unset") != b.get(name, "unset")
    ]
    values = {n: (a.get(n, "unset"), b.get(n, "unset")) for n in differing}
    lines = {n: f"{n}: {_short(n, x)} -> {_short(n, y)}" for n, (x, y) in values.items()}
    never = [n for n, (x, y) in values.items() if rules.in_state(n, x, y)]
    refused = never or [n for n in differing if not {n, rules.owner_of(n)} & {*allow}]
    if refused:
        fix = (
            f"set resume_allow=[{','.join(differing)}] to apply the change, or resume=never for a"
            " new run"
        )
        if never:  # what the checkpoint holds would not fit
            fix = f"start another run from this one, with model.archive={run_dir}"
        raise ResumeMismatch(
            f"{run_dir}: checkpoint does not match this configuration:"
            f" {'; '.join(lines[name] for name in refused)}; restore these, or {fix}"
        )
    return [*lines.values()]


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return {knob: default} of the config tree for a run with these settings."""
    loss = f"loss/{settings.get('loss.name')}.yaml"
    files = [CONFIG / name for name in ("config.yaml", loss, "model/blank_model.yaml")]
    known = [yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {} for file in files]
    return dict(flatten(known[0] | {"loss": known[1], "model": known[2]}))


def _short(name: str, value: Any) -> str:
    if name not in CONTENTS:
        return str(value)
    return "+".join(v[:8] for v in ([value] if isinstance(value, str) else value)) or "none"
