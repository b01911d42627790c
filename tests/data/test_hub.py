"""Sets of the hub given as owner/name: read from the hub's own cache, as a first use leaves it, and
one line for each way in which a name fails.
"""

import json
import shutil

import datasets
import pytest
from own_files import load

from plumb.data.registry import Reading
from plumb.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"prompt": f"Name a {n}:", "chosen": " a", "rejected": " b"} for n in range(6)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The cache after me/pairs (easy, hard) and me/answers (two train splits) were downloaded."""
    folder = tmp_path_factory.mktemp("hub")

    def download(repo, subset, splits):
        source = folder / "source"
        source.mkdir()
        for split, rows in splits.items():
            (source / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        files = {split: str(source / f"{split}.jsonl") for split in splits}
        built = folder / "built"
        datasets.load_dataset("json", data_files=files, cache_dir=str(built))
        (info,) = built.rglob("dataset_info.json")
        there = folder / repo.replace("/", "___") / subset / "0.0.0" / COMMIT
        shutil.copytree(info.parent, there)
        name = repo.partition("/")[2]
        for file in there.glob("json-*.arrow"):
            file.rename(there / file.name.replace("json", name, 1))
        described = json.loads(info.read_text()) | {"dataset_name": name, "config_name": subset}
        (there / "dataset_info.json").write_text(json.dumps(described))
        shutil.rmtree(source)
        shutil.rmtree(built)

    nested = [{"q": row["prompt"], "chosen": {"text": " a"}, "rejected": " b"} for row in ROWS]
    download("me/pairs", "easy", {"train": ROWS, "test": ROWS[:2]})
    download("me/pairs", "hard", {"train": nested})
    several = {"train_sft": ROWS[2:], "train_prefs": ROWS, "odd": ROWS[:1]}
    download("me/answers", "default", several)
    return str(folder)


def test_a_set_of_the_hub_is_read_like_files(cache):
    loaded = load("me/pairs:easy", cache_dir=cache)
    assert [row.prompt for row in loaded.rows] == [row["prompt"] for row in ROWS]
    assert loaded.rows[1].source == "me/pairs:easy/train:2"
    assert loaded.form == "me/pairs:easy: 6 rows, prompt / chosen / rejected (as raw text)"
    assert len(load("me/pairs:easy", "test", cache_dir=cache).rows) == 2


def test_the_options_of_files_apply(cache):
    where = {"prompt": "q", "chosen": "chosen.text"}
    options = {"cache_dir": cache, "field_map": where, "eval_share": 0.5}
    parts = [load("me/pairs:hard", split, **options).rows for split in ("train", "test")]
    assert [len(part) for part in parts] == [3, 3]
    assert not {row.prompt for row in parts[0]} & {row.prompt for row in parts[1]}


def test_splits_are_chosen_as_in_a_folder(cache):
    for_pairs = Reading(group="pair")
    assert load("me/answers", cache_dir=cache, reading=for_pairs).taken.startswith("train_prefs (")
    odd = Reading(split_names={"train": "odd"})
    assert len(load("me/answers", cache_dir=cache, reading=odd).rows) == 1


ABSENT = "there is no file or folder of that name in "
MISTAKES = {
    "no file": ("data/none.jsonl", ("no such file or folder",)),
    "not in the table": ("none", ("unknown data set 'none'", "any other set of the hub by owner/")),
    "not reachable": ("me/none", ("the hub cannot be reached", "not in the cache", ABSENT)),
    "no such subset": (
        "me/pairs:odd",
        ("the set has no subset 'odd': easy, hard; choose one, such as me/pairs:easy",),
    ),
    "several subsets": ("me/pairs", ("the set has several subsets: easy, hard; choose one",)),
    "several splits": ("me/answers", ("several train splits, train_prefs, train_sft", "split_n")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_names_that_fail(cache, case):
    name, parts = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        load(name, cache_dir=cache)
    text = str(caught.value)
    assert name in text and "\n" not in text
    for part in parts:
        assert part in text


def test_another_commit_is_not_read_from_the_cache(cache):
    reading = Reading(revisions={"me/pairs": "f" * 40})
    with pytest.raises(UserError, match=f"the cache holds the revision {COMMIT}"):
        load("me/pairs:easy", cache_dir=cache, reading=reading)
    reading = Reading(revisions={"me/pairs": COMMIT})
    assert load("me/pairs:easy", cache_dir=cache, reading=reading).rows


# What the library says with a network, and what is made of it.
ANSWERS = {
    "no such set": (
        datasets.exceptions.DatasetNotFoundError("Dataset 'me/x' doesn't exist on the Hub or ..."),
        ("no such data set on the hub", "hf auth login", ABSENT),
    ),
    "gated": (
        datasets.exceptions.DatasetNotFoundError("Dataset 'me/x' is a gated dataset on the Hub."),
        ("accept its terms at https://huggingface.co/datasets/me/x, then `hf auth login`",),
    ),
    "no such revision": (
        datasets.exceptions.DatasetNotFoundError("Revision 'r' doesn't exist for dataset 'me/x'"),
        ("no revision 'r' on the hub",),
    ),
    "several subsets": (
        ValueError("Config name is missing.\nPlease pick one among the available configs: ['a']"),
        ("has several subsets: a; choose one, such as me/x:a",),
    ),
    "a script": (
        RuntimeError("Dataset scripts are no longer supported, but found x.py"),
        ("dataset_revisions='{me/x: refs/convert/parquet}'",),
    ),
    "another": (OSError("disk\nfull"), ("cannot be loaded from the hub (OSError: disk full)",)),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_the_hub_answers(monkeypatch, case):
    error, parts = ANSWERS[case]

    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        load("me/x", reading=Reading(revisions={"me/x": "r"}))
    text = str(caught.value)
    assert text.startswith("me/x: ") and "\n" not in text
    for part in parts:
        assert part in text
