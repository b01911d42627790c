"""Make token stores of the few rows that a test writes."""

import json

from tiny import tiny_tokenizer

from plumb.data import examples
from plumb.data.registry import get_dataset
from plumb.data.token_store import StoreSpec, TokenStore, find_or_make
from plumb.data.tokenization import TextRules

RULES = TextRules(
    max_length=64,
    max_prompt_length=32,
    response_truncation="fixed",
    add_bos=True,
    eos_in_text="strip",
)


def write(tmp_path, *rows):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def store_of(path, folder):
    spec = StoreSpec(
        data=get_dataset(str(path), "train", eval_share=0),
        split="train",
        tokenizer=tiny_tokenizer(),
        identity="",
        rules=RULES,
        template=None,
        inputs=None,
        options={},
    )
    return TokenStore(find_or_make(spec, folder)[0])


def view_of(path, folder, group="pair"):
    return examples.view(store_of(path, folder), group, RULES, "keep_start", None)
