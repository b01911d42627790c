"""What newcomers write, and what they are told: the lines written out. And --config, --help and
--version.
"""

import sys

import pytest
from conftest import ROOT

import train
from plumb.settings import config_file
from plumb.settings import help as help_screens
from plumb.settings.options import sections
from plumb.settings.schema import KNOBS

START = ["exp_name=x", "model.name_or_path=/nowhere", "wandb.enabled=false"]
NO_SUCH = "no such knob, or not of this model or loss"
LISTED = "expected a list such as [hh] or [hh,my.jsonl], nothing twice"
FLAGS = "train.py takes knob=value, and flags such as -m before or after all of them"
MISTAKES = {  # the words of a command -> its one line
    "learning_rate=1e-5": f"learning_rate=1e-5: {NO_SUCH}; did you mean lr=1e-5?",
    "bach_size=8": f"bach_size=8: {NO_SUCH}; did you mean batch_size=8?",
    "beta=0.1": f"beta=0.1: {NO_SUCH}; did you mean loss.beta=0.1?",
    "per_device_train_batch_size=4": (
        f"per_device_train_batch_size=4: {NO_SUCH}; here: batch_size, which counts the examples of"
        " a step on all GPUs"
    ),
    "num_train_epochs=3": f"num_train_epochs=3: {NO_SUCH}; did you mean n_epochs=3?",
    "model_name_or_path=gpt2": (
        f"model_name_or_path=gpt2: {NO_SUCH}; did you mean model.name_or_path=gpt2?"
    ),
    "--learning_rate 1e-5": (
        f"unrecognized arguments: --learning_rate 1e-5; did you mean lr=1e-5?; {FLAGS}"
    ),
    "+gradient_checkpointing=true": (
        "gradient_checkpointing=True: no such knob; did you mean activation_checkpointing=True?;"
        " see config/config.yaml and config/model/blank_model.yaml"
    ),
    "model=/data/llama": (
        "model=/data/llama: model= names a file of config/model; for a folder or a model of the"
        " hub, write model.name_or_path=/data/llama"
    ),
    "local_dirs=/x": f"local_dirs=/x: {LISTED}; write local_dirs=[/x]",
    "datasets=hh": f"datasets=hh: {LISTED}; write datasets=[hh]",
    "datasets=[hh, me]": (  # two words to the shell
        "unknown data set 'me'; known: "
    ),
    "loss=dpo": (
        "missing: loss.beta; add loss.beta=..., for instance: python train.py exp_name=first"
        " model.name_or_path=gpt2 datasets=[hh] loss=dpo loss.beta=0.1 (config/loss/dpo.yaml has"
        " the usual values)"
    ),
    "stage=dpo": (
        "stage=dpo: expected one of sft, reward, policy, or null; the objective is chosen by"
        " loss=dpo"
    ),
    "--config none.yaml": "--config none.yaml: no such file; give a YAML file of knobs",
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command(*words)`: train.py with these words, started in another directory. -> its exit code,
    what it printed, and what went to stderr
    """
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *words])
        code = 0
        try:
            train.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_the_fifteen_mistakes(command):
    assert len(MISTAKES) == 15
    for words, line in MISTAKES.items():
        code, _, printed = command(*START, *words.split(" "))
        assert code == 2 and printed.startswith(f"error: {line}"), printed
        assert line.endswith(": ") or printed == f"error: {line}\n"


def test_an_equals_sign_within_braces_is_explained(command):
    """Hydra alone says only where it stopped to understand; a colon needs no quotation marks."""
    code, _, printed = command(*START, "loss=rloo", "reward.terms={a: {rule: length=40}}")
    assert code == 2 and printed.count("\n") == 1
    assert "= needs quotation marks, {rule: 'length=200'}; or write {rule: length:200}" in printed
    terms = train.compose([*START, "loss=rloo", "reward.terms={a: {rule: length:40}}"]).reward.terms
    assert terms.a.rule == "length:40"


def test_every_name_of_others_leads_to_a_knob_of_ours():
    from plumb.settings.mistakes import OTHERWISE, SAME_VALUE, _loss_knobs

    known = {*KNOBS, *_loss_knobs(), "loss"}
    assert {*SAME_VALUE.values()} <= known and not {*SAME_VALUE} & known
    assert not {*OTHERWISE} & {*known, *SAME_VALUE}


CONFIG = """
exp_name: mine
model: {name_or_path: /nowhere, policy_dtype: bfloat16}
datasets: [hh, "my data.jsonl"]
loss:
  name: dpo
  beta: 0.2
loss.label_smoothing: 0.1
data_split: 5,0,5
stage: policy
field_map: {prompt: q}
wandb: {enabled: false}
lr: 1e-6
"""


def test_a_file_of_knobs(tmp_path, command):
    (tmp_path / "my.yaml").write_text(CONFIG)
    words = config_file.with_config_files(["--config", "my.yaml", "lr=2e-6"])
    config = train.compose(words)
    assert (config.exp_name, config.model.policy_dtype) == ("mine", "bfloat16")
    assert list(config.datasets) == ["hh", "my data.jsonl"]
    assert dict(config.loss) | {"beta": 0.2, "label_smoothing": 0.1} == dict(config.loss)
    assert (config.data_split, config.field_map.prompt) == ("5,0,5", "q")
    assert config.lr == 2e-6 and config.wandb.enabled is False
    for text, line in (
        ("learning_rate: 1", "learning_rate=1: no such knob"),
        ("- lr", "my.yaml: not a mapping; write knob: value on each line"),
        ("lr: [", "my.yaml, line 2: not valid YAML; write knob: value on each line"),
        ("defaults: [a]", "my.yaml: 'defaults' is for files of a config folder (--config-dir)"),
        ("hydra: {run: {dir: x}}", "my.yaml: 'hydra' is for files of a config folder"),
        ("lr: !!python/name:os.system", "my.yaml, line 1: '!' (an anchor, alias or tag) is not"),
        ("seed: ${oc.env:HOME}", "${oc.env:HOME}: configs are logged"),
    ):
        (tmp_path / "my.yaml").write_text(text + "\n")
        code, _, printed = command("exp_name=x", "--config=my.yaml", *START[1:])
        assert code == 2 and line in printed, printed


def test_help_and_version(command):
    assert command("--version")[:2] == (0, "Plumb 0.1.0\n")
    overview = command("--help")[1]
    for topic in ("run", "data", "training", "saving", "model", "loss", "dpo", "data_rules", ""):
        code, screen, _ = command("--help", topic) if topic else (0, overview, "")
        assert code == 0 and topic in overview or topic == "data_rules"
        assert max(map(len, screen.splitlines())) <= 80, topic
        assert len(screen.splitlines()) <= 50, topic
    topics = map(help_screens.topic_of, sections())
    shown = "".join(command(f"--help={topic}")[1] for topic in topics)
    for knob in KNOBS:
        group = knob.partition(".")[0]
        assert knob.startswith("model.") or f"\n{group}" in f"\n{shown}", knob
    assert command("--help", "lr_schedule")[1].startswith("lr_schedule=constant\n\nafter the")
    code, _, printed = command("--help", "learning_rate")
    assert code == 2 and "no such topic, loss or knob; did you mean lr?" in printed


def test_help_in_a_sentence_of_its_own():
    assert help_screens.answer(["exp_name=x", "-h"]) == help_screens.screen("")
    assert help_screens.answer(["exp_name=x"]) is None
