"""Encode text as token ids that decode to exactly that text, and decode ids to what they add to the
text before them.

SentencePiece-style tokenizers mark the start of a text with a space, which their decoder drops
there and nowhere else: a response that is encoded by itself and put after a prompt would begin with
a spurious space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A response is encoded behind one of these, which is then dropped: the first that does not merge
# with it.
ANCHORS = ("\n", ":", "1", "x", "中")

Ids = list[int]


class Row(NamedTuple):
    """Hold a prompt and its responses as token ids, without BOS and without the EOS that ends a
    response.
    """

    prompt: Ids
    responses: list[Ids]
    exact: list[bool]  # of the prompt, then of each response: do the ids decode to the text?


def ids_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Encode each text by itself, without BOS and EOS of the tokenizer's own."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "verbose": False}
    if tokenizer.is_fast:
        # switches off truncation and padding that a tokenizer.json may ask for
        tokenizer("", **options)
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [encoding.ids for encoding in encoded]
    return [list(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]


def decode(
    rows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, skip_special: bool = False
) -> list[str]:
    """Decode each row as a text of its own, exactly: no spaces are tidied up."""
    if not rows:
        return []
    if tokenizer.is_fast:
        return list(
            tokenizer.backend_tokenizer.decode_batch(list(rows), skip_special_tokens=skip_special)
        )
    exactly = {"clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}
    return [str(tokenizer.decode(row, skip_special_tokens=skip_special, **exactly)) for row in rows]


def continuations(
    rows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, skip_special: bool = False
) -> list[str]:
    """Decode each row to what it adds to a text before it: " Lily", where `decode` may give
    "Lily".
    """
    if not rows:
        return []
    anchors = [ids for ids in ids_of(ANCHORS[::-1], tokenizer) if ids]
    decoded = zip(anchors, decode(anchors, tokenizer, skip_special), strict=True)
    before, text = next(((ids, text) for ids, text in decoded if text.strip()), ([], ""))
    return [
        both[len(text) :]
        for both in decode([before + row for row in rows], tokenizer, skip_special)
    ]


def continued(
    prompt: Ids, rows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, skip_special: bool = False
) -> list[str]:
    """Decode each row to what it adds to this prompt's text, which may be nothing but BOS."""
    is_start = all(token == tokenizer.bos_token_id for token in prompt)
    return (decode if is_start else continuations)(rows, tokenizer, skip_special)


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase, bos: int | None) -> Ids:
    """Encode one prompt, without BOS, as `encode_rows` does."""
    (row,) = encode_rows([(text, [])], tokenizer, bos)
    return row.prompt


def encode_rows(
    rows: Sequence[tuple[str, Sequence[str]]], tokenizer: PreTrainedTokenizerBase, bos: int | None
) -> list[Row]:
    """Encode prompts and their responses so that prompt + response decodes to exactly their texts.

    A prompt's ids are the tokenizer's own, the same for all of its responses. So are a response's,
    encoded separately as in the original, wherever they continue the prompt exactly; elsewhere it
    is encoded after an anchor (see ANCHORS). If that isn't exact either, as with a tokenizer that
    lowercases, it is encoded after its prompt, and not `exact`. `bos`: the id that is put before
    every prompt later; one that a chat template wrote is dropped.
    """
    prompts = [prompt for prompt, _ in rows]
    texts = [(i, text) for i, (_, responses) in enumerate(rows) for text in responses]
    encoded = ids_of([*prompts, *(text for _, text in texts)], tokenizer)
    heads = _Prompts(prompts, encoded[: len(rows)], tokenizer, bos)
    tails, exact = _responses(texts, encoded[len(rows) :], heads)
    made, n = [], 0
    for i, (_, responses) in enumerate(rows):
        end = n + len(responses)
        made.append(Row(heads.ids[i], tails[n:end], [heads.exact[i], *exact[n:end]]))
        n = end
    return made


