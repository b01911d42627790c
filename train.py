"""Train a policy: `python train.py exp_name=... model=... datasets=[...] loss=...`; every knob is
in config/.

validate -> tokenizer and data -> policy and reference -> trainer -> train -> save. An error that
the user can fix ends in one line and exit code 2.
"""

from __future__ import annotations

import copy
import os
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

# Hydra then raises what it would print, and `main` prints it in one line
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Threads that spin while waiting make a CPU run ten times slower as soon as something else needs a
# core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

import preference_datasets  # noqa: F401  registers its sets
from plumb.console import as_shown, one_line, rank, rank0_print, redacted, to_dict, under_torchrun
from plumb.distributed import signals
from plumb.distributed.progress import run_progress
from plumb.errors import UserError
from plumb.paths import CONFIG
from plumb.runs.policy_path import resolve_archive
from plumb.settings import schema
from plumb.settings.cli import temporary_jsonl
from plumb.settings.config_file import with_config_files
from plumb.settings.help import answer
from plumb.settings.hydra_guard import (
    are_knobs,
    check_command_line,
    in_one_line,
    no_environment,
    spelled_out,
)
from plumb.settings.plugins import import_plugins
from plumb.settings.validation import validate
from utils import environment, get_local_run_dir, peak_memory_gb

# What imports torch or transformers is imported by the functions that use it: --help and a refused
# knob answer within a second.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plumb.distributed import sharding
    from plumb.losses.registry import Loss
    from plumb.runs import checkpoints, directory, identity
    from plumb.training.metrics import TrainingLog
    from plumb.training.run_plan import RunPlan
    from plumb.training.setup import Data, Reference
    from trainers import BasicTrainer

OmegaConf.register_new_resolver(
    "get_local_run_dir", get_local_run_dir, use_cache=True, replace=True
)
OmegaConf.register_new_resolver("oc.env", no_environment, replace=True)


def run(config: DictConfig) -> None:
    """Validate, then train in this process or in several. The reason why a run ends early is
    printed in one line and recorded in its exit code and status.json.
    """
    run_dir = None
    signals.reset()
    run_progress.report(0, 0)
    try:
        loss = validate(config)
        if config.plan:
            from plumb.planning import answers, plan

            shown = plan.show if config.plan is True else answers.answer
            rank0_print(shown(config, loss, validate))
            return
        run_dir = prepare(config)
        if config.trainer == "BasicTrainer":
            train(config)
        else:
            from plumb.distributed import launch

            if launch.forks():
                import trainers  # noqa: F401  once, for all processes
            patience = timedelta(minutes=config.timeout_minutes)
            launch.launch(
                train,
                (config,),
                n_cpu_processes=config.n_cpu_processes,
                port=config.fsdp_port,
                timeout=patience,
            )
    except (
        UserError
    ) as error:  # here, not in `main`: Hydra would print a line of its own before passing it on
        sys.exit(end(run_dir, "failed", error.exit_code, f"error: {error}"))
    except signals.Stopped as stopped:
        sys.exit(end(run_dir, "stopped", stopped.code, str(stopped)))
    except InterpolationResolutionError as error:
        sys.exit(fail(in_one_line(error), 2))
    except (Exception, SystemExit):
        if run_dir is not None:
            from plumb.runs import directory

            directory.write_status(run_dir, "failed", 1, "internal error; see the traceback above")
        raise


def prepare(config: DictConfig) -> Path:
    """Choose the run directory and resolve the config. Return the directory."""
    from plumb.runs import directory

    config.local_run_dir = directory.find(config)
    OmegaConf.resolve(config)
    # so that the run's record shows which policy.pt a pattern or LATEST meant
    if config.model.archive:
        config.model.archive = str(resolve_archive(config.model.archive).resolve())
    return Path(config.local_run_dir)


# Hydra's own start: help, other config folders, and sweeps. It composes the config twice.
start_by_hydra = hydra.main(version_base="1.3", config_path="config", config_name="config")(run)


