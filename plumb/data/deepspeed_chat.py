"""The data sets of the DeepSpeed-Chat-style pipeline, in its exact wording: a table of templates,
and loaders where more has to be decided.

Prompt + response is the text that the pipeline trains on, character by character. Each raw row is
one prompt: equal ones are not merged, and rows come one at a time. All keep the end of a long
prompt, where the question or the cue to answer stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from plumb.data.files import RawRow, describe
from plumb.data.forms.published import shp_pair
from plumb.data.registry import Hub, dataset, load_rows
from plumb.data.rows import PROMPTS_DIFFER, skipped
from plumb.data.scores import check_scores, pair_scores, score_pairs

PLACE = re.compile(r"\{([\w.]+)\}")


class Entry(NamedTuple):
    """Describe a set whose texts are templates: {field}, {field.key} or {field.0} stands for the
    row's value there.
    """

    hub: Hub
    prompt: str
    chosen: str
    rejected: str | None = None  # None: SFT only, of which `chosen` is the target

    def prompt_of(self, row: RawRow) -> str:
        return fill(self.prompt, row) or ""


def fill(template: str, row: RawRow) -> str | None:
    """Return the template filled with the row's texts; None if one of them is null, or missing from
    the end of a list.

    >>> row = RawRow({"a": {"b": ["x", "{c}"]}, "c": None}, "f", 1, "row")
    >>> fill("<{a.b.1}>", row), fill("{a.b.0}{c}", row), fill("{a.b.2}", row)
    ('<{c}>', None, None)
    """
    texts = {place: _text_at(row, place) for place in PLACE.findall(template)}
    return (
        None if None in texts.values() else PLACE.sub(lambda match: str(texts[match[1]]), template)
    )


def _text_at(row: RawRow, place: str) -> str | None:
    field, *keys = place.split(".")
    value = row.value(field)
    for key in keys:
        if isinstance(value, list) and key.isdigit():
            value = value[int(key)] if int(key) < len(value) else None
        elif isinstance(value, dict) and key in value:
            value = value[key]
        elif value is not None:
            raise row.error(
                f"field '{place}' isn't there: '{key}' is looked for in {describe(value)}",
                "fix or remove the row",
            )
    return None if value is None else row.check_text(value, place)


def entry_rows(
    entry: Entry, split: str, silent=False, cache_dir=None, path=None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a set with these templates. A row without a prompt or a response is skipped
    and counted; one without a rejected response has only its SFT target.
    """
    for row in load_rows(
        entry.hub, split, entry.prompt_of, path=path, cache_dir=cache_dir, silent=silent
    ):
        prompt, chosen = fill(entry.prompt, row), fill(entry.chosen, row)
        rejected = None if entry.rejected is None else fill(entry.rejected, row)
        if prompt is None or chosen is None:
            skipped("no prompt" if prompt is None else "no response")
        else:
            if entry.rejected is not None and rejected is None:
                skipped("no rejected response")
            yield _row(prompt, chosen, rejected, None if rejected is None else pair_scores(row))


def _row(
    prompt: str, chosen: str, rejected: str | None, scores: list[float] | None = None
) -> dict[str, Any]:
    responses = [chosen] if rejected is None else [chosen, rejected]
    pairs = [(0, 1)] if rejected is not None else []
    return {
        "prompt": prompt,
        "responses": responses,
        "pairs": pairs,
        "sft_target": chosen,
        "scores": scores,
    }


def _human(question: str) -> str:
    return f" Human: {question} Assistant:"


# ---- the table ----

VERBATIM = ("{prompt}", "{chosen}", "{rejected}")
SUMMARIZE = "\n\nHuman: Please summarize the following text:\n{prompt}\n\nAssistant:"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
TABLE = {
    "rm_static": Entry(Hub("Dahoas/rm-static"), *VERBATIM),
    "full_hh_rlhf": Entry(Hub("Dahoas/full-hh-rlhf"), *VERBATIM),
    "synthetic_instruct": Entry(
        Hub("Dahoas/synthetic-instruct-gptj-pairwise", test_share=0.1),
        _human("{prompt}"),
        " {chosen}",
        " {rejected}",
    ),
    "miracl_zh": Entry(
        Hub("Cohere/miracl-zh-queries-22-12", test_split="dev"),
        _human("{query}"),
        " {positive_passages.0.text}",
        " {negative_passages.0.text}",
    ),
    "miracl_ja": Entry(
        Hub("Cohere/miracl-ja-queries-22-12", test_split="dev"),
        _human("{query}"),
        " {positive_passages.0.text}",
        " {negative_passages.0.text}",
    ),
    "zhihu_kol": Entry(
        Hub("wangrui6/Zhihu-KOL", test_share=0.1), _human("{INSTRUCTION}"), " {RESPONSE}"
    ),
    "hc3_chinese": Entry(
        Hub("Hello-SimpleAI/HC3-Chinese", config="all", test_share=0.1),
        _human("{question}"),
        " {human_answers.0}",
    ),
    "mkqa_zh": Entry(
        Hub("mkqa", test_share=0.1), _human("{queries.zh_cn}"), " {answers.zh_cn.0.text}"
    ),
    "mkqa_ja": Entry(Hub("mkqa", test_share=0.1), _human("{queries.ja}"), " {answers.ja.0.text}"),
    "jaquad_qg": Entry(
        Hub("lmqg/qg_jaquad", test_split="validation"), _human("{question}"), " {sentence}"
    ),
    "jaquad_qag": Entry(
        Hub("lmqg/qag_jaquad", test_split="validation"), _human("{questions.0}"), " {paragraph}"
    ),
    "alpaca_gpt4": Entry(
        Hub("vicgalle/alpaca-gpt4", test_share=0.01),
        "\n\nHuman: {instruction}\n{input}\n\nAssistant:",
        "{output}",
    ),
    # on no hub
    "helpful_jsonl": Entry(Hub(None), *VERBATIM),
    "harmless_jsonl": Entry(Hub(None), *VERBATIM),
    "tldr": Entry(
        Hub(None, "preference_data", test_share=0.05), SUMMARIZE, "{chosen}", "{rejected}"
    ),
    "tldr_sft": Entry(Hub(None, "sft_data"), SUMMARIZE, "{chosen}"),
    "sharegpt_zh": Entry(
        Hub(None, test_share=0.05), "<!!USR!!>{instruction}\n<!!AST!!>", "{chosen}", "{rejected}"
    ),
    "single_turn_rlhf": Entry(Hub(None), ALPACA, "{chosen}", "{rejected}"),
    "moss_harmless": Entry(
        Hub(None, test_share=0.1),
        "### 用户(User):\n{prompt}\n ### 助手(Assistant):\n",
        "{chosen}",
        "{rejected}",
    ),
    "local_json": Entry(Hub(None), " {prompt}", " {chosen}", " {rejected}"),
}


