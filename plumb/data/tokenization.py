"""Turn text into token ids: chat templates, BOS and EOS, and truncation. Every repair leaves a
mark.

Lengths are in tokens. An example has a prompt of P tokens and k responses (1 for SFT, 2 for pairs)
of C_i tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from plumb.console import rank
from plumb.data.chat_template import ChatTemplate
from plumb.data.files import Message, Text, digest
from plumb.data.registry import DataSet
from plumb.data.rows import Row
from plumb.data.token_text import encode_rows
from plumb.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = (
    1000  # rows that are tokenized at once: enough for the tokenizer's threads, and little memory
)
# marks of a text: only white space; an EOS string stood within it; its ids decode to another
BLANK = 1
HAS_EOS = 2
CHANGED = 4


@dataclass(frozen=True)
class TextRules:
    """Hold how text becomes tokens; each field is the option of that name in config.yaml."""

    max_length: int  # tokens of prompt + response
    max_prompt_length: (
        int  # tokens a prompt is cut to, when prompt + longest response exceed max_length
    )
    # "fixed": to max_length - max_prompt_length (2023); "fill": to max_length - the prompt's length
    response_truncation: str
    add_bos: (
        bool  # one BOS at the start where the tokenizer adds one by itself; false: none, as in 2023
    )
    # an EOS string within a response or message: "strip" removes it, "keep" makes it the EOS token
    eos_in_text: str


class Example(NamedTuple):
    """Hold one unit of training as token ids after truncation: a prompt and k responses (the SFT
    target; chosen, rejected; or a list, best first).
    """

    # [P] int32, BOS included where there is one; a tuple of k such arrays where each response has
    # its own
    prompt: Any
    responses: tuple[np.ndarray, ...]  # k arrays [C_i] int32, each ending in EOS unless it was cut
    source: str  # "my.jsonl:17"


class Prefixes(NamedTuple):
    """Hold what responses begin with by their labels, where only labelled responses are wanted."""

    undesirable: str
    desirable: str
    unpair: bool  # is a pair a desirable and an undesirable response?


class Chunk(NamedTuple):
    """Hold some rows of a data set as columns: each text once, without truncation. Texts and rows
    are numbered from 0 within the chunk.
    """

    n_rows: int  # that it was made of, with those that no pair and no target came from
    ids: list[int]  # of all texts, one after another; responses with their EOS, prompts without BOS
    lengths: list[int]  # [texts] tokens
    digests: list[int]  # [texts] 64 bits that stand for the text
    marks: list[int]  # [texts] BLANK | HAS_EOS | CHANGED
    rows: list[tuple[int, str]]  # (its prompt's text, its source)
    weights: list[float]  # [rows] how many rows each counts as, or NaN
    pairs: list[tuple[int, int, int]]  # (row, chosen text, rejected text)
    margins: list[float]  # [pairs] score of chosen less that of rejected, or NaN
    p_chosen: list[float]  # [pairs] soft label, or NaN
    # [pairs] of a ranked list: the levels of chosen and rejected, and the lowest; else (0, 1, 1)
    places: list[tuple[int, int, int]]
    targets: list[tuple[int, int]]  # (row, text)
    labelled: list[tuple[int, int, int]]  # (row, text, 1 if desirable, else 0)
    # (row, where its responses begin in `ranked`, how many they are)
    lists: list[tuple[int, int, int]]
    ranked: list[int]  # the texts of all lists, each from best to worst
    levels: list[int]  # [ranked] 0 for the best, the same for those that rank alike


def encode(
    data: DataSet,
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules,
    template: str | None = None,
    prefixes: Prefixes | None = None,
) -> Iterator[Chunk]:
    """Yield all pairs and SFT targets of a data set in its order, a chunk of its rows at a time.

    A prompt's ids are the same for all of its responses, and those of prompt + response decode to
    exactly these texts (see token_text.encode_rows); a text for which that is impossible is marked
    CHANGED. `template` renders message lists (see `render`). With `prefixes`, labelled responses
    are all that is yielded, each behind the prefix of its label. A row that the template does not
    accept is refused as `data` says. When all are drawn, `data` knows which fields nothing reads.
    """
    if tokenizer.eos_token is None:
        name = tokenizer.name_or_path
        raise UserError(
            f"model.tokenizer_name_or_path={name}: it has no EOS token; set eos_token in its"
            " tokenizer_config.json"
        )
    chat = ChatTemplate(tokenizer, template or own_template(tokenizer))
    # before the clock starts: a source may first be read for its held-out prompts
    rows = list(islice(data.rows, CHUNK))
    with tqdm(
        desc=f"tokenizing {data.name}", unit="row", unit_scale=True, delay=3, disable=rank() != 0
    ) as progress:
        while rows:
            progress.total = data.n_rows
            n_rows = len(rows)
            if prefixes is not None:
                rows = [one for row in rows for one in _prefixed(row, prefixes)]
            yield _encode(rows, data, tokenizer, rules, chat)._replace(n_rows=n_rows)
            progress.update(n_rows)
            rows = list(islice(data.rows, CHUNK))
    data.unused.update(chat.unused)
    data.altered.update(chat.altered)


def _encode(
    rows: list[Row],
    data: DataSet,
    tokenizer: PreTrainedTokenizerBase,
    rules: TextRules,
    chat: ChatTemplate,
) -> Chunk:
    """Return the columns of these rows; one that the template refuses goes to `data.refuse`."""
    chunk = Chunk(len(rows), *([] for _ in Chunk._fields[1:]))
    texts = list[tuple[str, list[str]]]()
    n_texts = 0
    for row in rows:
        lists = _lists_of(row)
        wanted = [row.responses[i] for pair in row.pairs for i in pair]
        wanted += [] if row.sft_target is None else [row.sft_target]
        wanted += [row.responses[i] for order, _ in lists for i in order]
        wanted += [] if row.labels is None else row.responses
        # a response stands in many pairs, but is rendered and kept once
        unique = {_hashable(text): text for text in wanted}
        if not unique:
            continue
        try:
            (prompt, *rendered), marks = _as_texts(row, list(unique.values()), chat, rules)
        except UserError as error:
            data.refuse(error)
            continue
        if isinstance(row.prompt, str):
            data.unused.update((row.more or {}).keys())
        _record(row, lists, n_texts, {key: n_texts + i for i, key in enumerate(unique, 1)}, chunk)
        texts.append((prompt, rendered))
        n_texts += len(marks)
        chunk.marks.extend(marks)
    encoded = encode_rows(texts, tokenizer, automatic_bos(tokenizer) if rules.add_bos else None)
    exact = [is_exact for made in encoded for is_exact in made.exact]
    chunk.marks[:] = [
        mark | CHANGED * (not is_exact) for mark, is_exact in zip(chunk.marks, exact, strict=True)
    ]
    for (prompt, responses), made in zip(texts, encoded, strict=True):
        ended = [[*ids, tokenizer.eos_token_id] for ids in made.responses]
        for text, ids in zip([prompt, *responses], [made.prompt, *ended], strict=True):
            chunk.ids.extend(ids)
            chunk.lengths.append(len(ids))
            chunk.digests.append(digest(text))
    return chunk


def _record(
    row: Row,
    lists: list[tuple[list[int], list[int]]],
    prompt: int,
    numbers: Mapping[object, int],
    chunk: Chunk,
) -> None:
    """Add the row to the chunk's columns; `prompt`: the number of its text, `numbers`: those of its
    other texts, by _hashable.
    """
    n = len(chunk.rows)
    responses = [numbers.get(_hashable(text), 0) for text in row.responses]  # 0: not used
    chunk.rows.append((prompt, row.source))
    chunk.weights.append(nan if row.weight is None else row.weight)
    for i, j in row.pairs:
        chunk.pairs.append((n, responses[i], responses[j]))
        chunk.margins.append(nan if row.scores is None else row.scores[i] - row.scores[j])
        chunk.p_chosen.append(nan if row.p_chosen is None else row.p_chosen)
    chunk.places.extend(_places_of(row))
    if row.sft_target is not None:
        chunk.targets.append((n, numbers[_hashable(row.sft_target)]))
    for order, levels in lists:
        chunk.lists.append((n, len(chunk.ranked), len(order)))
        chunk.ranked.extend(responses[i] for i in order)
        chunk.levels.extend(levels)
    chunk.labelled.extend((n, responses[i], int(x)) for i, x in enumerate(row.labels or ()))


def _prefixed(row: Row, prefixes: Prefixes) -> Iterator[Row]:
    """Yield the row's desirable and its undesirable responses, each kind as a row."""
    texts: dict[bool, list[Text]] = {True: [], False: []}
    for text, label in zip(row.responses, row.labels or (), strict=False):
        texts[label].append(text)
    for pair in row.pairs if prefixes.unpair else ():
        for i, label in zip(pair, (True, False), strict=True):
            texts[label].append(row.responses[i])
    for label, own in texts.items():
        if own:
            yield row._replace(
                responses=own,
                labels=[label] * len(own),
                prefix=prefixes.desirable if label else prefixes.undesirable,
                pairs=[],
                scores=None,
                ranking=None,
                sft_target=None,
            )