def compose(knobs: Sequence[str]) -> DictConfig:
    """Return the config with these knobs (knob=value), neither validated nor resolved."""
    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        return hydra.compose("config", list(knobs))


def train_on(rows: Iterable[Mapping[str, Any]], *overrides: str) -> Path:
    """Train in one process on rows that are dicts, as `python train.py datasets=[rows.jsonl]` does
    on a file of them. `overrides`: knob=value. Return the run directory. Raises UserError.
    """
    signals.reset()
    with temporary_jsonl(rows, "rows.jsonl") as file:
        words = ["exp_name=notebook", "wandb.enabled=false", f"datasets=['{file}']", *overrides]
        words = spelled_out(words)
        check_command_line(words, Path(__file__))
        try:
            config = compose(words)
            validate(config)
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UserError(in_one_line(error)) from None
        if config.trainer != "BasicTrainer":
            raise UserError(
                f"trainer={config.trainer}: train_on uses one process; use python train.py"
            )
        run_dir = prepare(config)
        train(config)
    return run_dir


def end(run_dir: Path | None, state: str, code: int, text: str) -> int:
    """Print how the run ended, and record it in status.json. Return its exit code."""
    text = one_line(text)
    if run_dir is not None:
        from plumb.runs import directory

        directory.write_status(run_dir, state, code, text.removeprefix("error: "))
    # every rank has the same error, and a rank that exits would take the others with it
    if under_torchrun() and rank() != 0:
        signals.end_quietly()
        time.sleep(5)
    print(as_shown(text, sys.stderr), file=sys.stderr)
    return code


def train(config: DictConfig) -> None:
    """Train one run, from data to the last checkpoint, in this process or in this rank's part of
    it.
    """
    from plumb.distributed import collectives
    from plumb.losses.registry import build_loss
    from plumb.models.export import export_run
    from plumb.runs import checkpoints, directory, identity
    from plumb.training.saving import best_by

    import_plugins(config.plugins)
    config.local_run_dir = collectives.broadcast_object(config.local_run_dir)
    run_dir = Path(config.local_run_dir)
    owner = directory.RunLock(run_dir)
    try:
        checkpoint = collectives.from_rank0(partial(checkpoints.latest_valid, run_dir))
        changed: list[str] = []
        if checkpoint is not None:
            before = {"settings": checkpoint.manifest.fingerprint["settings"]}
            now = {"settings": identity.settings(config, schema.may_change)}
            rules = rules_of_resuming()
            changed = identity.compare(run_dir, before, now, config.resume_allow, rules)
        if checkpoint is not None and checkpoint.manifest.finished and not changed:
            finish = partial(
                checkpoints.finish_save,
                run_dir,
                checkpoint.path.name,
                config.keep_checkpoints,
                best_by(config, build_loss(to_dict(config.loss))),
            )
            # a kill may have prevented this
            collectives.from_rank0(finish)
            collectives.from_rank0(partial(checkpoints.remove_leftovers, run_dir))
            rank0_print(
                f"{run_dir} is finished: {checkpoint.manifest.step:,} steps; nothing to do."
                " For a new run, set resume=never"
            )
            run_progress.report(checkpoint.manifest.step, checkpoint.manifest.examples)
        else:
            train_from(config, owner, checkpoint)
        if config.export and rank() == 0:
            export_run(run_dir)
        if rank() == 0:
            directory.write_status(run_dir, "finished", 0)
    finally:
        owner.release()


def fewer_bytes(config: DictConfig, loss: Loss) -> str:
    """Return what to do about weights that do not fit: what the config has not done yet."""
    splits = config.compile or config.trainer == "TensorParallelTrainer"
    second = loss.needs_reference and config.adapter == "none" and config.reference != "cached"
    ways = {
        "trainer=FSDPTrainer on more GPUs": True,
        "adapter=lora": second,
        "adapter=lora with model.quantize=nf4": config.model.quantize is None and not splits,
        "reference=cached": second and not loss.live_reference,
        "a smaller model": True,
    }
    left = ", ".join(way for way, open_ in ways.items() if open_)
    return f"the weights alone do not fit; plan=true says what would: {left}"