def _loader(name: str, entry: Entry) -> Callable:
    def load(split, silent=False, cache_dir=None, path=None) -> Iterator[dict[str, Any]]:
        return entry_rows(entry, split, silent, cache_dir, path)

    load.__name__ = f"get_{name}"
    return load


for _name, _entry in TABLE.items():
    dataset("keep_end", hub=_entry.hub, pairs=_entry.rejected is not None)(_loader(_name, _entry))


# ---- the loaders ----

REWARD = Hub("yitingxie/rlhf-reward-datasets")
WEBGPT = Hub("openai/webgpt_comparisons", test_share=0.1)
SHP = Hub("stanfordnlp/SHP", test_split="validation")
SHAREGPT = Hub("pvduy/sharegpt_alpaca_oa_vicuna_format")


@dataset("keep_end", hub=REWARD)
def get_rlhf_reward_datasets(
    split, silent=False, cache_dir=None, path=None
) -> Iterator[dict[str, Any]]:
    """Load a set whose responses begin with turns of their own: the prompt extends to the last
    "Assistant:" in them.

    A pair whose responses differ before that is skipped, since it has no common prompt.
    """
    for row in load_rows(REWARD, split, _prompt, path=path, cache_dir=cache_dir, silent=silent):
        (turns, marker, chosen), (others, other_marker, rejected) = (
            row.text(field).rpartition("Assistant:") for field in ("chosen", "rejected")
        )
        if not marker or not other_marker:
            skipped("no 'Assistant:' in a response")
        elif turns != others:
            skipped(PROMPTS_DIFFER)
        else:
            yield _row(_prompt(row) + turns + marker, chosen, rejected)


def _prompt(row: RawRow) -> str:
    return row.text("prompt")


@dataset("keep_end", hub=WEBGPT)
def get_webgpt(split, silent=False, cache_dir=None, path=None) -> Iterator[dict[str, Any]]:
    """Load pairs of answers, preferring the one with the higher score; (parentheses) and
    [brackets], meant for citations, are removed.

    Equal scores form no pair; the pipeline took the first answer as the better one. SFT imitates
    the better one, or the first.
    """
    for row in load_rows(WEBGPT, split, _full_text, path=path, cache_dir=cache_dir, silent=silent):
        answers = [" " + without_parentheses(row.text(f"answer_{i}")) for i in (0, 1)]
        scores = check_scores(
            row, [row.value("score_0"), row.value("score_1")], "score_0, score_1", 2
        )
        best = answers[scores.index(max(scores))]
        pairs = score_pairs(scores)
        yield {
            "prompt": _human(_full_text(row)),
            "responses": answers,
            "pairs": pairs,
            "sft_target": best,
            "scores": scores,
        }


def _full_text(row: RawRow) -> str:
    return fill("{question.full_text}", row) or ""


def without_parentheses(text: str) -> str:
    """Return the text without each (...) and [...], the shortest first; those after a space are
    removed with the space, before the others.

    >>> without_parentheses("Rain [1] falls(2 (or 3) hours) down.")
    'Rain falls down.'
    """
    for group in (r" [(\[].*?[)\]]", r"[(\[].*?[)\]]"):
        text = re.sub(group, "", text)
    return text


@dataset("keep_end", hub=SHP)
def get_shp_all(split, silent=False, cache_dir=None, path=None) -> Iterator[dict[str, Any]]:
    """Load Stanford Human Preferences, all pairs, by `labels`; `shp` keeps those whose scores
    differ by a factor of 2.
    """
    for row in load_rows(SHP, split, _history, path=path, cache_dir=cache_dir, silent=silent):
        responses, scores, (better, worse) = shp_pair(row)
        yield _row(
            _human(_history(row)),
            responses[better],
            responses[worse],
            [scores[better], scores[worse]],
        )


def _history(row: RawRow) -> str:
    return row.text("history")


@dataset("keep_end", hub=SHAREGPT, pairs=False)
def get_sharegpt_vicuna(split, silent=False, cache_dir=None, path=None) -> Iterator[dict[str, Any]]:
    """Load dialogues for SFT, with USER and ASSISTANT renamed Human and Assistant wherever they
    occur.
    """
    for row in load_rows(SHAREGPT, split, _dialogue, path=path, cache_dir=cache_dir, silent=silent):
        prompt, label = _dialogue(row), fill(" {label}", row)
        if not prompt or label is None:
            skipped("no response" if prompt else "no prompt")
        else:
            yield _row(prompt, label, None)


def _dialogue(row: RawRow) -> str:
    return (fill("{prompt}", row) or "").replace("USER", "Human").replace("ASSISTANT", "Assistant")
