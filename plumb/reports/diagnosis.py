"""Diagnose what is wrong with a run, in plain words: rules over its records, each with its
condition and a remedy.

A rule is a pure function Run -> evidence, "" if it does not apply. A rule that needs more steps
than the run has does not fire.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from plumb.console import shortened
from plumb.reports.rollout_diagnosis import (
    all_equal,
    critic_explains_nothing,
    critic_explodes,
    disagrees,
    entropy_falls,
    far_from_reference,
    learns_from_samples,
    negative_kl,
    never_ends,
    used_too_often,
)
from plumb.reports.trends import MIN_STEPS, ends, fifths, number_of, values_of
from plumb.runs.history import Record, Run, Sample

if TYPE_CHECKING:
    from plumb.reports.loss_families import Family

# Thresholds. They are rough on purpose: a rule that fires is a reason to look, not a measurement.
MIN_SAMPLES = 4  # nor do fewer samples
SILENT_SECS = 3600.0  # every step writes a record, so an hour without one is not a slow step
NO_GRADIENT = 1e-8  # a norm below this does not move float32 weights
# share of its first value by which the loss must change: dpo from 0.6931 to 0.6917
FLAT = 0.002
AT_CHANCE = 0.05  # around 0.5: 1.6 standard errors of 256 pairs, the default of n_eval_examples
# the chosen answers are 150 times less likely, and have lost a tenth of their nats
FALL_NATS = 5.0
FALL_SHARE = 0.1
HUGE_MARGIN = 10.0  # sigmoid(10) = 0.99995: no label is that certain
NO_PULL = (
    0.01  # a pair whose gradient is below this share of that at a margin of 0 teaches nothing more
)
# of the held-out loss, above its best: a tenth of its fall, and half a percent
RISE_OF_FALL = 0.1
RISE = 0.005
BY_HEART, GAP = 0.99, 0.1  # accuracy on training pairs, and how far the held-out one is below it
DIVERGED = 0.1  # share of its first value by which the training loss rises over its best
LONGER = 1.5  # length of samples relative to those before training, in words
BUCKET_GAP = 0.25  # between accuracies by length: two standard errors of buckets of 30 pairs
# share of 4-grams that already occur in the same sample; English prose has below 0.05
REPEATED = 0.3
N_GRAM = 4
ALIKE = 0.5  # share of different prompts that get exactly the same answer
CLIPPED = 0.9  # share of the steps whose gradient is clipped


class Finding(NamedTuple):
    """Hold what a rule found."""

    level: str  # problem | warning | note
    title: str
    evidence: str
    remedy: str


class Rule(NamedTuple):
    """Hold a rule with its check and its remedy."""

    level: str
    title: str
    check: Callable[[Run], str]
    # advice, and functions that return the advice for a loss, "" if it has none
    remedy: Sequence[str | Callable[[Family], str]]


def diagnose(run: Run) -> list[Finding]:
    """Return what the rules find, worst first."""
    family = family_of(run)
    findings = [
        Finding(rule.level, rule.title, evidence, in_words(rule.remedy, family))
        for rule in RULES
        if (evidence := rule.check(run))
    ]
    return sorted(findings, key=lambda finding: ("problem", "warning", "note").index(finding.level))


def family_of(run: Run) -> Family:
    """Return the family of the run's loss."""
    from plumb.reports import loss_families  # torch: not for --help

    return loss_families.family_of(run)


def in_words(remedy: Sequence[str | Callable[[Family], str]], family: Family) -> str:
    """Return the advice that applies to this loss."""
    parts = (advice if isinstance(advice, str) else advice(family) for advice in remedy)
    return "; ".join(filter(None, parts))


def healthy(findings: Sequence[Finding]) -> str:
    """Return the sentence for a run in which no rule found more than notes; "" for others."""
    return "" if any(f.level != "note" for f in findings) else "Nothing wrong was found."