def smaller_steps(config: DictConfig, budget: int | None) -> str:
    """Return what to do about a step that does not fit: what the config has not done yet. `budget`:
    the tokens of a microbatch.
    """
    narrow = "bfloat16" in (config.model.policy_dtype, config.model.fsdp_policy_mp)
    ways = {
        f"tokens_per_microbatch below {budget or 'the automatic value'} (the result stays the"
        " same)": True,
        "activation_checkpointing=true": config.activation_checkpointing is not True,
        "model.fsdp_policy_mp=bfloat16": not narrow,
    }
    return f"set {', or '.join(way for way, open_ in ways.items() if open_)}"


def rules_of_resuming() -> identity.Rules:
    """Return which settings may change in a run that resumes."""
    from plumb.runs import identity

    return identity.Rules(schema.owner_of, schema.in_state)


def train_from(
    config: DictConfig, owner: directory.RunLock, checkpoint: checkpoints.Checkpoint | None
) -> None:
    """Train from a checkpoint of this run, or from the start."""
    from plumb.distributed import collectives
    from plumb.distributed.device import out_of_memory_in_one_line
    from plumb.losses.advantage_rules import GaeRule
    from plumb.losses.registry import build_loss
    from plumb.models.adapters import starting_state
    from plumb.models.load import note_coarse_weights
    from plumb.models.reference_cache import state_digest
    from plumb.reports.curves import draw_curves
    from plumb.reports.outcome import reward_line
    from plumb.runs import identity
    from plumb.runs.history import read_metrics
    from plumb.training.optimizers import PACKAGES
    from plumb.training.setup import Run
    from plumb.training.summary import next_commands
    from trainers import TRAINERS

    start = time.monotonic()
    loss = build_loss(to_dict(config.loss))
    run_dir = owner.run_dir

    # data and policy
    data = load_data(config, loss, run_dir)
    layout = TRAINERS[config.trainer].make_layout(config)
    with out_of_memory_in_one_line(lambda: fewer_bytes(config, loss)):
        policy = load_checked_policy(config, loss, data, layout)
    can_round = config.optimizer not in PACKAGES and not isinstance(loss.advantages, GaeRule)
    note_coarse_weights(policy, config.stochastic_rounding, can_round)
    digest = state_digest(starting_state(policy))

    # the fingerprint, which must match that of the checkpoint
    fingerprint = fingerprint_of(config, data, digest)
    changed: list[str] = []
    if checkpoint is not None:
        before, rules = checkpoint.manifest.fingerprint, rules_of_resuming()
        changed = identity.compare(run_dir, before, fingerprint, config.resume_allow, rules)
        config = with_decisions(config, checkpoint.manifest.decisions, sharded=layout is not None)
    config = with_balanced_weights(config, loss, data)
    loss = build_loss(to_dict(config.loss))

    # the decisions that depend on memory, and the reference
    plan = decide(config, loss, policy, data, layout)
    with out_of_memory_in_one_line(lambda: fewer_bytes(config, loss)):
        reference = load_reference_for(config, plan, policy, digest, layout)

    # train
    owner.claim()
    log = open_log(config, run_dir, checkpoint, changed)
    failed = True
    budget = config.tokens_per_microbatch

    try:
        with out_of_memory_in_one_line(lambda: smaller_steps(config, budget)):
            trainer = TRAINERS[config.trainer](
                config,
                policy,
                reference,
                Run(
                    loss=loss,
                    data=data,
                    plan=plan,
                    fingerprint=fingerprint,
                    run_dir=run_dir,
                    log=log,
                    layout=layout,
                ),
            )
            del policy, reference  # the trainer has them; a reference that runs only once is freed
            budget = trainer.packing.budget
            if checkpoint is not None:
                trainer.restore(checkpoint)
            else:
                collectives.from_rank0(partial(record_layout, trainer, digest))
            print_start(config, trainer)
            trainer.train()
            failed = False
    finally:
        log.close(failed)
    if rank() == 0:
        secs = time.monotonic() - start
        rank0_print(
            f"done in {secs:,.0f} s, peak memory {peak_memory_gb():.1f} GB; curves:"
            f" {draw_curves([run_dir])}"
        )
        if change := reward_line(read_metrics(run_dir)):
            rank0_print(change)
        print(next_commands(config, loss, run_dir))


