"""Weights, soft labels, labels of responses, and ties: from rows to the examples of a loss."""

import json

import numpy as np
import pytest
from stores import RULES, store_of, view_of, write

from plumb.batching.feed import Feed
from plumb.batching.microbatches import Packing
from plumb.data import prepare
from plumb.data.examples import EVERYTHING, concatenate, view
from plumb.data.registry import Reading, get_dataset
from plumb.errors import UserError
from plumb.losses.bound import LabelWeights

PAIR = {"prompt": "Name a sea:", "chosen": " the Baltic", "rejected": " the Alps"}
RESPONSE = {"prompt": "Name a sea:", "completion": " the Baltic"}
PACKING = Packing(packed=True, budget=99, world_size=1, pad_token_id=0, longest=64)


def labels_of(path, **reading):
    data = get_dataset(str(path), "train", eval_share=0, reading=Reading(**reading))
    return [label for row in data.rows for label in row.labels]


def batch_of(examples):
    (part,) = Feed(examples, PACKING, 0).step(np.arange(len(examples))).microbatches
    return part.batch


# ---- labels of single responses ----


def test_spellings_of_a_label(tmp_path):
    yes = [True, 1, 1.0, "true", "1", "Thumbs Up", "thumbs_up", "\U0001f44d", "good"]
    no = [False, 0, 0.0, "False", "0", "thumbs-down", "THUMBS DOWN", "\U0001f44e", "undesirable"]
    path = write(tmp_path, *(RESPONSE | {"label": label} for label in (*yes, *no)))
    assert labels_of(path) == [True] * 9 + [False] * 9


def test_a_score_is_a_label_with_a_threshold(tmp_path):
    path = write(tmp_path, *(RESPONSE | {"label": score} for score in (3, 4.5, 0, -1, 4)))
    assert labels_of(path, label_threshold=4) == [False, True, False, False, True]
    csv = tmp_path / "own.csv"
    csv.write_text("prompt,completion,label\na,b,4.5\na,c,2\n")
    assert labels_of(csv, label_threshold=3) == [True, False]
    for bad, problem in (
        ("much", "a string .'much'., not a finite number"),
        (True, "a boolean .True., not a finite number"),
        (float("nan"), "not a finite number"),
    ):
        path = write(tmp_path, RESPONSE | {"label": 5}, RESPONSE | {"label": bad})
        with pytest.raises(UserError, match=f"line 2: field 'label' is .*{problem}"):
            labels_of(path, label_threshold=4)


def test_a_pair_is_two_labelled_responses_unless_unpair_is_off(tmp_path):
    store = store_of(write(tmp_path, PAIR), tmp_path / "s")
    args = (store, "labelled", RULES, "keep_start", None)
    assert view(*args).extras().example["labels"].tolist() == [1, 0]
    assert len(view(*args, EVERYTHING._replace(unpair=False))) == 0


# ---- weights and soft labels ----


def test_weights_are_relative_to_their_mean(tmp_path):
    """Weights 4, none (a row that counts once) and 1 have mean 2."""
    path = write(tmp_path, PAIR | {"weight": 4}, PAIR, PAIR | {"weight": 1.0})
    some = view_of(path, tmp_path / "s")
    np.testing.assert_array_equal(some.extras().example["weights"], [4, np.nan, 1])
    batch = batch_of(some)
    assert sorted(batch.extras.example["weights"].tolist()) == [0.5, 0.5, 2.0]
    without = view_of(write(tmp_path, PAIR), tmp_path / "t")
    assert not batch_of(without).extras.example


@pytest.mark.parametrize("group", ["single", "pair", "list", "labelled"])
def test_every_group_has_the_weights_of_its_rows(tmp_path, group):
    path = write(tmp_path, PAIR | {"weight": 3}, PAIR | {"weight": 1})
    weights = view_of(path, tmp_path / "s", group).extras().example["weights"].tolist()
    assert weights == ([3, 3, 1, 1] if group == "labelled" else [3, 1])


def test_soft_labels_go_with_their_pairs(tmp_path):
    rows = [PAIR | {"p_chosen": 0.75}, PAIR, PAIR | {"p_chosen": "0"}]
    store = store_of(write(tmp_path, *rows), tmp_path / "s")
    some = view(store, "pair", RULES, "keep_start", None)
    np.testing.assert_array_equal(some.extras().example["p_chosen"], [0.75, np.nan, 0])
    chosen = some.select(np.array([0, 2]))
    assert batch_of(chosen).extras.example["p_chosen"].tolist() == [0.75, 0]
    ignored = view(
        store, "pair", RULES, "keep_start", None, EVERYTHING._replace(soft_labels="ignore")
    )
    assert "p_chosen" not in ignored.extras().example
    with pytest.raises(
        UserError, match="own.jsonl:1: p_chosen=0.75, which this loss .simpo. would"
    ):
        prepare.check_soft_labels("simpo", some)


def test_fields_of_other_names(tmp_path):
    path = write(tmp_path, PAIR | {"times": 3, "sure": 0.9})
    field_map = {"weight": "times", "p_chosen": "sure"}
    data = get_dataset(str(path), "train", eval_share=0, field_map=field_map)
    (row,) = data.rows
    assert (row.weight, row.p_chosen, row.more) == (3, 0.9, None)


# ---- lists ----

TIED = {"prompt": "a", "responses": ["1", "22", "333", "4444"], "scores": [2, 5, 2, 1]}
STRICT = {"prompt": "b", "responses": ["1", "22"], "scores": [1, 2]}
EQUAL = {"prompt": "c", "responses": ["1", "22"], "scores": [3, 3]}


