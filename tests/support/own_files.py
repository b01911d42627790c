"""Make rows of a user's own file: their usual turns, a file of them, and its data set."""

import json
from dataclasses import replace

from plumb.data.registry import get_dataset

PAIR = {"prompt": "Name a sea:", "chosen": " the Baltic", "rejected": " the Alps"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
Q = user("Name a sea.")
GOOD = assistant("The Baltic.")
BAD = assistant("The Alps.")
CHAT_PAIR = {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}


def shown(turn):
    return {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}


def load(path, split="train", **options):
    """Return the data set with all its rows read."""
    data = get_dataset(str(path), split, **{"eval_share": 0, **options})
    rows = list(data.rows)
    return replace(data, rows=rows)


def jsonl(tmp_path, *rows):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_message(caught, message):
    text = str(caught.value)
    assert message in text and "\n" not in text and "; " in text
