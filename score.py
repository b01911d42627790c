"""Score answers: `python score.py pairs | answers | winrate | split`, see docs/scoring.md.

A SCORER is a reward model (a run, its policy.pt, or a Hugging Face sequence-classification model),
or a policy: a run is scored by the rewards of its loss, any other policy with --reference and
--beta.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import preference_datasets  # noqa: F401  registers its sets
from plumb.console import to_dict
from plumb.data.order import Schedule
from plumb.data.registry import LOADERS, Reading, get_dataset, resolve
from plumb.data.rows import Row
from plumb.errors import UserError
from plumb.paths import get_local_dir, new_file
from plumb.reports.score_plots import draw_calibration, draw_scores
from plumb.scoring import judges
from plumb.scoring.intervals import Interval, calibration, length_buckets, wilson
from plumb.scoring.judges import Endpoint, Verdicts
from plumb.scoring.sample_files import read_answers, read_ranked
from plumb.scoring.winrates import (
    Duel,
    Judged,
    WinRate,
    by_endpoint,
    by_points,
    duels,
    read_policies,
    win_rate,
)
from plumb.settings import cli
from plumb.settings.cli import Parser, write_jsonl
from plumb.settings.plugins import import_plugins
from plumb.settings.schema import DTYPE_NAMES

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from plumb.models.find import ModelRef
    from plumb.scoring.scorers import Scored, Scorer

KNOBS = ("max_length", "max_prompt_length", "chat_template", "eval_share")
OF_SCORERS = (
    "reference",
    "beta",
    "base",
    "tokenizer",
    "dtype",
    "device",
    "tokens_per_microbatch",
    "plugin",
    *KNOBS,
)
OF_ENDPOINTS = ("judge_model", "judge_template", "key_env", "verdicts", "parallel", "timeout")


def parser() -> argparse.ArgumentParser:
    """Return the parser with the four subcommands."""
    p = Parser(str(__doc__))
    commands_ = p.add_subparsers(metavar="pairs | answers | winrate | split", required=True)
    add = lambda name, what: commands_.add_parser(name, help=what, description=what)

    q = add("pairs", "measure a scorer's accuracy on preference pairs")
    q.set_defaults(main=pairs)
    q.add_argument("scorer", metavar="SCORER")
    q.add_argument("data", nargs="+", metavar="DATA", help="data sets: names, files or folders")
    q.add_argument("--split", choices=("train", "test"), default="test")
    q.add_argument(
        "--n-examples",
        type=_count,
        metavar="N",
        help="number from each data set, in a seeded order (default: all)",
    )
    q.add_argument(
        "--dataset-path",
        type=_assignment,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="local copy of a named data set",
    )
    q.add_argument(
        "--field",
        type=_assignment,
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="field names in your own files",
    )
    q.add_argument(
        "--eval-share",
        type=float,
        metavar="S",
        help="share held out if a file has no test split",
    )
    q.add_argument(
        "--out", type=Path, metavar="FILE", help="write the pairs with their scores as JSONL"
    )
    q.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    q.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="draw the score histogram and calibration curve as PNGs",
    )
    _scorer_options(q)

    q = add("answers", "add scores to a file of prompts and answers")
    q.set_defaults(main=answers)
    q.add_argument("scorer", metavar="SCORER")
    q.add_argument("file", type=Path, metavar="FILE", help="for instance, the output of sample.py")
    q.add_argument("--out", type=Path, required=True, metavar="FILE")
    _scorer_options(q)

    q = add("winrate", "compare the samples of policies with a baseline's")
    q.set_defaults(main=winrate)
    q.add_argument(
        "file",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="samples; for instance, the output of sample.py",
    )
    q.add_argument("--baseline", required=True, metavar="MODEL_OR_FILE")
    q.add_argument(
        "--judge",
        required=True,
        metavar="SCORER | rule:... | URL",
        help="rule:longer, rule:shorter, rule:contains=TEXT; http://host:port/v1",
    )
    q.add_argument("--seed", type=_whole, default=0, help="seed of the bootstrap")
    q.add_argument("--out", type=Path, metavar="FILE", help="write every comparison as JSONL")
    q.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    _scorer_options(q)
    _endpoint_options(q)

    q = add("split", "split scored pairs or samples into an easy and a hard data set")
    q.set_defaults(main=split)
    q.add_argument(
        "file", type=Path, metavar="FILE", help="output of score.py pairs or score.py answers"
    )
    q.add_argument(
        "--threshold",
        type=float,
        default=1.0,
        metavar="T",
        help="pairs with a margin of T or more are easy",
    )
    q.add_argument("--easy", type=Path, required=True, metavar="FILE")
    q.add_argument("--hard", type=Path, required=True, metavar="FILE")
    q.add_argument(
        "--sort",
        action="store_true",
        help="sort by margin, largest first (default: the file's order)",
    )
    return p


def _scorer_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group(
        "the scorer",
        "options not given come from its run's config.yaml, or from config/config.yaml",
    )
    g.add_argument(
        "--reference",
        metavar="MODEL",
        help="reference that a policy is compared with (default: what its run started from)",
    )
    g.add_argument(
        "--beta",
        type=float,
        help="beta of a policy's rewards (default: its run's); with --reference: beta * log(policy"
        " / reference), whatever its run's loss",
    )
    g.add_argument(
        "--base",
        metavar="MODEL",
        help="base model of a policy.pt that has no config.yaml, or of a run whose base has moved",
    )
    g.add_argument(
        "--tokenizer", metavar="NAME", help="tokenizer to use in place of the model's own"
    )
    g.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        help="dtype of the weights (default: float32)",
    )
    g.add_argument("--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    g.add_argument(
        "--max-length", type=_count, metavar="N", help="maximum tokens of prompt + response"
    )
    g.add_argument(
        "--max-prompt-length",
        type=_count,
        metavar="N",
        help="tokens kept of a prompt that is too long",
    )
    g.add_argument(
        "--chat-template",
        metavar="hh | NAME | FILE",
        help="template for messages (default: the tokenizer's)",
    )
    g.add_argument("--tokens-per-microbatch", type=_count, metavar="N", help="(default: 8192)")
    g.add_argument(
        "--plugin",
        action="append",
        metavar="FILE",
        help="import your own file with its @loss or @dataset; may be repeated",
    )


def _endpoint_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("a judge at a URL")
    g.add_argument("--judge-model", metavar="NAME", help="the server's name for the model")
    g.add_argument(
        "--judge-template",
        metavar="hh | tldr | tldr_concise | FILE",
        help="prompt for the judge (default: hh)",
    )
    g.add_argument(
        "--key-env", metavar="VARIABLE", help="environment variable that holds the API key"
    )
    g.add_argument(
        "--verdicts",
        type=Path,
        metavar="FILE",
        help="file that keeps its verdicts (default: .cache/verdicts.jsonl)",
    )
    g.add_argument("--parallel", type=_count, metavar="N", help="concurrent requests (default: 4)")
    g.add_argument(
        "--timeout", type=_seconds, metavar="SECS", help="time limit for one reply (default: 60)"
    )


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _count(text: str) -> int:
    if (n := _whole(text)) == 0:
        raise argparse.ArgumentTypeError("0: give at least 1")
    return n


def _seconds(text: str) -> float:
    if not 0 < (seconds := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give more than 0")
    return seconds


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def scorer_of(options: argparse.Namespace, name: str) -> tuple[ModelRef, DictConfig]:
    """Return the scorer that the options name, not yet loaded so that data can be read first, and
    its config.
    """
    from plumb.models.find import find_model
    from plumb.scoring.scorers import knobs_of

    import_plugins(options.plugin or [])
    ref = find_model(name, options.base, options.tokenizer, options.dtype)
    return ref, knobs_of(ref, {knob: getattr(options, knob, None) for knob in KNOBS})


def loaded(options: argparse.Namespace, ref: ModelRef, config: DictConfig) -> Scorer:
    from plumb.scoring.scorers import load_scorer

    budget = options.tokens_per_microbatch or 8192
    return load_scorer(
        ref, config, options.reference, options.beta, device=options.device, budget=budget
    )


# ---- pairs ----


def pairs(options: argparse.Namespace) -> None:
    """Run the command `pairs`."""
    from plumb.scoring.scorers import Scored

    wanted = list(dict.fromkeys(map(resolve, options.data)))
    for name, path in options.dataset_path:
        if resolve(name) not in wanted or resolve(name) not in LOADERS:
            raise UserError(
                f"--dataset-path={name}={path}: is for a named set among DATA; leave it out"
            )
    ref, config = scorer_of(options, options.scorer)
    data = [(name, *read_pairs(config, name, options)) for name in wanted]
    scorer = loaded(options, ref, config)
    names = list[str]()
    rows = list[Row]()
    parts = list[Scored]()
    for name, some, keep in data:
        scored = scorer.score(some, keep)
        kept = (
            ~scored.same
            if config.data_rules.identical_after_truncation == "drop"
            else np.ones(len(some), bool)
        )
        print(
            f"{name}: {int(kept.sum()):,} pairs, {int((~kept).sum()):,} left out as identical,"
            f" {int(scored.cut.sum()):,} truncated"
        )
        names += [name] * int(kept.sum())
        rows += [row for row, k in zip(some, kept, strict=True) if k]
        parts.append(Scored(*(x[kept] for x in scored)))
    scored = Scored(*map(np.concatenate, zip(*parts, strict=True)))
    if not rows:
        raise UserError(
            f"{' '.join(options.data)}: no pairs are left; see --split and --eval-share"
        )
    figures = {
        name: figures_of(scored, mask) for name, mask in groups(names, scored.tokens).items()
    }
    print(table_of(figures))
    if options.out:
        print(
            f"{write_jsonl(options.out, map(_scored_pair, names, rows, scored.scores)):,} pairs in"
            f" {options.out}"
        )
    if options.json:
        _write_json(
            options.json,
            {
                "scorer": options.scorer,
                "data": options.data,
                "split": options.split,
                "figures": figures,
            },
        )
    if options.plots:
        draw(scored, options.plots, options.scorer)


def read_pairs(config: DictConfig, name: str, options: argparse.Namespace) -> tuple[list[Row], str]:
    """Return the pairs of a data set, one per row, and which end of its long prompts is kept."""
    paths = to_dict(config.dataset_paths) | {
        resolve(dataset): path for dataset, path in options.dataset_path
    }
    # the run's own files are read as in the run
    is_of_run = name in (config.get("datasets") or [])
    fields = dict(options.field) or (to_dict(config.field_map) if is_of_run else None)
    roles, splits = (
        to_dict(config.get(knob)) if is_of_run else None for knob in ("role_map", "split_names")
    )
    bad_row = (config.get("data_rules") or {}).get("bad_row", "stop") if is_of_run else "stop"
    reading = Reading(
        role_map=roles,
        split_names=splits,
        bad_row=bad_row,
        group="pair",
        plain_prompts=config.get("plain_prompts", "verbatim") if is_of_run else "verbatim",
        revisions=to_dict(config.get("dataset_revisions")) if is_of_run else None,
    )
    cache_dir = str(get_local_dir(config.local_dirs))
    share = config.eval_share
    data = get_dataset(
        name,
        options.split,
        path=paths.get(name),
        field_map=fields,
        reading=reading,
        eval_share=share,
        cache_dir=cache_dir,
    )
    every = ((row, row.responses[i], row.responses[j]) for row in data.rows for i, j in row.pairs)
    rows = [
        Row(
            prompt=row.prompt,
            responses=[chosen, rejected],
            pairs=[(0, 1)],
            sft_target=None,
            source=row.source,
            more=row.more,
        )
        for row, chosen, rejected in every
    ]
    print(data.form)
    if not rows:
        raise UserError(
            f"{name}: no pairs (chosen and rejected) in its {options.split} split; see --split and"
            " --eval-share"
        )
    order = Schedule(
        len(rows),
        batch_size=1,
        n_epochs=1,
        n_examples=options.n_examples,
        shuffle=True,
        seed=config.seed,
    )
    chosen = sorted(order.order(0)[: order.n_examples].tolist())
    return [rows[i] for i in chosen], config.truncation_mode or data.truncation


def groups(names: Sequence[str], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return {name: mask [n]} of all pairs, of each data set if there are several, and of each
    class of lengths of the longer response.
    """
    masks = {"all": np.ones(len(names), bool)}
    if len(set(names)) > 1:
        masks |= {name: np.array(names) == name for name in dict.fromkeys(names)}
    buckets = length_buckets(tokens.max(1))
    return masks | {
        str(b): buckets == b
        for b in sorted(set(buckets), key=lambda b: int(b.split()[1].split("-")[0]))
    }


