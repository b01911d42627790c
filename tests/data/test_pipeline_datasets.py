"""Every set of the pipeline, from a row in its real schema to the very text that the pipeline
trains on.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from plumb.data import deepspeed_chat, registry
from plumb.data.deepspeed_chat import TABLE
from plumb.data.registry import LOADERS, resolve
from plumb.errors import UserError
from plumb.settings import plugins, validation

ROWS = json.loads(
    (Path(__file__).parents[1] / "fixtures/pipeline.json").read_text(encoding="utf-8")
)
TREE = "\n\nHuman: Name a tree.\n\nAssistant:"
HH = (TREE, TREE + " The oak.", TREE + " A what?")
POST = (
    "\n\nHuman: Please summarize the following text:\nSUBREDDIT: r/trees\n\nPOST: I planted an"
    " oak.\n\nAssistant:"
)
# of each row that is loaded: the prompt, prompt + chosen, and prompt + rejected, which SFT sets
# don't have
TEXTS = {
    "rm_static": [HH],
    "full_hh_rlhf": [HH],
    "helpful_jsonl": [HH],
    "harmless_jsonl": [HH],
    "synthetic_instruct": [
        (
            " Human: Name a tree with {braces}. Assistant:",
            " Human: Name a tree with {braces}. Assistant: The oak.",
            " Human: Name a tree with {braces}. Assistant: A what?",
        ),
    ],
    "rlhf_reward_datasets": [
        (
            "\n\nHuman: Name a tree. Assistant:",
            "\n\nHuman: Name a tree. Assistant: The oak.",
            "\n\nHuman: Name a tree. Assistant: A what?",
        ),
        (
            "\n\nHuman: And a river?Assistant: Hm.\n\nHuman: Well?\n\nAssistant:",
            "\n\nHuman: And a river?Assistant: Hm.\n\nHuman: Well?\n\nAssistant: The Rhine.",
            "\n\nHuman: And a river?Assistant: Hm.\n\nHuman: Well?\n\nAssistant: No.",
        ),
    ],
    "webgpt": [
        (
            " Human: Why does it rain? Assistant:",
            " Human: Why does it rain? Assistant: Drops grow heavy.",
            " Human: Why does it rain? Assistant: Clouds cool and let go.",
        ),
        (
            " Human: Why is the sea salty? Assistant:",
            " Human: Why is the sea salty? Assistant: Rivers bring salt.",
            None,
        ),
    ],
    "shp_all": [
        (
            " Human: When to plant garlic? Assistant:",
            " Human: When to plant garlic? Assistant: In autumn.",
            " Human: When to plant garlic? Assistant: In spring.",
        ),
        (
            " Human: How deep? Assistant:",
            " Human: How deep? Assistant: Two inches.",
            " Human: How deep? Assistant: Very.",
        ),
    ],
    "sharegpt_vicuna": [
        (
            "Human: Name a tree. Assistant: The oak. Human: And another? Assistant:",
            "Human: Name a tree. Assistant: The oak. Human: And another? Assistant: The elm.",
            None,
        ),
    ],
    "zhihu_kol": [(" Human: 树有哪些? Assistant:", " Human: 树有哪些? Assistant: 橡树。", None)],
    "hc3_chinese": [(" Human: 树有哪些? Assistant:", " Human: 树有哪些? Assistant: 橡树。", None)],
    "mkqa_zh": [(" Human: 树有哪些 Assistant:", " Human: 树有哪些 Assistant: 橡树", None)],
    "mkqa_ja": [(" Human: 木の名前は Assistant:", " Human: 木の名前は Assistant: 樫", None)],
    "miracl_zh": [
        (
            " Human: 树有哪些? Assistant:",
            " Human: 树有哪些? Assistant: 橡树是一种树。",
            " Human: 树有哪些? Assistant: 河在流。",
        ),
        (" Human: 河呢? Assistant:", " Human: 河呢? Assistant: 莱茵河。", None),
    ],
    "miracl_ja": [
        (
            " Human: 木の名前は? Assistant:",
            " Human: 木の名前は? Assistant: 樫は木です。",
            " Human: 木の名前は? Assistant: 川が流れる。",
        ),
        (" Human: 川は? Assistant:", " Human: 川は? Assistant: ライン川。", None),
    ],
    "jaquad_qg": [
        (" Human: 木の名前は? Assistant:", " Human: 木の名前は? Assistant: 樫は木です。", None)
    ],
    "jaquad_qag": [
        (
            " Human: 木の名前は? Assistant:",
            " Human: 木の名前は? Assistant: 樫は木です。川が流れる。",
            None,
        )
    ],
    "alpaca_gpt4": [
        (
            "\n\nHuman: Name a tree.\n\n\nAssistant:",
            "\n\nHuman: Name a tree.\n\n\nAssistant:The oak.",
            None,
        ),
        (
            "\n\nHuman: Shorten it.\nA very long line.\n\nAssistant:",
            "\n\nHuman: Shorten it.\nA very long line.\n\nAssistant:A line.",
            None,
        ),
    ],
    "tldr": [(POST, POST + " Planted an oak.", POST + " Trees.")],
    "tldr_sft": [(POST, POST + " Planted an oak.", None)],
    "sharegpt_zh": [
        (
            "<!!USR!!>树有哪些?\n<!!AST!!>",
            "<!!USR!!>树有哪些?\n<!!AST!!>橡树。",
            "<!!USR!!>树有哪些?\n<!!AST!!>不知道。",
        ),
    ],
    "single_turn_rlhf": [
        tuple(
            "Below is an instruction that describes a task. Write a response that appropriately"
            " completes the request.\n\n### Instruction:\nName a tree.\n\n###"
            f" Response:\n{response}"
            for response in ("", "The oak.", "A what?")
        ),
    ],
    "moss_harmless": [
        tuple(
            f"### 用户(User):\n树有哪些?\n ### 助手(Assistant):\n{response}"
            for response in ("", "橡树。", "不知道。")
        ),
    ],
    "local_json": [
        (
            " Human: I have a question. Assistant:",
            " Human: I have a question. Assistant: Good answer.",
            " Human: I have a question. Assistant: Bad answer.",
        ),
    ],
}
SKIPPED = {
    "rlhf_reward_datasets": {"prompts of the pair differ": 1, "no 'Assistant:' in a response": 1},
    "webgpt": {"equal scores": 1},
    "sharegpt_vicuna": {"no prompt": 1},
    "zhihu_kol": {"no prompt": 1, "no response": 1},
    "hc3_chinese": {"no response": 1},
    "mkqa_zh": {"no response": 1},
    "miracl_zh": {"no rejected response": 1},
    "miracl_ja": {"no rejected response": 1},
}
SCORES = {
    "webgpt": [[-0.5, 0.5], [0.0, 0.0]],
    "shp_all": [[30, 20], [4, 0]],
    "harmless_jsonl": [[2.5, 1.0]],
}
OURS = [
    name
    for name, loader in LOADERS.items()
    if loader.load.__module__ == "plumb.data.deepspeed_chat"
]


def draw(name, path, split="train", **options):
    data = registry.get_dataset(
        name, split, **{"path": path and str(path), "eval_share": 0.5} | options
    )
    rows = list(data.rows)
    return replace(data, rows=rows)


def copy(tmp_path, name, rows, splits=("train", "test")):
    for split in splits:
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_every_set_has_its_fixture():
    assert set(OURS) == set(TEXTS) == set(ROWS)


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_the_pipeline_s(tmp_path, name):
    loaded = draw(name, copy(tmp_path, name, ROWS[name]))
    texts = []
    for row in loaded.rows:
        rejected = [row.prompt + row.responses[j] for i, j in row.pairs]
        assert all(row.responses[i] == row.sft_target for i, j in row.pairs)
        texts.append((row.prompt, row.prompt + row.sft_target, *(rejected or [None])))
    assert texts == TEXTS[name]
    assert loaded.skipped == SKIPPED.get(name, {})
    assert [row.scores for row in loaded.rows] == SCORES.get(name, [None] * len(texts))
    assert loaded.truncation == "keep_end"
    assert LOADERS[name].pairs == any(row.pairs for row in loaded.rows)


@pytest.mark.parametrize("name", [name for name in OURS if LOADERS[name].hub.test_share])
def test_a_set_without_a_test_split_holds_out_its_own_share(tmp_path, name):
    """By prompt, whatever eval_share is; of 100 prompts."""
    row = json.dumps(ROWS[name][0], ensure_ascii=False)
    marks = ("树有哪些", "木の名前は", "Name a tree", "Why does it rain", "planted an oak")
    mark = re.compile("|".join(marks))
    rows = [json.loads(mark.sub(lambda match: f"{match[0]}{i}", row)) for i in range(100)]  # noqa: B023
    folder = copy(tmp_path, name, rows, splits=["train"])
    parts = [{row.prompt for row in draw(name, folder, split).rows} for split in ("train", "test")]
    assert not parts[0] & parts[1] and len(parts[0]) + len(parts[1]) == 100
    share = {"tldr": 5, "sharegpt_zh": 5, "alpaca_gpt4": 1}.get(name, 10)
    assert len(parts[1]) == share


HUB = {  # name on the hub, configuration, split that is held out; None: there is none
    "rm_static": ("Dahoas/rm-static", None, "test"),
    "full_hh_rlhf": ("Dahoas/full-hh-rlhf", None, "test"),
    "synthetic_instruct": ("Dahoas/synthetic-instruct-gptj-pairwise", None, None),
    "rlhf_reward_datasets": ("yitingxie/rlhf-reward-datasets", None, "test"),
    "webgpt": ("openai/webgpt_comparisons", None, None),
    "shp_all": ("stanfordnlp/SHP", None, "validation"),
    "sharegpt_vicuna": ("pvduy/sharegpt_alpaca_oa_vicuna_format", None, "test"),
    "zhihu_kol": ("wangrui6/Zhihu-KOL", None, None),
    "miracl_zh": ("Cohere/miracl-zh-queries-22-12", None, "dev"),
    "miracl_ja": ("Cohere/miracl-ja-queries-22-12", None, "dev"),
    "hc3_chinese": ("Hello-SimpleAI/HC3-Chinese", "all", None),
    "mkqa_zh": ("mkqa", None, None),
    "mkqa_ja": ("mkqa", None, None),
    "jaquad_qg": ("lmqg/qg_jaquad", None, "validation"),
    "jaquad_qag": ("lmqg/qag_jaquad", None, "validation"),
    "alpaca_gpt4": ("vicgalle/alpaca-gpt4", None, None),
}


@pytest.mark.parametrize("name", OURS)
def test_what_is_asked_of_the_hub(monkeypatch, name):
    """A set that is on none says what to do."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(registry, "_hub_sets", {})
    asked = []

    def load_dataset(hub_name, split, **options):
        asked.append((hub_name, options.get("name"), split))
        return ROWS[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if name not in HUB:
        with pytest.raises(
            UserError, match=rf"^{name}: it is not on the hub; set dataset_paths\.{name}=/path/to"
        ):
            draw(name, None)
        return
    draw(name, None)
    draw(name, None, "test")
    there, config, test_split = HUB[name]
    assert asked == [(there, config, split) for split in ("train", test_split) if split]


def test_real_files(shared):
    (row,) = draw("shp_all", shared("data/shp/shp_card_example.jsonl"), eval_share=0).rows
    assert (
        row.prompt.startswith(" Human: ")
        and row.prompt.endswith(" Assistant:")
        and row.scores[0] > row.scores[1]
    )
    folder = shared("data/ultrafeedback/processed")
    loaded = draw("local_json", folder / "train_clean.jsonl.gz", eval_share=0)
    assert (
        len(loaded.rows) == 1000 and all(row.scores for row in loaded.rows) and not loaded.skipped
    )
    assert all(text.startswith(" ") for row in loaded.rows for text in (row.prompt, *row.responses))
    assert len(draw("helpful_jsonl", folder, "test").rows) == 200  # eval_clean


def test_local_json_reads_the_pipeline_s_files(tmp_path):
    """data/train.json and data/eval.json, each one JSON list; single_turn_rlhf has the list under
    "data".
    """
    for name, wrap in (
        ("local_json", lambda rows: rows),
        ("single_turn_rlhf", lambda rows: {"data": rows}),
    ):
        for split, own in (
            ("train", "train"),
            ("test", "eval" if name == "local_json" else "test"),
        ):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{own}.json").write_text(
                json.dumps(wrap([ROWS[name][0] | {"chosen": split}]))
            )
        assert [
            draw(name, tmp_path / name, split).rows[0].sft_target.strip()
            for split in ("train", "test")
        ] == ["train", "test"]