def verdict(run: Run) -> str:
    """Return one line: the run's state, how far it got, how long it took, its last evaluation."""
    state = run.status.get("state") or "of unknown state (no status.json)"
    last: Record = max(run.steps[-1:] + run.evaluations[-1:], key=lambda r: r["step"], default={})
    parts = [f"{state}{f' (exit code {code})' if (code := run.status.get('code')) else ''}"]
    if last:
        updates = next(
            (r["counters/updates"] for r in reversed(run.steps) if "counters/updates" in r),
            len(run.steps),
        )
        parts.append(f"{updates:,.0f} steps, {last['step']:,.0f} examples")
    else:
        parts.append("no metrics yet")
    if state == "running":
        parts.append(f"last record {duration(run.silent_secs)} ago")
        left = run.steps[-1].get("seconds_left") if run.steps else None
        parts += (
            [f"about {duration(left)} left"] if left is not None and math.isfinite(left) else []
        )
    elif run.wall_secs:
        parts.append(
            f"{duration(run.wall_secs)}{f' over {run.starts} starts' if run.starts > 1 else ''}"
        )
    final = run.evaluations[-1] if run.evaluations else {}
    keys = {
        "held-out loss": "loss/eval",
        "accuracy": "rewards_eval/accuracies",
        "margin": "rewards_eval/margins",
        "held-out reward": "rollout_eval/reward",
    }
    parts += [f"{label} {final[key]:.4g}" for label, key in keys.items() if key in final]
    return ", ".join(parts)


def duration(secs: float) -> str:
    """Return a time in a unit that suits it.

    >>> duration(42), duration(150), duration(5400)
    ('42 s', '2 min', '1.5 h')
    """
    return (
        f"{secs:.0f} s"
        if secs < 120
        else f"{secs / 60:.0f} min"
        if secs < 3600
        else f"{secs / 3600:.1f} h"
    )


# ---- the rules ----


def stopped(run: Run) -> str:
    """Detect a run whose status.json says failed or stopped."""
    state = run.status.get("state")
    return (
        str(run.status.get("reason") or f"it {state}; no reason was recorded")
        if state in ("failed", "stopped")
        else ""
    )


def silent(run: Run) -> str:
    """Detect a run whose status.json says running, but which wrote no record for an hour."""
    if run.status.get("state") != "running" or run.silent_secs < SILENT_SECS:
        return ""
    return f"its status is running, but it wrote nothing for {duration(run.silent_secs)}"


def not_finite(run: Run) -> str:
    """Detect a loss or a gradient norm that is NaN or infinite."""
    for record in (*run.steps, *run.evaluations):
        for key in ("loss/train", "loss/eval", "grad_norm"):
            if not math.isfinite(record.get(key, 0.0)):
                return f"{key} is {record[key]} at {record['step']:,} examples"
    return "the run stopped because of it (exit code 4)" if run.status.get("code") == 4 else ""


