"""Sample answers from an opened model, for sample.py and `plumb.sample`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import GenerationConfig

from plumb.data.prompts import Prompt, rendered, token_ids
from plumb.errors import UserError
from plumb.models.find import ModelRef, Opened, open_model
from plumb.models.limits import pad_within, positions_of
from plumb.rollouts.decoding import Decoding


class ReadPrompt(NamedTuple):
    """Hold a prompt as a model reads it."""

    text: str  # after the chat template
    ids: np.ndarray  # [P] token ids
    cut: bool  # the prompt was too long; its end was kept


def open_policy(ref: ModelRef, device: str | None) -> Opened:
    """Load a model and clear its generation config except for the end tokens, since hidden settings
    would make models answer in different ways. Raise UserError for a tokenizer without EOS.
    """
    model = open_model(ref, device)
    if model.tokenizer.eos_token_id is None:
        raise UserError(
            f"{ref.name}: its tokenizer has no EOS token; set eos_token in its"
            " tokenizer_config.json"
        )
    pad_within(model.model, model.tokenizer)
    model.model.generation_config = GenerationConfig(
        eos_token_id=model.model.generation_config.eos_token_id
    )
    return model


def longest_prompt(model: Opened, decoding: Decoding) -> int:
    """Return the maximum number of tokens of a prompt. Raise UserError if it is below 1."""
    context = (positions_of(model.model) or (2**20, ""))[0]
    if (room := context - int(decoding.max_new_tokens or 0)) < 2:
        raise UserError(
            f"--max-new-tokens {decoding.max_new_tokens}: {model.ref.name} has room for {context}"
            " tokens, prompt included; give fewer"
        )
    return room


def read_prompts(
    model: Opened, prompts: Sequence[Prompt], template: str | None, add_bos: bool, room: int
) -> list[ReadPrompt]:
    """Return the prompts as the model reads them, of up to `room` tokens. Raise UserError for one
    without a token.
    """
    read = []
    for prompt in prompts:
        text = rendered(prompt, model.tokenizer, template)
        read.append(ReadPrompt(text, *token_ids(text, model.tokenizer, add_bos, room)))
        if not len(read[-1].ids):
            raise UserError(
                f"{prompt.source}: the prompt has no tokens, and {model.ref.name} has no BOS to"
                " start from; write a prompt"
            )
    return read
