"""What a user can get wrong: exit code 2 (3 for a policy.pt that is refused) and one line that
names the knob, file, row or field, its value and the fix.

No traceback, and no run directory. Most cases go through train.main() in this process, which is
what `python train.py` does; those of `test_the_real_command` run in a process of their own.
"""

import gzip
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, ROOT, run_command
from families import save_family
from payloads import Payload
from runs import one_line

import train
from plumb.settings.plugins import import_plugins

PAIR = {"prompt": "Name a sea:", "chosen": " the Baltic", "rejected": " the Alps"}
OTHER = {"prompt": "Name a hill:", "chosen": " the Brocken", "rejected": " the Po"}


@pytest.fixture
def refused(here, tmp_path, monkeypatch, capfd):
    """`refused(*overrides)`: `train.main()` refuses them as `one_line` says. -> the line"""
    monkeypatch.chdir(ROOT)
    # Hydra then finds config/ beside train.py, as for a script
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")

    def run(*overrides, code=2):
        monkeypatch.setattr(sys, "argv", ["train.py", *here, *map(str, overrides)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            train.main()
        return one_line(exit.value.code, capfd.readouterr().err, tmp_path / "runs", code)

    return run


@pytest.fixture(scope="module")
def good(tiny_model, tmp_path_factory):
    """Overrides of a run that would train: each case below breaks one thing of it."""
    rows = tmp_path_factory.mktemp("data") / "good.jsonl"
    rows.write_text("".join((ROOT / "demo/train.jsonl").read_text().splitlines(keepends=True)[:40]))
    return ["exp_name=x", f"model.name_or_path={tiny_model}", f"datasets=[{rows}]"]


DPO = ["loss=dpo", "loss.beta=0.1"]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def says(line, *parts):
    for part in parts:
        assert part in line, f"{part!r} is not in: {line}"


def test_the_good_run_is_good(train_here, good):
    """Else every refusal below might have another reason."""
    small = ["n_examples=4", "n_eval_examples=4", "sample_during_eval=false"]
    assert (train_here(*good, *small) / "LATEST/policy.pt").is_file()


# ---- processes of their own ----

COMMANDS = {
    "bare": ("exp_name", "model.name_or_path", "python train.py exp_name="),
    "no GPU": ("device=cuda", "null picks one"),
    "no GPU to shard over": ("trainer=FSDPTrainer", "trainer=BasicTrainer", "n_cpu_processes=2"),
    "bad row": ("cut.jsonl, line 2", "rejected", "add it"),
    "bad row, two processes": (
        "cut.jsonl, line 2",
        "rejected",
        "add it",
    ),  # met by both, said by one
    "code in policy.pt": ("policy.pt", "refused", "code"),
}


FROM_COLD = ("bare", "bad row, two processes")  # a new interpreter takes seconds


@pytest.fixture(scope="module")
def commands(tmp_path_factory, good, warm):
    """case -> what its process returned, and its runs. They run side by side."""
    folder = tmp_path_factory.mktemp("commands")
    rows = write(folder / "cut.jsonl", PAIR, {"prompt": "Name a sea:", "chosen": " the Baltic"})
    torch.save(
        {"step_idx": 1, "state": Payload(os.system, f"touch {folder}/ran"), "metrics": {}},
        folder / "policy.pt",
    )
    overrides = {
        "bare": [],
        "no GPU": [*good, "device=cuda"],
        "no GPU to shard over": [*good, "trainer=FSDPTrainer"],
        "bad row": [*good, *DPO, f"datasets=[{rows}]"],
        "bad row, two processes": [
            *good,
            *DPO,
            f"datasets=[{rows}]",
            "trainer=FSDPTrainer",
            "n_cpu_processes=2",
        ],
        "code in policy.pt": [*good, f"model.archive={folder}/policy.pt"],
    }
    environment = {"CUDA_VISIBLE_DEVICES": "", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}

    def run(case):
        runs = folder / "runs" / case.replace(" ", "_").replace(",", "")
        options = [f"local_dirs=[{runs}]", *overrides[case]]
        if case in FROM_COLD:
            return run_command(options, **environment), runs
        return warm.run(["train.py", *options], ROOT, os.environ | environment, PATIENCE), runs

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(overrides, pool.map(run, overrides), strict=True))
    assert not (folder / "ran").exists(), "loading policy.pt ran its code"
    return done


@pytest.mark.parametrize("case", COMMANDS)
def test_the_real_command(commands, case):
    """The whole way through the interpreter's exit, and what only a process without a GPU shows."""
    done, runs = commands[case]
    says(
        one_line(done.returncode, done.stderr, runs, 3 if case == "code in policy.pt" else 2),
        *COMMANDS[case],
    )


# ---- knobs ----

KNOBS = {
    "nosuch=1": ("nosuch=1", "no such knob", "config/config.yaml"),
    "wandb.nosuch=1": ("wandb.nosuch=1", "no such knob"),
    "+nosuch=1": ("nosuch=1", "no such knob"),
    "+data_rules.nosuch=1": ("data_rules.nosuch=1",),
    "+data_rules.typo=drop": ("data_rules.typo=drop", "no such knob"),
    "+dataset_paths.typo=/nowhere": ("dataset_paths.typo=/nowhere", "no such data set", "saferlhf"),
    "datasets=[hh,hh]": ("datasets=", "nothing twice"),
    "optimizer_args={fused: true, foreach: true}": ("optimizer_args=", "foreach"),
    "model=nosuch": ("model=nosuch", "config/model", "blank_model", "pythia28"),
    "loss=nosuch": ("loss=nosuch", "dpo", "sft"),
    "exp=nosuch": ("exp=nosuch", "demo_sft"),
    "loss.name=nosuch": ("loss.name=nosuch", "known:", "dpo"),
    "loss.beta=0.1": ("loss.beta=0.1", "no such knob"),
    "+loss.beta=0.1": ("loss.beta=0.1", "sft", "average_over"),
    "loss.average_over=words": ("loss.average_over=words", "examples, tokens"),
    "exp_name=5": ("exp_name=5", "a text"),
    "exp_name=${nosuch}": ("exp_name", "nosuch"),
    "batch_size=[": ("'['",),
    "batch_size=abc": ("batch_size=abc", "a whole number of at least 1"),
    "batch_size=0": ("batch_size=0", "at least 1"),
    "batch_size=1.5": ("batch_size=1.5", "whole"),
    "batch_size=true": ("batch_size=True", "whole"),
    "batch_size=null": ("batch_size=None", "whole"),
    "seed=1.5": ("seed=1.5", "a whole number of at least 0"),
    "seed=-1": ("seed=-1", "at least 0"),
    "lr=-1": ("lr=-1", "above 0"),
    "lr=nan": ("lr=nan", "above 0"),
    "lr=fast": ("lr=fast", "above 0"),
    "debug=1": ("debug=1", "true or false"),
    "eval_share=1": ("eval_share=1", "[0, 1)"),
    "data_split=5,0,5": ("data_split=5,0,5", "needs a stage", "stage="),  # not three runs to Hydra
    "data_split=5,0": ("data_split=5,0", "three numbers", "5,0,5"),
    "min_lr_ratio=2": ("min_lr_ratio=2", "[0, 1]"),
    "lr_schedule=step": ("lr_schedule=step", "constant, linear, cosine"),
    "local_dirs=[]": ("local_dirs=[]", "a list"),
    "local_dirs=/data": ("local_dirs=/data", "a list"),
    "datasets=hh": ("datasets=hh", "[hh]"),
    "datasets=[]": ("datasets=[]", "[hh]"),
    "datasets=[1]": ("datasets=[1]", "[hh]"),
    "data_rules.duplicate=maybe": ("data_rules.duplicate=maybe", "keep, drop, stop"),
    "truncation_mode=middle": ("truncation_mode=middle", "keep_start, keep_end", "null"),
    "model.policy_dtype=int8": ("model.policy_dtype=int8", "float32"),
    "model.policy_dtype=float16": (
        "model.policy_dtype=float16",
        "eps",
        "set float32",
        "fsdp_policy_mp=bfloat16",
    ),
    "model.fsdp_policy_mp=float16": ("model.fsdp_policy_mp=float16", "not scaled", "set bfloat16"),
    "model.fsdp_policy_mp=float32": ("model.fsdp_policy_mp=float32", "bfloat16", "null"),
    "optimizer=Nosuch": ("optimizer=Nosuch", "RMSprop", "AdamW"),
    "optimizer=LBFGS": ("optimizer=LBFGS", "RMSprop"),  # needs a closure
    "optimizer=SparseAdam": ("optimizer=SparseAdam", "RMSprop"),  # needs sparse gradients
    "optimizer=Muon": ("optimizer=Muon", "RMSprop"),  # refuses biases and norms
    "optimizer_args={nosuch: 1}": ("optimizer=RMSprop", "nosuch"),
    "optimizer_args={alpha: -1}": ("optimizer=RMSprop", "alpha", "-1"),
    "optimizer_args=[1]": ("optimizer_args=[1]", "{a: b}"),
    "trainer=Nosuch": ("trainer=Nosuch", "BasicTrainer, FSDPTrainer"),
    "max_prompt_length=512": ("max_prompt_length=512", "below max_length=512"),
    "max_length=256": ("max_prompt_length=256", "below max_length=256"),
    "n_epochs=null": ("n_epochs=null", "n_examples=null"),
    "tokens_per_microbatch=0": ("tokens_per_microbatch=0", "at least 1", "null"),
    "compile=maybe": ("compile=maybe", "true or false"),
    "activation_checkpointing=2": ("activation_checkpointing=2", "a share in (0, 1)"),
    "reference=never": ("reference=never", "auto, live, cached"),
    "reference=cached": (
        "reference=cached",
        "sft",
        "reference=auto",
    ),  # `good` runs SFT, which has no use for it
    "device=nosuch": ("device=nosuch", "null picks one"),
    "chat_template=nosuch.jinja": ("chat_template=nosuch.jinja", "No such file"),
    "plugins=[nosuch.py]": ("plugins=nosuch.py", "no such file"),
    "model.name_or_path=null": ("model.name_or_path=null", "model.architecture"),
}


@pytest.mark.parametrize("override", KNOBS)
def test_knob(refused, good, override):
    says(refused(*good, override), *KNOBS[override])


LOSS_KNOBS = {
    "loss.beta=abc": ("loss.beta=abc", "a number"),
    "loss.beta=0": ("loss.beta=0", "above 0"),
    "loss.beta=null": ("loss.beta=None", "a number"),
    "loss.label_smoothing=0.5": ("loss.label_smoothing=0.5", "[0, 0.5)"),
    "loss.reference_free=1": ("loss.reference_free=1", "true or false"),
    "+loss.gamma=1": ("loss.gamma=1", "dpo", "beta"),
    # it has the knobs of config/loss/sft.yaml then
    "loss.name=sft": ("loss.beta=0.1: no such knob", "not of this model or loss"),
    "~loss.label_smoothing": ("loss.label_smoothing", "needs it"),
    "~loss.alpha": ("~loss.alpha: there is nothing to remove", "leave out ~loss.alpha"),
}


@pytest.mark.parametrize("override", LOSS_KNOBS)
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_loss_knob(refused, good, loss, override):
    expected = [loss if part == "dpo" else part for part in LOSS_KNOBS[override]]
    says(refused(*good, f"loss={loss}", "loss.beta=0.1", override), *expected)


def test_loss_knob_that_must_be_given(refused, good):
    says(refused(*good, "loss=dpo"), "missing: loss.beta", "loss.beta=...")


def test_another_loss_than_the_experiments(refused, good, monkeypatch, tmp_path):
    """An experiment's loss knobs reach a loss that was chosen over its own: refused, not
    ignored.
    """
    experiment = tmp_path / "exp" / "mine.yaml"
    experiment.parent.mkdir()
    experiment.write_text(
        "# @package _global_\ndefaults:\n- override /loss: dpo\n\nloss:\n  beta: 0.1\n"
    )
    says(refused(*good, "exp=mine", "loss=sft", f"--config-dir={tmp_path}"), "loss.beta=0.1", "sft")


# ---- data ----


def bad_file(tmp_path, case):
    path = tmp_path / "bad.jsonl"
    if case == "missing":
        return path
    if case == "empty":
        path.write_text("")
    elif case == "latin-1":
        path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "caf\xe9"}\n')
    elif case == "not json":
        path.write_text(json.dumps(PAIR) + "\n{prompt: no}\n")
    elif case == "truncated gzip":
        path = path.with_suffix(".jsonl.gz")
        path.write_bytes(
            gzip.compress(
                "".join(json.dumps(PAIR | {"n": i}) + "\n" for i in range(1000)).encode()
            )[:-40]
        )
    elif case == "no rejected":
        write(path, PAIR, {k: v for k, v in PAIR.items() if k != "rejected"})
    elif case == "number":
        write(path, PAIR, PAIR | {"rejected": 7})
    elif case == "unknown form":
        write(path, {"nosuch": "x"})
    return path


