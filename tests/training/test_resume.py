"""A run that was stopped, anywhere, ends as if it had not been: weights, optimizer, metrics, order;
or it is refused.
"""

import hashlib
import json
import os
import shutil
import signal
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from groups import Halt, run_in_group, train_until
from runs import DPO, FAST, STEADY, outcome, records, same

from plumb.data.order import Schedule
from plumb.distributed import signals
from plumb.errors import ResumeMismatch, UnsafeFile, UserError
from plumb.runs import checkpoints, directory, durable_files, identity
from plumb.settings import schema
from plumb.training.between_steps import BetweenSteps
from plumb.training.objective import Scorer
from plumb.training.optimizers import make_scheduler

OPTIONS = {
    "dpo": [*DPO, "n_epochs=2", "save_every=4", "eval_every=12"],
    "cached": [
        *DPO,
        "n_epochs=2",
        "reference=cached",
        "batch_size=5",
        "gradient_accumulation_steps=2",
        "eval_every=10",
    ],
    "mix": ["loss=mix", *DPO[2:], "save_every=4", "eval_every=12"],
    "sft": [
        "loss=sft",
        "lr=1e-3",
        "warmup_steps=2",
        "batch_size=4",
        "n_epochs=2",
        "save_every=8",
        "optimizer=AdamW",
        "lr_schedule=cosine",
        "async_save=true",
        "eval_every=16",
        "sample_during_eval=true",
        "n_eval_model_samples=2",
        "sample_max_new_tokens=4",
    ],
    "reward": [
        "loss=reward",
        "loss.centering=0.01",
        "lr=1e-3",
        "head_lr=1e-2",
        "warmup_steps=2",
        "batch_size=5",
        "eval_every=10",
        "save_every=5",
        "model.policy_dtype=bfloat16",
    ],
    # blocks of two batches, each used twice; the scale of the rewards is part of the state
    "rollouts": [
        "loss=rloo",
        "reward.terms={brief: {rule: shorter}}",
        "reward.scale=running",
        "rollout.n=2",
        "rollout.max_new_tokens=4",
        "rollout.batches=2",
        "rollout.uses=2",
        "lr=1e-3",
        "warmup_steps=2",
        "batch_size=4",
        "n_examples=12",
        "save_every=4",
        "eval_every=16",
    ],
    # the critic alone on the first rollout; on the second the KL has another weight
    "ppo": [
        "loss=ppo_openai2019",
        "loss.critic_warmup=1",
        "loss.critic_lr=1e-3",
        "loss.kl_horizon=16",
        "reward.terms={brief: {rule: shorter}}",
        "rollout.n=2",
        "rollout.max_new_tokens=4",
        "rollout.uses=2",
        "optimizer=AdamW",
        "lr=1e-3",
        "warmup_steps=2",
        "batch_size=4",
        "n_examples=8",
        "save_every=4",
        "eval_every=16",
    ],
}


def run_until(n, halted_at, train, name, *options):
    """Train, gone after update n; then go on, in a start of its own, to the end."""
    with halted_at(n), pytest.raises(Halt):
        train(name, *options, "resume=auto")
    return train(name, *options, "resume=auto")


@pytest.mark.parametrize("kind", OPTIONS)
def test_halted_after_every_step_it_ends_the_same(kind, train, halted_at, capsys):
    """Mid-epoch, at an epoch's end, before an evaluation, after the last step: one run that is
    halted after each of its steps in turn, so that one wrong resume of all these would show.
    """
    whole = outcome(train("whole", *OPTIONS[kind]))
    steps = whole[3][0]
    for n in range(1, steps + 1):
        with halted_at(n), pytest.raises(Halt):
            train("halted", *OPTIONS[kind], "resume=auto")
    assert same(outcome(train("halted", *OPTIONS[kind], "resume=auto")), whole)
    assert capsys.readouterr().out.count("resuming from") > steps // 2