def load_data(config: DictConfig, loss: Loss, run_dir: Path) -> Data:
    """Return tokenizer and examples, after the checks that need the model's config but not its
    weights.
    """
    from plumb.data.prepare import (
        balance_note,
        check_label_smoothing,
        check_label_threshold,
        check_list_pairs,
        check_margins,
        check_soft_labels,
        check_unweighted,
        load_examples,
    )
    from plumb.distributed import collectives
    from plumb.models.export import rehearse
    from plumb.models.layout_probe import check_rope
    from plumb.models.load import check_length, check_weights, load_config, load_tokenizer
    from plumb.runs import lineage
    from plumb.training.rollouts import samples_responses
    from plumb.training.setup import Data

    check_rope(load_config(config), config.max_length)
    check_length(config)
    tokenizer = load_tokenizer(config)
    check_weights(config, scalar=loss.reads == "scores")
    if config.export:
        collectives.from_rank0(partial(rehearse, config, run_dir))
    samples = samples_responses(config, loss)  # then prompts are all that the data have to hold
    group = "rollout" if samples else loss.group
    train_examples, eval_examples = load_examples(config, tokenizer, group, prefixes=loss.prefixes)
    if note := lineage.lineage(config, schema.deciding_slices()):
        rank0_print(note)
    # an SFT target is no preference, and neither is a prompt
    if config.soft_labels == "use" and not loss.soft_labels and group not in ("single", "rollout"):
        check_soft_labels(loss.name, train_examples, eval_examples)
    check_label_smoothing(loss.values_of("label_smoothing"), train_examples)
    check_list_pairs(config.list_pairs, train_examples, eval_examples)
    check_label_threshold(config.label_threshold, train_examples, eval_examples)
    for weights in loss.label_weights:
        if weights.balanced is None and (note := balance_note(train_examples, weights)):
            rank0_print(note)
    if samples:
        check_unweighted(train_examples, eval_examples)
    if loss.needs_margins and not samples:
        check_margins(loss.name, train_examples, eval_examples)
    ptx = None
    if config.rollout.ptx_datasets is not None:
        own = {"datasets": config.rollout.ptx_datasets, "eval_datasets": None}
        whole = {"data_split": None, "stage": None}
        of_ptx = cast(DictConfig, OmegaConf.merge(config, own, whole))
        ptx, _ = load_examples(of_ptx, tokenizer, "single")
    return Data(tokenizer, train_examples, eval_examples, ptx)


def load_checked_policy(
    config: DictConfig, loss: Loss, data: Data, layout: sharding.Layout | None
) -> PreTrainedModel:
    """Return the policy where it will be trained. Raise UserError if the data have ids that it does
    not know.
    """
    import torch

    from plumb.models.adapters import knobs_of
    from plumb.models.limits import check_vocabulary
    from plumb.models.load import load_policy

    several_gpus = (
        config.trainer == "BasicTrainer" and config.device is None and torch.cuda.device_count() > 1
    )
    device_map = "balanced" if several_gpus else None
    policy = load_policy(
        config, device_map, layout, scalar=loss.reads == "scores", adapter=knobs_of(config)
    )
    check_vocabulary(
        policy,
        data.tokenizer,
        max(data.train.highest_id(), data.evaluation.highest_id()),
        config.model.name_or_path,
        chain(data.train, data.evaluation),
    )
    return policy


