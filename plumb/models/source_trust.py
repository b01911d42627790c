"""Decide which parts of a model's folder or repository to trust: its weights and settings, and its
code only at one named commit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from plumb.errors import UnsafeFile, UserError

# Others, such as kernels-community/..., are names of repositories whose code transformers would
# fetch and run.
ATTENTIONS = ("eager", "sdpa", "flex_attention")
COMMIT = re.compile(r"[0-9a-f]{40}")


def check_revision(spec: DictConfig) -> None:
    """Check that model.revision and model.trust_remote_code are valid and not ignored. Raises
    UserError.
    """
    name, revision = spec.name_or_path, spec.revision
    if revision is not None and not COMMIT.fullmatch(revision):
        raise UserError(
            f"model.revision={revision}: expected a commit of 40 hexadecimal digits, which always"
            " means the same"
        )
    if spec.trust_remote_code and revision is None:
        raise UserError(
            "model.trust_remote_code=true: needs model.revision=, the commit whose code you have"
            " read"
        )
    if revision is not None and (
        name is None or Path(name).expanduser().exists() or spec.architecture
    ):
        raise UserError(
            f"model.revision={revision}: only for a name on the hub, not for"
            f" model.name_or_path={name}; leave it out"
        )


def pinned(spec: DictConfig, name: str) -> dict[str, Any]:
    """Return the arguments with which transformers reads `name` at model.revision, and runs code
    from there only if told to.

    Code that it refers to in another repository is requested at the same commit, where there is
    none. If `trust_remote_code` were not given, transformers would ask on the terminal.
    """
    if name != spec.name_or_path or spec.revision is None:
        return {"trust_remote_code": False}
    return {
        "revision": spec.revision,
        "code_revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
    }


def check_settings(hf_config: Any, what: str) -> None:
    """Raise UnsafeFile for a config.json that names attention or experts whose code would be
    fetched and run; and UserError for sizes with which transformers builds an empty model, or one
    that cannot compute.
    """
    for key, allowed in (
        ("_attn_implementation_internal", ATTENTIONS),
        ("_experts_implementation_internal", None),
    ):
        value = getattr(hf_config, key, None)
        for implementation in value.values() if isinstance(value, dict) else [value]:
            if implementation is not None and (
                not isinstance(implementation, str)
                or (allowed and implementation not in allowed)
                or "/" in implementation
            ):
                raise UnsafeFile(
                    f"{what}: its config asks for"
                    f" {key[1:].removesuffix('_internal')}={implementation!r},"
                    " whose code would be fetched and run; remove the line from config.json"
                )
    for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        size = getattr(hf_config.get_text_config(), key, None)
        if isinstance(size, int) and size < 1:
            raise UserError(f"{what}: its config has {key}={size}; write at least 1")
    _check_heads(hf_config.get_text_config(), what)
    for value in vars(hf_config).values():
        if hasattr(value, "_attn_implementation_internal"):  # a config within the config
            check_settings(value, what)


def _check_heads(hf_config: Any, what: str) -> None:
    """Raise UserError for key heads that the attention heads cannot share evenly."""
    heads, of_keys = (
        getattr(hf_config, key, None) for key in ("num_attention_heads", "num_key_value_heads")
    )
    if isinstance(heads, int) and isinstance(of_keys, int) and of_keys > 0 and heads % of_keys:
        raise UserError(
            f"{what}: its config has num_key_value_heads={of_keys}, which does not divide"
            f" num_attention_heads={heads}; write a divisor"
        )


def check_templates(tokenizer: Any, what: str) -> None:
    """Raise UnsafeFile for chat templates whose names are paths, to which a tokenizer that is saved
    would write.
    """
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if bad := [
        name for name in templates if not re.fullmatch(r"[\w.-]+", str(name)) or ".." in str(name)
    ]:
        raise UnsafeFile(
            f"{what}: a chat template is called {bad[0]!r}, no plain name; rename it in"
            " tokenizer_config.json"
        )