def _lists_of(row: Row) -> list[tuple[list[int], list[int]]]:
    """Return the row's lists of responses, the one that it ranks or each of its pairs: their
    indices from best to worst, and their levels.
    """
    if row.ranking is None:
        return [([*pair], [0, 1]) for pair in row.pairs]
    levels = _levels(row.ranking)
    order = sorted(range(len(levels)), key=levels.__getitem__)
    return [(order, [levels[i] for i in order])]


def _levels(ranking: Sequence[float]) -> list[int]:
    """Return each response's level: 0 for the best, the same for those that rank alike.

    >>> _levels([2.5, 4, 1, 2.5])
    [1, 0, 2, 1]
    """
    level = {rank: i for i, rank in enumerate(sorted(set(ranking), reverse=True))}
    return [level[rank] for rank in ranking]


def _places_of(row: Row) -> list[tuple[int, int, int]]:
    """Return where each of the row's pairs stands in its ranking (see Chunk)."""
    if row.ranking is None:
        return [(0, 1, 1)] * len(row.pairs)
    levels = _levels(row.ranking)
    return [(levels[i], levels[j], max(levels)) for i, j in row.pairs]


def _hashable(text: Text) -> object:
    return text if isinstance(text, str) else (json.dumps(text, default=str),)


def render(
    prompt: Text,
    responses: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    source: str,
    more: Mapping[str, Any] | None = None,
) -> tuple[str, list[str]]:
    """Return (prompt, responses) as texts: strings unchanged, message lists rendered by the chat
    template.

    The template is `template` if given, else the tokenizer's, else the HH form "\\n\\nHuman:
    ...\\n\\nAssistant:". `more`: fields of the row that the template may read. See
    ChatTemplate.render.
    """
    chat = ChatTemplate(tokenizer, template or own_template(tokenizer))
    if isinstance(prompt, str):
        return prompt, [str(text) for text in responses]
    return chat.render(prompt, [r for r in responses if isinstance(r, list)], source, more)