def test_the_draws_of_a_step_are_a_function_of_seed_and_step(train, halted_at, monkeypatch):
    """What a model draws while it trains (dropout, a router's noise) is another number in each step
    and for each seed, and the same one in a run that was halted. Gone after update 1, before any
    save, it begins anew; gone after update 2, it goes on from the checkpoint of step 1: so the
    steps are 1, then 1 and 2, then 2 and 3.
    """
    drawn = []
    options = [*DPO, "n_examples=12", "do_first_eval=false", "do_last_eval=false", "save_every=4"]
    scored = Scorer.__call__
    monkeypatch.setattr(
        Scorer, "__call__", lambda self, *b: drawn.append(torch.rand(()).item()) or scored(self, *b)
    )

    def draws(name, *more, halts=()):
        drawn.clear()
        for n in halts:
            with halted_at(n), pytest.raises(Halt):
                train(name, *options, *more, "resume=auto")
        train(name, *options, *more, "resume=auto")
        return list(drawn)

    torch.manual_seed(1)
    whole = draws("whole")
    assert len(whole) == len(set(whole)) == 3
    torch.manual_seed(2)
    first, second, third = whole
    assert draws("halted", halts=(1, 2)) == [first, first, second, second, third]
    assert not set(draws("other", "seed=1")) & set(whole)


def test_the_digest_of_the_order_by_definition(train):
    """sha256 of the digest so far and the indices of the step as 8-byte numbers, from an empty one
    on: it stands for the indices of all steps in their order, so that a resumed run can be compared
    with one that was not.
    """
    run = train("order", *DPO, "n_epochs=2", "n_examples=22")
    order = b""
    for indices in Schedule(18, batch_size=4, n_epochs=2, n_examples=22, shuffle=True, seed=0):
        order = hashlib.sha256(
            order + b"".join(int(i).to_bytes(8, "little") for i in indices)
        ).digest()
    assert json.loads((run / "LATEST/manifest.json").read_text())["order"] == order.hex()


def test_a_resume_that_is_halted_is_resumed(train, halted_at):
    whole = outcome(train("whole", *OPTIONS["dpo"]))
    for n in range(2, 9, 2):
        with halted_at(n), pytest.raises(Halt):
            train("often", *OPTIONS["dpo"], "resume=auto")
    assert same(outcome(train("often", *OPTIONS["dpo"], "resume=auto")), whole)


@pytest.mark.parametrize("forgotten", ["n_seen", "optimizer", "n_updates"])
def test_the_comparison_can_fail(forgotten, train, halted_at, monkeypatch):
    """Negative controls: without the position, the optimizer's state or the step, the end is
    another one.
    """
    import trainers

    restore = trainers.BasicTrainer.restore

    def forgetting(self, checkpoint):
        restore(self, checkpoint)
        for path in checkpoints.listed(self.run.run_dir):  # or their names would be in the way
            shutil.rmtree(path)
        if forgotten == "optimizer":
            self.optimizer.state.clear()
        else:
            state = self.state
            setattr(state.position, forgotten, 0)
            state.first_update = 0
            state.scheduler = make_scheduler(
                self.config, self.optimizer, state.n_steps, self.n_updates
            )

    whole = outcome(train("whole", *OPTIONS["dpo"]))
    monkeypatch.setattr(trainers.BasicTrainer, "restore", forgetting)
    # which would see it, too
    monkeypatch.setattr(trainers.first_step, "FirstStep", lambda *_: None)
    with pytest.raises(AssertionError):
        same(outcome(run_until(3, halted_at, train, "halted", *OPTIONS["dpo"])), whole)