def test_tldr_s_folders(tmp_path):
    for folder in ("preference_data", "sft_data"):
        (tmp_path / folder).mkdir()
    copy(tmp_path / "sft_data", "tldr_sft", ROWS["tldr_sft"])
    (tmp_path / "preference_data/total.jsonl").write_text(json.dumps(ROWS["tldr"][0]) + "\n")
    assert len(draw("tldr_sft", tmp_path).rows) == 1
    assert len(draw("tldr", tmp_path / "preference_data/total.jsonl").rows) == 1
    with pytest.raises(
        UserError, match=r"no train\* or test\* file \(found: total.jsonl\); give the file itself"
    ):
        draw("tldr", tmp_path)


@pytest.mark.parametrize(
    "name, field, value, message",
    [
        ("rm_static", "chosen", 7, "field 'chosen' is a number (7), not a string"),
        (
            "miracl_zh",
            "positive_passages",
            "x",
            "field 'positive_passages.0.text' isn't there: '0' is looked for in a string ('x')",
        ),
        (
            "mkqa_zh",
            "queries",
            {"ja": "x"},
            "field 'queries.zh_cn' isn't there: 'zh_cn' is looked for in an object",
        ),
        ("webgpt", "score_0", None, "field 'score_0, score_1[0]' is null, not a finite number"),
        ("shp_all", "labels", 2, "field 'labels' is a number (2), not 1 (A preferred) or 0"),
        ("rlhf_reward_datasets", "chosen", None, "field 'chosen' is null"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, field, value, message):
    folder = copy(tmp_path, name, [ROWS[name][0], ROWS[name][0] | {field: value}])
    with pytest.raises(UserError) as caught:
        draw(name, folder)
    assert message in str(caught.value) and f"{tmp_path}/train.jsonl, line 2: " in str(caught.value)


# ---- names of the hub, and SFT sets ----


def test_a_name_of_the_hub_stands_for_its_set(tmp_path, monkeypatch):
    assert (
        resolve("Dahoas/rm-static") == "rm_static"
        and resolve("mine/own") == "mine/own"
        and resolve("hh") == "hh"
    )
    for name, said in (
        ("stanfordnlp/SHP", "shp and shp_all read it"),
        ("Anthropic/hh-rlhf", "harmless and helpful and hh"),
    ):
        with pytest.raises(UserError, match=said):
            resolve(name)
    loaded = draw("Dahoas/rm-static", copy(tmp_path, "rm_static", ROWS["rm_static"]))
    assert loaded.name == "rm_static" and len(loaded.rows) == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Dahoas/rm-static").mkdir(parents=True)
    assert resolve("Dahoas/rm-static") == "Dahoas/rm-static"  # a path that is there


def test_an_sft_set_is_refused_for_pairs_before_anything_is_read(compose):
    for name in ("zhihu_kol", "wangrui6/Zhihu-KOL"):
        config = compose(
            "exp_name=x",
            "model=pythia28",
            "loss=dpo",
            "loss.beta=0.1",
            f"datasets=[rm_static,{name}]",
        )
        with pytest.raises(
            UserError,
            match=r"zhihu_kol has SFT targets only, and this loss \(dpo\) needs pairs; train",
        ):
            validation.validate(config)
        validation.validate(compose("exp_name=x", "model=pythia28", f"datasets=[rm_static,{name}]"))


def test_pairs_and_sft_sets_blend(train_here, tmp_path, tiny_model, capsys):
    """rm_static by its name on the hub, alpaca_gpt4 and an own file, cut by stage; a small run of
    SFT.
    """
    for name in ("rm_static", "alpaca_gpt4"):
        (tmp_path / name).mkdir()
        rows = [
            row | {f: f"{i} {row[f]}" for f in ("prompt", "instruction") if f in row}
            for i in range(4)
            for row in ROWS[name]
        ]
        copy(tmp_path / name, name, rows)
    own = tmp_path / "own.jsonl"
    own.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "completion": f" {i}"}) + "\n" for i in range(8))
    )
    train_here(
        f"model.name_or_path={tiny_model}",
        f"datasets=[Dahoas/rm-static,alpaca_gpt4,{own}]",
        "loss=sft",
        "eval_share=0.25",
        f"dataset_paths.rm_static={tmp_path}/rm_static",
        f"dataset_paths.alpaca_gpt4={tmp_path}/alpaca_gpt4",
        "warmup_steps=0",
        "data_split=5,0,5",
        "stage=sft",
        "batch_size=4",
        "sample_during_eval=false",
        "optimizer=SGD",
        "device=cpu",
    )
    out = capsys.readouterr().out
    assert "3 of 4 examples; 9 in all, 1 epochs" in out  # half of 4 + 8 + 6 prompts
    assert "data_split=5,0,5 stage=sft" in out and "first example (rm_static:" in out


