"""Turn raw preference data into prompts, responses and pairs, as text.

A data set is one function, `get_xyz`, with `@dataset`: it turns raw rows into `{prompt: Prompt}`,
the contract of the 2023 repository, so that its users' own functions work with the decorator alone.
`get_dataset` gives the rest of the code its `Row`s, one at a time, from a registered name or from a
path to files in one of the forms of data/forms/. No torch, no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from plumb.data.files import Messages, RawRow, Text, describe
from plumb.data.forms.published import hh_prompt, shp_pair, split_transcript
from plumb.data.html import strip_html
from plumb.data.registry import DataSet, Hub, Prompt, dataset, dataset_names, get_dataset, load_rows
from plumb.data.rows import PROMPTS_DIFFER, Row, skipped
from plumb.data.scores import check_scores, score_pairs

__all__ = [
    "DataSet",
    "Hub",
    "Messages",
    "Prompt",
    "Row",
    "Text",
    "dataset",
    "dataset_names",
    "get_dataset",
    "skipped",
]


# ---- the loaders ----


HH = Hub("Anthropic/hh-rlhf")
HELPFUL, HARMLESS = replace(HH, data_dir="helpful-base"), replace(HH, data_dir="harmless-base")
SHP = Hub("stanfordnlp/SHP")
SE = Hub("HuggingFaceH4/stack-exchange-preferences", test_share=0.01)
SAFERLHF = Hub("PKU-Alignment/PKU-SafeRLHF")


@dataset(truncation="keep_end", hub=HH)
def get_hh(split, silent=False, cache_dir=None, path=None, hub=HH) -> dict[str, Prompt]:
    """Load Anthropic HH. A prompt ends with the last "\\n\\nAssistant:"; SFT imitates the prompt's
    last chosen response.

    A pair whose texts split into different prompts is skipped and counted; the 2023 code cut the
    rejected text at the chosen prompt's length (pinned by
    test_hh_differs_from_2023_only_in_the_skipped_rows). `hub`: the part of HH that is read.
    """
    data: dict[str, Prompt] = {}
    for row in load_rows(hub, split, _hh_prompt, path=path, cache_dir=cache_dir, silent=silent):
        prompt, chosen = split_transcript(row, "chosen")
        other, rejected = split_transcript(row, "rejected")
        if prompt != other:
            skipped(PROMPTS_DIFFER)
            continue
        _add(data, prompt, [chosen, rejected], [(0, 1)])["sft_target"] = chosen
    return data


@dataset(truncation="keep_end", hub=HELPFUL)
def get_helpful(split, silent=False, cache_dir=None, path=None) -> dict[str, Prompt]:
    """Load the helpful-base part of HH; otherwise like get_hh."""
    return get_hh(split, silent, cache_dir, path, hub=HELPFUL)


@dataset(truncation="keep_end", hub=HARMLESS)
def get_harmless(split, silent=False, cache_dir=None, path=None) -> dict[str, Prompt]:
    """Load the harmless-base part of HH; otherwise like get_hh."""
    return get_hh(split, silent, cache_dir, path, hub=HARMLESS)


def _hh_prompt(row: RawRow) -> str:
    return split_transcript(row, "chosen")[0]


@dataset(hub=SHP, fields=("history", "human_ref_A", "human_ref_B", "score_A", "score_B", "labels"))
def get_shp(split, silent=False, cache_dir=None, path=None) -> dict[str, Prompt]:
    """Load Stanford Human Preferences without the pairs whose scores differ by a factor under 2
    (Ethayarajh et al., 2022).

    SFT imitates the response with the best score. Scores are upvotes, starting at 1; a pair with a
    score below 1 has no ratio, and is skipped.
    """
    data: dict[str, Prompt] = {}
    best: dict[str, float] = {}
    for row in load_rows(SHP, split, _history, path=path, cache_dir=cache_dir, silent=silent):
        prompt = hh_prompt(_history(row))
        responses, scores, pair = shp_pair(row)
        if min(scores) < 1:
            skipped("score below 1")
        elif max(scores) / min(scores) < 2:
            skipped("score ratio below 2")
        else:
            entry = _add(data, prompt, responses, [pair])
            entry.setdefault("scores", []).extend(scores)
            _keep_best(entry, best, prompt, responses, scores)
    return data


def _history(row: RawRow) -> str:
    return row.text("history")


@dataset(hub=SE, fields=("question", "answers"))
def get_se(split, silent=False, cache_dir=None, path=None) -> Iterator[dict[str, Any]]:
    """Load Stack Exchange questions with scored answers, with HTML stripped; SFT imitates the best
    answer.

    The set has only a train split: 1 % of the questions is the test split, the same share as in the
    original, but different questions. Equal scores form no pair; in the original they did (pinned
    by test_se_equal_scores). The rows come one at a time, since 10.8 M questions do not fit in
    memory as a dict; therefore identical questions, of which there are almost none, are not merged.
    """
    for row in load_rows(SE, split, _question, path=path, cache_dir=cache_dir, silent=silent):
        prompt, answers = hh_prompt(_question(row)), row.value("answers")
        if not isinstance(answers, list) or not all(
            isinstance(a, dict) and {"text", "pm_score"} <= a.keys() for a in answers
        ):
            raise row.error(
                f"field 'answers' is {describe(answers)}", "write a list of {text, pm_score}"
            )
        if not answers:
            skipped("question without answers")
            continue
        texts = [row.check_text(a["text"], f"answers[{i}].text") for i, a in enumerate(answers)]
        responses = [" " + strip_html(text) for text in texts]
        scores = check_scores(
            row, [a["pm_score"] for a in answers], "answers.pm_score", len(answers)
        )
        best = responses[scores.index(max(scores))]
        pairs = score_pairs(scores)
        yield {
            "prompt": prompt,
            "responses": responses,
            "pairs": pairs,
            "sft_target": best,
            "scores": scores,
        }


def _question(row: RawRow) -> str:
    return strip_html(row.text("question"))


@dataset(
    hub=SAFERLHF,
    fields=("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
)
def get_saferlhf(split, silent=False, cache_dir=None, path=None) -> dict[str, Prompt]:
    """Load PKU-SafeRLHF, the rows with one response labelled safe and one unsafe; the safe one is
    preferred.

    SFT imitates the safe one. Reads the first schema (7 fields) and the current one. AmberSafe's
    get_saferlhf passes prompt and responses without a separator, which would glue the answer to the
    question; here they get HH's format.
    """
    data: dict[str, Prompt] = {}
    for row in load_rows(SAFERLHF, split, _prompt, path=path, cache_dir=cache_dir, silent=silent):
        prompt = hh_prompt(_prompt(row))
        responses = [" " + row.text("response_0"), " " + row.text("response_1")]
        safe = [_boolean(row, f"is_response_{i}_safe") for i in (0, 1)]
        if safe[0] == safe[1]:
            skipped("both responses safe" if safe[0] else "both responses unsafe")
            continue
        chosen = safe.index(True)
        _add(data, prompt, responses, [(chosen, 1 - chosen)])["sft_target"] = responses[chosen]
    return data


def _prompt(row: RawRow) -> str:
    return row.text("prompt")


def _boolean(row: RawRow, field: str) -> bool:
    value = row.value(field)
    if not isinstance(value, bool):
        raise row.error(
            f"field '{field}' is {describe(value)}, not a boolean", "write true or false"
        )
    return value


def _add(
    data: dict[str, Prompt], prompt: str, responses: list[str], pairs: list[tuple[int, int]]
) -> Prompt:
    """Append a row's responses to its prompt's, and its pairs, whose indices count from these
    responses.
    """
    entry = data.setdefault(prompt, Prompt(responses=[], pairs=[], sft_target=""))
    n = len(entry["responses"])
    entry["pairs"] += [(n + i, n + j) for i, j in pairs]
    entry["responses"] += responses
    return entry


def _keep_best(
    entry: Prompt, best: dict[str, float], prompt: str, responses: list[str], scores: list[float]
) -> None:
    """Make the best-scored response so far the SFT target; the first of equals."""
    top = max(scores)
    if prompt not in best or top > best[prompt]:
        best[prompt] = top
        entry["sft_target"] = responses[scores.index(top)]
