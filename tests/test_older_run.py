"""A run that was begun by the code of commit 00fe812, when all modules lay at the root, goes on,
evaluates, exports and reports.

`fixtures/older_run/run` is its directory after a kill in step 7 of 12: the checkpoint of step 6,
and the records of all seven. `final` is what the same code made of it then.
"""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT
from runs import DPO, FAST, OF_THE_MACHINE, records
from transformers import AutoModelForCausalLM

from plumb.runs import checkpoints

HERE = "tests/fixtures/older_run"
MODEL = (
    "{model_type: llama, vocab_size: 259, hidden_size: 16, intermediate_size: 32,"
    " num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,"
    " max_position_embeddings: 128, bos_token_id: 1, eos_token_id: 2, pad_token_id: 0,"
    " tie_word_embeddings: true}"
)
OPTIONS = [
    *FAST,
    *DPO,
    "model=blank_model",
    "model.name_or_path=null",
    f"model.architecture={MODEL}",
    f"model.tokenizer_name_or_path={HERE}/tokenizer",
    f"datasets=[{HERE}/pairs.jsonl]",
    "eval_share=0.2",
    "n_epochs=3",
    "n_examples=null",
    "eval_every=12",
    "sample_during_eval=true",
    "n_eval_model_samples=2",
    "sample_max_new_tokens=4",
    "save_optimizer_pt=false",
    "keep_checkpoints=1",
]
# Another CPU rounds otherwise: by 1e-7 of a gradient, which RMSprop divides by its own size. See
# STEADY in runs.py: a weight moves by up to lr = 1e-3 where a gradient is rounding alone, in each
# of the six steps that are left.
OTHER_MACHINE = 6e-3


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A copy, as it lay on the disk."""
    copy = tmp_path_factory.mktemp("older") / "run"
    shutil.copytree(ROOT / HERE / "run", copy, symlinks=True)
    return copy


def steps(rows):
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in rows]


def test_it_goes_on(train_here, tmp_path, run_dir):
    """To the bit where this machine's arithmetic is that of the one on which the run began; else as
    far as rounding leads.
    """
    before = (run_dir / "metrics.jsonl").read_text()
    anew = train_here(*OPTIONS, f"local_run_dir={tmp_path}/anew", "keep_checkpoints=null")
    # Another CPU may draw other random weights at the start, which a run does not resume with
    # unless it is allowed to.
    began, begins = (
        checkpoints.latest_valid(run).manifest.fingerprint["weights"] for run in (run_dir, anew)
    )
    allow = [] if began == begins else ["resume_allow=[weights]"]
    resumed = train_here(*OPTIONS, f"local_run_dir={run_dir}", "resume=must", *allow)
    old = torch.load(ROOT / HERE / "run/step-24/policy.pt", weights_only=True)["state"]
    new = torch.load(anew / "step-24/policy.pt", weights_only=True)["state"]
    then = torch.load(ROOT / HERE / "final/policy.pt", weights_only=True)["state"]
    now = torch.load(resumed / "LATEST/policy.pt", weights_only=True)["state"]
    rows = [
        json.loads(line) for line in (ROOT / HERE / "final/metrics.jsonl").read_text().splitlines()
    ]
    assert [row.keys() for row in records(resumed)] == [row.keys() for row in rows]
    kept = "".join(
        line for line in before.splitlines(keepends=True) if json.loads(line)["step"] <= 24
    )
    assert (resumed / "metrics.jsonl").read_text().startswith(kept)
    if all(torch.equal(old[name], new[name]) for name in old):
        assert all(torch.equal(then[name], now[name]) for name in then)
        assert steps(records(resumed)) == steps(rows)
        assert (resumed / "samples.jsonl").read_text() == (
            ROOT / HERE / "final/samples.jsonl"
        ).read_text()
    else:
        assert all(
            torch.allclose(then[name], now[name], rtol=0, atol=OTHER_MACHINE) for name in then
        )


def test_it_evaluates_exports_and_reports(tmp_path, run_dir, monkeypatch, capsys):
    """Each command reads the directory, and says what the run recorded, or the old code did."""
    import eval as eval_command
    import export
    import report

    monkeypatch.chdir(ROOT)
    copy = tmp_path / "run"
    shutil.copytree(ROOT / HERE / "run", copy, symlinks=True)
    (
        copy / "metrics.jsonl"
    ).touch()  # a run that has written nothing for long is reported as silent
    say = lambda command, *arguments: command.main(
        command.parser().parse_args([str(copy), *map(str, arguments)])
    )
    (recorded,) = (row for row in records(copy, "eval") if row["step"] == 24)
    say(eval_command, "--out", tmp_path / "eval.json")
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    numbers = {name: value for name, value in recorded.items() if "eval" in name}
    assert {name: evaluated["metrics"][name] for name in numbers} == pytest.approx(
        numbers, rel=1e-5
    )
    capsys.readouterr()
    say(report, "--out", tmp_path / "page.html")
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if not line.startswith(("report:", "curves:"))
    ]
    text = (ROOT / HERE / "final/report.txt").read_text()
    then = text.replace("judged from 10 on", "judged from 10 steps on").splitlines()  # worded anew
    assert lines[1:] == then[1:]
    assert re.sub(r"last record .* ago", "", lines[0]) == re.sub(r"last record .* ago", "", then[0])
    say(export, "--out", tmp_path / "hf")
    policy = torch.load(copy / "LATEST/policy.pt", weights_only=True)["state"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in policy.items())