def fingerprint_of(config: DictConfig, data: Data, digest: str) -> dict[str, Any]:
    """Return the fingerprint of the run; `digest`: of the policy's weights."""
    from plumb.data.token_store import tokenizer_fingerprint
    from plumb.runs import identity

    return identity.fingerprint(
        config,
        schema.may_change,
        tokenizer_fingerprint(data.tokenizer),
        data.train,
        data.evaluation,
        digest,
        [] if data.ptx is None else [data.ptx],
    )


def with_decisions(config: DictConfig, decisions: dict[str, Any], sharded: bool) -> DictConfig:
    """Return the config with the decisions that the run made from the memory at its first start,
    where the config leaves a choice.
    """
    config = copy.deepcopy(config)
    for knob, value in decisions.items():
        is_open = config.get(knob, "") in (None, "auto")
        if is_open and value is not None and (knob != "fsdp_reduce" or sharded):
            config[knob] = value
    return config


def with_balanced_weights(config: DictConfig, loss: Loss, data: Data) -> DictConfig:
    """Return the config with the numbers that balanced label weights stand for, and print them. The
    run's record then has these numbers, so that its evaluations need no training data.
    """
    from plumb.data.prepare import balanced_weight, label_counts

    config = copy.deepcopy(config)
    for weights in loss.label_weights:
        if (name := weights.balanced) is not None:
            value = balanced_weight(data.train, weights)
            undesirable, desirable = label_counts(data.train)
            rank0_print(
                f"{name}=balanced: {value:.6g}, for {desirable:,.6g} desirable and"
                f" {undesirable:,.6g} undesirable responses"
            )
            OmegaConf.update(config, name, value)
    return config


def decide(
    config: DictConfig,
    loss: Loss,
    policy: PreTrainedModel,
    data: Data,
    layout: sharding.Layout | None,
) -> RunPlan:
    """Return the decisions that depend on memory."""
    from plumb.data.examples import lengths_of
    from plumb.distributed.device import pick_device
    from plumb.training.optimizers import make_schedule
    from plumb.training.rollout_memory import PolicySize, beside_policy
    from plumb.training.rollouts import samples_responses, trees_of
    from plumb.training.run_plan import numbers_at_hand, plan_run

    n = len(data.train)
    samples = samples_responses(config, loss)
    lengths = lengths_of(data.train)
    trees = trees_of(config, lengths.prompts[:, 0])[0] if samples else lengths
    numbers = numbers_at_hand(
        policy,
        layout.device if layout is not None else pick_device(config),
        layout,
        mean_tokens=float(lengths.tokens().mean()),
        longest=int(trees.tokens().max()),
        repeats=make_schedule(config, n).n_examples > n,
    )
    live_only = loss.needs_reference and (loss.live_reference or samples)
    taken = 0.0
    if samples:
        beside = beside_policy(config, loss, PolicySize.of(policy), numbers.memory)
        taken = beside.taken(numbers.trained)
    return plan_run(config, policy.config, loss.needs_reference, numbers, live_only, taken)


def load_reference_for(
    config: DictConfig,
    plan: RunPlan,
    policy: PreTrainedModel,
    digest: str,
    layout: sharding.Layout | None,
) -> Reference:
    """Return the reference of this plan. A cached one in the policy's precision needs no model: it
    is the policy before its first step; nor does that of a policy with adapters, which holds the
    weights that it started from. `digest`: of those weights.
    """
    from plumb.models.adapters import StartingPolicy, roles_of
    from plumb.models.forward_path import DTYPES
    from plumb.models.load import load_reference
    from plumb.training.setup import Reference

    if plan.reference is None:
        return Reference()
    name = config.model.reference_dtype
    dtype = name and DTYPES[name]
    cached = plan.reference == "cached"
    model: Any = None
    if roles_of(policy) is not None:
        model = StartingPolicy(policy)
    elif not cached or dtype not in (None, policy.dtype):
        model = load_reference(policy, dtype, config, layout)
    return Reference(model, digest if cached else None)


