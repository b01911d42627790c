"""The first step: what is wrong with a run is said before hours are spent on it, and nothing of a bad step is applied."""

import json

import pytest
import torch
from runs import DPO, records

import checkpoints
import pretrained
import rundir
import storage
import trainers
from utils import NonFinite, StorageError


@pytest.fixture
def changed_model(monkeypatch):
    """`changed_model(f)`: what load_policy gives is given to f first."""

    def install(f):
        load = pretrained.load_policy
        monkeypatch.setattr("train.load_policy", lambda *a, **k: (m := load(*a, **k), f(m))[0])

    return install


def test_dropout_that_no_config_names_is_found(train, changed_model):
    """Functional dropout in the model's own code: no_dropout can't see it, and eval() in the self-checks before hides it."""
    changed_model(lambda m: m.model.layers[0].register_forward_hook(
        lambda module, _, output: torch.nn.functional.dropout(output, 0.5, module.training)))  # fmt: skip
    with pytest.raises(NonFinite, match="same batch twice|DISAGREE") as error:
        train("dropout", "loss=sft", "lr=1e-3", "batch_size=4", "n_examples=8", "do_first_eval=false")
    assert error.value.exit_code == 4 and "dropout" in str(error.value)


def test_a_reference_that_is_not_the_policy_stops_the_run(train, monkeypatch):
    load = pretrained.load_reference

    def other(*arguments):
        reference = load(*arguments)
        reference.lm_head.weight.data[:, 0] += 0.5
        return reference

    monkeypatch.setattr("train.load_reference", other)
    with pytest.raises(NonFinite, match="step 0: policy and reference DISAGREE: mean rewards"):
        train("other", *DPO, "n_examples=8", "do_first_eval=false", "reference=live")


def test_no_gradient_stops_the_run(train, monkeypatch):
    backward = trainers.BasicTrainer.backward
    monkeypatch.setattr(trainers.BasicTrainer, "backward", lambda self, loss, last: backward(self, 0 * loss, last))
    with pytest.raises(NonFinite, match="step 1: the gradient is 0"):
        train("still", *DPO, "do_first_eval=false")


@pytest.mark.parametrize("dtype, stops", [("float32", True), ("bfloat16", False)])
def test_a_rate_that_is_rounded_away_is_noticed(dtype, stops, train, capsys):
    options = ["rounded", *DPO, "lr=1e-30", "n_examples=8", "do_first_eval=false", f"model.policy_dtype={dtype}"]
    if stops:
        with pytest.raises(NonFinite, match="step 1: no weight has changed .*: lr=1e-30 is rounded away; raise lr"):
            train(*options)
    else:  # 16 bits lose most updates of usual rates; it is said, and goes on
        train(*options)
        assert "no weight has changed" in capsys.readouterr().out


def test_a_save_that_will_fail_fails_at_the_first_step(train, monkeypatch, tmp_path):
    write = storage.write

    def failing(path, fill):
        if path.name == "optimizer.pt":
            raise OSError(28, "No space left on device")
        return write(path, fill)

    monkeypatch.setattr(storage, "write", failing)
    with pytest.raises(StorageError, match="could not be written .No space left on device.; it takes .* are free") as error:
        train("full", *DPO, "do_first_eval=false", "minimum_log_interval_secs=0")
    assert error.value.exit_code == 5
    assert not [p.name for p in (tmp_path / "full").iterdir() if "rehearsal" in p.name or "step" in p.name]


def test_room_for_two_checkpoints_is_asked_for_at_the_first_step(train, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda _: 3_000_000)
    with pytest.raises(StorageError, match="a checkpoint takes 2.38 MB, two must have room, and 3.00 MB are free"):
        train("tight", *DPO, "eval_every=4")
    train("one", *DPO, "n_examples=4")  # writes one only


def test_a_step_that_is_not_finite_is_not_applied_and_its_batch_is_dumped(train, monkeypatch, tmp_path):
    """The third batch gives NaN: the last checkpoint is from before, and holds finite weights."""
    backward = trainers.BasicTrainer.backward

    def poisoned(self, loss, last):
        backward(self, loss * float("nan") if self.n_updates == 2 else loss, last)

    monkeypatch.setattr(trainers.BasicTrainer, "backward", poisoned)
    with pytest.raises(NonFinite, match=r"step 3: the gradient norm is nan; stopped before the update; batch: .*pairs.jsonl:\d+"):
        train("unfit", *DPO, "save_every=4", "do_first_eval=false", "shuffle=false")
    run = tmp_path / "unfit"
    dump = json.loads((run / "non_finite.json").read_text())
    assert dump["step"] == 3 and [e["index"] for e in dump["examples"]] == [8, 9, 10, 11] and dump["examples"][0]["responses"]
    assert checkpoints.newest(run).manifest.step == 2 and len(records(run, "train")) == 2
    state = torch.load(run / "LATEST/policy.pt", weights_only=True)["state"]
    assert all(x.isfinite().all() for x in state.values())


def test_every_knob_is_compared_or_free_by_name(compose):
    """What rundir leaves out of the comparison exists: a renamed knob would otherwise be compared, or not, by accident."""
    config = compose("exp_name=x", "model=demo", "loss=sft")
    flat = dict(rundir.flatten(rundir.plain(config)))
    assert flat.keys() >= rundir.BOOKKEEPING | rundir.BY_CONTENTS | rundir.PLACEMENT
    assert {"lr", "seed", "batch_size", "loss.average_over", "model.policy_dtype", "max_length"} <= rundir.settings(config).keys()
