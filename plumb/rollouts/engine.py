"""Define what samples responses for training: one small interface, its inputs and outputs, and the
random draws, which every engine should use if it can.

Shapes: B prompts of P tokens, n responses to each of up to L tokens; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from plumb.data.prompts import NumberedPrompt
from plumb.errors import UserError
from plumb.models.chunked_head import at_temperature, token_logps
from plumb.rollouts.decoding import Decoding

NOT_FINITE = (
    "the model gives tokens no finite probabilities; is it damaged, or is its precision too low?"
)


class Response(NamedTuple):
    """Hold one sampled response.

    Example: the tokens 5, 6 and the end token 2: Response([5, 6, 2], [-1.2, -0.3, -0.1], "eos").
    """

    ids: np.ndarray  # [T] int64, the end token included
    # [T] float64: log pi(y_t | x, y_<t) at the sampling temperature, as the sampler computed it
    logps: np.ndarray
    ended: str  # "eos" or "length"


class Samples(NamedTuple):
    """Hold the responses to B prompts, in their order, and the time that sampling took."""

    responses: list[list[Response]]  # [B][n]
    secs: float

    @property
    def n_tokens(self) -> int:
        return sum(len(response.ids) for each in self.responses for response in each)

    @property
    def tokens_per_sec(self) -> float:
        return self.n_tokens / max(self.secs, 1e-9)


class Engine(Protocol):
    """Sample responses from a policy that changes between calls."""

    def load(self, policy: Any) -> None:
        """Take over the weights that the policy (a model) has now."""

    def sample(self, prompts: Sequence[NumberedPrompt], n: int, seed: Sequence[int]) -> Samples:
        """Return n responses to each prompt. They depend on the weights, on `seed` (the run's, the
        step), on the prompt with its number, and on which of the n they are, and on nothing else.
        """


def check_untruncated(decoding: Decoding) -> None:
    """Raise UserError unless every token is drawn from the whole distribution that is trained."""
    if decoding.mode != "sample":
        raise UserError(f"rollout.mode={decoding.mode}: responses to train on need mode sample")
    if decoding.temperature is None or decoding.temperature <= 0:
        raise UserError(f"rollout.temperature={decoding.temperature}: must be above 0")
    if decoding.max_new_tokens is None or decoding.max_new_tokens < 1:
        raise UserError(f"rollout.max_new_tokens={decoding.max_new_tokens}: must be 1 or more")
    for name, whole in (("top_k", 0), ("top_p", 1.0), ("stop", ())):
        if (value := getattr(decoding, name)) not in (None, whole):
            raise UserError(
                f"rollout.{name}={value}: trained log-probabilities are those of the whole"
                f" distribution, not of a truncated one; leave rollout.{name} out"
            )


def check_lengths(prompts: Sequence[NumberedPrompt], max_new_tokens: int, longest: int) -> None:
    """Raise UserError for a prompt without tokens, and for one that leaves too little room: a
    prompt and its response must fit in `longest` tokens.
    """
    room = longest - max_new_tokens
    for prompt in prompts:
        if not len(prompt.ids):
            raise UserError(f"{prompt.source}: the prompt has no tokens; write a prompt")
        if len(prompt.ids) > room:
            raise UserError(
                f"{prompt.source}: the prompt has {len(prompt.ids):,} tokens, and"
                f" max_new_tokens={max_new_tokens} leaves room for {max(room, 0)} (of {longest}):"
                " shorten the prompt, lower max_new_tokens or raise max_length"
            )


def uniforms(
    seed: Sequence[int], prompts: Sequence[NumberedPrompt], n: int, length: int
) -> np.ndarray:
    """Return a uniform draw for every token that may come. Each sample has a generator of its own,
    seeded by (seed, the prompt's number, the sample's index), so no batching changes its draws.
    -> [B, n, length] float64, in [0, 1)
    """
    draws = np.empty((len(prompts), n, length))
    for prompt_draws, prompt in zip(draws, prompts, strict=True):
        for index, sample_draws in enumerate(prompt_draws):
            key = np.random.SeedSequence([*seed, prompt.number, index])
            np.random.Generator(np.random.Philox(key)).random(out=sample_draws)
    return draws


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that uniform draws choose by the inverse of the cumulative distribution of
    softmax(logits / temperature), and their log-probabilities.  [B, V], [B] -> [B], [B] in nats

    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0]]).expand(3, 4)
    >>> draw(logits, 1.0, torch.tensor([0.3, 0.5, 0.9]))[0].tolist()
    [0, 1, 3]
    """
    scaled = at_temperature(logits, temperature)
    cumulative = scaled.softmax(1).cumsum(1, dtype=widest(logits.device))
    # scaled by the sum after rounding, so that no draw falls past the last token
    goals = (uniform.to(cumulative) * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, goals, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return tokens, token_logps(scaled, tokens)
