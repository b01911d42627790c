"""The first step: what is wrong with a run is said before hours are spent on it, and nothing of a
bad step is applied.
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from runs import DPO, records

import trainers
from plumb.batching.layout import pack
from plumb.console import to_dict
from plumb.data.tokenization import Example
from plumb.distributed import sharding
from plumb.errors import NonFinite, StorageError
from plumb.models import load as pretrained
from plumb.models import logps as models
from plumb.runs import checkpoints, durable_files, identity
from plumb.runs.history import flatten
from plumb.settings import schema
from plumb.training import setup


@pytest.fixture
def changed_model(monkeypatch):
    """`changed_model(f)`: what load_policy gives is given to f first."""

    def install(f):
        load = pretrained.load_policy
        monkeypatch.setattr(
            "plumb.models.load.load_policy", lambda *a, **k: (m := load(*a, **k), f(m))[0]
        )

    return install


def test_dropout_that_no_config_names_is_found(train, changed_model):
    """Functional dropout in the model's own code: no_dropout can't see it, and eval() in the
    self-checks before hides it.
    """
    changed_model(
        lambda m: m.model.layers[0].register_forward_hook(
            lambda module, _, output: torch.nn.functional.dropout(output, 0.5, module.training)
        )
    )
    with pytest.raises(NonFinite, match="same batch twice|DISAGREE") as error:
        train(
            "dropout", "loss=sft", "lr=1e-3", "batch_size=4", "n_examples=8", "do_first_eval=false"
        )
    assert error.value.exit_code == 4 and "dropout" in str(error.value)


@pytest.fixture
def changed_reference(monkeypatch):
    """`changed_reference(f)`: the live reference is given to f first."""

    def install(f):
        load = pretrained.load_reference
        monkeypatch.setattr("plumb.models.load.load_reference", lambda *a: (m := load(*a), f(m))[0])

    return install


DISAGREE = "step 0: policy and reference DISAGREE: mean rewards"
ONE_STEP = [*DPO, "n_examples=4", "do_first_eval=false"]


@pytest.mark.parametrize(
    "precision", [[], ["model.policy_dtype=bfloat16"], ["model.fsdp_policy_mp=bfloat16"]]
)
def test_a_reference_that_is_not_the_policy_stops_the_run(precision, train, changed_reference):
    """One row of the head, EOS's: its logit alone changes. (A column adds the same number to all
    logits of a position, which a softmax does not see.)
    """

    def change(reference):
        reference.lm_head.weight.data[reference.config.eos_token_id] += 0.5

    changed_reference(change)
    with pytest.raises(NonFinite, match=DISAGREE) as error:
        train("other", *ONE_STEP, "reference=live", *precision)
    assert error.value.exit_code == 4


def test_a_column_of_the_head_is_not_another_reference(train, changed_reference, capsys):
    """It rounds the logits otherwise, so that rewards are not exactly 0: accepted."""

    def change(reference):
        reference.lm_head.weight.data[:, 0] += 0.5

    changed_reference(change)
    train("column", *ONE_STEP, "reference=live")
    assert "step 0: policy and reference agree" in capsys.readouterr().out


@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize(
    "precision", [[], ["model.policy_dtype=bfloat16"], ["model.policy_dtype=float64"]]
)
def test_another_order_of_summation_is_no_other_reference(
    reference, precision, train, monkeypatch, capsys
):
    """A new order for each sum, in float32, as atomic additions on a GPU would have it."""

    def scattered(logps, batch):
        order = torch.randperm(len(logps))
        total = torch.zeros(len(batch.spans), dtype=torch.promote_types(logps.dtype, torch.float32))
        return total.index_add(0, batch.response[order], logps[order].to(total.dtype))

    monkeypatch.setattr("plumb.models.logps.sums_by_response", scattered)
    first = records(
        train("order", *ONE_STEP, f"reference={reference}", "max_length=256", *precision), "train"
    )[0]
    assert "step 0: policy and reference agree" in capsys.readouterr().out
    # it was another order
    assert first["rewards_train/chosen"] != 0 or first["rewards_train/rejected"] != 0


def test_sums_do_not_depend_on_how_often_or_when_they_are_made():
    """Of up to 3,000 terms: to half a unit in the last place of the exact sums, in whatever row and
    beside whatever others; gradients are those of the plain sum.
    """
    rng = np.random.default_rng(0)
    lengths = [(1, 3000), (0, 2), (1, 700), (5, 1)]
    examples = [
        Example(
            rng.integers(3, 99, p).astype(np.int32),
            tuple(rng.integers(3, 99, r).astype(np.int32) for r in (n, 40)),
            "",
        )
        for p, n in lengths
    ]
    batch = pack(examples, pad_token_id=0, longest=4000)
    logps = -torch.from_numpy(rng.exponential(3, batch.n_scored)).float().requires_grad_()
    sums = models.sums_by_response(logps, batch)
    exact = [math.fsum(logps[batch.response == r].tolist()) for r in range(8)]
    assert sums.tolist() == torch.tensor(exact, dtype=torch.float64).float().tolist()
    upstream = torch.randn(8)
    (gradient,) = torch.autograd.grad((sums * upstream).sum(), logps)
    assert torch.equal(gradient, upstream[batch.response])
    alone = pack(examples[:1], pad_token_id=0, longest=4000)
    of_first = (batch.response == 0) | (batch.response == 4)
    assert torch.equal(models.sums_by_response(logps[of_first], alone), sums[[0, 4]])


def test_a_cached_reference_of_other_weights_stops_the_run(train, monkeypatch):
    """A file that passes for this reference's, and was computed with other weights."""
    monkeypatch.setattr(
        "plumb.models.reference_cache.state_digest", lambda state: "the same for all"
    )
    sft = train(
        "sft",
        "loss=sft",
        "lr=1e-3",
        "warmup_steps=0",
        "batch_size=4",
        "n_examples=8",
        "do_first_eval=false",
    )
    train("mine", *ONE_STEP, "reference=cached")
    with pytest.raises(NonFinite, match=f"{DISAGREE}.*; compare with reference=live"):
        train("others", *ONE_STEP, "reference=cached", f"model.archive={sft}")