FILES = {
    "missing": ("bad.jsonl", "no such file", "check the path"),
    "empty": ("bad.jsonl", "empty", "at least one row"),
    "latin-1": ("bad.jsonl, line 2", "0xe9", "UTF-8"),
    "not json": ("bad.jsonl, line 2", "not valid JSON"),
    "truncated gzip": ("bad.jsonl.gz", "cut short", "copy it again"),
    "no rejected": ("bad.jsonl, line 2", "'rejected'", "prompt, chosen", "add it"),
    "number": ("bad.jsonl, line 2", "'rejected'", "a number (7)"),
    "unknown form": ("bad.jsonl, line 1", "nosuch"),
}


@pytest.mark.parametrize("knob", ["datasets", "eval_datasets"])
@pytest.mark.parametrize("case", FILES)
def test_data_file(refused, good, tmp_path, case, knob):
    says(refused(*good, *DPO, f"{knob}=[{bad_file(tmp_path, case)}]"), *FILES[case])


def test_data_set_name(refused, good):
    says(refused(*good, "datasets=[hhh]"), "'hhh'", "did you mean 'hh'", "saferlhf", "./hhh.jsonl")


def test_data_set_of_the_hub_offline(refused, good):
    says(refused(*good, "datasets=[hh]"), "Anthropic/hh-rlhf", "dataset_paths.hh")