class _Prompts:
    """Hold the prompts of some rows, as `ids`."""

    def __init__(
        self, texts: list[str], ids: list[Ids], tokenizer: PreTrainedTokenizerBase, bos: int | None
    ):
        self.tokenizer, self.bos, self.encoded_as, self.ids = (
            tokenizer,
            bos,
            texts.copy(),
            self.without_bos(ids, bos),
        )
        cut = [len(kept) < len(row) for kept, row in zip(self.ids, ids, strict=True)]
        mark = str(tokenizer.bos_token)
        wanted = [
            text.removeprefix(mark) if c else text for text, c in zip(texts, cut, strict=True)
        ]
        decoded = decode(self.ids, tokenizer)
        # A tokenizer may take a text's own first space for its mark of the start: it is given one
        # more.
        short = [i for i, text in enumerate(wanted) if text[:1].isspace() and decoded[i] != text]
        longer = self.without_bos(ids_of([f" {texts[i]}" for i in short], tokenizer), bos)
        for i, row, text in zip(short, longer, decode(longer, tokenizer), strict=True):
            if text == wanted[i]:
                self.ids[i] = row
                decoded[i] = text
                self.encoded_as[i] = f" {texts[i]}"
        # White space at the end of a prompt that its ids lack has to come with the response.
        ends = [
            (_end_space(text), _end_space(shown))
            for text, shown in zip(wanted, decoded, strict=True)
        ]
        self.missing = [end[len(kept) :] if end.startswith(kept) else "" for end, kept in ends]
        self.exact = [a + b == c for a, b, c in zip(decoded, self.missing, wanted, strict=True)]

    @staticmethod
    def without_bos(rows: list[Ids], bos: int | None) -> list[Ids]:
        return [row[1:] if bos is not None and row[:1] == [bos] else row for row in rows]


def _end_space(text: str) -> str:
    return text[len(text.rstrip()) :]


def _responses(
    texts: list[tuple[int, str]], apart: list[Ids], prompts: _Prompts
) -> tuple[list[Ids], list[bool]]:
    """Encode responses, given as (number of the prompt, text), separately. Return (ids, whether
    each is exact).
    """
    tokenizer = prompts.tokenizer
    chosen = apart.copy()
    exact = [False] * len(texts)

    def take(candidates: list[tuple[int, Ids]], inexact: bool = False) -> list[int]:
        """Take those that are exact, or all. Return the numbers of all responses that are not exact
        yet.
        """
        # Behind a prompt without tokens a response is the start of a text.
        starts = [(n, ids) for n, ids in candidates if not prompts.ids[texts[n][0]]]
        later = [(n, ids) for n, ids in candidates if prompts.ids[texts[n][0]]]
        decoded = [
            *decode([ids for _, ids in starts], tokenizer),
            *continuations([ids for _, ids in later], tokenizer),
        ]
        for (n, ids), text in zip([*starts, *later], decoded, strict=True):
            prompt, wanted = texts[n]
            exact[n] = text == (prompts.missing[prompt] if prompts.ids[prompt] else "") + wanted
            if exact[n] or inexact:
                chosen[n] = ids
        return [n for n, done in enumerate(exact) if not done]

    left = take([*enumerate(apart)])
    starts = [n for n in left if not prompts.ids[texts[n][0]]]
    left = take(
        [*zip(starts, _behind_anchors([f" {texts[n][1]}" for n in starts], tokenizer), strict=True)]
    )
    left = take([*zip(left, _behind_anchors([texts[n][1] for n in left], tokenizer), strict=True)])
    joined = ids_of([prompts.encoded_as[texts[n][0]] + texts[n][1] for n in left], tokenizer)
    heads = [prompts.ids[texts[n][0]] for n in left]
    behind = zip(left, heads, prompts.without_bos(joined, prompts.bos), strict=True)
    take(
        [(n, ids[len(head) :]) for n, head, ids in behind if ids[: len(head)] == head], inexact=True
    )
    return chosen, exact


def _behind_anchors(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Encode texts as they continue others: each is cut at special tokens, behind which a tokenizer
    may add a space.

    A section that merges with every anchor is encoded as a text of its own.
    """
    added = sorted(
        (token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True
    )
    cut = re.compile(f"({'|'.join(map(re.escape, added))})") if added else re.compile("(?!)")
    sections = [[part for part in cut.split(text) if part] for text in texts]
    encoded = dict[str, Ids]()
    waiting = list(dict.fromkeys(part for parts in sections for part in parts))
    for anchor in ANCHORS if waiting else ():
        (mark,) = ids_of([anchor], tokenizer)
        for part, ids in zip(
            waiting, ids_of([anchor + part for part in waiting], tokenizer), strict=True
        ):
            if mark and ids[: len(mark)] == mark:
                encoded[part] = ids[len(mark) :]
        waiting = [part for part in waiting if part not in encoded]
    encoded |= zip(waiting, ids_of(waiting, tokenizer), strict=True)
    return [[token for part in parts for token in encoded[part]] for parts in sections]