@pytest.fixture
def stopped_at(monkeypatch):
    """`stopped_at(place, n)`: within, a SIGTERM comes as `place` is called for the n-th time, which
    is "evaluate", or after "step" n.
    """
    import trainers

    owners = {"step": trainers.BasicTrainer, "evaluate": BetweenSteps}

    @contextmanager
    def install(place, n):
        real, calls = getattr(owners[place], place), []

        def signalled(self, *arguments, **options):
            calls.append(place)
            if place == "step":
                real(self, *arguments, **options)
            if len(calls) == n:
                signals.state.requested = signal.SIGTERM
            return None if place == "step" else real(self, *arguments, **options)

        signals.reset()
        with monkeypatch.context() as patch:
            patch.setattr(owners[place], place, signalled)
            yield
        signals.reset()

    return install


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_stopped_by_a_signal_at_any_step_it_ends_the_same(kind, train, stopped_at):
    """Also at a step that an evaluation follows."""
    whole = outcome(train("whole", *OPTIONS[kind]))
    for n in range(1, whole[3][0] + 1):
        with (
            stopped_at("step", n),
            pytest.raises(signals.Stopped, match=f"SIGTERM after step {n} of") as stopped,
        ):
            train(f"stopped{n}", *OPTIONS[kind], "resume=auto")
        assert stopped.value.code == 143
        assert same(outcome(train(f"stopped{n}", *OPTIONS[kind], "resume=auto")), whole)


def test_stopped_in_an_evaluation_again_and_again(train, stopped_at):
    """The second of three evaluations is begun three times, and stands in the metrics once."""
    whole = outcome(train("whole", *OPTIONS["dpo"]))
    for n in (2, 1, 1):
        with stopped_at("evaluate", n), pytest.raises(signals.Stopped):
            train("stopped", *OPTIONS["dpo"], "resume=auto")
    assert same(outcome(train("stopped", *OPTIONS["dpo"], "resume=auto")), whole)


def test_a_limit_that_is_reached_already(train):
    run = train("run", *DPO, "eval_every=8", "n_examples=16")
    # nothing is left to train
    train("run", *DPO, "eval_every=8", "n_examples=8", "resume=auto", "resume_allow=[n_examples]")
    longer = train(
        "run", *DPO, "eval_every=8", "n_examples=18", "resume=auto", "resume_allow=[n_examples]"
    )
    # a finished run goes on, if told to
    assert longer == run and checkpoints.latest_valid(run).manifest.examples == 18


# ---- what is refused, and what is not ----


@pytest.fixture
def begun(train, halted_at, tmp_path):
    """`begun(*options)`: a run that was halted after its third step, with a checkpoint after each.
    -> its options
    """

    def begin(*options, name="run"):
        options = [name, *DPO, "save_every=4", "eval_every=8", *options]
        with halted_at(3), pytest.raises(Halt):
            train(*options)
        return options

    return begin


CHANGES = {
    "lr=2e-3": "lr: 0.001 -> 0.002",
    "loss.beta=0.2": "loss.beta: 0.1 -> 0.2",
    "batch_size=5": "batch_size: 4 -> 5",
    "seed=1": "seed: 0 -> 1",
    "loss=ipo": "loss.name: dpo -> ipo",
    "max_length=90": "max_length: 96 -> 90",
    "n_epochs=2": "n_epochs: 1 -> 2",
    "eval_every=4": "eval_every: 8 -> 4",
    "shuffle=false": "shuffle: True -> False",
    "optimizer_args={alpha: 0.9}": "optimizer_args.alpha: unset -> 0.9",
    "max_grad_norm=1": "max_grad_norm: 10.0 -> 1",
}


# Of these, what a checkpoint holds would not fit.
NEVER = {
    "optimizer=AdamW": "optimizer: RMSprop -> AdamW",
    "optimizer_state=bfloat16": "optimizer_state: full -> bfloat16",
    "optimizer_args={momentum: 0.5}": "optimizer_args.momentum: unset -> 0.5",
    "adapter=lora": "adapter: none -> lora",
    "ema_decay=0.9": "ema_decay: None -> 0.9",
    "model.policy_dtype=bfloat16": "model.policy_dtype: float32 -> bfloat16",
}


