"""Sampling from a policy, for every trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from utils import quiet


@torch.no_grad()
def sample(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], *,
    batch_size: int, max_length: int, max_new_tokens: int | None, temperature: float | None, seed: int,
    between: Callable[[], None] = lambda: None,
) -> list[str]:  # fmt: skip
    """One continuation per prompt (arrays of token ids), decoded without special tokens.

    A batch may grow to `max_length` tokens with its prompt (the 2023 rule), or by `max_new_tokens` if given. Temperature
    None samples as the model's generation config says, 0 is greedy. The draw depends on `seed` alone and leaves the
    training's random state as it was. `between` is called before each batch, and may raise.
    """
    how = {"do_sample": temperature != 0} | ({"temperature": temperature} if temperature else {})
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    texts: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(prompts), batch_size), desc="sampling", leave=False, disable=quiet()):
            between()
            chunk = prompts[start : start + batch_size]
            width = max(len(p) for p in chunk)
            ids = torch.full((len(chunk), width), tokenizer.pad_token_id)  # [B, P], padded on the left
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(chunk):
                ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
                mask[row, width - len(prompt) :] = 1
            output = model.generate(
                ids.to(device), attention_mask=mask.to(device), use_cache=True, **how,
                max_new_tokens=max_new_tokens or max(max_length - width, 1),
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            texts += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    model.train(was_training)
    return texts