def test_dataset_paths(refused, good, tmp_path):
    says(
        refused(*good, "datasets=[shp]", f"dataset_paths.shp={tmp_path}/nosuch"),
        "nosuch",
        "no such file or folder",
    )


def test_field_map(refused, good, tmp_path):
    path = write(tmp_path / "own.jsonl", PAIR)
    says(refused(*good, *DPO, f"datasets=[{path}]", "field_map={prompt: question}"), "question")


VOTE = {"prompt": "Name a sea:", "completion": " the Baltic"}
KTO = ["loss=kto", "loss.beta=0.1"]
LABELS = {
    "negative weight": (DPO, PAIR | {"weight": -1}, "'weight' is -1, which is negative; write"),
    "NaN weight": (
        DPO,
        PAIR | {"weight": float("nan")},
        "'weight' is a number (nan), not a finite",
    ),
    "soft label": (DPO, PAIR | {"p_chosen": -0.1}, "'p_chosen' is -0.1, not a probability; write"),
    "soft label that is ignored": (
        ["loss=simpo", "loss.beta=2", "loss.gamma=1"],
        PAIR | {"p_chosen": 0.7},
        "own.jsonl:1: p_chosen=0.7, which this loss (simpo) would ignore; train with loss=dpo",
    ),
    "soft label that kto would ignore": (KTO, PAIR | {"p_chosen": 0.7}, "this loss (kto) would"),
    "label smoothing that is ignored": (
        [*DPO, "loss.label_smoothing=0.1"],
        PAIR | {"p_chosen": 0.7},
        "loss.label_smoothing=0.1: every training pair has a soft label (p_chosen), which takes",
    ),
    "score without a threshold": (
        KTO,
        VOTE | {"label": 3.5},
        "(prompt, completion, label; a score is one with label_threshold), nor pairs",
    ),
    "score after a label": (
        KTO,
        [VOTE | {"label": 1}, VOTE | {"label": 4}],
        "line 2: field 'label' is a number (4), not true or false; set label_threshold",
    ),
    "label that is no score": (
        [*KTO, "label_threshold=3"],
        VOTE | {"label": True},
        "'label' is a boolean (True), not a finite number",
    ),
    "NaN score": (
        ["loss=plackett_luce", "loss.beta=0.1"],
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]},
        "'scores[1]' is a number (nan), not a finite number; fix or remove the line",
    ),
    "soft labels in place of a term's smoothing": (
        [
            "loss=mix",
            "~loss.terms.quality",
            "~loss.terms.generation",
            "loss.terms.preference.label_smoothing=0.1",
        ],
        PAIR | {"p_chosen": 0.7},
        "loss.terms.preference.label_smoothing=0.1: every training pair has a soft label",
    ),
    "pairs of a list of two": (
        [*DPO, "list_pairs=adjacent"],
        PAIR,
        "list_pairs=adjacent: no data set has a list of more than two ranked responses; leave",
    ),
    "threshold of no score": (
        [*KTO, "label_threshold=3"],
        PAIR,
        "label_threshold=3: no data set has responses with a label",
    ),
    "no pairs to unpair": (
        [*KTO, "unpair=false"],
        PAIR,
        "holds no responses with a label",
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(refused, good, tmp_path, case):
    loss, rows, message = LABELS[case]
    path = write(tmp_path / "own.jsonl", *(rows if isinstance(rows, list) else [rows]))
    says(refused(*good, *loss, f"datasets=[{path}]", "eval_share=0"), message)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("label_threshold=3", "label_threshold=3: is for losses on labelled responses"),
        ("label_threshold=high", "label_threshold=high: expected a finite number, or null"),
        ("label_threshold=nan", "label_threshold=nan: expected a finite number"),
        ("unpair=false", "unpair=False: is for losses on labelled responses, and this loss (dpo)"),
        ("list_pairs=some", "list_pairs=some: expected one of all, best-worst, adjacent"),
        ("soft_labels=maybe", "soft_labels=maybe: expected one of use, ignore"),
    ],
)
def test_knobs_of_labels(refused, good, override, expected):
    says(refused(*good, *DPO, override), expected)
    if override == "unpair=false":
        says(refused(*good, *KTO, "list_pairs=adjacent"), "list_pairs=adjacent: is for losses on p")