def test_the_documented_set_of_ones_own(tmp_path, monkeypatch):
    """docs/data.md's example of a template in a plugin; its tokens depend on the plugin's file."""
    monkeypatch.setattr(registry, "LOADERS", dict(LOADERS))
    (code,) = re.findall(
        r"^```python\n(from plumb.data.deepspeed_chat.*?)^```",
        (ROOT / "docs/data.md").read_text("utf-8"),
        re.M | re.S,
    )
    plugin = tmp_path / "quiz_in_the_docs.py"
    plugin.write_text(code)
    plugins.import_plugins([plugin])
    folder = tmp_path / "quiz"
    folder.mkdir()
    (row,) = draw(
        "quiz", copy(folder, "quiz", [{"question": "1 + 1?", "answers": ["2", "3"]}])
    ).rows
    assert row[:4] == ("Q: 1 + 1?\nA:", [" 2", " 3"], [(0, 1)], " 2")
    assert registry.made_of("quiz", "train", None, str(folder))[1] == [plugin]


def test_the_table_says_what_it_reads():
    """Templates only name fields; a literal brace would be lost on whoever reads it."""
    for entry in TABLE.values():
        for template in filter(None, entry[1:]):
            assert "{" not in deepspeed_chat.PLACE.sub(
                "", template
            ) and deepspeed_chat.PLACE.search(template)