@pytest.mark.parametrize("precision", [[], ["model.policy_dtype=bfloat16"]])
def test_opposite_errors_do_not_cancel(precision, train, monkeypatch):
    """Log-probabilities that are off by +3 and -3 nats in turn: all means are those of the right
    ones.
    """
    prepare = setup.prepare

    def with_errors(*arguments):
        ready = prepare(*arguments)
        signs = np.where(np.arange(len(ready.train_feed.reference)) % 2, 3.0, -3.0)
        ready.train_feed.reference += signs[:, None]
        return ready

    monkeypatch.setattr(setup, "prepare", with_errors)
    with pytest.raises(
        NonFinite, match=f"{DISAGREE}.*; at worst 3(.0)? nats in a response of [0-9]+ tokens"
    ):
        train("opposite", *ONE_STEP, "reference=cached", "shuffle=false", *precision)


def test_every_microbatch_is_compared(train, monkeypatch):
    """One response of the first microbatch of four is off by 3 nats."""
    prepare = setup.prepare

    def with_error(*arguments):
        ready = prepare(*arguments)
        ready.train_feed.reference[0, 1] += 3
        return ready

    monkeypatch.setattr(setup, "prepare", with_error)
    with pytest.raises(NonFinite, match=DISAGREE):
        train(
            "one",
            *ONE_STEP,
            "reference=cached",
            "shuffle=false",
            "gradient_accumulation_steps=4",
            "loss.beta=0.001",
        )