def figures_of(scored: Scored, mask: np.ndarray) -> dict[str, float]:
    """Return the figures for the pairs in `mask`. A tie counts as wrong, both for scores and for
    lengths.
    """
    scores, tokens = scored.scores[mask], scored.tokens[mask]
    (chosen, rejected), n = scores.T, len(scores)
    accuracy, longer = (wilson(int((x[:, 0] > x[:, 1]).sum()), n) for x in (scores, tokens))
    margins = chosen - rejected
    return {
        "pairs": n,
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "ties": int((margins == 0).sum()),
        "longer_accuracy": longer.value,
        "longer_low": longer.low,
        "longer_high": longer.high,
        "longer_ties": int((tokens[:, 0] == tokens[:, 1]).sum()),
        "chosen_score": float(chosen.mean()),
        "rejected_score": float(rejected.mean()),
        "margin": float(margins.mean()),
        "margin_spread": float(margins.std()),
        "score_spread": float(scores.std()),
        "calibration_error": calibration(margins).error,
    }


def table_of(figures: dict[str, dict[str, float]]) -> str:
    """Return the table for the terminal."""
    rows = [
        [
            "",
            "pairs",
            "accuracy [95 %]",
            "ties",
            "longer wins [95 %]",
            "ties",
            "chosen",
            "rejected",
            "margin",
            "spread",
            "cal. error",
        ]
    ]
    interval = lambda *three: str(Interval(*three))
    for name, f in figures.items():
        rows.append(
            [
                name,
                f"{f['pairs']:,}",
                interval(f["accuracy"], f["accuracy_low"], f["accuracy_high"]),
                f"{f['ties']:,}",
                interval(f["longer_accuracy"], f["longer_low"], f["longer_high"]),
                f"{f['longer_ties']:,}",
                *(
                    f"{f[key]:.3f}"
                    for key in (
                        "chosen_score",
                        "rejected_score",
                        "margin",
                        "score_spread",
                        "calibration_error",
                    )
                ),
            ]
        )
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows with aligned columns, the first to the left."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = lambda row: "  ".join(
        [f"{row[0]:<{first}}", *(f"{x:>{w}}" for x, w in zip(row[1:], others, strict=True))]
    )
    return "\n".join(map(line, rows))