def test_a_changed_setting_is_refused_with_the_difference(begun, train):
    options = begun()
    for change, said in CHANGES.items():
        with pytest.raises(
            ResumeMismatch, match="checkpoint does not match this configuration: "
        ) as refused:
            train(*options, change, "resume=auto")
        assert said in str(refused.value) and "resume_allow=[" in str(refused.value), change
    for change, said in NEVER.items():
        with pytest.raises(ResumeMismatch, match=f"{said}; restore these, or start another run fr"):
            train(*options, change, "resume=auto", "resume_allow=[lr,optimizer_args]")
    with pytest.raises(UserError, match="optimizer cannot change within a run, whose checkpoints"):
        train(*options, "resume=auto", "resume_allow=[optimizer]")
    # these change no number
    train(
        *options, "resume=auto", "save_every=null", "max_hours=99", "gradient_accumulation_steps=2"
    )


def test_a_part_of_an_option_may_be_allowed_to_change(begun, train):
    """By the name that the refusal gives it, and with the option as a whole."""
    options = [*begun(), "resume=auto"]
    run_dir = train(*options, "optimizer_args={alpha: 0.9}", "resume_allow=[optimizer_args.alpha]")
    with pytest.raises(ResumeMismatch, match="optimizer_args.alpha: 0.9 -> unset"):
        train(*options)
    train(*options, "resume_allow=[optimizer_args]")
    rows = [json.loads(line) for line in (run_dir / "resumes.jsonl").read_text().splitlines()]
    assert [row["changed"] for row in rows] == [
        ["optimizer_args.alpha: unset -> 0.9"],
        ["optimizer_args.alpha: 0.9 -> unset"],
    ]


def test_a_knob_that_a_run_did_not_know_yet_counts_as_its_default(compose, tmp_path):
    now = identity.settings(compose("exp_name=x", "model.name_or_path=y", *DPO), schema.may_change)
    before = {
        knob: value
        for knob, value in now.items()
        if knob not in ("loss.nll", "split_seed", "stage")
    }
    assert len(now) - len(before) == 3
    rules = identity.Rules(schema.owner_of, schema.in_state)
    compare = lambda a, b: identity.compare(tmp_path, {"settings": a}, {"settings": b}, [], rules)
    assert compare(before, now) == []
    with pytest.raises(ResumeMismatch, match="loss.nll: 0.0 -> 1"):
        compare(before, now | {"loss.nll": 1})
    assert compare(before | {"gone": 1}, now) == []
    with pytest.raises(ResumeMismatch, match="optimizer_args.eps: 1e-05 -> unset"):
        compare(before | {"optimizer_args.eps": 1e-5}, now)


def test_a_changed_data_file_tokenizer_or_base_is_refused(begun, train, data, tiny_model, tmp_path):
    options = begun()
    text = data.read_text()
    data.write_text(text.replace("happy to help", "happy to hemp"))  # the same size
    with pytest.raises(ResumeMismatch, match="data: "):
        train(*options, "resume=auto")
    data.write_text(text)
    other = shutil.copytree(tiny_model, tmp_path / "other")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ResumeMismatch, match="tokenizer: "):
        train(*options, f"model.tokenizer_name_or_path={tmp_path}/tokenizer", "resume=auto")
    model = AutoModelForCausalLM.from_pretrained(other)
    # a copy of the same weights will do
    train(*options, f"model.name_or_path={other}", "resume=auto", "n_examples=null")
    model.lm_head.weight.data[0, 0] += 1e-3
    model.save_pretrained(other)
    with pytest.raises(ResumeMismatch, match="weights: "):
        train(*begun(name="again"), f"model.name_or_path={other}", "resume=auto")


def test_an_allowed_change_is_applied(begun, train):
    """The learning rate really becomes another one; the environment's record says from which
    step.
    """
    run = train(*begun(), "lr=5e-3", "resume_allow=[lr]", "resume=auto")
    assert [r["lr"] for r in records(run, "train")] == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, 5e-3, 5e-3, 5e-3]
    )
    (row,) = [json.loads(line) for line in (run / "resumes.jsonl").read_text().splitlines()]
    assert row["step"] == 2 and row["changed"] == ["lr: 0.001 -> 0.005"] and row["packages"]
    longer = train(*begun(name="longer"), "n_epochs=2", "resume_allow=[n_epochs]", "resume=auto")
    assert records(longer, "train")[-1]["counters/examples"] == 36