def test_responses_that_rank_alike_share_a_level(tmp_path):
    """A list whose ranks are all equal ranks nothing and is left out."""
    some = view_of(write(tmp_path, TIED, EQUAL, STRICT), tmp_path / "s", "list")
    assert [[len(r) - 1 for r in e.responses] for e in some] == [[2, 1, 3, 4], [2, 1]]
    levels = some.extras().response["levels"]
    np.testing.assert_array_equal(levels, [[0, 1, 1, 2], [0, 1, np.nan, np.nan]])
    assert batch_of(some).extras.response["levels"].shape == (6,)
    strict = view_of(write(tmp_path, STRICT), tmp_path / "t", "list")
    assert not batch_of(strict).extras.response
    both = concatenate([strict, some]).extras().response["levels"]
    assert both.shape == (3, 4) and np.isnan(both[0]).all()


def test_which_pairs_of_a_list(tmp_path):
    """Levels 1, 0, 1, 2: five pairs, of which the worst against the best, and two neighbours of the
    best and two of the worst. A pair that is no part of a list is always taken.
    """
    store = store_of(write(tmp_path, TIED), tmp_path / "s")
    alone = store_of(write(tmp_path, PAIR), tmp_path / "t")
    for which, expected in (
        ("all", {(2, 1), (2, 3), (2, 4), (1, 4), (3, 4)}),
        ("best-worst", {(2, 4)}),
        ("adjacent", {(2, 1), (2, 3), (1, 4), (3, 4)}),
    ):
        taking = EVERYTHING._replace(list_pairs=which)
        some = view(store, "pair", RULES, "keep_start", None, taking)
        assert {tuple(len(r) - 1 for r in e.responses) for e in some} == expected
        assert len(view(alone, "pair", RULES, "keep_start", None, taking)) == 1


# ---- the table ----


def test_the_table_shows_how_labels_are_distributed(tmp_path):
    rows = [PAIR | {"weight": w, "p_chosen": w / 10} for w in (1, 2, 3, 4, 5)] + [PAIR]
    some = view_of(write(tmp_path, *rows), tmp_path / "s")
    lines = dict(prepare.distributions([some]))
    assert lines["  weights"] == lines["  p_chosen"] == ["of 5"] and "  margins" not in lines
    names = [name for name, _ in prepare.distributions([some])]
    assert names[1:6] == ["    min", "    1/4", "    1/2", "    3/4", "    max"]
    texts = [texts for _, texts in prepare.distributions([some])]
    assert texts[1:6] == [["1"], ["2"], ["3"], ["4"], ["5"]]
    labelled = view_of(write(tmp_path, PAIR, PAIR), tmp_path / "t", "labelled")
    assert prepare.distributions([labelled]) == [("  desirable", ["2"]), ("  undesirable", ["2"])]
    tied = view_of(write(tmp_path, TIED, STRICT), tmp_path / "u", "list")
    assert prepare.distributions([tied]) == [("  lists with ties", ["1"])]


NAMES = ("loss.undesirable_weight", "loss.desirable_weight")


def note(some, desirable, undesirable):
    return prepare.balance_note(some, LabelWeights(NAMES, (undesirable, desirable)))


def balanced(some, desirable, undesirable):
    return prepare.balanced_weight(some, LabelWeights(NAMES, (undesirable, desirable)))


def test_an_unbalanced_set_gets_a_suggestion(tmp_path):
    rows = [RESPONSE | {"label": i == 0} for i in range(4)]
    some = view_of(write(tmp_path, *rows), tmp_path / "s", "labelled")
    assert "responses is 0.333, and 1 to 1.33 is usual" in note(some, 1, 1)
    assert "loss.desirable_weight=3, or loss.desirable_weight=balanced, makes it 1" in note(
        some, 1, 1
    )
    assert note(some, 3, 1) == note(some, 4, 1) == ""
    assert "loss.undesirable_weight=2, or loss.undesirable_weight=bal" in note(some, 6, 1)
    assert (balanced(some, "balanced", 1.0), balanced(some, "balanced", 2)) == (3, 6)
    assert balanced(some, 1.0, "balanced") == pytest.approx(1 / 3)
    weighted = [row | {"weight": 3 if row["label"] else 1} for row in rows]
    some = view_of(write(tmp_path, *weighted), tmp_path / "t", "labelled")
    assert note(some, 1, 1) == "" and balanced(some, "balanced", 1.0) == 1
    one_kind = view_of(write(tmp_path, rows[1]), tmp_path / "u", "labelled")
    assert note(one_kind, 1, 1).startswith("labels: all responses are undesirable")
    with pytest.raises(UserError, match="loss.desirable_weight=balanced: all training responses"):
        balanced(one_kind, "balanced", 1.0)


def test_weights_of_zero_count_nothing(tmp_path):
    some = view_of(write(tmp_path, PAIR | {"weight": 0}), tmp_path / "s")
    with pytest.raises(UserError, match="own.jsonl:1: all rows of its split have weight 0"):
        prepare.check_weights(some)
    prepare.check_weights(view_of(write(tmp_path, PAIR), tmp_path / "t"))


def test_the_real_ultrafeedback_has_margins(shared, tmp_path):
    rows = shared("data/ultrafeedback/processed/eval_clean.jsonl.gz")
    some = view_of(rows, tmp_path / "s")
    lines = dict(prepare.distributions([some]))
    assert lines["  margins"] == [f"of {len(some):,}"]
    assert json.loads(lines["    min"][0]) >= 0