def record_layout(trainer: BasicTrainer, digest: str) -> None:
    """Add to env.json how the models compute, which the console does not show; `digest`: of the
    policy's weights.
    """
    from plumb.runs import directory

    run = trainer.run
    directory.add_to_environment(
        run.run_dir,
        {
            "weights": digest,
            "layout": trainer.layout_found,
            "tokens_per_microbatch": trainer.packing.budget,
            "head_chunk_mb": run.plan.head_chunk_mb,
            "reference": run.plan.reference and f"{run.plan.reference} ({run.plan.why})",
        },
    )


def print_start(config: DictConfig, trainer: BasicTrainer) -> None:
    """Print what the run trains, and notes on what it will probably not do as meant."""
    from plumb.training.summary import notes, start_summary

    n = trainer.state.schedule.n_examples
    n_steps = trainer.state.n_steps
    rank0_print(start_summary(config, trainer.run, trainer.policy, trainer.state.schedule, n_steps))
    if config.n_examples and config.n_examples > n:
        rank0_print(
            f"n_examples={config.n_examples}: n_epochs={config.n_epochs} ends after {n}; set"
            " n_epochs=null to continue"
        )
    for note in notes(config, trainer.run, n_steps):
        rank0_print(f"note: {note}")


def open_log(
    config: DictConfig,
    run_dir: Path,
    checkpoint: checkpoints.Checkpoint | None,
    changed: Sequence[str],
) -> TrainingLog:
    """Open the run's records, and remove what was logged after the checkpoint."""
    from plumb.distributed import collectives
    from plumb.runs import checkpoints, directory
    from plumb.training.metrics import TrainingLog, make_sinks

    def prepare() -> None:
        try:
            checkpoints.quarantine_newer(run_dir, checkpoint)
            directory.cut_logs(run_dir, checkpoint.manifest.logs if checkpoint else {})
            directory.record(
                config, run_dir, checkpoint and checkpoint.manifest.step, changed, environment()
            )
            directory.write_status(run_dir, "running")
        except OSError as error:
            raise UserError(
                f"local_run_dir={run_dir}: cannot be written ({error.strerror}); set local_dirs"
            ) from None

    if checkpoint is not None:
        rank0_print(
            f"resuming from {checkpoint.path}, step {checkpoint.manifest.step:,}"
            + "".join(f"; {line}" for line in changed)
        )
    elif config.resume != "never":
        rank0_print(
            f"resume={config.resume}: no checkpoint in {run_dir}; starting from the beginning"
        )
    collectives.from_rank0(prepare)
    sinks = make_sinks(redacted(to_dict(config)), run_dir, checkpoint and checkpoint.manifest.wandb)
    return TrainingLog(sinks, config.minimum_log_interval_secs)


def main() -> None:
    """Run the command. Errors that a user can cause end in one line."""
    signals.listen()
    together = "-".join(
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    )
    # identifies the start that wrote status.json
    os.environ["PLUMB_LAUNCH"] = together if under_torchrun() else uuid.uuid4().hex
    try:
        if (shown := answer(sys.argv[1:])) is not None:
            print(shown)
            return
        sys.argv[1:] = words = spelled_out(with_config_files(sys.argv[1:]))
        check_command_line(words, Path(__file__))
        if are_knobs(words):
            run(compose(words))
        else:
            start_by_hydra()
    except UserError as error:
        sys.exit(fail(error, error.exit_code))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        sys.exit(fail(in_one_line(error), 2))
    except signals.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)


def fail(error: object, code: int) -> int:
    """Print the error in one line. Return the exit code."""
    print(as_shown(f"error: {one_line(error)}", sys.stderr), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
