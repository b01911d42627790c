"""Generate answers to prompts, for every trainer and for sample.py: one function for all decoding
modes.

Shapes: B prompts of up to P tokens, padded on the left; n answers to each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)
from transformers.generation import StoppingCriteriaList

from plumb.console import bar_width, quiet
from plumb.data.token_text import continued
from plumb.errors import UserError
from plumb.models.blocks import uncompiled
from plumb.models.limits import positions_of
from plumb.rollouts.decoding import Decoding


class Answer(NamedTuple):
    """Hold one answer to a prompt."""

    text: str  # without special tokens and stop strings
    n_tokens: int  # generated, with EOS
    ended: str  # "eos", "stop", or "length"


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    *,
    batch_size: int,
    seed: int,
    max_length: int = 0,
    between: Callable[[], None] = lambda: None,
) -> Iterator[list[Answer]]:
    """Return n answers to each prompt (an array of token ids), in order, `batch_size` prompts at a
    time.

    If `decoding.max_new_tokens` is None, a batch may grow to `max_length` tokens including its
    prompts, as in the original; never beyond the model's positions. Draws depend on `seed`, the
    prompts and the batch size, and leave the random state unchanged. `between` is called before
    each batch, and may raise.
    """
    was_training = model.training
    model.eval()
    device, pad = next(model.parameters()).device, tokenizer.pad_token_id
    ends, n_positions = end_tokens(model, tokenizer), (positions_of(model) or (2**31, ""))[0]
    stopping = StoppingCriteriaList(
        [StopStringCriteria(tokenizer, list(decoding.stop))] if decoding.stop else []
    )
    try:
        for start in tqdm(
            range(0, len(prompts), batch_size),
            desc="sampling",
            unit="batch",
            leave=False,
            disable=quiet(),
            ncols=bar_width(),
        ):
            between()
            # [B, P]
            ids, mask = (x.to(device) for x in padded(prompts[start : start + batch_size], pad))
            n_new = decoding.max_new_tokens or max_length - ids.shape[1]
            n_new = max(min(n_new, n_positions - ids.shape[1]), 1)
            options: dict[str, Any] = {
                "attention_mask": mask,
                "use_cache": True,
                "max_new_tokens": n_new,
                "pad_token_id": pad,
                "eos_token_id": ends,
                "stopping_criteria": stopping,
            } | decoding.arguments()
            devices = [device] if device.type == "cuda" else []
            with uncompiled(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed + start)
                if decoding.mode == "contrastive":
                    new = _contrastive(model, ids, mask, decoding, n_new, ends, pad, stopping)
                elif decoding.mode == "diverse-beam":
                    new = _diverse_beams(model, ids, decoding, options)
                else:
                    new = model.generate(ids, **options)[:, ids.shape[1] :]  # [B * n, up to n_new]
            for i, prompt in enumerate(prompts[start : start + batch_size]):
                rows = new[i * decoding.n : (i + 1) * decoding.n].tolist()
                yield [
                    _answer(row, prompt.tolist(), tokenizer, ends, decoding.stop) for row in rows
                ]
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(
            "the model gives tokens no finite probabilities; is it damaged, or is its precision too"
            " low?"
        ) from None
    finally:
        model.train(was_training)


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    *,
    batch_size: int,
    max_length: int,
    max_new_tokens: int | None,
    temperature: float | None,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return one continuation per prompt for the trainers: temperature None uses the model's
    generation config, 0 is greedy. See `answers`.
    """
    mode = "greedy" if temperature == 0 else "sample"
    decoding = Decoding(mode, max_new_tokens=max_new_tokens, temperature=temperature or None)
    by_prompt = answers(
        model,
        tokenizer,
        prompts,
        decoding,
        batch_size=batch_size,
        seed=seed,
        max_length=max_length,
        between=between,
    )
    return [answer.text for (answer,) in by_prompt]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens: the tokenizer's EOS, which training uses, and those of the model's
    generation config.
    """
    own = model.generation_config.eos_token_id
    return list(
        dict.fromkeys(
            [
                tokenizer.eos_token_id,
                *(own if isinstance(own, list) else [] if own is None else [own]),
            ]
        )
    )


def padded(prompts: Sequence[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, [B, P], padded on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _answer(
    ids: list[int],
    prompt: list[int],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    stop: Sequence[str],
) -> Answer:
    """Return the text that a row, possibly padded on the right with EOS, adds to its
    prompt's text.
    """
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[:end]
    while kept and kept[-1] == tokenizer.pad_token_id:
        kept = kept[:-1]
    text, with_special = (continued(prompt, [kept], tokenizer, skip)[0] for skip in (True, False))
    if any(s in with_special for s in stop):  # padding with EOS may have followed
        return Answer(min((text.partition(s)[0] for s in stop), key=len), len(kept), "stop")
    return Answer(text, len(kept) + (end is not None), "length" if end is None else "eos")


# --------------------------------------------------------------------------------------------------


class _Hamming(LogitsProcessor):
    """Lower the scores of tokens chosen by beams of earlier groups at the same position, and record
    this group's.
    """

    def __init__(self, n_prompts: int, n_prompt_tokens: int, penalty: float, ends: Sequence[int]):
        self.n_prompts = n_prompts
        self.start = n_prompt_tokens
        self.penalty = penalty
        self.ends = list(ends)
        self.earlier: list[
            Tensor
        ] = []  # for each position, how many beams of earlier groups have each token there  [B, V]
        self.own: list[Tensor] = []

    def __call__(
        self, input_ids: Tensor, scores: Tensor
    ) -> Tensor:  # [B * beams, T], [B * beams, V] -> the latter
        place = input_ids.shape[1] - self.start
        if place:
            counts = scores.new_zeros(self.n_prompts, scores.shape[1])
            counts.scatter_add_(
                1, last := input_ids[:, -1].view(self.n_prompts, -1), counts.new_ones(last.shape)
            )
            counts[:, self.ends] = (
                0  # sharing an end token is not a lack of variety, and padding may look like one
            )
            self.own.append(counts)
        if place >= len(self.earlier):
            return scores
        return scores - self.penalty * self.earlier[place].repeat_interleave(
            len(scores) // self.n_prompts, 0
        )

    def next_group(self) -> None:
        """Apply what was recorded to the following groups."""
        longest, none = max(len(self.earlier), len(self.own)), torch.tensor(0.0)
        at = lambda counts, i: counts[i] if i < len(counts) else none.to(self.own[0].device)
        self.earlier = [at(self.earlier, i) + at(self.own, i) for i in range(longest)]
        self.own = []


def _diverse_beams(model: Any, ids: Tensor, decoding: Decoding, options: dict[str, Any]) -> Tensor:
    """Run diverse beam search (Vijayakumar et al. 2018, arXiv:1610.02424) with Hamming diversity.
    Return the new tokens, [B * n, up to n_new].

    A group depends on the earlier ones only, so the groups run one after another, each an ordinary
    beam search. The n answers are the best of each group, then the second best, and so on. End
    tokens are not penalized, nor is the last token of a search that reaches its limit.
    """
    beams, groups = int(decoding.num_beams or 1), int(decoding.num_beam_groups or 1)
    each, ends = -(-decoding.n // groups), [*options["eos_token_id"], options["pad_token_id"]]
    hamming = _Hamming(len(ids), ids.shape[1], float(decoding.diversity_penalty or 0), ends)
    options |= {
        "num_beams": beams // groups,
        "num_return_sequences": each,
        "logits_processor": LogitsProcessorList([hamming]),
    }
    by_group = []
    for _ in range(groups):
        by_group.append(model.generate(ids, **options)[:, ids.shape[1] :].view(len(ids), each, -1))
        hamming.next_group()
    longest = max(x.shape[-1] for x in by_group)
    padded = [F.pad(x, (0, longest - x.shape[-1]), value=options["pad_token_id"]) for x in by_group]
    return (
        torch.stack(padded, 2)
        .view(len(ids), each * groups, longest)[:, : decoding.n]
        .reshape(-1, longest)
    )


def _contrastive(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    decoding: Decoding,
    n_new: int,
    ends: Sequence[int],
    pad: int,
    stopping: Any,
) -> Tensor:
    """Run contrastive search (Su et al. 2022, arXiv:2202.06417): among the k most probable tokens
    v, choose the one with the greatest (1 - alpha) p(v) - alpha max_j cos(h_v, h_j), where h are
    the last hidden states of v and of all earlier tokens. Return the new tokens, [B, up to n_new].
    """
    alpha, n = float(decoding.penalty_alpha or 0), len(ids)
    k = min(int(decoding.top_k or 1), model.config.get_text_config().vocab_size)
    cache, rows = DynamicCache(config=model.config), torch.arange(n, device=ids.device)
    options = {"past_key_values": cache, "use_cache": True, "output_hidden_states": True}
    done = torch.zeros(n, dtype=torch.bool, device=ids.device)
    width, endings = ids.shape[1], torch.tensor([*ends], device=ids.device)
    out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **options)
    # [B, T, d], [B, V]
    past = F.normalize(out.hidden_states[-1], dim=-1)
    logits = out.logits[:, -1]
    for _ in range(n_new):
        p, candidates = logits.float().softmax(-1).topk(k)  # [B, k]
        mask = F.pad(mask, (0, 1), value=1)
        cache.batch_repeat_interleave(k)
        places = (mask.sum(1) - 1).repeat_interleave(k)[:, None]
        out = model(
            candidates.view(-1, 1),
            attention_mask=mask.repeat_interleave(k, 0),
            position_ids=places,
            **options,
        )
        hidden = F.normalize(out.hidden_states[-1][:, -1], dim=-1).view(n, k, -1)
        cosines = (hidden @ past.mT).masked_fill(mask[:, None, :-1] == 0, -torch.inf)  # [B, k, T]
        best = ((1 - alpha) * p - alpha * cosines.amax(-1).float()).argmax(-1)  # [B]
        cache.batch_select_indices(rows * k + best)
        past = torch.cat([past, hidden[rows, best][:, None]], 1)
        logits = out.logits[:, -1].view(n, k, -1)[rows, best]
        ids = torch.cat([ids, candidates[rows, best].masked_fill(done, pad)[:, None]], 1)
        done |= torch.isin(ids[:, -1], endings)
        if stopping:
            done |= stopping(ids, logits)
        if done.all():
            break
    return ids[:, width:]