def test_a_finished_run_says_so_and_stops(train, capsys):
    options = ["run", *DPO, "n_examples=4", "do_first_eval=false"]
    run = train(*options)
    before = {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name not in ("status.json", ".lock")
    }
    # as a kill in the last removal leaves it
    shutil.copytree(run / "step-4", run / ".interim-3.removed")
    train(*options, "resume=auto")
    assert "is finished: 1 steps; nothing to do" in capsys.readouterr().out
    assert {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name not in ("status.json", ".lock")
    } == before
    assert directory.status(run)["state"] == "finished"
    with pytest.raises(ResumeMismatch, match="lr: 0.001 -> 0.01"):
        train(*options, "resume=auto", "lr=1e-2")


def test_which_run_is_gone_on_with(train_here, data, tiny_model, tmp_path, capsys):
    """resume=auto finds the newest of the exp_name, and no other; resume=must wants one;
    resume=never says that there is one.
    """
    options = [
        f"model.name_or_path={tiny_model}",
        f"datasets=[{data}]",
        *FAST,
        *DPO,
        "n_examples=8",
    ]
    with pytest.raises(
        ResumeMismatch, match="resume=must: there is no checkpoint of exp_name=test"
    ):
        train_here(*options, "resume=must")
    other = train_here(*options, "exp_name=test_2")
    first = train_here(*options, "resume=auto")
    assert "is finished" not in capsys.readouterr().out and first != other
    assert train_here(*options, "resume=must") == first and "is finished" in capsys.readouterr().out
    shutil.rmtree(first / "step-8")
    directory.write_status(first, "stopped", 143)
    assert train_here(*options) != first  # resume=never is the default
    with pytest.raises(
        UserError, match="holds a run already; give another directory, or resume=auto"
    ):
        train_here(*options, f"local_run_dir={first}")


# ---- another number of processes ----


SHARDED = ["trainer=FSDPTrainer", "n_cpu_processes=4"]


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_on_another_number_of_processes(
    first, then, train, compose, here, data, tiny_model, tmp_path
):
    """The same examples in the same order, and weights within 1e-8 in float64: a Llama's norms are
    float32 whatever its weights are, so that numbers which differ by 1e-16 may there be rounded
    apart, by 6e-8 of a term of a gradient of at most 0.1.
    """
    options = [
        *DPO,
        STEADY,
        "n_epochs=2",
        "save_every=4",
        "model.policy_dtype=float64",
        "reference=cached",
    ]
    whole = outcome(train("whole", *options))
    run = tmp_path / "run"
    for n, halt in ((first, 5), (then, None)):
        overrides = [
            *here,
            "exp_name=run",
            f"local_run_dir={run}",
            f"model.name_or_path={tiny_model}",
            f"datasets=[{data}]",
            *FAST,
            *options,
            "resume=auto",
            *(SHARDED if n > 1 else []),
        ]
        run_in_group(n, train_until, partial(compose, *overrides), halt)
    assert len(list((run / "LATEST").glob("state-*"))) == then
    assert checkpoints.latest_valid(run).manifest.step == 10 and len(records(run, "train")) == 10
    assert same(outcome(run), whole, tolerance=1e-8)


def test_a_directory_that_another_process_took_meanwhile_is_left_alone(tmp_path):
    """Both found it absent; the other made it, ran and ended while this one loaded its data."""
    owner = directory.RunLock(tmp_path / "run")
    other = directory.RunLock(tmp_path / "run")
    other.claim()
    directory.write_status(tmp_path / "run", "running")
    other.release()
    with pytest.raises(UserError, match="another process has used it in the meantime; start again"):
        owner.claim()


# ---- damage on the disk ----


