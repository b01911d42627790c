"""Evaluate any checkpoint without training, on all held-out data, as its training run would.

MODEL is a run, a checkpoint or its policy.pt, a folder, or a name on the hub. Data, loss and
lengths are those of its run; options change them. A model that does not come from a run needs them:
`python eval.py gpt2 loss=sft datasets=[hh]`.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import train  # noqa: F401  registers the resolvers of config.yaml
from plumb.console import rank0_print, to_dict
from plumb.errors import UserError
from plumb.paths import ROOT, new_file
from plumb.settings.cli import Parser, run, temporary_jsonl
from plumb.settings.hydra_guard import check_command_line, in_one_line, spelled_out
from plumb.settings.schema import knob_of, values_in_eval
from plumb.settings.validation import validate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plumb.data.examples import Examples
    from plumb.losses.registry import Loss
    from plumb.models.find import ModelRef
    from plumb.training.evaluator import Evaluator
    from plumb.training.metrics import Record


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = Parser(__doc__ or "", prog="eval.py")
    p.add_argument("model", help="run, checkpoint, policy.pt, folder or hub name")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="knob=value",
        help="options as for train.py, e.g. datasets=[hh] n_eval_examples=500",
    )
    p.add_argument(
        "--reference", help="reference for a DPO loss (default: that of the policy's run)"
    )
    p.add_argument(
        "--base",
        help="base model of a policy.pt that has no config.yaml, or of a run whose base has moved",
    )
    p.add_argument("--out", type=Path, help="write the metrics to this JSON file")
    p.add_argument(
        "--checkpoints",
        action="store_true",
        help="evaluate all evaluated checkpoints of the run MODEL, in one table; with --out, also"
        " as curves, in a .png of the same name",
    )
    return p


def main(args: argparse.Namespace) -> None:
    """Print the table of metrics, and write them to a file if --out is given."""
    from plumb.models.find import find_model

    if args.checkpoints:
        evaluate_checkpoints(args)
        return
    ref = find_model(args.model, args.base)
    config = config_of(ref, args.overrides)
    with (
        tempfile.TemporaryDirectory() as folder,
        new_file(args.out, "--out") if args.out else nullcontext() as file,
    ):
        config.local_run_dir = f"{folder}/eval"
        loss = validate(config, trains=False)
        if args.reference and not loss.needs_reference:
            raise UserError(
                f"--reference {args.reference}: this loss ({loss.name}) needs no reference; leave"
                " it out"
            )
        tokenizer, examples = held_out(ref, config, loss)
        plots = args.out.parent if args.out else Path(folder)
        record, counts = evaluate(ref, config, loss, args.reference, plots, tokenizer, examples)
        print(
            f"\n{args.model}: held-out data of"
            f" {', '.join(config.eval_datasets or config.datasets)}, loss {loss.name}\n"
        )
        print(table(record, counts))
        if file:
            content = {
                "model": args.model,
                "policy": str(ref.archive or ""),
                "loss": to_dict(config.loss),
                "examples": counts,
                "datasets": list(config.eval_datasets or config.datasets),
                "metrics": record,
            }
            json.dump(content, file, indent=1)
    if args.out:
        print(f"\nwritten to {args.out}")


def evaluate_checkpoints(args: argparse.Namespace) -> None:
    """Print a table with a column for each evaluated checkpoint of a run, from the first to the
    last; write the numbers and their curves if --out is given. The data are read once.
    """
    from plumb.models.find import find_model
    from plumb.runs.checkpoints import listed

    paths = [path for path in reversed(listed(Path(args.model))) if path.name.startswith("step-")]
    if not paths:
        raise UserError(
            f"{args.model}: not a run with checkpoints; give its directory, or leave out"
            " --checkpoints"
        )
    records: dict[int, Record] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        new_file(args.out, "--out") if args.out else nullcontext() as file,
    ):
        data = None
        for path in paths:
            ref = find_model(str(path), args.base)
            config = config_of(ref, args.overrides)
            config.local_run_dir = f"{folder}/eval"
            loss = validate(config, trains=False)
            data = data or held_out(ref, config, loss)
            records[examples_seen(ref)], counts = evaluate(
                ref, config, loss, args.reference, Path(folder), *data
            )
        names = ", ".join(config.eval_datasets or config.datasets)
        print(f"\n{args.model}: {counts['all']:,} held-out examples of {names}, loss {loss.name}\n")
        print(table_by_checkpoint(records))
        if file:
            by_name = {f"step-{n}": record for n, record in records.items()}
            json.dump({"model": args.model, "examples": counts, "metrics": by_name}, file, indent=1)
    if args.out:
        print(
            f"\nwritten to {args.out} and {draw_by_checkpoint(Path(args.model), args.out, records)}"
        )


def table_by_checkpoint(records: Mapping[int, Record]) -> str:
    """Format the metrics over all examples by row and the checkpoints by column, named after the
    training examples they have seen.

    >>> print(table_by_checkpoint({4: {"loss/eval": 0.7}, 8: {"loss/eval": 0.5, "loss/eval/x": 1}}))
                4    8
    loss/eval  0.7  0.5
    """
    metrics = dict.fromkeys(name for record in records.values() for name in record)
    rows = [["", *(f"{n:,}" for n in records)]]
    for name in metrics:
        if name.count("/") == 1:  # not that of one data set or length
            rows.append([name, *(f"{r[name]:.4g}" if name in r else "" for r in records.values())])
    return aligned(rows)


def draw_by_checkpoint(run_dir: Path, out: Path, records: Mapping[int, Record]) -> Path:
    """Draw the metrics over the training examples as a PNG beside `out`. Return its path."""
    from plumb.reports.curves import draw_all, named
    from plumb.runs.history import read_run

    evaluations = [{**record, "step": n} for n, record in records.items()]
    run = replace(read_run(run_dir), steps=[], evaluations=evaluations, samples=[])
    path = out.with_suffix(".png")
    with new_file(path, "--out", "wb") as file:
        file.write(draw_all([named(run)], further=False))
    return path


def evaluate_on(
    model: str | Path,
    rows: Iterable[Mapping[str, Any]],
    *overrides: str,
    reference: str | None = None,
) -> Record:
    """Evaluate a model on all of these rows (dicts), as the command does on a file of them.
    `overrides`: knob=value. Raises UserError.
    """
    from plumb.models.find import find_model

    ref = find_model(str(model))
    with (
        temporary_jsonl(rows, "test.jsonl") as file,
        tempfile.TemporaryDirectory() as folder,
    ):
        own = (f"datasets=['{file}']", f"eval_datasets=['{file}']", "n_eval_examples=null")
        config = config_of(ref, [*own, *overrides])
        config.local_run_dir = f"{folder}/eval"
        loss = validate(config, trains=False)
        data = held_out(ref, config, loss)
        return evaluate(ref, config, loss, reference, Path(folder), *data)[0]


def config_of(ref: ModelRef, overrides: Sequence[str]) -> DictConfig:
    """Compose the config: config/, overridden by the run's own options, overridden by the command
    line. Raise UserError if it does not compose.
    """
    overrides = spelled_out(overrides)
    try:
        check_command_line(overrides, ROOT / "eval.py")
        parsed = OverridesParser.create().parse_overrides(overrides)
        for override in parsed:
            check_override(override, ref)
        check_plugins(ref, parsed)
        groups = [o.input_line or "" for o in parsed if o.key_or_group in ("loss", "model", "exp")]
        other_loss = any(line.startswith("loss=") for line in groups)
        name = OmegaConf.select(ref.config, "loss.name")
        own = [f"loss={name}"] if name and not other_loss else []
        with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
            config = compose("config", ["exp_name=eval", *groups, *own])
        OmegaConf.set_struct(config, False)
        if ref.run_dir is not None:
            settings = {
                k: v
                for k, v in ref.config.items()
                if k in config and k not in ("model", "loss", "local_run_dir", "plugins")
            }
            config = cast(
                DictConfig,
                OmegaConf.merge(config, settings, {"loss": ref.config.loss} if own else {}),
            )
        config.model = ref.config.model
        for knob, value in values_in_eval().items():
            OmegaConf.update(config, knob, value)
        if any(override.key_or_group == "datasets" for override in parsed):
            config.eval_datasets = None  # it belonged to the run's data sets
        for override in parsed:
            if override.input_line not in groups:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
        config.local_run_dir = "eval"
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(in_one_line(error)) from None
    return config


def check_plugins(ref: ModelRef, overrides: Sequence[Override]) -> None:
    """Raise UserError where the run had plugins that the command line does not name: they are code,
    and a run's directory, which may come from anywhere, must not start any.
    """
    plugins = OmegaConf.select(ref.config, "plugins")
    if plugins and not any(override.key_or_group == "plugins" for override in overrides):
        files = ", ".join(map(str, plugins))
        raise UserError(
            f"{ref.run_dir}: the run imported plugins=[{files}]; a run's config.yaml starts no"
            " code, so if you trust these files, add that to this command (or plugins=[])"
        )


def check_override(override: Override, ref: ModelRef) -> None:
    """Raise UserError for an override that has no effect on an evaluation."""
    key, text = override.key_or_group, override.input_line
    if override.is_sweep_override():
        raise UserError(
            f"{text}: an evaluation has one value for each knob; quote a value with commas"
        )
    if key == "model" or key in ("model.name_or_path", "model.archive", "model.architecture"):
        raise UserError(
            f"{text}: the model is {ref.name}; leave it out, or give another MODEL (or --base)"
        )
    if key == "exp" and ref.run_dir is not None:
        raise UserError(
            f"{text}: the settings come from the run {ref.run_dir}; give knobs to change them"
        )
    knob = knob_of(key)
    if knob is not None and "eval" not in knob.commands:
        raise UserError(f"{text}: not applicable to evaluation; leave it out")


def held_out(
    ref: ModelRef, config: DictConfig, loss: Loss
) -> tuple[PreTrainedTokenizerBase, Examples]:
    """Return the tokenizer and the examples to evaluate on. The training split is not read. Raises
    UserError for a model or data that this loss cannot use.
    """
    from plumb.data.prepare import check_margins, check_soft_labels, load_held_out
    from plumb.models.load import check_length, load_tokenizer

    if ref.scalar != (loss.reads == "scores"):
        kind, wanted = (
            ("a reward model", "a policy") if ref.scalar else ("a policy", "a reward model")
        )
        raise UserError(
            f"{ref.name}: {kind}, but loss={loss.name} is for {wanted}; set another loss="
        )
    if loss.group == "rollout":
        raise UserError(
            f"loss.name={loss.name}: is about the policy's own samples, and eval.py draws none;"
            " give another loss=, such as loss=sft, or score samples with sample.py and score.py"
        )
    check_length(config)
    tokenizer = load_tokenizer(config)
    # the archive is evaluated; no run starts from it
    data = cast(DictConfig, OmegaConf.merge(config, {"model": {"archive": None}}))
    examples = load_held_out(data, tokenizer, loss.group, prefixes=loss.prefixes)
    # an SFT target is no preference
    if config.soft_labels == "use" and not loss.soft_labels and loss.group != "single":
        check_soft_labels(loss.name, examples)
    if loss.needs_margins:
        check_margins(loss.name, examples)
    return tokenizer, examples


def evaluate(
    ref: ModelRef,
    config: DictConfig,
    loss: Loss,
    reference: str | None,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
) -> tuple[Record, dict[str, int]]:
    """Return the record that training would log and the number of examples, overall and by group.
    Plots of a reward model's scores go to `folder`.
    """
    from plumb.models.find import find_model, move_reference, start_of
    from plumb.models.limits import check_vocabulary
    from plumb.models.load import load_policy
    from plumb.reports.score_plots import draw_evaluation

    policy, other = load_policy(config, scalar=ref.scalar), cast("PreTrainedModel | None", None)
    check_vocabulary(policy, tokenizer, examples.highest_id(), ref.name, examples)
    if loss.needs_reference:
        spec = find_model(reference).config if reference else start_of(ref)
        # an archive is named by load_policy
        base = "" if spec.model.archive else f", {spec.model.name_or_path}"
        rank0_print(f"reference: {reference or f'the model that the run started from{base}'}")
        other = load_policy(spec).eval().requires_grad_(False)
        if reference is None:
            move_reference(ref, other)
    evaluator = make_evaluator(config, policy, other, loss, tokenizer, examples)
    rank0_print(f"evaluating {len(evaluator)} examples")
    evaluation = evaluator.evaluate()
    if loss.reads == "scores":
        draw_evaluation(*evaluation.scores(), folder, examples_seen(ref))
    return evaluator.record(evaluation), evaluator.counts()


def make_evaluator(
    config: DictConfig,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    loss: Loss,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
) -> Evaluator:
    """Return the evaluator of the policy on these examples; models compute as in training."""
    from plumb.batching.feed import Feed
    from plumb.batching.microbatches import Packing
    from plumb.data.examples import lengths_of
    from plumb.distributed.device import pick_device
    from plumb.models.forward_path import DTYPES, ForwardPath
    from plumb.models.scalar_head import scores
    from plumb.training import budget, setup
    from plumb.training.evaluator import Evaluator
    from plumb.training.objective import Scorer

    spec = config.model
    device = pick_device(config)
    policy = setup.place_on(policy, device)
    reference = None if reference is None else setup.place_on(reference, device)
    computation = setup.Computation(
        device=device,
        dtype=DTYPES[spec.fsdp_policy_mp or spec.policy_dtype],
        weights_dtype=DTYPES[spec.policy_dtype],
        autocast=setup.autocast_to(spec.fsdp_policy_mp, device),
    )
    routers = setup.watch_routers(policy, config.router_aux_loss)
    setup.stop_draws(policy, device)

    lengths = lengths_of(examples).tokens()

    def row_tokens(path: ForwardPath) -> int:
        return budget.token_budget(
            config,
            policy.config,
            device,
            computation.dtype,
            free=budget.memory_at_hand(device),
            plain_head=path.plain_head or scores(policy),
            mean=float(lengths.mean()),
            longest=int(lengths.max()),
            ranks=1,
        )

    path, _ = setup.find_forward_path(policy, tokenizer, computation, config.max_length, row_tokens)
    packing = Packing(
        packed=path.packed,
        budget=row_tokens(path),
        world_size=1,
        pad_token_id=tokenizer.pad_token_id,
        longest=config.max_length,
    )
    rank0_print(f"microbatches of up to {packing.budget:,} tokens")
    scorer = Scorer(
        policy=policy,
        reference=reference,
        loss=loss,
        forward_path=path,
        precision=computation.autocast,
        device=device,
        routers=routers,
    )
    return Evaluator(
        scorer, Feed(examples, packing, 0, context=loss.context_examples), config.eval_batch_size
    )


def examples_seen(ref: ModelRef) -> int:
    """Return how many training examples a checkpoint has seen, by its name; 0 for other models."""
    step = ref.archive and re.fullmatch(
        r"(?:step|interim)-(\d+)", ref.archive.resolve().parent.name
    )
    return int(step[1]) if step else 0


def table(record: Record, counts: dict[str, int]) -> str:
    """Format the metrics by row and the groups (data sets, lengths) by column, with the number of
    examples in each group on top.
    """
    cells: dict[str, dict[str, float]] = {"examples": dict(counts)}
    for name, value in record.items():
        metric, group = re.fullmatch(r"([^/]+/[^/]+)(?:/(.*))?", name).groups()  # type: ignore[union-attr]
        cells.setdefault(metric, {})[group or "all"] = value
    columns = list(dict.fromkeys(group for row in cells.values() for group in row))
    shown = lambda value: f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    rows = [
        ["", *columns],
        *([m, *(shown(row[c]) if c in row else "" for c in columns)] for m, row in cells.items()),
    ]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as lines, with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


if __name__ == "__main__":
    run(parser(), main)
