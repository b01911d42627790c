"""Read what other commands measured, for the report: the figures of eval.py and score.py, and
answers of several models to the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumb.data.files import Text
from plumb.errors import UserError
from plumb.runs.history import STAMP
from plumb.scoring.intervals import Interval, wilson
from plumb.scoring.sample_files import read_answers

# of an evaluation: what is a share of the held-out examples
ACCURACIES = {
    "rewards_eval/accuracies": "accuracy: the chosen answer has the larger reward",
    "logps_eval/accuracies": "the chosen answer is the likelier one",
}


@dataclass(frozen=True)
class Figure:
    """Hold a share that was measured, and of how many it is one."""

    model: str
    what: str
    share: Interval
    n: int
    unit: str

    def __str__(self) -> str:
        low, high = f"{self.share.low:.1%}", f"{self.share.high:.1%}"
        return f"{self.share.value:.1%} [{low}, {high}] of {self.n:,} {self.unit}"


def read_figures(files: Sequence[Path]) -> list[Figure]:
    """Return the figures of files that `eval.py --out`, `score.py winrate --json` or `score.py
    pairs --json` wrote: win rates first. Raise UserError for another file.
    """
    found = []
    for file in files:
        try:
            content = json.loads(file.read_text("utf-8"))
            found += _figures(content)
        except OSError as error:
            raise UserError(f"--figures {file}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"--figures {file}: not what eval.py --out, score.py winrate --json or score.py"
                " pairs --json writes"
            ) from None
    return sorted(found, key=lambda figure: not figure.what.startswith("wins"))


def _figures(content: Mapping[str, Any]) -> list[Figure]:
    if "win_rates" in content:
        how = f"wins against {short(content['baseline'])}, as judged by {short(content['judge'])}"
        return [
            Figure(
                model=name,
                what=how,
                share=Interval(rate["value"], rate["low"], rate["high"]),
                n=rate["n_prompts"],
                unit="prompts",
            )
            for name, rate in content["win_rates"].items()
        ]
    if "figures" in content:  # by data set
        return [
            Figure(
                model=content["scorer"],
                what=f"accuracy on {name}",
                share=_accuracy(of_set),
                n=of_set["pairs"],
                unit="pairs",
            )
            for name, of_set in content["figures"].items()
        ]
    n = content["examples"]["all"]
    return [
        Figure(
            model=content["model"],
            what=what,
            share=wilson(content["metrics"][name] * n, n),
            n=n,
            unit="held-out examples",
        )
        for name, what in ACCURACIES.items()
        if name in content["metrics"]
    ]


def _accuracy(figures: Mapping[str, float]) -> Interval:
    value, low, high = (figures[f"accuracy{end}"] for end in ("", "_low", "_high"))
    return Interval(value, low, high)


def read_side_by_side(file: Path, most: int) -> dict[str, Any]:
    """Return the answers of a file of sample.py in one row per prompt: {titles, rows, left_out},
    each row (prompt, answer or None of each model). Only a prompt's first answer is shown.
    """
    answers: dict[str, dict[str, str]] = {}
    texts: dict[str, Text] = {}
    for line in read_answers(file):
        texts[line.key] = line.prompt
        answers.setdefault(line.model, {}).setdefault(line.key, line.answers[0])
    rows = [
        (plain(text), *(of_model.get(key) for of_model in answers.values()))
        for key, text in list(texts.items())[:most]
    ]
    return {
        "titles": [short(model) for model in answers],
        "rows": rows,
        "left_out": max(0, len(texts) - most),
        "file": file.name,
    }


def plain(prompt: Text) -> str:
    """Return a prompt as text; of messages, each with its role unless there is only the user's."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def short(model: str) -> str:
    """Return a model's name without the folders before it and the time in it; a checkpoint with
    its run.

    >>> short("runs/dpo_2026-01-31_12-00-00"), short("runs/dpo/step-800/policy.pt"), short("gpt2")
    ('dpo', 'dpo/step-800', 'gpt2')
    """
    parts = [STAMP.sub("", part) for part in model.split("/") if part not in ("", "policy.pt")]
    of_run = len(parts) > 1 and (parts[-1].startswith("step-") or parts[-1] == "LATEST")
    return "/".join(parts[-2:] if of_run else parts[-1:]) or model