def test_sft_file_for_a_loss_of_pairs(refused, good, tmp_path):
    path = write(
        tmp_path / "sft.jsonl", *({"prompt": f"{i}?", "completion": f" {i}"} for i in range(20))
    )
    says(refused(*good, *DPO, f"datasets=[{path}]"), "sft.jsonl", "pairs", "chosen and rejected")


EOS = "<|end|>"
CASES = {
    "prompt_truncated": [{**PAIR, "prompt": "sea " * 600}],
    "response_truncated": [{**PAIR, "chosen": " sea" * 600}],
    "eos_in_text": [{**PAIR, "chosen": f" the{EOS} Baltic"}],
    "empty_prompt": [{**PAIR, "prompt": "  "}],
    "empty_response": [{**PAIR, "rejected": ""}],
    "identical_pair": [{**PAIR, "rejected": PAIR["chosen"]}],
    "identical_after_truncation": [{**PAIR, "chosen": " sea" * 700, "rejected": " sea" * 800}],
    "duplicate": [PAIR, PAIR],
    "contradictory": [PAIR, PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}],
    "prompt_in_eval": [PAIR],
}


def test_every_data_rule_has_a_case(compose):
    elsewhere = {"bad_row", "text_changed"}  # in test_left_out.py and test_token_text.py
    assert CASES.keys() | elsewhere == set(compose().data_rules)