HH_TEMPLATE = (
    "{% for m in messages %}{{ {'user': '\n\nHuman: ', 'assistant': '\n\nAssistant: ', 'system':"
    " ''}[m['role']] + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:'"
    " }}{% endif %}"
)


def named_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the tokenizer's chat templates by name; a single one is "default"."""
    own = tokenizer.chat_template
    return own if isinstance(own, dict) else {"default": own} if own else {}


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's default chat template, or HH's if it has none. Raise UserError if it
    has several and no default.
    """
    own = named_templates(tokenizer)
    if own and "default" not in own and len(own) > 1:
        raise UserError(
            f"chat_template: the tokenizer has several templates ({', '.join(sorted(own))}) and no"
            " default; give chat_template= one of these names"
        )
    return own.get("default") or next(iter(own.values()), HH_TEMPLATE)


def template_text(
    named: str | None, whose: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> str | None:
    """Return the option chat_template as text: None (see own_template), "hh", the name of one of
    the tokenizer's templates, or a file.

    Without a tokenizer, a possible name gives None. Raises UserError, which begins with `whose`,
    for a file that cannot be read or is empty, and for an unknown name.
    """
    if named is None:
        return None
    own = named_templates(tokenizer) if tokenizer else {}
    if named == "hh" or named in own:
        return HH_TEMPLATE if named == "hh" else own[named]
    is_name = (
        re.fullmatch(r"[\w.-]+", named)
        and not named.endswith(".jinja")
        and not Path(named).exists()
    )
    if is_name and tokenizer is None:
        return None
    problem, known = "is empty", f"the tokenizer's templates: {', '.join(sorted(own)) or 'none'}"
    try:
        if not is_name and (text := Path(named).read_text("utf-8")).strip():
            return text
    except (OSError, UnicodeDecodeError) as error:
        problem = (
            f"cannot be read ({error.strerror if isinstance(error, OSError) else 'not UTF-8 text'})"
        )
    if is_name:
        raise UserError(
            f"{whose}: neither a file nor a template of the tokenizer; give hh, a file, or one of"
            f" {known}"
        )
    raise UserError(f"{whose}: {problem}; give hh, or a file with a jinja template")


def _as_texts(
    row: Row, responses: list[Text], chat: ChatTemplate, rules: TextRules
) -> tuple[list[str], list[int]]:
    """Clean and render; return the texts of the prompt and the responses, and the marks of each.

    A prompt that is a string keeps its EOS strings: it may be an already rendered chat, and prompts
    are not trained on.
    """
    eos = str(chat.tokenizer.eos_token)
    strip = rules.eos_in_text == "strip"
    clean = [_less(text, eos) for text in responses] if strip else responses
    if isinstance(row.prompt, str):
        prompt, tails = row.prompt, [str(text) for text in clean]
    else:
        turns = _less(row.prompt, eos) if strip else row.prompt
        answers = [text for text in clean if isinstance(text, list)]
        prompt, tails = chat.render(turns, answers, row.source, row.more)
    texts = [prompt, *(row.prefix + tail for tail in tails)]
    return texts, [
        BLANK * (not text.strip()) | HAS_EOS * _holds(given, eos)
        for text, given in zip(texts, (row.prompt, *responses), strict=True)
    ]


def _holds(value: Any, eos: str) -> bool:
    """Return whether the EOS string occurs in a text, or in any text of messages."""
    if isinstance(value, str):
        return eos in value
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds(each, eos) for each in within)


def _less(value: Any, eos: str) -> Any:
    """Return the text, or the messages, without EOS strings."""
    if isinstance(value, str):
        while eos in value:  # repeated, since the remaining text may form a new one
            value = value.replace(eos, "")
        return value
    if isinstance(value, Message):
        return value.replaced({name: _less(each, eos) for name, each in value.items()})
    if isinstance(value, dict):
        return {name: _less(each, eos) for name, each in value.items()}
    return [_less(each, eos) for each in value] if isinstance(value, list) else value


def automatic_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS id if this tokenizer adds one to a text by default."""
    ids = tokenizer("x")["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def truncate(prompts: np.ndarray, responses: np.ndarray, rules: TextRules) -> np.ndarray:
    """Return the lengths after truncation: [n] of the prompts, including BOS, and [n, k] of their
    responses -> [n, 1 + k].

    The original's rules: cut the prompt if it does not fit with the longest response, then all
    responses if still too long. A truncated response loses its EOS. BOS, if there is one, stays at
    the start of what remains of the prompt.

    >>> from dataclasses import replace
    >>> rules = TextRules(
    ...     max_length=8,
    ...     max_prompt_length=4,
    ...     response_truncation="fixed",
    ...     add_bos=True,
    ...     eos_in_text="strip",
    ... )
    >>> lengths = np.array([6, 2]), np.array([[3, 2], [7, 3]])
    >>> truncate(*lengths, rules)  # fixed: 4 = max_length - max_prompt_length
    array([[4, 3, 2],
           [2, 4, 3]])
    >>> truncate(*lengths, replace(rules, response_truncation="fill"))[1]
    array([2, 6, 3])
    """
    longest = responses.max(1)
    too_long = (prompts + longest > rules.max_length) & (prompts > rules.max_prompt_length)
    prompts = np.where(too_long, rules.max_prompt_length, prompts)
    taken = rules.max_prompt_length if rules.response_truncation == "fixed" else prompts
    room = np.where(prompts + longest > rules.max_length, rules.max_length - taken, longest)
    return np.column_stack([prompts, np.minimum(responses, room[:, None])])


def trees_of(example: Example) -> list[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    """Return (prompt, its responses): one tree, or one per response if their prompts differ."""
    if isinstance(example.prompt, tuple):
        return [
            (prompt, (response,))
            for prompt, response in zip(example.prompt, example.responses, strict=True)
        ]
    return [(example.prompt, example.responses)]
