"""Data for losses on lists: ranked rows -> examples of k responses, where k differs."""

import json

import numpy as np
import pytest
import torch
from runs import DPO, FAST, STEADY, records
from test_margins import view_of, write

from plumb.batching.feed import Feed
from plumb.batching.layout import by_example, pack
from plumb.batching.microbatches import Packing, split_into_microbatches
from plumb.data.examples import concatenate, ids_of, lengths_of
from plumb.data.extras import Extras
from plumb.errors import UserError

RANKED = [
    {"prompt": "a", "responses": ["x", "yy", "zzz"], "ranks": [2, 3, 1]},
    {"prompt": "b", "responses": ["x", "yy"], "ranks": [1, 2]},
]
SCORED = {"prompt": "c", "responses": ["1", "22", "333", "4444"], "scores": [1, 4, 3, 2]}
PAIR = {"prompt": "d", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def mixed(tmp_path):
    """Lists of 3 and 2, of 4, and of a pair."""
    parts = [
        view_of(write(tmp_path, *rows), tmp_path / str(i), "list")
        for i, rows in enumerate((RANKED, [SCORED], [PAIR]))
    ]
    return concatenate(parts)


def test_lists_stand_from_best_to_worst(mixed):
    """Ranks count from the best, scores to it; a pair is a list of two. One more id per response is
    its EOS.
    """
    lengths = [[len(r) - 1 for r in e.responses] for e in mixed]
    assert lengths == [[3, 1, 2], [1, 2], [2, 3, 4, 1], [4, 3]]
    assert mixed.k == 4 and lengths_of(mixed).counts.tolist() == [3, 2, 4, 2]
    as_list = list(mixed)
    for column in ("prompts", "responses", "roots", "counts"):
        ours, theirs = (getattr(lengths_of(some), column) for some in (mixed, as_list))
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ids_of(mixed), ids_of(as_list))


def test_a_row_holds_trees_of_any_size(mixed):
    """Responses are numbered firsts first; extras follow examples and responses."""
    table = np.arange(16.0).reshape(4, 4)
    extras = Extras(example={"n": np.arange(4)}, response={"reference": table})
    batch = pack(list(mixed), pad_token_id=0, longest=64, extras=extras)
    assert batch.n_responses.tolist() == [3, 2, 4, 2] and len(batch.spans) == 11
    lengths = torch.from_numpy(batch.spans[:, 3])
    expected = [[4, 2, 3, 0], [2, 3, 0, 0], [3, 4, 5, 2], [5, 4, 0, 0]]
    assert by_example(lengths, batch.n_responses).tolist() == expected
    reference = by_example(batch.extras.response["reference"], batch.n_responses, -1).tolist()
    assert reference == [[0, 1, 2, -1], [4, 5, -1, -1], [8, 9, 10, 11], [12, 13, -1, -1]]


def test_padded_rows_are_counted_by_responses(mixed):
    """11 rows of at most 6 tokens: a budget of 66 holds them, one of 65 does not."""
    packing = Packing(packed=False, budget=66, world_size=1, pad_token_id=0, longest=64)
    assert len(split_into_microbatches(lengths_of(mixed), packing, 1)) == 1
    assert len(split_into_microbatches(lengths_of(mixed), packing._replace(budget=65), 1)) > 1
    steps = [Feed(mixed, packing, 0, np.zeros((4, 4))).step(np.array([3, 0]))]
    (part,) = steps[0].microbatches
    assert part.batch.n_responses.sum() == 5 and len(part.batch.extras.response["reference"]) == 5


# ---- runs ----

ROWS = [
    {
        "prompt": f"\n\nHuman: What is {a} and {b}?\n\nAssistant:",
        "responses": [f" It makes {a + b}.", f" Perhaps {a}.", " No."][: 2 + (a + b) % 2],
        "scores": [3, 2, 1][: 2 + (a + b) % 2],
    }
    for a in range(4)
    for b in range(5)
]
LISTS = ["loss=plackett_luce", "loss.beta=0.1", *DPO[2:], "n_examples=12"]


@pytest.fixture
def lists(tmp_path):
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def losses_of(run):
    return [row["loss/train"] for row in records(run, "train")]


def test_how_lists_are_computed_changes_nothing(train, lists):
    """Lists of two and three: one microbatch or several, live or cached reference. It starts at
    log 2 for lists of two and log 6 for three (each order is as likely), and falls.
    """
    options = [*LISTS, *FAST, STEADY, f"datasets=[{lists}]"]
    live = losses_of(train("live", *options, "reference=live"))
    assert np.log(2) <= live[0] <= np.log(6) and live[-1] < live[0]
    for name, *more in (
        ("several", "reference=live", "gradient_accumulation_steps=3"),
        ("cached", "reference=cached"),
    ):
        assert losses_of(train(name, *options, *more)) == pytest.approx(live, rel=2e-5)


def test_lists_without_an_order_are_refused_or_dropped(train, lists, tmp_path, capsys):
    options = [*LISTS, f"datasets=[{lists}]"]
    for n, fields, problem in (
        (1, {"scores": [2, 2]}, "two of its responses have the same rank or score"),
        (2, {"responses": [" a"], "scores": [1]}, "a list of one response"),
    ):
        bad = [ROWS[0] | fields, *ROWS[1:]]
        lists.write_text("".join(json.dumps(row) + "\n" for row in bad))
        with pytest.raises(UserError, match=f"lists.jsonl:1: {problem}.*data_rules.bad_row=drop"):
            train(f"bad{n}", *options, "eval_share=0.1")
    train("drop", *options, "data_rules.bad_row=drop")
    assert "lists with equal ranks, or of one response" in capsys.readouterr().out
    lists.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    with pytest.raises(UserError, match="holds no ranked lists .prompt, responses, and ranks or"):
        train("sft", *options)