@pytest.mark.parametrize("case", CASES)
def test_data_rule_that_says_stop(refused, good, tmp_path, case):
    """The error names the first such row, which stands after a good one, and the way out. Of two
    that contradict, both count.
    """
    path = write(tmp_path / "own.jsonl", OTHER, *CASES[case])
    held_out = write(tmp_path / "eval.jsonl", PAIR)
    files = [f"datasets=[{path}]", f"eval_datasets=[{held_out}]"]
    line = 2 if case == "contradictory" else 1 + len(CASES[case])
    says(
        refused(*good, *DPO, *files, f"data_rules.{case}=stop"),
        f"own.jsonl:{line}",
        f"data_rules.{case}=stop",
        f"data_rules.{case}=drop",
    )


def test_data_rules_that_leave_nothing(refused, good, tmp_path):
    path = write(tmp_path / "own.jsonl", {**PAIR, "rejected": PAIR["chosen"]})
    says(refused(*good, *DPO, f"datasets=[{path}]", "eval_share=0"), "own.jsonl", "identical_pair")


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (b"{% for m in messages %}{{ m.content }}", "chat_template"),  # no endfor
        (b"{{ raise_exception('only two turns') }}", "only two turns"),
        (b"{{ messages[0].content }}\xff", "chat_template"),
    ],
)
def test_chat_template(refused, good, tmp_path, template, part):
    file = tmp_path / "bad.jinja"
    file.write_bytes(template)
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "completion": f" {i}"} for i in range(20)
    ]
    path = write(tmp_path / "chat.jsonl", *rows)
    says(refused(*good, f"datasets=[{path}]", f"chat_template={file}"), part)