def damages(path):
    """What may become of a checkpoint's files: (what, how)."""
    for file in sorted(path.iterdir()):
        n = file.stat().st_size
        for size in (0, 1, 10, n // 2, n - 1):
            yield f"{file.name} cut to {size}", lambda f=file, s=size: os.truncate(f, s)
        yield f"{file.name} gone", file.unlink
        for i in range(8):
            yield (
                f"{file.name} bit {i}",
                lambda f=file, i=i: flip(f, (2 * i + 1) * f.stat().st_size // 16, i),
            )
        yield f"{file.name} a link", lambda f=file: f.symlink_to(f.rename(path.parent / "moved"))
        yield f"{file.name} a directory", lambda f=file: (f.unlink(), f.mkdir())


def flip(path, byte, bit):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def test_every_damage_is_seen_and_the_checkpoint_before_is_used(train, capsys, tmp_path):
    run = train("run", *DPO, "n_examples=12", "eval_every=4", "do_first_eval=false")
    good, newest = run / "step-8", run / "step-12"
    assert checkpoints.latest_valid(run).path == newest
    n = 0
    for what, damage in damages(newest):
        copy = shutil.copytree(newest, tmp_path / "kept", symlinks=True)
        damage()
        capsys.readouterr()
        assert checkpoints.latest_valid(run).path == good, what
        assert f"{newest}: not used: " in capsys.readouterr().out, what
        shutil.rmtree(newest)
        copy.rename(newest)
        n += 1
    assert n == 4 * 16  # policy, scheduler, state, manifest
    for name in ("policy.pt", "manifest.json"):  # swapped with another step's
        shutil.copy(newest / name, tmp_path / name)
        shutil.copy(good / name, newest / name)
        assert checkpoints.latest_valid(run).path == good, name
        shutil.copy(tmp_path / name, newest / name)


def test_a_state_file_that_is_a_pickle_is_not_loaded(train, tmp_path):
    """Even with a manifest that fits it: there is no code that would read it as one. And a
    policy.pt that would run code is refused before it is read.
    """
    import pickle

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    options = ["run", *DPO, "save_every=4", "eval_every=8"]
    run = train(*options)
    for path in checkpoints.listed(run)[:-1]:
        shutil.rmtree(path)
    (path,) = checkpoints.listed(run)
    manifest = checkpoints.read_manifest(path)
    manifest.finished = False
    for name, why in (("state-0-of-1.safetensors", "cannot be read"), ("policy.pt", "mkdir")):
        good = (path / name).read_bytes()
        if name == "policy.pt":
            torch.save({"step_idx": 8, "state": Payload(), "metrics": {}}, path / name)
        else:
            (path / name).write_bytes(pickle.dumps(Payload()))
        manifest.files[name] = durable_files.read_back(path / name)
        (path / "manifest.json").write_bytes(checkpoints._dump(manifest))
        with pytest.raises(UnsafeFile, match=why) as error:
            train(*options, "resume=auto")
        assert error.value.exit_code == 3 and not (tmp_path / "executed").exists()
        (path / name).write_bytes(good)
        manifest.files[name] = durable_files.read_back(path / name)


def test_after_damage_the_run_goes_on_from_the_one_before_and_never_afresh(
    train, halted_at, capsys, tmp_path
):
    options = ["run", *DPO, "eval_every=4"]
    whole = outcome(train("whole", *options[1:]))
    with halted_at(4), pytest.raises(Halt):
        train(*options)
    run = tmp_path / "run"
    flip(run / "step-12/state-0-of-1.safetensors", 3000, 0)
    train(*options, "resume=auto")
    said = capsys.readouterr().out
    assert "step-12: not used: state-0-of-1.safetensors has changed since it was written" in said
    assert f"resuming from {run}/step-8, step 2" in said and list(run.glob("damaged-step-12-*"))
    assert same(outcome(run), whole)
    for path in checkpoints.listed(run):
        flip(path / "manifest.json", 40, 1)
    before = sorted(run.iterdir())
    with pytest.raises(UnsafeFile, match="none of its [0-9]+ checkpoints can be resumed") as error:
        train(*options, "resume=auto")
    assert error.value.exit_code == 3 and sorted(run.iterdir()) == before
