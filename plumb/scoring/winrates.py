"""Compare samples of several policies with a baseline's: who wins, how often, and with what
uncertainty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plumb.data.files import Text
from plumb.errors import UserError
from plumb.scoring.intervals import Interval, bootstrap
from plumb.scoring.judges import Comparison, Endpoint, Verdict
from plumb.scoring.sample_files import Answered, read_answers

Answers = dict[str, list[Answered]]  # prompt's key -> the lines with answers to it


class Duel(NamedTuple):
    """Hold one answer of a policy and one of the baseline to the same prompt."""

    line: Answered  # with the prompt
    answer: str
    baseline: str


class Judged(NamedTuple):
    """Hold a judge's verdicts on n duels."""

    # [n] 1 the policy's answer is better, 1/2 a tie, 0 the baseline's is; NaN: no verdict
    points: np.ndarray
    details: list[dict[str, Any]]  # [n] further details, for the file
    swayed: np.ndarray | None = (
        None  # [n] bool: the verdict depends on the answers' order; None: it sees one at a time
    )


@dataclass(frozen=True)
class WinRate:
    """Hold a policy's result against the baseline."""

    policy: str
    n: int  # duels with a verdict
    n_prompts: int
    wins: int
    ties: int
    losses: int
    rate: Interval  # over prompts; a tie is half a win
    n_unsaid: int  # duels without a verdict
    swayed: float | None  # share of duels whose verdict depends on the order


def read_policies(files: Sequence[Path], baseline: str) -> tuple[dict[str, Answers], str]:
    """Return ({policy: answers}, the baseline's name) of these files. A policy is named by `model`
    in the lines, otherwise by the file.

    `baseline` is one of the models, or a file. Raises UserError if it is neither, or if no other
    policy is left to compare with it.
    """
    path = Path(baseline)
    is_file = path.is_file() and path.suffix != ".pt"  # a policy.pt is a model's name
    by_source: dict[tuple[str, Path], Answers] = {}
    for file in dict.fromkeys([*files, path] if is_file else files):
        for line in read_answers(file):
            by_source.setdefault((line.model, file), defaultdict(list))[line.key].append(line)
    models = [model for model, _ in by_source]
    names = {
        key: key[0] if models.count(key[0]) == 1 else f"{key[0]} ({key[1]})" for key in by_source
    }
    chosen = [
        name
        for key, name in names.items()
        if (key[1] == path if is_file else baseline in (key[0], name))
    ]
    if len(chosen) != 1:
        listed = ", ".join(names.values())
        raise UserError(
            f"--baseline={baseline}: {len(chosen) or 'none'} of the models ({listed}) match;"
            " give one of them, or a file with one model's answers"
        )
    if len(names) < 2:
        raise UserError(
            f"--baseline={baseline}: the files have no other model's answers; add samples"
            " of another model"
        )
    return {names[key]: answers for key, answers in by_source.items()}, chosen[0]


def duels(policy: Answers, baseline: Answers) -> list[Duel]:
    """Pair the i-th answers to each prompt; answers without a counterpart are left out."""
    pairs = []
    for key in policy.keys() & baseline.keys():
        mine, theirs = (
            [(line, answer) for line in side[key] for answer in line.answers]
            for side in (policy, baseline)
        )
        pairs += [
            Duel(line, answer, other)
            for (line, answer), (_, other) in zip(mine, theirs, strict=False)
        ]
    return sorted(pairs, key=lambda duel: (duel.line.raw.file, duel.line.raw.number))


def by_points(
    some: Sequence[Duel], points_of: Callable[[Sequence[Answered]], Sequence[float]]
) -> Judged:
    """Judge by a scorer that sees one answer at a time: more points win. Each distinct answer to a
    prompt is scored once; after messages, the template adds the text around it.
    """
    read = lambda duel, text: text if isinstance(duel.line.prompt, str) else text.strip()
    texts = ((duel, read(duel, text)) for duel in some for text in (duel.answer, duel.baseline))
    answers = {(duel.line.key, text): duel.line._replace(answers=[text]) for duel, text in texts}
    points = dict(zip(answers, points_of(list(answers.values())), strict=True))
    pairs = [
        [points[duel.line.key, read(duel, text)] for text in (duel.answer, duel.baseline)]
        for duel in some
    ]
    details = [{"score": float(mine), "baseline_score": float(theirs)} for mine, theirs in pairs]
    return Judged(
        np.array([(mine > theirs) + (mine == theirs) / 2 for mine, theirs in pairs]), details
    )


def by_endpoint(some: Sequence[Duel], endpoint: Endpoint) -> Judged:
    """Judge by an endpoint that sees both answers, in both orders: a verdict counts if the two
    agree, and is a tie otherwise. Equal answers are not sent.
    """
    differing = [i for i, duel in enumerate(some) if duel.answer.strip() != duel.baseline.strip()]
    orders = []
    for i in differing:
        question = question_of(some[i].line.prompt)
        mine = some[i].answer.strip()
        theirs = some[i].baseline.strip()
        orders += [Comparison(question, mine, theirs), Comparison(question, theirs, mine)]
    verdicts = endpoint.judge(orders)
    points = np.full(len(some), 0.5)
    swayed = np.zeros(len(some), bool)
    details = [dict[str, Any]() for _ in some]
    value: dict[Verdict | None, float] = {"a": 1.0, "tie": 0.5, "b": 0.0, None: np.nan}
    for i, first, second in zip(differing, verdicts[::2], verdicts[1::2], strict=True):
        both = value[first], 1 - value[second]
        swayed[i] = None not in (first, second) and both[0] != both[1]
        points[i] = np.nan if None in (first, second) else both[0] if both[0] == both[1] else 0.5
        details[i] = {"verdict": first, "verdict_swapped": second}
    return Judged(points, details, swayed)


def question_of(prompt: Text) -> str:
    """Return a prompt as a judge sees it: a single question by itself, a dialogue with its
    speakers, a post without "TL;DR:".

    >>> question_of("\\n\\nHuman: Why?\\n\\nAssistant:"), question_of("POST: I ran.\\nTL;DR:")
    ('Why?', 'POST: I ran.')
    """
    if isinstance(prompt, list):
        speakers = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
        prompt = "".join(speakers[turn["role"]] + turn["content"] for turn in prompt)
    text = prompt.strip().removesuffix("TL;DR:").removesuffix("Assistant:").strip()
    return (
        text.removeprefix("Human:").strip()
        if text.count("Human:") == 1 and "Assistant:" not in text
        else text
    )


def win_rate(policy: str, some: Sequence[Duel], judged: Judged, seed: int) -> WinRate:
    """Return a policy's line of the table."""
    decided = ~np.isnan(judged.points)
    points, prompts = judged.points[decided], np.array([duel.line.key for duel in some])[decided]
    wins, ties, losses = (int((points == value).sum()) for value in (1, 0.5, 0))
    swayed = (
        None if judged.swayed is None or not decided.any() else float(judged.swayed[decided].mean())
    )
    return WinRate(
        policy=policy,
        n=len(points),
        n_prompts=len(np.unique(prompts)),
        wins=wins,
        ties=ties,
        losses=losses,
        rate=bootstrap(points, prompts, seed),
        n_unsaid=int((~decided).sum()),
        swayed=swayed,
    )