# ---- plugins and directories ----


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("import os\n\ndef f(:\n", ("SyntaxError", "line 3")),
        ("x = 1\nimport nosuchmodule\n", ("line 2", "nosuchmodule")),
        ("def f():\n    return 1 / 0\n\nf()\n", ("line 2", "ZeroDivisionError")),
    ],
)
def test_plugin(refused, good, tmp_path, code, parts):
    file = tmp_path / "mine.py"
    file.write_text(code)
    says(refused(*good, f"plugins=[{file}]"), f"plugins={file}", *parts)
    assert not [m for m in sys.modules.values() if getattr(m, "__file__", None) == str(file)]


def test_two_plugins_of_one_name(tmp_path):
    """Both are imported, each once."""
    files = [tmp_path / folder / "mine.py" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("open(__file__ + '.log', 'a').write('x')\n")
    import_plugins([*map(str, files), str(files[0])])
    assert [Path(f"{file}.log").read_text() for file in files] == ["x", "x"]


def test_local_run_dir_that_holds_a_run(refused, good, tmp_path):
    run = tmp_path / "earlier"
    run.mkdir()
    (run / "metrics.jsonl").write_text("kept")
    says(refused(*good, f"local_run_dir={run}"), f"local_run_dir={run}", "another directory")
    assert [f.name for f in run.iterdir()] == ["metrics.jsonl"] and (
        run / "metrics.jsonl"
    ).read_text() == "kept"


def test_local_dirs_that_cannot_be_written(refused, good, tmp_path):
    """A file in the directory's place, which stops root too."""
    (tmp_path / "file").write_text("")
    says(
        refused(*good, f"local_dirs=[{tmp_path}/file/runs]"), f"{tmp_path}/file/runs", "local_dirs"
    )


# ---- models ----


def test_model_name_offline(refused, good):
    says(
        refused(*good, "model.name_or_path=nosuch/model"),
        "nosuch/model",
        "HF_HUB_OFFLINE",
        "a local folder",
    )


def test_model_path_that_is_not_there(refused, good):
    says(
        refused(*good, "model.name_or_path=/no/such/folder"),
        "model.name_or_path=/no/such/folder",
        "no such folder",
    )


def shrink(folder):
    """To a model of 50 tokens, while its tokenizer knows more."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = AutoConfig.from_pretrained(folder, vocab_size=50)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)


def damage(folder, case):
    config = folder / "config.json"
    if case in ("no config", "nothing"):
        config.unlink()
    if case == "nothing":
        (folder / "tokenizer_config.json").unlink()
    elif case == "config cut":
        config.write_text(config.read_text()[:40])
    elif case == "unknown type":
        config.write_text(json.dumps({"model_type": "nosuch"}))
    elif case == "no weights":
        (folder / "model.safetensors").unlink()
    elif case == "weights cut":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif case == "weights of another size":
        config.write_text(
            config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 96')
        )
    elif case == "tokenizer cut":
        whole = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])
    elif case == "an index without its shard":
        (folder / "model.safetensors").unlink()
        index = {
            "metadata": {},
            "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif case == "a text for a size":
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": "large"'))
    elif case == "sizes that do not fit":
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 33'))
    elif case == "a negative size":
        config.write_text(
            config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": -2')
        )
    elif case == "a list for a config":
        config.write_text("[]")
    elif case == "a vocabulary that is too small":
        shrink(folder)
    elif case == "weights empty":
        (folder / "model.safetensors").write_bytes(b"")
    elif case == "weights with a header of 2**60 bytes":
        (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    elif case == "weights of text":
        (folder / "model.safetensors").write_text("weights")
    elif case == "no eos":
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "TokenizersBackend"})
        )


MODELS = {
    "no config": ("model.name_or_path",),
    "nothing": ("model.name_or_path", "neither config.json"),
    "config cut": ("name_or_path", "config.json"),
    "unknown type": ("model.name_or_path", "nosuch"),
    "no weights": ("model.name_or_path", "model.safetensors"),
    "weights cut": ("model.name_or_path",),
    "weights of another size": ("model.name_or_path",),
    "tokenizer cut": ("model.name_or_path", "tokenizer"),
    "an index without its shard": ("model.name_or_path",),
    "a text for a size": ("model.name_or_path", "hidden_size"),
    "sizes that do not fit": ("model.name_or_path", "33"),
    "a negative size": ("model.name_or_path", "num_hidden_layers=-2"),
    "a list for a config": ("model.name_or_path",),
    "a vocabulary that is too small": ("model.name_or_path", "50 tokens", "tokenizer"),
    "weights empty": ("model.name_or_path",),
    "weights with a header of 2**60 bytes": ("model.name_or_path",),
    "weights of text": ("model.name_or_path",),
    "no eos": ("model.tokenizer_name_or_path", "EOS"),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_folder(refused, good, tiny_model, tmp_path, case):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    damage(folder, case)
    says(refused(*good, f"model.name_or_path={folder}"), str(folder), *MODELS[case])


def test_model_architecture(refused, good, tiny_model):
    tokenizer = f"model.tokenizer_name_or_path={tiny_model}"
    line = refused(
        *good, "model.name_or_path=null", tokenizer, "model.architecture={model_type: nosuch}"
    )
    says(line, "model.architecture", "nosuch")
    heads = "{model_type: llama, num_attention_heads: 4, num_key_value_heads: 3, hidden_size: 64}"
    line = refused(*good, "model.name_or_path=null", tokenizer, f"model.architecture={heads}")
    says(line, "num_key_value_heads=3, which does not divide num_attention_heads=4")


# ---- policy.pt ----


def saved(path, state, **options):
    torch.save({"step_idx": 64, "state": state, "metrics": {}}, path, **options)
    return path


@pytest.fixture(scope="module")
def weights(tiny_model):
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(tiny_model).state_dict())


def bad_policy(path, weights, case):
    """A file that is no policy of `tiny_model`."""
    if case == "cut short":
        path.write_bytes(saved(path, weights).read_bytes()[:-5000])
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "text":
        path.write_text("weights")
    elif case == "bare state":
        torch.save(weights, path)
    elif case == "state of numbers":
        saved(path, {k: 1.0 for k in weights})
    elif case == "another architecture":
        saved(
            path,
            {
                "transformer.wte.weight": torch.zeros(5, 4),
                "transformer.wpe.weight": torch.zeros(5, 4),
            },
        )
    elif case == "another size":
        saved(path, {k: torch.zeros([2 * n for n in v.shape]) for k, v in weights.items()})
    elif case == "a layer more":
        saved(path, weights | {k.replace("layers.1", "layers.2"): v for k, v in weights.items()})
    elif case == "a tensor less":
        saved(path, {k: v for k, v in weights.items() if "layers.0.mlp.up_proj" not in k})
    return path


POLICIES = {
    "missing": ("no such file, run directory or pattern",),
    "cut short": ("not a readable checkpoint", "cut short"),
    "empty": ("not a readable checkpoint",),
    "text": ("not a readable checkpoint",),
    "bare state": ("not a policy.pt", "step_idx, state, metrics"),
    "state of numbers": ("not a policy.pt",),
    "another architecture": (
        "not the weights of this LlamaForCausalLM",
        "the model it was trained from",
    ),
    "another size": ("not the weights of this LlamaForCausalLM",),
    "a layer more": ("not the weights of this LlamaForCausalLM", "layers.2"),
    "a tensor less": ("not the weights of this LlamaForCausalLM", "up_proj"),
}


DAMAGED = {case for case, (what, *_) in POLICIES.items() if "readable" in what} | {
    "state of numbers"
}


@pytest.mark.parametrize("case", POLICIES)
def test_policy(refused, good, weights, tmp_path, case):
    path = bad_policy(tmp_path / "policy.pt", weights, case)
    code = 3 if case in DAMAGED else 2  # else a sound file of another kind, or of another model
    says(
        refused(*good, f"model.archive={path}", code=code), f"model.archive={path}", *POLICIES[case]
    )


def test_a_good_policy_is_taken(train_here, good, weights, tmp_path):
    """The same file with nothing wrong trains, or the refusals above would prove nothing."""
    path = saved(tmp_path / "policy.pt", weights)
    small = ["n_examples=4", "n_eval_examples=4", "sample_during_eval=false"]
    assert (train_here(*good, *DPO, f"model.archive={path}", *small) / "LATEST/policy.pt").is_file()


@pytest.fixture
def refused_early(refused, monkeypatch):
    """As `refused`, before any data are read."""

    def read(*arguments, **options):
        raise AssertionError("the data were read first")

    monkeypatch.setattr("plumb.data.prepare.load_examples", read)
    return refused


def _other_shapes(path):
    torch.save({"step_idx": 1, "state": tiny_llama_state(hidden_size=16), "metrics": {}}, path)


def _missing(path):
    state = tiny_llama_state()
    del state["model.norm.weight"]
    torch.save({"step_idx": 1, "state": state, "metrics": {}}, path)


def _reward(path):
    state = tiny_llama_state()
    torch.save(
        {"step_idx": 1, "state": state | {"lm_head.weight": torch.zeros(1, 32)}, "metrics": {}},
        path,
    )


def _foreign(path):
    torch.save({"model": tiny_llama_state(), "epoch": 3}, path)


def _another_model(path):
    torch.save(
        {"step_idx": 1, "state": {"transformer.wte.weight": torch.zeros(4, 4)}, "metrics": {}}, path
    )


def _cut_short(path):
    _foreign(path)
    path.write_bytes(path.read_bytes()[:20_000])


ARCHIVES = {
    "other shapes": (_other_shapes, "tensors of another shape", 2),
    "a weight missing": (_missing, "model.norm.weight", 2),
    "a reward model": (_reward, "a reward model, which has no LM head", 2),
    "a foreign file": (_foreign, "it holds model, epoch", 2),
    "another model": (_another_model, "not the weights of this LlamaForCausalLM", 2),
    "cut short": (_cut_short, "cut short", 3),
}


def tiny_llama_state(**sizes):
    """Of the tiny model, or of one of other sizes."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    n = len(AutoTokenizer.from_pretrained(ROOT / "demo/tokenizer"))
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=n, num_key_value_heads=1, **(small | sizes))
    ).state_dict()


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_of_something_else_is_refused_before_data_are_read(
    refused_early, good, tmp_path, case
):
    make, said, code = ARCHIVES[case]
    make(path := tmp_path / "policy.pt")
    line = refused_early(*good, f"model.archive={path}", code=code)
    assert line.startswith(f"model.archive={path}: ") and said in line