def test_dropout_beside_a_live_reference_is_found(train, changed_model):
    """The policy trains with it, and its reference, in eval mode, computes without."""
    changed_model(
        lambda m: m.model.layers[0].register_forward_hook(
            lambda module, _, output: torch.nn.functional.dropout(output, 0.01, module.training)
        )
    )
    with pytest.raises(NonFinite, match=f"{DISAGREE}.*; is the model deterministic"):
        train("dropout", *ONE_STEP, "reference=live")


def test_a_reference_of_another_precision_is_said_and_goes_on(train, capsys):
    for reference in ("live", "cached"):
        train(reference, *ONE_STEP, f"reference={reference}", "model.reference_dtype=bfloat16")
        said = capsys.readouterr().out
        assert (
            DISAGREE in said
            and "since model.reference_dtype=bfloat16 is not the policy's precision" in said
        )


def test_no_gradient_stops_the_run(train, monkeypatch):
    backward = trainers.BasicTrainer.backward
    monkeypatch.setattr(
        trainers.BasicTrainer, "backward", lambda self, loss, last: backward(self, 0 * loss, last)
    )
    with pytest.raises(NonFinite, match="step 1: the gradient is 0"):
        train("still", *DPO, "do_first_eval=false")


@pytest.mark.parametrize("dtype, stops", [("float32", True), ("bfloat16", False)])
def test_a_rate_that_is_rounded_away_is_noticed(dtype, stops, train, capsys):
    options = [
        "rounded",
        *DPO,
        "lr=1e-30",
        "n_examples=8",
        "do_first_eval=false",
        f"model.policy_dtype={dtype}",
    ]
    if stops:
        with pytest.raises(
            NonFinite, match="step 1: no weight has changed .*: lr=1e-30 is rounded away; raise lr"
        ):
            train(*options)
    else:  # 16 bits lose most updates of usual rates; it is said, and goes on
        train(*options)
        assert "no weight has changed" in capsys.readouterr().out


def test_a_save_that_will_fail_fails_at_the_first_step(train, monkeypatch, tmp_path):
    write = durable_files.write

    def failing(path, fill):
        if path.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        return write(path, fill)

    monkeypatch.setattr(durable_files, "write", failing)
    with pytest.raises(
        StorageError, match="could not be written .No space left on device.; it takes .* are free"
    ) as error:
        train("full", *DPO, "do_first_eval=false", "minimum_log_interval_secs=0")
    assert error.value.exit_code == 5
    assert not [
        p.name for p in (tmp_path / "full").iterdir() if "rehearsal" in p.name or "step" in p.name
    ]


def test_room_for_two_checkpoints_is_asked_for_at_the_first_step(train, monkeypatch, capsys):
    """1.19 MB: 148,000 parameters with their optimizer state, 4 bytes each."""
    monkeypatch.setattr(durable_files, "free_bytes", lambda _: 1_500_000)
    with pytest.raises(
        StorageError, match="a checkpoint takes 1.19 MB, two must fit, and 1.50 MB are free"
    ):
        train("tight", *DPO, "eval_every=4")
    train("one", *DPO, "n_examples=4")  # writes one only
    monkeypatch.setattr(durable_files, "free_bytes", lambda _: 3_000_000)
    train("several", *DPO, "eval_every=4")
    assert re.search(
        r"note: the \d+ checkpoints to come take [\d.]+ MB, and 3.00 MB are free; set"
        r" keep_checkpoints=1\n",
        capsys.readouterr().out,
    )