def _scored_pair(name: str, row: Row, scores: np.ndarray) -> dict[str, Any]:
    chosen, rejected = row.responses
    return {
        "prompt": row.prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_score": float(scores[0]),
        "rejected_score": float(scores[1]),
        "margin": float(scores[0] - scores[1]),
        "data": name,
        "source": row.source,
    }


def draw(scored: Scored, folder: Path, title: str) -> None:
    """Draw scores.png and calibration.png."""
    chosen, rejected = scored.scores.T
    try:
        draw_scores(chosen, rejected, folder / "scores.png", title)
        draw_calibration(chosen, rejected, folder / "calibration.png", title)
    except OSError as error:  # a full disk
        raise UserError(
            f"--plots={folder}: cannot be written ({error.strerror}); give another place"
        ) from None
    print(f"scores.png and calibration.png in {folder}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with new_file(path, "--json") as file:
        # JSON has no NaN
        cleaned = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
        file.write(json.dumps(cleaned, indent=2) + "\n")


# ---- answers, win rates, easy and hard ----


def keep_end(rows: Iterable[Row]) -> str:
    """Return which end of a long prompt is kept, as in training: the end of a dialogue, the start
    of other text.
    """
    return (
        "keep_end"
        if any(isinstance(r.prompt, list) or r.prompt.endswith("\n\nAssistant:") for r in rows)
        else "keep_start"
    )


def answers(options: argparse.Namespace) -> None:
    """Run the command `answers`."""
    lines = list(read_answers(options.file))
    rows = [row for line in lines for row in line.rows()]
    ref, config = scorer_of(options, options.scorer)
    scores = (
        loaded(options, ref, config)
        .score(rows, config.truncation_mode or keep_end(rows))
        .scores[:, 0]
    )
    ends = np.cumsum([len(line.answers) for line in lines])
    parts = np.split(scores, ends[:-1])
    write_jsonl(
        options.out,
        (line.with_scores(part.tolist()) for line, part in zip(lines, parts, strict=True)),
    )
    print(
        f"{len(rows):,} answers to {len({line.key for line in lines}):,} prompts, mean score"
        f" {scores.mean():.3f}, spread {scores.std():.3f}, in {options.out}"
    )


def winrate(options: argparse.Namespace) -> None:
    """Run the command `winrate`."""
    is_url = options.judge.startswith(("http://", "https://"))
    ignored = OF_SCORERS if is_url or options.judge.startswith("rule:") else ()
    for option in (*ignored, *(() if is_url else OF_ENDPOINTS)):
        if getattr(options, option, None) is not None:
            raise UserError(
                f"--{option.replace('_', '-')}: --judge={options.judge} does not use it; leave"
                " it out"
            )
    policies, baseline = read_policies(options.file, options.baseline)
    judge = judge_of(options)
    rates, lines = [], list[dict[str, Any]]()
    for name, theirs in policies.items():
        if name == baseline:
            continue
        some = duels(theirs, policies[baseline])
        if not some:
            raise UserError(
                f"{name}: no prompt in common with {baseline}; sample both with the same prompts"
            )
        judged = judge(some)
        rates.append(win_rate(name, some, judged, options.seed))
        alone = len(theirs.keys() ^ policies[baseline].keys())
        if alone:
            print(
                f"note: {alone} prompts are left out: only {name} or only {baseline} has answers"
                " to them"
            )
        for duel, points, details in zip(some, judged.points.tolist(), judged.details, strict=True):
            about = {"prompt": duel.line.prompt, "model": name, "baseline": baseline}
            two = {"answer": duel.answer, "baseline_answer": duel.baseline}
            lines.append(about | two | {"points": None if np.isnan(points) else points} | details)
    print(win_table(rates, baseline))
    if options.out:
        write_jsonl(options.out, lines)
    if options.json:
        figures = {w.policy: vars(w) | w.rate._asdict() for w in rates}
        _write_json(
            options.json, {"judge": options.judge, "baseline": baseline, "win_rates": figures}
        )


def win_table(rates: Sequence[WinRate], baseline: str) -> str:
    """Return the table for the terminal."""
    rows = [
        [
            f"against {baseline}",
            "prompts",
            "answers",
            "wins",
            "ties",
            "losses",
            "win rate [95 %]",
            "by order",
            "no verdict",
        ]
    ]
    for w in rates:
        counts = [f"{x:,}" for x in (w.n_prompts, w.n, w.wins, w.ties, w.losses)]
        rows.append(
            [
                w.policy,
                *counts,
                str(w.rate),
                "-" if w.swayed is None else f"{w.swayed:.3f}",
                f"{w.n_unsaid:,}",
            ]
        )
    return aligned(rows)


def judge_of(options: argparse.Namespace):
    """Return a function that judges duels. What it needs is read first, so that a typo costs no
    work.
    """
    spec = options.judge
    if spec.startswith("rule:"):
        points = judges.rule(spec)
        return lambda some: by_points(some, lambda lines: [points(a.answers[0]) for a in lines])
    if spec.startswith(("http://", "https://")):
        if not options.judge_model:
            raise UserError(f"--judge={spec}: which model? give --judge-model NAME")
        endpoint = Endpoint(
            url=spec,
            model=options.judge_model,
            template=judges.read_template(options.judge_template or "hh"),
            verdicts=Verdicts(options.verdicts or Path(".cache/verdicts.jsonl")),
            key=judges.key_from(options.key_env),
            parallel=options.parallel or 4,
            timeout=options.timeout or 60.0,
        )
        return lambda some: by_endpoint(some, endpoint)
    ref, config = scorer_of(options, spec)
    scorer = loaded(options, ref, config)

    def judged(some: Sequence[Duel]) -> Judged:
        def points_of(lines):
            rows = [row for a in lines for row in a.rows()]
            return (
                scorer.score(rows, config.truncation_mode or keep_end(rows)).scores[:, 0].tolist()
            )

        return by_points(some, points_of)

    return judged


def split(options: argparse.Namespace) -> None:
    """Run the command `split`."""
    if not options.threshold > 0:
        raise UserError(
            f"--threshold={options.threshold}: must be above 0; a margin is the better score minus"
            " the worse one"
        )
    ranked = list(read_ranked(options.file))
    if options.sort:
        ranked.sort(key=lambda r: -r.margin)
    n = {"easy": 0, "hard": 0, "ties": 0}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(new_file(getattr(options, name), f"--{name}"))
            for name in ("easy", "hard")
        }
        for row, margin in ranked:
            name = "ties" if margin == 0 else "easy" if margin >= options.threshold else "hard"
            n[name] += 1
            if name in files:
                files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
    print(
        f"{n['easy']:,} easy in {options.easy}, {n['hard']:,} hard in {options.hard}; left out:"
        f" {n['ties']:,} ties"
    )


def main(options: argparse.Namespace) -> None:
    """Run the subcommand."""
    read = (
        []
        if options.main in (pairs, answers)
        else [options.file]
        if options.main is split
        else options.file
    )
    # scores may be added in place; anything else would lose what was read
    claimed = [path.resolve() for path in read]
    for name in ("out", "json", "easy", "hard", "plots"):
        if (path := getattr(options, name, None)) is not None:
            check_place(path, f"--{name}", folder=name == "plots")
            if path.resolve() in claimed:
                raise UserError(
                    f"--{name}={path}: is also read, or written by another option; give another"
                    " place"
                )
            claimed.append(path.resolve())
    options.main(options)


def check_place(path: Path, option: str, folder: bool) -> None:
    """Raise UserError for an output that could not be written, before hours of work."""
    try:
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
        problem = "" if folder or not path.is_dir() else "it is a folder"
    except OSError as error:
        problem = str(error.strerror)
    if problem or not os.access(path if folder else path.parent, os.W_OK):
        raise UserError(
            f"{option}={path}: cannot be written ({problem or 'no permission'}); give another place"
        )


if __name__ == "__main__":
    cli.run(parser(), main)