def test_a_folder_that_lacks_weights_is_refused_before_data_are_read(
    refused_early, good, tiny_model, tmp_path
):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "norm" not in k},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    line = refused_early(*good, f"model.name_or_path={folder}")
    assert (
        str(folder) in line and "missing keys, e.g. model.layers.0.input_layernorm.weight" in line
    )
    (folder / "model.safetensors").write_bytes(
        (tiny_model / "model.safetensors").read_bytes()[:50_000]
    )
    assert str(folder) in refused_early(*good, f"model.name_or_path={folder}")


def test_an_export_that_cannot_work_is_refused_before_data_are_read(refused_early, good, tmp_path):
    """No class for its scores, a template that is none, and places where no folder can be."""
    granite = save_family(tmp_path / "granite", "granite")
    line = refused_early(*good, f"model.name_or_path={granite}", "loss=reward", "export=hf")
    assert line.startswith(
        "export=hf: GraniteForCausalLM: transformers has no sequence-classification model"
    )
    (tmp_path / "bad.jinja").write_text("{% for")
    assert "not valid Jinja" in refused_early(
        *good, f"chat_template={tmp_path}/bad.jinja", "export=hf"
    )
    (tmp_path / "file").write_text("")
    line = refused_early(*good, f"local_run_dir={tmp_path}/file/run", "export=hf")
    assert "cannot be written" in line and "local_dirs" in line
    (tmp_path / "run/hf").mkdir(parents=True)
    line = refused_early(*good, f"local_run_dir={tmp_path}/run", "export=hf")
    assert (
        line
        == f"export=hf: {tmp_path}/run/hf already exists and is not a model's folder; move it away"
    )
