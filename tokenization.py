"""Text becomes token ids: chat templates, BOS and EOS, truncation. Nothing is cut or repaired without leaving a flag.

Lengths are in tokens. An example has a prompt of P tokens and k responses (1 for SFT, 2 for pairs) of C_i tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from preference_datasets import DataSet, Row, Text
from utils import UserError, rank


class TextRules(NamedTuple):
    """How text becomes tokens; each field is the knob of that name in config.yaml."""

    max_length: int  # tokens of prompt + response
    max_prompt_length: int  # tokens a prompt is cut to, when prompt + longest response exceed max_length
    response_truncation: str  # "fixed": to max_length - max_prompt_length (2023); "fill": to max_length - the prompt's length
    add_bos: bool  # one BOS at the start where the tokenizer adds one by itself; false: none, as in 2023
    eos_in_text: str  # an EOS string within a response or message: "strip" removes it, "keep" makes it the EOS token


class Example(NamedTuple):
    """One unit of training, as token ids: a prompt and k responses (SFT: the target; pairs: chosen, rejected)."""

    prompt: np.ndarray  # [P] int32
    responses: tuple[np.ndarray, ...]  # k arrays [C_i] int32, each ending in EOS unless it was cut
    source: str  # "my.jsonl:17"
    flags: frozenset[str] = frozenset()  # which of the data rules' cases it is
    texts: tuple[int, ...] = ()  # hash of the prompt's text, then of each response's: finds duplicates and leaks


def tokenize(
    data: DataSet, tokenizer: PreTrainedTokenizerBase, pairs: bool, rules: TextRules, template: str | None = None
) -> list[Example]:
    """Every example of a data set, in its order: one per pair if `pairs`, else one per row's sft_target.

    Prompt and response are tokenized apart and their ids joined, so that the boundary cannot move; the ids may therefore
    differ from those of the joined text. `template` renders message lists (see `render`).
    """
    flat: list[tuple[Row, Text, list[Text]]] = []
    for row in data.rows:
        if pairs:
            flat += [(row, row.prompt, [row.responses[w], row.responses[l]]) for w, l in row.pairs]
        elif row.sft_target is not None:
            flat.append((row, row.prompt, [row.sft_target]))

    bos = _automatic_bos(tokenizer) if rules.add_bos else None
    if tokenizer.eos_token is None:
        name = tokenizer.name_or_path
        raise UserError(f"model.tokenizer_name_or_path={name}: it has no EOS token; set eos_token in its tokenizer_config.json")
    examples = []
    silent = rank() != 0 or len(flat) < 5000
    for start in tqdm(range(0, len(flat), 1000), desc=f"tokenizing {data.name}", unit="k", disable=silent):
        chunk = flat[start : start + 1000]
        rendered = [_as_text(prompt, responses, tokenizer, template, rules, row.source) for row, prompt, responses in chunk]
        strings = [text for prompt, responses, _ in rendered for text in (prompt, *responses)]
        ids = iter(tokenizer(strings, add_special_tokens=False)["input_ids"])
        for (row, _, _), (prompt, responses, flags) in zip(chunk, rendered, strict=True):
            prompt_ids, response_ids = next(ids), [next(ids) + [tokenizer.eos_token_id] for _ in responses]
            prompt_ids, response_ids, cuts = truncate(prompt_ids, response_ids, data.truncation, rules, bos)
            flags = flags | cuts | _sameness(prompt, responses, response_ids)
            arrays = tuple(np.asarray(r, np.int32) for r in response_ids)
            texts = tuple(hash(t) for t in (prompt, *responses))
            examples.append(Example(np.asarray(prompt_ids, np.int32), arrays, row.source, frozenset(flags), texts))
    return examples


def render(
    prompt: Text, responses: Sequence[Text], tokenizer: PreTrainedTokenizerBase, template: str | None, source: str
) -> tuple[str, list[str]]:
    """Strings pass as they stand; message lists go through the chat template. -> (prompt, responses)

    The template is `template` if given, else the tokenizer's, else the HH form "\\n\\nHuman: ...\\n\\nAssistant:".
    A response is what the template appends to the rendered prompt, up to its end-of-turn token; EOS itself is added later.
    """
    if isinstance(prompt, str):
        return prompt, [str(r) for r in responses]
    template = template or tokenizer.chat_template or HH_TEMPLATE
    try:
        head = str(tokenizer.apply_chat_template(prompt, chat_template=template, tokenize=False, add_generation_prompt=True))
        tails = []
        for response in responses:
            whole = str(tokenizer.apply_chat_template([*prompt, *response], chat_template=template, tokenize=False))
            if not whole.startswith(head):  # the tail could not be told from the prompt
                raise UserError(f"{source}: the chat template renders prompt and answer differently from the prompt alone; "
                                "give a simpler one with chat_template=FILE or chat_template=hh")  # fmt: skip
            tail = whole[len(head) :]
            body, eos, after = tail.rpartition(tokenizer.eos_token or "")
            tails.append(body if eos and not after.strip() else tail)
    except UserError:
        raise
    except Exception as error:  # jinja2's and the template's own raise_exception
        raise UserError(f"{source}: the chat template refuses this conversation: {str(error).splitlines()[0]}") from None
    return head, tails


HH_TEMPLATE = (
    "{% for m in messages %}{{ {'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: ', 'system': ''}[m['role']] + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def _as_text(
    prompt: Text, responses: list[Text], tokenizer: PreTrainedTokenizerBase, template: str | None, rules: TextRules, source: str
) -> tuple[str, list[str], set[str]]:
    """Cleaned, then rendered: prompt, responses, and the flags that this gave.

    A prompt that is a string keeps its EOS strings: it may be a chat that was rendered already, and no prompt is trained.
    """
    eos = str(tokenizer.eos_token)
    cleaned = [_clean(text, eos, rules) for text in (prompt, *responses)]
    flags = {"eos_in_text"} if any(found for _, found in cleaned) else set()
    texts = [text for text, _ in cleaned]
    return *render(prompt if isinstance(prompt, str) else texts[0], texts[1:], tokenizer, template, source), flags


def _clean(text: Text, eos: str, rules: TextRules) -> tuple[Text, bool]:
    """Deal with an EOS string within a text, or within a message's content. -> (text, was there one)"""
    if isinstance(text, list):
        cleaned = [(message, _clean(message["content"], eos, rules)) for message in text]
        return [message | {"content": str(content)} for message, (content, _) in cleaned], any(found for _, (_, found) in cleaned)
    found = eos in text
    while rules.eos_in_text == "strip" and eos in text:  # again: what is left may join to a new one
        text = text.replace(eos, "")
    return text, found


