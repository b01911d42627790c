"""What the table at the start says of rows, fields and splits that are not used."""

import json
import re

import pytest

from plumb.data.prepare import load_examples
from plumb.errors import UserError
from plumb.models.load import load_tokenizer

PAIR = {"prompt": "Name a sea:", "chosen": " the Baltic", "rejected": " the Alps"}
OTHER = {"prompt": "Name a hill:", "chosen": " the Brocken", "rejected": " the Po"}


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bad_rows_that_are_dropped_are_named(compose, tmp_path, tiny_model, capsys):
    """In the table: how many, and the first. Also where a template refuses them, and where none is
    left.
    """
    bad = {**PAIR, "chosen": None}
    path, rule = write(tmp_path / "own.jsonl", PAIR, bad, OTHER), "data_rules.bad_row=drop"
    config = compose(
        "exp_name=x",
        f"model.name_or_path={tiny_model}",
        f"datasets=[{path}]",
        "eval_share=0",
        rule,
        f"local_dirs=[{tmp_path}/runs]",
    )
    for _ in ("made", "from the cache"):
        assert len(load_examples(config, load_tokenizer(config), "pair")[0]) == 2
        shown = capsys.readouterr().out
        assert re.search(r"  bad rows +1 +1? *.*not loaded\n", shown), shown
        assert f"  the first bad row: {path}, line 2: field 'chosen' is null" in shown
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}
    config.datasets = [str(write(tmp_path / "chat.jsonl", turns))]
    with pytest.raises(
        UserError,
        match=(
            r"no row of .*chat.jsonl is usable; the first error: .*line 1: field"
            r" 'messages\[1\].role'"
        ),
    ):
        load_examples(config, load_tokenizer(config), "single")


def test_one_split_of_a_folder_is_named(compose, tmp_path, tiny_model, capsys):
    for kind in ("prefs", "sft"):
        write(tmp_path / f"data/train_{kind}.jsonl", PAIR, OTHER)
        write(tmp_path / f"data/test_{kind}.jsonl", PAIR | {"prompt": "And a lake?", "id": 7})
    config = compose(
        "exp_name=x",
        f"model.name_or_path={tiny_model}",
        f"datasets=[{tmp_path}/data]",
        f"local_dirs=[{tmp_path}/runs]",
    )
    for group, taken in (
        ("pair", ("train_prefs", "test_prefs", "train_sft")),
        ("single", ("train_sft", "test_sft", "train_prefs")),
    ):
        train, evaluation = load_examples(config, load_tokenizer(config), group)
        assert (len(train), len(evaluation)) == (2, 1)
        shown = capsys.readouterr().out
        assert re.search(r"split +{} +{} +\(not {}\)\n".format(*taken), shown), shown
        assert "  fields that neither the form nor the chat template reads: id" in shown


JOINTS = {  # prompt, response -> whether a note says that nothing is between them
    "glued": ("May I have some water?", "You may", True),
    "a word": ("Name a sea", "Baltic", True),
    "a space before the response": ("May I have some water?", " You may", False),
    "a line break after the prompt": ("May I?\n", "You may", False),
    "a turn marker": ("May I? [/INST]", "You may", False),
    "a colon": ("Q: May I? A:", "Yes", False),
    "a script without spaces": ("可以吗？", "可以", False),
}


def test_prompts_and_responses_with_nothing_between_them(compose, tmp_path, tiny_model, capsys):
    """A note shows the first such place, from the cache too, and names the option that helps."""
    own = tmp_path / "own.jsonl"
    config = compose(
        "exp_name=x",
        f"model.name_or_path={tiny_model}",
        f"datasets=[{own}]",
        "eval_share=0",
        f"local_dirs=[{tmp_path}/runs]",
    )
    tokenizer = load_tokenizer(config)
    for case, (prompt, response, noted) in JOINTS.items():
        write(own, {"prompt": prompt, "chosen": response, "rejected": f"{response}!"})
        for _ in ("made", "from the cache"):
            load_examples(config, tokenizer, "pair")
            shown = capsys.readouterr().out
            note = f"note: {own}: neither white space nor a turn marker between prompt and response"
            assert (note in shown) == noted, case
    write(own, {"prompt": "Is it water?", "chosen": "You see", "rejected": "No"})
    load_examples(config, tokenizer, "pair")
    assert "...'Is it water?' + 'You see'...; write it into" in capsys.readouterr().out
    config.plain_prompts = "chat"
    train, _ = load_examples(config, tokenizer, "pair")
    shown = capsys.readouterr().out
    assert "note:" not in shown and "(as chat messages)" in shown
    text = tokenizer.decode(train[0].prompt)
    assert text == "\n\nHuman: Is it water?\n\nAssistant:", "no template of its own: as in HH"