def test_a_step_that_is_not_finite_is_not_applied_and_its_batch_is_dumped(
    train, monkeypatch, tmp_path
):
    """The third batch gives NaN: the last checkpoint is from before, and holds finite weights."""
    backward = trainers.BasicTrainer.backward

    def poisoned(self, loss, last):
        backward(self, loss * float("nan") if self.n_updates == 2 else loss, last)

    monkeypatch.setattr(trainers.BasicTrainer, "backward", poisoned)
    with pytest.raises(
        NonFinite,
        match=(
            r"step 3: the gradient norm is nan; stopped before the update; batch: .*pairs.jsonl:\d+"
        ),
    ):
        train("unfit", *DPO, "save_every=4", "do_first_eval=false", "shuffle=false")
    run = tmp_path / "unfit"
    dump = json.loads((run / "non_finite.json").read_text())
    assert (
        dump["step"] == 3
        and [e["index"] for e in dump["examples"]] == [8, 9, 10, 11]
        and dump["examples"][0]["responses"]
    )
    assert checkpoints.latest_valid(run).manifest.step == 2 and len(records(run, "train")) == 2
    state = torch.load(run / "LATEST/policy.pt", weights_only=True)["state"]
    assert all(x.isfinite().all() for x in state.values())


@pytest.fixture
def poisoned(monkeypatch):
    """`poisoned(n, value)`: the n-th update leaves `value` in one weight."""

    def install(n, value):
        make = setup.make_optimizer

        def poisoning(config, policy, device):
            optimizer, made = make(config, policy, device), []

            def after_step(*_):
                made.append(1)
                if len(made) == n:
                    policy.model.norm.weight.data[3] = value

            optimizer.register_step_post_hook(after_step)
            return optimizer

        monkeypatch.setattr(setup, "make_optimizer", poisoning)

    return install


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_first_update_that_is_not_finite_stops_the_run(value, train, poisoned, tmp_path):
    poisoned(1, value)
    with pytest.raises(
        NonFinite,
        match="step 1: the update leaves NaN or infinity in model.norm.weight .*: lower lr=0.001",
    ):
        train("first", *DPO, "do_first_eval=false")
    assert checkpoints.latest_valid(tmp_path / "first") is None


@pytest.mark.parametrize("options", [[], ["async_save=true"]])
def test_weights_that_are_not_finite_become_no_checkpoint(options, train, poisoned, tmp_path):
    """The fourth update spoils a weight, and the save that follows is refused: LATEST stays at the
    second.
    """
    poisoned(4, float("nan"))
    with pytest.raises(
        NonFinite, match="-16 is not written, since model.norm.weight holds NaN or infinity; older"
    ) as error:
        train(
            "later",
            "loss=sft",
            "lr=1e-3",
            "batch_size=4",
            "save_every=8",
            "do_first_eval=false",
            *options,
        )
    assert error.value.exit_code == 4
    run = tmp_path / "later"
    assert {p.name for p in run.glob("*-*") if p.is_dir()} == {"interim-8"}
    assert (
        checkpoints.latest_valid(run).manifest.step == 2
        and (run / "LATEST").resolve().name == "interim-8"
    )
    state = torch.load(run / "LATEST/policy.pt", weights_only=True)["state"]
    assert all(x.isfinite().all() for x in state.values())


def test_what_is_not_finite_is_found_in_any_type():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for value in (float("nan"), float("inf"), float("-inf")):
            tensors = {
                "fine": torch.full((3, 70), torch.finfo(dtype).max, dtype=dtype),
                "none": torch.empty(0, 4, dtype=dtype),
                "numbers": torch.arange(3),
                "bad": torch.ones(300, dtype=dtype),
            }
            assert sharding.not_finite(tensors.items()) is None
            tensors["bad"][299] = value
            assert sharding.not_finite(tensors.items()) == "bad"


def test_every_knob_is_compared_or_free_by_name(compose):
    """What the comparison leaves out exists: a renamed knob would otherwise be compared, or not, by
    accident.
    """
    config = compose("exp_name=x", "model=demo", "loss=sft")
    flat = dict(flatten(to_dict(config)))
    assert flat.keys() >= set(filter(schema.may_change, schema.KNOBS))
    assert {
        "lr",
        "seed",
        "batch_size",
        "loss.average_over",
        "model.policy_dtype",
        "max_length",
    } <= identity.settings(config, schema.may_change).keys()