def _automatic_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id, if this tokenizer puts one in front of a text by itself."""
    ids = tokenizer("x")["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def truncate(
    prompt: list[int], responses: list[list[int]], keep: str, rules: TextRules, bos: int | None = None
) -> tuple[list[int], list[list[int]], set[str]]:
    """The 2023 rules: cut the prompt if it does not fit with the longest response, then all responses if still too long.

    A response that is cut loses its EOS. BOS, where there is one, stays in front of whatever remains of the prompt.

    >>> rules = TextRules(max_length=8, max_prompt_length=4, response_truncation="fixed", add_bos=True, eos_in_text="strip")
    >>> truncate([1, 2, 3, 4, 5, 6], [[7, 8, 0], [9, 0]], "keep_end", rules)
    ([3, 4, 5, 6], [[7, 8, 0], [9, 0]], {'prompt_truncated'})
    >>> truncate([1, 2], [[3, 4, 5, 6, 7, 8, 0]], "keep_end", rules)[:2]          # fixed: 4 = max_length - max_prompt_length
    ([1, 2], [[3, 4, 5, 6]])
    >>> truncate([1, 2], [[3, 4, 5, 6, 7, 8, 0]], "keep_end", rules._replace(response_truncation="fill"))[:2]
    ([1, 2], [[3, 4, 5, 6, 7, 8]])
    """
    flags = set()
    head = [] if bos is None else [bos]
    if bos is not None and prompt[:1] == [bos]:  # a chat template wrote it
        prompt = prompt[1:]
    longest = max(len(r) for r in responses)
    if len(head) + len(prompt) + longest > rules.max_length and len(head) + len(prompt) > rules.max_prompt_length:
        room = rules.max_prompt_length - len(head)
        prompt = prompt[:room] if keep == "keep_start" else prompt[len(prompt) - room :]  # not [-room:]: room may be 0
        flags.add("prompt_truncated")
    prompt = head + prompt
    if len(prompt) + longest > rules.max_length:
        taken = rules.max_prompt_length if rules.response_truncation == "fixed" else len(prompt)
        responses = [r[: rules.max_length - taken] for r in responses]
        flags.add("response_truncated")
    return prompt, responses, flags


def _sameness(prompt: str, responses: list[str], ids: list[list[int]]) -> set[str]:
    flags = set()
    if not prompt.strip():
        flags.add("empty_prompt")
    if not all(r.strip() for r in responses):
        flags.add("empty_response")
    if len(responses) > 1 and responses[0] == responses[1]:
        flags.add("identical_pair")
    elif len(responses) > 1 and ids[0] == ids[1]:
        flags.add("identical_after_truncation")
    return flags


def n_scored_tokens(examples: Iterable[Example]) -> int:
    """Response tokens that have a prediction: all of them, less the first where there is no prompt token to predict it from."""
    return sum(len(r) - (len(e.prompt) == 0) for e in examples for r in e.responses)
