"""Scores of a pair's responses: read where a row has them, kept with its tokens, and carried to the
batch as their difference.
"""

import gzip
import json
import math

import numpy as np
import pytest
from stores import view_of, write

from plumb.batching.feed import Feed
from plumb.batching.layout import pack
from plumb.batching.microbatches import Packing
from plumb.data import examples
from plumb.data.registry import get_dataset
from plumb.errors import UserError
from plumb.runs import identity

PAIR = {"prompt": "Name a sea:", "chosen": " the Baltic", "rejected": " the Alps"}
CHAT = [{"role": "user", "content": "Name a sea."}]
DIALOGUES = {x: f"\n\nHuman: Name a sea.\n\nAssistant: {x}" for x in ("chosen", "rejected")}


def rows_of(path, **options):
    return list(get_dataset(str(path), "train", eval_share=0, **options).rows)


ROWS = {
    "none": (PAIR, None),
    "one alone": (PAIR | {"score_chosen": 3}, None),
    "null": (PAIR | {"score_chosen": 3, "score_rejected": None}, None),
    "score_chosen": (PAIR | {"score_chosen": 3, "score_rejected": 1.5}, [3, 1.5]),
    "chosen_score": (PAIR | {"chosen_score": 1, "rejected_score": 1}, [1, 1]),
    "in metadata": (PAIR | {"metadata": {"score_chosen": 1, "score_rejected": 8}}, [1, 8]),
    "other metadata": (PAIR | {"metadata": "score_chosen"}, None),
    "transcripts": (DIALOGUES | {"score_chosen": 2, "score_rejected": 1}, [2, 1]),
    "messages": (PAIR | {"prompt": CHAT, "score_chosen": 2, "score_rejected": 1}, [2, 1]),
    "instruction": (
        {
            "instruction": "a",
            "chosen": "b",
            "rejected": "c",
            "score_chosen": 2,
            "score_rejected": 1,
        },
        [2, 1],
    ),
    "responses": ({"prompt": "a", "responses": ["b", "c", "d"], "scores": [2, 1, 4]}, [2, 1, 4]),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_s_scores(tmp_path, case):
    fields, scores = ROWS[case]
    (row,) = rows_of(write(tmp_path, fields))
    assert row.scores == scores


def test_scores_of_a_csv_and_under_other_names(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("prompt,chosen,rejected,up,down\na,b,c,2.5,1\na,b,c,,\n")
    field_map = {"score_chosen": "up", "score_rejected": "down"}
    assert [row.scores for row in rows_of(path, field_map=field_map)] == [[2.5, 1.0], None]


@pytest.mark.parametrize("bad", ["much", math.nan, 10**400, True, [1]])
def test_a_score_that_is_none_is_named(tmp_path, bad):
    with pytest.raises(
        UserError,
        match=r"line 2: field 'score_chosen, score_rejected\[1\]' is .*, not a finite number; fix",
    ):
        rows_of(write(tmp_path, PAIR, PAIR | {"score_chosen": 1, "score_rejected": bad}))


def test_the_real_ultrafeedback(shared):
    for name in ("processed/train_clean", "noisy/label_flip_30"):
        path = shared(f"data/ultrafeedback/{name}.jsonl.gz")
        raw = [
            json.loads(line)["metadata"] for line in gzip.decompress(path.read_bytes()).splitlines()
        ]
        scores = [row.scores for row in rows_of(path)]
        assert scores == [[row["score_chosen"], row["score_rejected"]] for row in raw]
        # the labels flipped on purpose
        gaps = [row["noise"] for row in raw if row.get("noise", {}).get("selected")]
        assert sum(chosen < rejected for chosen, rejected in scores) == sum(
            noise["original_score_gap"] > 0 for noise in gaps
        )


def test_margins_reach_the_batch(tmp_path):
    """Pair by pair, through the store, a view of several stores in another order, and packing."""
    scored = write(
        tmp_path,
        {"prompt": "a", "responses": ["b", "c", "d"], "scores": [2, 1, 4.25]},
        {"prompt": "e", "responses": ["f", "f"], "scores": [1, 0]},
    )
    some = view_of(scored, tmp_path / "a")
    assert some.margins().tolist() == [1.0, 2.25, 3.25, 1.0]
    assert some.margins().dtype == np.float32
    unscored = view_of(write(tmp_path, PAIR), tmp_path / "b")
    both = examples.concatenate([unscored, some]).select(np.array([3, 0, 1]))
    np.testing.assert_array_equal(both.margins(), [3.25, np.nan, 1.0])
    extras = both.extras().take(np.arange(3))
    batch = pack([both[i] for i in range(3)], pad_token_id=0, longest=64, extras=extras).to("cpu")
    np.testing.assert_array_equal(batch.extras.example["margins"], [3.25, np.nan, 1.0])
    packing = Packing(packed=True, budget=99, world_size=1, pad_token_id=0, longest=64)
    (part,) = Feed(both, packing, 0).step(np.array([2, 0])).microbatches
    margins = dict(zip(part.where.tolist(), part.batch.extras.example["margins"], strict=True))
    assert margins == {0: 1.0, 1: 3.25}  # of examples 2 and 0
    targets = view_of(scored, tmp_path / "c", "single")
    for without in (unscored, targets):
        assert np.isnan(without.margins()).all()
        (part,) = Feed(without, packing, 0).step(np.array([0])).microbatches
        assert not part.batch.extras.example


def test_resume_sees_that_scores_changed(tmp_path):
    digests = []
    for i, score in enumerate([1, 2, None, 1]):
        some = view_of(
            write(tmp_path, PAIR | {"score_chosen": 3, "score_rejected": score}, PAIR),
            tmp_path / str(i),
        )
        digests.append(identity.digest_of(some))
    assert len(set(digests)) == 3 and digests[0] == digests[3]
