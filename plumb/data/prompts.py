"""Read prompts to sample from: from a file, a data set's split, or the built-in ones; turn a prompt
into tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from plumb.data.files import Text, read_file
from plumb.data.registry import DataSet
from plumb.data.token_text import encode_prompt
from plumb.data.tokenization import automatic_bos, render
from plumb.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A company, something for a child, a poem, a fact, how a thing works, and why: short, harmless,
# with answers one can judge.
BUILT_IN = {
    "english": (
        "Describe what IKEA does in three sentences.",
        "Tell a six-year-old what happened when people first walked on the moon.",
        "Write four lines of verse about an old lighthouse.",
        "In which year did the Berlin Wall fall, and what happened that night?",
        "How does a refrigerator keep food cold?",
        "Why do birds fly south for the winter?",
    ),
    "chinese": (
        "请用三句话介绍一下宜家这家公司。",
        "请给一个六岁的孩子讲讲人类第一次登上月球的故事。",
        "请写一首四行的小诗，主题是一座古老的灯塔。",
        "柏林墙是哪一年倒塌的？那天晚上发生了什么？",
        "冰箱是怎样让食物保持低温的？",
        "为什么有些鸟到了冬天要飞往南方？",
    ),
    "japanese": (
        "イケアがどのような会社なのか、三つの文で説明してください。",
        "人類が初めて月を歩いたときのことを、六歳の子どもに話してあげてください。",
        "古い灯台についての四行の詩を書いてください。",
        "ベルリンの壁が崩壊したのは何年ですか。その夜、何が起こりましたか。",
        "冷蔵庫はどのような仕組みで食べ物を冷やしているのですか。",
        "鳥はなぜ冬になると南へ渡るのですか。",
    ),
}


class Prompt(NamedTuple):
    """Hold a prompt: a string is used verbatim, messages go through the model's chat template."""

    text: Text
    source: str  # "my.jsonl:17", "hh:123", "english:1"
    more: Mapping[str, Any] | None = None  # fields of its row that the chat template may read


class NumberedPrompt(NamedTuple):
    """Hold a prompt as the policy reads it, with its own number among the prompts that a run
    samples from.

    Example: NumberedPrompt(np.array([40, 41]), 16, "my.jsonl:17").
    """

    ids: np.ndarray  # [P] token ids
    number: int
    source: str


def built_in(language: str) -> list[Prompt]:
    return [
        Prompt(user_turn(text), f"{language}:{i}") for i, text in enumerate(BUILT_IN[language], 1)
    ]


def user_turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def of_file(path: Path, field: str, raw: bool) -> Iterator[Prompt]:
    """Return the prompts of a .jsonl, .json, .csv or .parquet file. Messages must end with the
    user's. A string is a user's turn, unless it is `raw` or ends with "Assistant:", as an already
    rendered prompt does. Raises UserError that names file, line and field.
    """
    if not path.is_file():
        raise UserError(
            f"--prompts {path}: no such file; give a .jsonl, .json, .csv or .parquet file"
        )
    for row in read_file(path):
        if field not in row.fields:
            raise row.error(
                f"no field '{field}' (the row has: {row.names})",
                "name the one with the prompts by --field",
            )
        text = row.text_or_messages(field)
        if not (text.strip() if isinstance(text, str) else text[-1]["content"].strip()):
            raise row.error(f"field '{field}' is empty", "write a prompt")
        if isinstance(text, list) and text[-1]["role"] != "user":
            raise row.error(
                f"the last message of field '{field}' is the {text[-1]['role']}'s",
                "end with the user's",
            )
        rendered = isinstance(text, list) or raw or text.endswith("Assistant:")
        more = {name: value for name, value in row.fields.items() if name != field}
        yield Prompt(text if rendered else user_turn(str(text)), row.source, more or None)


def of_dataset(data: DataSet) -> Iterator[Prompt]:
    """Return a data set's prompts as in training: strings verbatim, or messages."""
    for row in data.rows:
        yield Prompt(row.prompt, row.source, row.more)


def some_of(prompts: Iterable[Prompt], n: int | None, seed: int) -> list[Prompt]:
    """Return each text once; `n` of them, drawn with `seed`, in their own order; None: all. Raise
    UserError if there are none.
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(json.dumps(prompt.text, default=str), prompt)
    unique = list(first.values())
    if not unique:
        raise UserError("there are no prompts; see --eval-share, --split and --prompts")
    if n is None or n >= len(unique):
        return unique
    return [
        unique[i] for i in sorted(np.random.default_rng(seed).choice(len(unique), n, replace=False))
    ]


def token_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, add_bos: bool, longest: int
) -> tuple[np.ndarray, bool]:
    """Return a rendered prompt as in training, after BOS if the tokenizer adds one, keeping the end
    if it has more than `longest` tokens. Return (ids [P], whether it was truncated).
    """
    bos = [b for b in [automatic_bos(tokenizer)] if b is not None and add_bos]
    ids = encode_prompt(text, tokenizer, bos[0] if bos else None)
    room = longest - len(bos)
    return np.array(bos + ids[max(len(ids) - room, 0) :], np.int64), len(ids) > room


def rendered(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """Return the text that the model reads."""
    return render(prompt.text, [], tokenizer, template, prompt.source, prompt.more)[0]