def no_gradient(run: Run) -> str:
    """Detect that all gradient norms in the last fifth of the steps are below 1e-8."""
    norms = values_of(run.steps, "grad_norm")
    last = norms[-max(1, len(norms) // 5) :]
    return (
        f"the norm is at most {last.max():.2g} at the end"
        if len(norms) >= MIN_STEPS and last.max() < NO_GRADIENT
        else ""
    )


def flat(run: Run) -> str:
    """Detect a loss (held-out if there are two evaluations, else in training) that never moved 0.2%
    from its first value.
    """
    held_out = values_of(run.evaluations, "loss/eval")
    train = (
        [part.mean() for part in fifths(values_of(run.steps, "loss/train"))]
        if len(run.steps) >= 5 * MIN_STEPS
        else []
    )
    values = held_out if len(held_out) > 1 else np.array(train)
    if (
        len(run.steps) < MIN_STEPS
        or learns_from_samples(run)  # whose losses are near 0 whatever is learned
        or len(values) < 2
        or np.abs(values / (values[0] or 1.0) - 1).max() > FLAT
    ):
        return ""
    return (
        f"{'held-out' if len(held_out) > 1 else 'training'} loss {ends(values)}; the largest lr so"
        f" far was {_top_lr(run):.2g}"
    )


def _top_lr(run: Run) -> float:
    return max(values_of(run.steps, "lr"), default=0.0)


def at_chance(run: Run) -> str:
    """Detect that the last held-out reward accuracy is within 0.05 of 0.5, or below."""
    values = values_of([r for r in run.evaluations if r["step"] > 0], "rewards_eval/accuracies")
    if len(run.steps) < MIN_STEPS or not len(values) or values[-1] > 0.5 + AT_CHANCE:
        return ""
    family = family_of(run)
    evidence = family.compared(values[-1])
    if family.own_likelihood() and family.summed():
        return f"{evidence}; without a reference, sums of log-probabilities favor short answers"
    if values[-1] < 0.5 - AT_CHANCE:
        return f"{evidence}; below chance: are the labels swapped?"
    return evidence


def chosen_falls(run: Run) -> str:
    """Detect margins that grow while the log-probability of the chosen answers falls by more than 5
    nats and a tenth of its first value.
    """
    for split, records in (("held-out", run.evaluations), ("training", run.steps)):
        logps = values_of(records, f"logps_{'eval' if split == 'held-out' else 'train'}/chosen")
        margins = _margins(records, "eval" if split == "held-out" else "train")
        if len(run.steps) < MIN_STEPS or len(logps) < 2 or len(margins) < 2:
            continue
        if split == "training":  # single batches vary by more than the change to detect
            logps, margins = (
                np.array([part.mean() for part in fifths(x)]) for x in (logps, margins)
            )
        fall = logps[0] - logps[-1]
        if margins[-1] > margins[0] and fall > max(FALL_NATS, FALL_SHARE * abs(logps[0])):
            return (
                f"{split} log-probability of the chosen answers {ends(logps)} nats, while the"
                f" margin went {ends(margins)}"
            )
        return ""  # the held-out examples count
    return ""


def _margins(records: Sequence[Record], split: str) -> np.ndarray:
    """Return the mean rewards of chosen minus those of rejected responses; of labelled ones, those
    of the desirable minus those of the undesirable.
    """
    keys = (f"rewards_{split}/chosen", f"rewards_{split}/rejected")
    if any(f"rewards_{split}/margins" in r for r in records):
        return values_of(records, f"rewards_{split}/margins")
    both = [r for r in records if all(math.isfinite(r.get(key, math.nan)) for key in keys)]
    return np.array([r[keys[0]] - r[keys[1]] for r in both])


def huge_margin(run: Run) -> str:
    """Detect that the mean training margin in the last fifth of the steps is above 10, where the
    loss has hardly any gradient left.
    """
    margins = values_of(run.steps, "rewards_train/margins")
    if len(margins) < MIN_STEPS or (last := fifths(margins)[-1].mean()) < HUGE_MARGIN:
        return ""
    pull = family_of(run).pull(float(last))
    if pull is not None and pull > NO_PULL:
        return ""
    gradient = "" if pull is None else f" ({pull:.1g} of that at a margin of 0)"
    return (
        f"the mean margin is {last:.3g}: most pairs no longer have a gradient{gradient}, and the"
        " few that are wrong have a large one"
    )


def overfits(run: Run) -> str:
    """Detect a held-out loss that rose above its best (by a tenth of its fall, and 0.5%) while the
    training loss kept falling.
    """
    evaluations = [r for r in run.evaluations if math.isfinite(r.get("loss/eval", math.nan))]
    if len(run.steps) < MIN_STEPS or len(evaluations) < 2:
        return ""
    losses = [r["loss/eval"] for r in evaluations]
    best = int(np.argmin(losses))
    rise = losses[-1] - losses[best]
    if rise <= max(RISE_OF_FALL * (losses[0] - losses[best]), RISE * abs(losses[best])):
        return ""
    at = evaluations[best]["step"]
    before, after = (
        values_of(rs, "loss/train")
        for rs in ([r for r in run.steps if r["step"] <= at], _after(run.steps, at))
    )
    n = max(1, len(after) // 2)
    if not len(after) or after[-n:].mean() >= (before[-n:] if len(before) else after[:n]).mean():
        return ""
    return (
        f"held-out loss {losses[best]:.4g} at {at:,} examples, {losses[-1]:.4g} at the end, while"
        " the training loss fell"
    )


def _after(records: Sequence[Record], step: float) -> list[Record]:
    return [r for r in records if r["step"] > step]


def by_heart(run: Run) -> str:
    """Detect a training accuracy of at least 0.99 in the last fifth, with a held-out accuracy more
    than 0.1 below.
    """
    train = values_of(run.steps, "rewards_train/accuracies")
    held_out = values_of(run.evaluations, "rewards_eval/accuracies")
    if len(train) < MIN_STEPS or not len(held_out):
        return ""
    last = fifths(train)[-1].mean()
    if last < BY_HEART or held_out[-1] >= last - GAP:
        return ""
    return f"accuracy {last:.3g} on training pairs, {held_out[-1]:.3g} on held-out ones"


def diverges(run: Run) -> str:
    """Detect a training loss that rose above its best fifth by a tenth of its first value, and by
    three standard errors.
    """
    losses = values_of(run.steps, "loss/train")
    if len(losses) < 5 * MIN_STEPS or learns_from_samples(run):
        return ""
    parts = fifths(losses)
    best = min(parts, key=lambda part: part.mean())
    rise = parts[-1].mean() - best.mean()
    error = math.hypot(*(part.std() / math.sqrt(len(part)) for part in (parts[-1], best)))
    if rise <= max(DIVERGED * abs(parts[0].mean()), 3 * error):
        return ""
    return (
        "mean training loss by fifths of the run:"
        f" {', '.join(f'{part.mean():.4g}' for part in parts)}"
    )


def in_warmup(run: Run) -> str:
    """Detect a run that ended before warmup_steps were over."""
    warmup, done = number_of(run, "warmup_steps") or 0, len(run.steps)
    if run.status.get("state") != "finished" or not done or done > warmup:
        return ""
    return f"{done} steps with warmup_steps={warmup}: lr={run.setting('lr')} was never reached"


def clipped(run: Run) -> str:
    """Detect a gradient norm above max_grad_norm in nine of ten steps."""
    norms, limit = values_of(run.steps, "grad_norm"), number_of(run, "max_grad_norm")
    if len(norms) < MIN_STEPS or limit is None or (share := (norms > limit).mean()) < CLIPPED:
        return ""
    return (
        f"{share:.0%} of the steps; the norm's median is {np.median(norms):.3g},"
        f" max_grad_norm={limit}"
    )


def by_length(run: Run) -> str:
    """Detect held-out accuracies that differ by more than 0.25 between two buckets of length."""
    last = run.evaluations[-1] if run.evaluations else {}
    accuracies = {
        k.rpartition("/")[2]: v
        for k, v in last.items()
        if k.startswith("rewards_eval/accuracies/length ")
    }
    if len(accuracies) < 2 or max(accuracies.values()) - min(accuracies.values()) <= BUCKET_GAP:
        return ""
    worst, best = (
        min(accuracies, key=lambda k: accuracies[k]),
        max(accuracies, key=lambda k: accuracies[k]),
    )
    return (
        f"held-out accuracy {accuracies[best]:.2f} for {best}, {accuracies[worst]:.2f} for {worst}"
    )


def not_held_out(run: Run) -> str:
    """Detect a run that trained, but has no evaluation."""
    return (
        "there is no record of an evaluation"
        if len(run.steps) >= MIN_STEPS and not run.evaluations
        else ""
    )


def too_short(run: Run) -> str:
    """Detect a run of fewer than 10 steps, on which the rules about trends do not apply."""
    return (
        f"{len(run.steps)} steps; trends are judged from {MIN_STEPS} steps on"
        if len(run.steps) < MIN_STEPS
        else ""
    )


# ---- the samples ----


def first_and_last(run: Run, table: str = "policy_samples") -> tuple[list[Sample], list[Sample]]:
    """Return the samples of the first and the last evaluation that has some; the latter are empty
    if there was only one.
    """
    rows = [s for s in run.samples if s.table == table]
    ends = sorted({s.step for s in rows})
    pick = lambda step: [s for s in rows if s.step == step]
    return (pick(ends[0]), pick(ends[-1]) if len(ends) > 1 else []) if ends else ([], [])


def words(text: str) -> list[str]:
    """Split a text into words or, in scripts without spaces, characters."""
    return re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower()
    )


def repetition(text: str) -> float:
    """Return the share of 4-grams of words that already occur in the text, in [0, 1).

    >>> repetition("a b c d e f g h"), repetition("no no no no no no no no")
    (0.0, 0.8)
    """
    tokens = words(text)
    grams = [tuple(tokens[i : i + N_GRAM]) for i in range(len(tokens) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longer(run: Run) -> str:
    """Detect, if there are rewards, that the policy's last samples have at least 1.5 times as many
    words as its first.
    """
    before, after = ([len(words(s.text)) for s in rows] for rows in first_and_last(run))
    if (
        not len(_margins(run.evaluations, "eval"))
        or min(len(before), len(after)) < MIN_SAMPLES
        or np.mean(after) < LONGER * max(1.0, float(np.mean(before)))
    ):
        return ""
    evidence = (
        f"the samples have {np.mean(after):.0f} words on average; at the beginning"
        f" {np.mean(before):.0f}"
    )
    if not family_of(run).summed():
        return evidence
    return f"{evidence}; rewards are sums over tokens, so a longer answer can gain more"


def repeats(run: Run) -> str:
    """Detect that nearly a third of the 4-grams in the policy's last samples are repetitions, and
    more than in its first.
    """
    before, after = ([repetition(s.text) for s in rows] for rows in first_and_last(run))
    if len(after) < MIN_SAMPLES or np.mean(after) < REPEATED or np.mean(after) < np.mean(before):
        return ""
    return (
        f"{np.mean(after):.0%} of the 4-word sequences in a sample already occur in it; at the"
        f" beginning {np.mean(before):.0%}"
    )


def alike(run: Run) -> str:
    """Detect that half of the prompts get the same answer, or none, in the last samples."""
    after = first_and_last(run)[1]
    if len({s.prompt for s in after}) < MIN_SAMPLES:
        return ""
    text, n = Counter(s.text.strip() for s in after).most_common(1)[0]
    if n < ALIKE * len(after):
        return ""
    return (
        f"{n} of {len(after)} prompts get"
        f" {f'the same answer: {shortened(text, 60)!r}' if text else 'an empty answer'}"
    )


# ---- advice that does not apply to every loss ----


def nearer(family: Family) -> str:
    names = " or ".join(family.names("loss.beta"))
    return (
        f"a larger {names}, which keeps the policy closer to the reference"
        if family.holds_near()
        else ""
    )


def with_nll(family: Family) -> str:
    names = " or ".join(f"{name}=1" for name in family.names("loss.nll"))
    return f"{names}, an NLL term on the chosen answers, counteracts it" if names else ""


def smoother(family: Family) -> str:
    return " or ".join(family.names("loss.label_smoothing"))


def per_token(family: Family) -> str:
    if not family.summed():
        return ""
    names = " or ".join(f"{name}=token" for name in family.names("loss.normalize"))
    return (
        f"{names or 'a loss whose rewards are means per token'}, so that length alone gains nothing"
    )


SLOWER = ("a lower lr", "an earlier stop (n_examples, or the best checkpoint by keep_best)")
NEARER = (*SLOWER, nearer)
RULES = [
    Rule(
        "problem",
        "The run did not finish",
        stopped,
        ("fix what it names, then run the same command with resume=auto",),
    ),
    Rule(
        "problem",
        "The run has gone silent",
        silent,
        ("it was probably killed", "run the same command with resume=auto"),
    ),
    Rule(
        "problem",
        "Numbers that are not finite",
        not_finite,
        (
            "a lower lr or more warmup_steps",
            "bfloat16 instead of float16",
            "look at the examples of that step",
        ),
    ),
    Rule(
        "problem",
        "No gradient",
        no_gradient,
        (
            "if margins are huge, all pairs are fitted: stop earlier",
            "otherwise check lr and the data",
        ),
    ),
    Rule(
        "problem",
        "The loss does not move",
        flat,
        (
            "a higher lr (5e-7 is meant for billions of parameters), fewer warmup_steps, or more"
            " steps",
        ),
    ),
    Rule("problem", "The training loss rises", diverges, ("a lower lr, or more warmup_steps",)),
    Rule(
        "problem",
        "Held-out accuracy at chance",
        at_chance,
        (
            "check that the labels agree with each other and are not swapped",
            "train longer, or with a higher lr",
            "start from an SFT model trained on data of the same kind",
        ),
    ),
    Rule(
        "problem",
        "Samples repeat themselves",
        repeats,
        (
            "the policy no longer produces normal text",
            *NEARER,
            "sample with a temperature above 0 before judging",
        ),
    ),
    Rule(
        "problem",
        "Different prompts get the same answer",
        alike,
        ("the policy has collapsed", *NEARER),
    ),
    Rule(
        "warning",
        "The chosen answers become less likely",
        chosen_falls,
        ("only if samples get worse, too", *NEARER, with_nll),
    ),
    Rule("warning", "Margins explode", huge_margin, (*SLOWER, smoother)),
    Rule(
        "warning",
        "Overfitting",
        overfits,
        ("fewer epochs, or the best checkpoint (keep_best=loss/eval)", "more data", "a lower lr"),
    ),
    Rule(
        "warning",
        "Training pairs are memorized",
        by_heart,
        ("fewer epochs", "more data", smoother, "a lower lr"),
    ),
    Rule(
        "warning",
        "Samples grow longer",
        longer,
        (
            "check whether preferred answers are longer than others, and whether length is what was"
            " learned: compare accuracies by length",
            "balance the lengths in the data",
            per_token,
        ),
    ),
    Rule(
        "note",
        "Accuracy depends on length",
        by_length,
        (
            "a bucket with few pairs may differ by chance",
            "otherwise check whether longer answers are preferred in the data",
            per_token,
        ),
    ),
    Rule(
        "problem",
        "The KL is negative",
        negative_kl,
        (
            "the responses are not the policy's own: compare rollout_train/logps_difference",
            "report it with the model's name; loss.kl=none only hides it",
        ),
    ),
    Rule(
        "problem",
        "All responses to a prompt get the same reward",
        all_equal,
        (
            "a reward that tells responses apart, or prompts that are neither too easy nor too"
            " hard",
            "a higher rollout.temperature, or a larger rollout.n",
            "loss.equal_rewards=drop spends no updates on them",
        ),
    ),
    Rule(
        "warning",
        "The reward rises by leaving the reference",
        far_from_reference,
        (
            "over-optimization: read the responses in rollouts.jsonl",
            "a larger loss.beta, a lower lr, or an earlier stop (keep_best=rollout_eval/reward)",
            "a second term of the reward, or a reward model trained on such responses",
        ),
    ),
    Rule(
        "warning",
        "The entropy collapses",
        entropy_falls,
        (
            "all responses become the same, and nothing more is learned",
            "a larger loss.beta, a lower lr, or a larger loss.clip_high",
        ),
    ),
    Rule(
        "warning",
        "Responses do not end",
        never_ends,
        (
            "a larger rollout.max_new_tokens, or reward.missing_eos above 0",
            "start from an SFT model, which has learned to end",
        ),
    ),
    Rule(
        "warning",
        "The sampler disagrees with the trainer",
        disagrees,
        (
            "model.policy_dtype=float32 and model.fsdp_policy_mp=null, for comparison",
            "a lower rollout.tolerance stops a run that goes too far",
        ),
    ),
    Rule(
        "warning",
        "The critic explains nothing",
        critic_explains_nothing,
        (
            "advantages are then rewards less a constant, and noisier than need be",
            "a larger loss.critic_lr, or loss.critic_warmup=2 and more",
            "loss.critic=reward, if a reward model is among reward.terms",
            "otherwise loss.gae_lambda=1, which leaves no error of the critic in the policy",
        ),
    ),
    Rule(
        "problem",
        "The critic's loss explodes",
        critic_explodes,
        (
            "a smaller loss.critic_lr, or more warmup_steps",
            "bounded rewards: reward.clip, or reward.scale=running",
            "fewer rollout.uses",
        ),
    ),
    Rule(
        "note",
        "Responses are used too often",
        used_too_often,
        ("a smaller rollout.uses or rollout.batches, or a lower lr",),
    ),
    Rule(
        "warning",
        "Ended in warmup",
        in_warmup,
        ("fewer warmup_steps (a tenth of all steps), or more steps",),
    ),
    Rule(
        "note",
        "The gradient is nearly always clipped",
        clipped,
        (
            "harmless with Adam and RMSprop, whose steps hardly depend on its length",
            "otherwise raise max_grad_norm or lower lr",
        ),
    ),
    Rule(
        "note",
        "Nothing is held out",
        not_held_out,
        ("eval_share or eval_datasets", "without them overfitting can't be seen"),
    ),
    Rule("note", "Too short to judge", too_short, ("more steps",)),
]
