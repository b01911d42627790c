"""Compare data with what a model was made for: its vocabulary and its number of positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from plumb.console import rank0_print
from plumb.data.tokenization import Example, named_templates, trees_of
from plumb.errors import UserError


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
