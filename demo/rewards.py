"""Rewards of an answer to the demo's questions, for `exp=demo_grpo`: is it courteous, and is it
helpful? Both are rules on the tables that the data were written from, so they cannot be in error.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from make_data import CHOSEN, read_subjects, slots_of

from plumb.rollouts.answered import Answered
from plumb.rollouts.rewards import reward


@reward
def courteous(answered: Answered) -> float:
    """Return 1 for an answer that begins with a courteous sentence, 0 otherwise."""
    slots = slots_of(subject_of(answered.prompt))
    openings = [template.format(**slots) for template in CHOSEN["open"]]
    return float(answered.response.strip().startswith(tuple(openings)))


@reward
def helpful(answered: Answered) -> float:
    """Return 1 for an answer that gives a step towards what was asked, with the reason for this
    step; 0 otherwise.
    """
    subject = subject_of(answered.prompt)
    facts = [slots_of(subject, step=step, reason=reason) for step, reason in subject["facts"]]
    advice = [template.format(**slots) for slots in facts for template in CHOSEN["core"]]
    return float(any(sentence in answered.response for sentence in advice))


@cache
def subject_of(prompt: str) -> dict[str, Any]:
    """Return what a prompt asks about: the subject of which it has most to say."""
    words = lambda subject: [subject[key] for key in ("task", "doing", "topic")]
    named = lambda subject: max(len(text) if text in prompt else 0 for text in words(subject))
    best: dict[str, Any] = max(read_subjects(), key=named)
    return best
