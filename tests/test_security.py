"""No config, command line or model folder runs code, leaves the run root, or writes a secret
down.
"""

import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hydra.errors import HydraException
from payloads import BOMBS, CODE, touch
from runs import one_line
from transformers import AutoConfig

import train
from plumb import console
from plumb.console import redact, redacted
from plumb.errors import UnsafeFile, UserError
from plumb.models import source_trust
from plumb.runs.safe_yaml import MAX_BYTES, check_config_file
from plumb.settings import validation
from plumb.settings.hydra_guard import check_command_line

SCRIPT = ROOT / "train.py"


def refuses(arguments):
    with pytest.raises((UserError, HydraException)) as error:  # some Hydra cannot parse
        check_command_line(arguments, SCRIPT)
    assert (
        not isinstance(error.value, UserError)
        or "\n" not in str(error.value)
        and error.value.exit_code == 2
    )
    return str(error.value)


# ---- Hydra ----

OVERRIDES = [
    "hydra.callbacks.a._target_=evil.Callback",
    "+hydra.callbacks.a._target_=evil.Callback",
    "++hydra.callbacks={a: {_target_: evil.C}}",
    "hydra.searchpath=[file:///tmp]",
    "hydra.searchpath=[pkg://evil]",
    "~hydra.searchpath",
    "hydra/launcher=joblib",
    "hydra/sweeper=optuna",
    "hydra.launcher._target_=evil.L",
    "hydra.sweeper._target_=evil.S",
    "+hydra.job_logging={handlers: {a: {class: evil.H}}}",
    "hydra/job_logging=default",
    "hydra.job.env_set.LD_PRELOAD=/tmp/evil.so",
    "hydra.job.chdir=true",
    "hydra={}",
    "+hydra/callbacks=evil",
    "+model@hydra.callbacks=demo",
    "model@hydra=demo",
    "+exp@_global_.hydra=demo_sft",
    "hydra.hydra_help.hydra_help=evil",
]
TARGETS = [
    "_target_=evil.f",
    "+_target_=evil.f",
    "loss._target_=evil.f",
    "+loss._target_=evil.f",
    "++model.a.b.c._target_=evil.f",
    "optimizer_args={_target_: evil.f}",
    "model.architecture={a: {b: {_target_: evil.f}}}",
    "field_map={'_target_': evil}",
    "datasets=[{_target_: evil.f}]",
    'optimizer_args={"_target_": evil.f}',
]
FLAGS = [
    ["--experimental-rerun=/tmp/x.pickle"],
    ["--experimental-r", "/tmp/x"],
    ["--config-path=pkg://evil"],
    ["--config-name=../../x"],
    ["--config-name=/tmp/x"],
    ["-cp", "pkg://evil"],
    ["--config-p=pkg://evil"],
    ["--nosuch"],
    ["exp=../../../tmp/evil"],
    ["model=../exp/demo_sft"],
    ["+a/b=../../x"],
    ["exp=${oc.env:HOME}"],
    ["loss=dpo,../../x", "-m"],
]


@pytest.mark.parametrize("override", OVERRIDES + TARGETS)
def test_override(override):
    refuses(["exp_name=x", override])


@pytest.mark.parametrize("arguments", FLAGS, ids=" ".join)
def test_flag(arguments):
    refuses(["exp_name=x", *arguments])


CALLBACK = "hydra:\n  callbacks:\n    a:\n      _target_: evil.Callback\n"
FILES = {
    "callbacks": CALLBACK,
    "callbacks, global": "# @package _global_\n" + CALLBACK,
    "search path": "hydra:\n  searchpath: [file:///tmp]\n",
    "hydra is a text": "hydra: ${loss}\n",
    "package": "# @package hydra.callbacks\na: {b: 1}\n",
    "defaults: launcher": "defaults:\n- override hydra/launcher: evil\n",
    "defaults: logging": "defaults:\n- override hydra/job_logging: evil\n",
    "defaults: package": "defaults:\n- /model@hydra.callbacks: demo\n",
    "defaults: climbs": "defaults:\n- ../../../tmp/evil\n",
    "defaults: interpolated": "defaults:\n- model: ${oc.env:HOME}\n",
    "_target_": "_target_: evil.f\n",
    "_target_, deep": "a: {b: [{c: {d: [[{_target_: evil.f}]]}}]}\n",
    "alias": "a: &x [1]\nb: *x\n",
    "alias bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{y}: &{y} [{','.join(['*' + x] * 9)}]\n"
            for x, y in zip("abcdefgh", "bcdefghi", strict=True)
        )
    ),
    "merge": "a: &a {b: 1}\nc: {<<: *a}\n",
    "tag": "a: !!python/object/apply:os.system [touch ran]\n",
    "other tag": "a: !evil x\n",
    "too large": "a: " + "x" * 2_000_000,
    "many tokens": "a: [" + "1," * 1_000_000 + "]",
    "too large, and not UTF-8 where it is cut": "a: " + "x" * (MAX_BYTES - 3) + "é" * 10,
    "too deep": "a: " + "[" * 20_000,
    "too deep, in lines": "".join(" " * i + "a:\n" for i in range(100)),
    "not UTF-8": b"a: caf\xe9\n",
}


@pytest.mark.parametrize("where", ["mine.yaml", "exp/mine.yaml", "deep/er/mine.yml"])
@pytest.mark.parametrize("case", FILES)
def test_config_file(tmp_path, case, where):
    """In a folder that the command line names, whether or not it asks for the file; and in seconds,
    not minutes.
    """
    file = tmp_path / where
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(FILES[case] if isinstance(FILES[case], bytes) else FILES[case].encode())
    start = time.process_time()
    for flag in ("--config-dir", "--config-path", "-cd"):
        line = refuses([flag, str(tmp_path), "exp_name=x"])
        assert line.startswith(str(file))
    assert time.process_time() - start < 15


def test_a_folder_that_hides_hydras_own(tmp_path):
    (tmp_path / "hydra/launcher").mkdir(parents=True)
    assert "hydra" in refuses([f"--config-dir={tmp_path}"])


def test_a_folder_that_is_no_config_folder(tmp_path):
    for i in range(1001):
        (tmp_path / str(i)).mkdir()
    assert "1000" in refuses([f"--config-dir={tmp_path}"])


def test_what_is_needed_is_taken(tmp_path):
    """Sweeps, folders of one's own, and names that only look alike."""
    (tmp_path / "exp").mkdir()
    mine = (
        "# @package _global_\ndefaults:\n- override /loss: dpo\n\nexp_name: my_target_run\nlr:"
        " 1e-6\n"
    )
    (tmp_path / "exp/mine.yaml").write_text(mine)
    (tmp_path / "exp/half.yaml").write_text("a: [\n")  # not asked for
    for arguments in (
        ["-m", "loss.beta=0.1,0.2", "exp_name=x"],
        ["--config-dir", str(tmp_path), "exp=mine"],
        ["hydra.run.dir=/tmp/x"],
        ["--multirun", "exp=demo_sft,demo_dpo", "hydra.sweep.dir=/tmp/x"],
        ["exp_name=my_target_v2"],
        ["--cfg", "job"],
        ["--help"],
        ["datasets=[../my.jsonl]", "local_dirs=[..]"],
        ["model.archive='.cache/*/x_*'"],
        ["+dataset_paths.x=a"],
        [],
    ):
        check_command_line(arguments, SCRIPT)


def test_our_own_configs_are_taken():
    for file in (ROOT / "config").rglob("*.yaml"):
        check_config_file(file)


def test_hydra_would_have_run_it(tmp_path):
    """The callback does run when nobody looks: the tests above refuse something real. And the
    command refuses it.
    """
    (tmp_path / "evil.py").write_text(
        "import pathlib\nfrom hydra.experimental.callback import"
        f" Callback\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass C(Callback): pass\n"
    )
    override = "+hydra.callbacks.a._target_=evil.C"
    (tmp_path / "app.py").write_text(
        "import hydra\n@hydra.main(version_base='1.3', config_path=None)\ndef f(c): pass\nf()\n"
    )
    code = os.system(
        f"cd {tmp_path} && {sys.executable} app.py {override} hydra.run.dir=."
        " hydra.output_subdir=null"
    )
    assert code == 0 and (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    assert (
        os.system(
            f"cd {ROOT} && PYTHONPATH={tmp_path} {sys.executable} train.py {override} 2>"
            f" {tmp_path}/said"
        )
        != 0
    )
    assert (tmp_path / "said").read_text().startswith("error: ") and not (tmp_path / "ran").exists()


def test_a_sweep(run_train, tmp_path, tiny_model, data):
    """-m goes on working: two runs, one after the other."""
    small = [
        "n_examples=2",
        "n_eval_examples=2",
        "sample_during_eval=false",
        f"datasets=[{data}]",
        f"model.name_or_path={tiny_model}",
    ]
    done = run_train("exp_name=a,b", *small, "-m")
    assert done.returncode == 0, done.stderr
    assert {run.name[0] for run in (tmp_path / "runs").glob("*/[ab]_*")} == {"a", "b"}


# ---- names and places ----

NAMES = [
    "..",
    ".",
    "../x",
    "../../pwn",
    "a/b",
    "/etc/x",
    "a\\b",
    "a b",
    " a",
    "a ",
    "a\n",
    "a\tb",
    "a\0b",
    "",
    "é",
    "名前",
    "a:b",
    "a*b",
    "a?b",
    "a|b",
    "a;b",
    "a$b",
    "$(touch x)",
    "`touch x`",
    "a&b",
    "a'b",
    'a"b',
    "~",
    "~root",
    "x" * 101,
    "x" * 300,
    "%2e%2e",
    "a,b",
    "a{b}",
    "‥",
    "．．",
    "a\u202eb",
    "a\x1b[31m",
    "hf_" + "a" * 30,
    "sk-" + "b" * 40,
    "0123456789abcdef" * 2 + "01234567",
]


@pytest.fixture
def validate_name(compose, tmp_path):
    config = compose("exp_name=x", "model.name_or_path=x", f"local_dirs=[{tmp_path}]")

    def run(name):
        config.exp_name = name
        validation.validate(config)

    return run


def test_names_that_could_lead_elsewhere(validate_name, tmp_path):
    for name in NAMES:
        with pytest.raises(UserError, match="exp_name=(.|\n)*expected a text of 1 to 100 letters"):
            validate_name(name)
    assert not list(tmp_path.iterdir())


def test_names_that_are_taken(validate_name):
    for name in (
        "x",
        "anthropic_dpo_pythia69",
        "a.b-c_D9",
        "x" * 100,
        "...",
        "-a",
        ".a",
        "my_target_run",
    ):
        validate_name(name)


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_a_link_out_of_the_run_root(compose, tmp_path, outside, monkeypatch):
    """The user's folder is a link, or the user's name leads up: refused, unless local_run_dir is
    given.
    """
    root = tmp_path / "root"
    root.mkdir()
    overrides = ["exp_name=x", "model.name_or_path=x", f"local_dirs=[{root}]"]
    monkeypatch.setenv("LOGNAME", "../elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        validation.validate(compose(*overrides))
    monkeypatch.setenv("LOGNAME", "me")
    validation.validate(compose(*overrides))
    (root / "me").symlink_to(outside)
    with pytest.raises(UserError, match="leads out of"):
        validation.validate(compose(*overrides))
    validation.validate(compose(*overrides, f"local_run_dir={root}/me/x"))
    (tmp_path / "link").symlink_to(root)  # the root itself may be a link
    (root / "me").unlink()
    validation.validate(compose(*overrides[:2], f"local_dirs=[{tmp_path}/link]"))


# ---- secrets ----

TOKENS = [
    "hf_" + "aB3" * 11 + "x",
    "sk-" + "proj-" + "Ab1_" * 10,
    "ghp_" + "a1" * 18,
    "github_pat_" + "a1_" * 20,
    "glpat-" + "Ab1-" * 5,
    "xoxb-1234567890-abcdefghij",
    "AKIA" + "A1B2C3D4E5F6G7H8",
    "0123456789abcdef0123456789abcdef01234567",
    "wandb_v1_" + "aB3" * 12,
]


def test_no_secret_is_written_down(train, monkeypatch, capfd):
    """In the run directory and on the console: not from a knob, the command line or the
    environment.
    """
    for i, token in enumerate(TOKENS):
        monkeypatch.setenv(f"MY_TOKEN_{i}", token)
    paths = {
        name: token
        for name, token in zip(
            ("hh", "helpful", "harmless", "shp", "se", "saferlhf"), TOKENS[3:], strict=True
        )
    }
    knobs = [f"dataset_paths.{name}={token}" for name, token in paths.items()] + [
        f"wandb.project={','.join(TOKENS[:3])}"
    ]
    urls = [f"model.name_or_path=https://me:{token}@host/x" for token in TOKENS]
    monkeypatch.setattr(sys, "argv", ["train.py", *knobs, *urls])
    run = train(
        "secret",
        *[knob.replace(",", "\\,") for knob in knobs],
        "debug=true",
        "n_examples=2",
        "n_eval_examples=1",
    )
    written = {
        f.name: f.read_text()
        for f in run.rglob("*")
        if f.is_file() and f.suffix in (".yaml", ".json", ".jsonl")
    }
    assert {"config.yaml", "env.json", "metrics.jsonl"} <= written.keys() and "<secret>" in written[
        "config.yaml"
    ]
    said = capfd.readouterr()
    for token in TOKENS:
        assert (
            not [name for name, text in written.items() if token in text]
            and token not in said.out + said.err
        )


def test_wandb_gets_no_secret(train, monkeypatch):
    """Its files hold the config; the command line, of which it keeps a record of its own, is not
    among them.
    """
    token = TOKENS[0]
    monkeypatch.setattr(sys, "argv", ["train.py", f"dataset_paths.se={token}"])
    run = train(
        "secret",
        f"dataset_paths.se={token}",
        "wandb.enabled=true",
        "n_examples=2",
        "n_eval_examples=1",
    )
    files = [f for f in run.glob("wandb/**/*") if f.is_file()]
    assert any(b"<secret>" in f.read_bytes() for f in files) and not any(
        token.encode() in f.read_bytes() for f in files
    )


def test_commits_and_paths_are_no_secrets():
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = {
        "model": {"revision": commit, "name_or_path": f"/cache/snapshots/{commit}"},
        "seed": 0,
        "lr": 1e-6,
        "x": [None, True],
    }
    assert redacted(kept) == kept
    for text in (
        f"model.revision={commit}",
        f"/cache/{commit}",
        commit[:39],
        "task-based-learning-of-language-models",
        "hf_model",
        commit * 2,
    ):
        assert redact(text) == text


def test_the_environment_is_not_read(compose):
    for text in ("${oc.env:HOME}", "${oc.env:NOSUCH,default}", "x${oc.env:PATH}"):
        config = compose("exp_name=x", "model.name_or_path=x", f"wandb.project='{text}'")
        with pytest.raises(Exception, match="nothing is read from the environment"):
            validation.validate(config)


def test_an_error_is_one_line_that_a_terminal_shows():
    line = console.one_line(UserError("a\nb\x1b[31mc\r\x00 hf_" + "a" * 30 + " é名" + "x" * 5000))
    assert line.isprintable() and "é名" in line and "hf_a" not in line and len(line) < 1001


# ---- models ----


@pytest.fixture
def folder(tiny_model, tmp_path):
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def refused_model(compose, tmp_path, monkeypatch, capfd, data):
    """`refused_model(code, *overrides)`: the line with which the command refuses them."""

    def run(code, *overrides):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")
        here = [
            f"local_dirs=[{tmp_path}/runs]",
            "wandb.enabled=false",
            "exp_name=x",
            f"datasets=[{data}]",
        ]
        monkeypatch.setattr(sys, "argv", ["train.py", *here, *map(str, overrides)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            train.main()
        return one_line(exit.value.code, capfd.readouterr().err, tmp_path / "runs", code)

    return run


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


EVIL = "import pathlib\npathlib.Path({!r}).touch()\nclass C: pass\n"


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ("config.json", "AutoConfig"),
        ("config.json", "AutoModelForCausalLM"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ],
)
def test_code_in_a_model_folder(refused_model, folder, tmp_path, where, key):
    """auto_map names a class of a file in the folder: not imported. A type that transformers lacks
    is refused.
    """
    # transformers would import a copy of it
    (folder / "evil.py").write_text(EVIL.format(str(tmp_path / "ran")))
    edit(
        folder / where, auto_map={key: ["evil.C", "evil.C"] if key == "AutoTokenizer" else "evil.C"}
    )
    edit(folder / "config.json", model_type="nosuch")
    refused_model(2, f"model.name_or_path={folder}")
    assert not (tmp_path / "ran").exists()


KERNELS = [
    "evil/kernel",
    "evil/kernel@main:f",
    "kernels-community/flash-attn2",
    "flash_attention_2",
    {"": "evil/kernel"},
]


@pytest.mark.parametrize(
    "key", ["_attn_implementation_internal", "_attn_implementation", "attn_implementation"]
)
def test_a_kernel_in_a_config(folder, key):
    """Refused, or without effect, where this transformers does not read the key."""
    for value in KERNELS:
        edit(folder / "config.json", **{key: value})
        loaded = AutoConfig.from_pretrained(folder)
        if getattr(loaded, "_attn_implementation_internal", None) is not None:
            with pytest.raises(UnsafeFile, match="fetched and run"):
                source_trust.check_settings(loaded, "x")


def test_a_kernel_is_refused_by_the_command(refused_model, folder):
    edit(folder / "config.json", attn_implementation="evil/kernel")
    assert "evil/kernel" in refused_model(3, f"model.name_or_path={folder}")


def test_a_kernel_in_an_architecture(refused_model, tiny_model):
    architecture = (
        "{model_type: llama, vocab_size: 99, hidden_size: 32, attn_implementation: evil/kernel}"
    )
    line = refused_model(
        3,
        "model.name_or_path=null",
        f"model.tokenizer_name_or_path={tiny_model}",
        f"model.architecture={architecture}",
    )
    assert "evil/kernel" in line


def pickled(folder, make):
    (folder / "model.safetensors").unlink()
    make(folder / "pytorch_model.bin", folder / "ran")


@pytest.mark.parametrize(
    "case",
    ["os.system", "the whole", "before 1.6", "protocol 4", "compressed", "bytearray", "cut short"],
)
def test_pickled_weights_that_would_run_code(refused_model, folder, monkeypatch, case):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    pickled(folder, (CODE | BOMBS)[case])
    assert "pytorch_model.bin" in refused_model(3, f"model.name_or_path={folder}")
    assert not (folder / "ran").exists()


def indexed(folder, index, *names):
    """Weights in the files that an index names."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {key: names[i % len(names)] for i, key in enumerate(state)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return state


# How a folder could bring a pickle past a check of its usual names: name -> do(folder); (file, what
# is to happen).
DETOURS = {
    "an unrelated safetensors file": lambda f: (
        (f / "unrelated.safetensors").write_bytes(b"") or "pytorch_model.bin"
    ),
    "an empty variant": lambda f: (
        (f / "model.fp16.safetensors").write_bytes(b"") or "pytorch_model.bin"
    ),
    "an index with names of its own": lambda f: (
        indexed(f, "pytorch_model.bin.index.json", "weights-1.bin") and "weights-1.bin"
    ),
    "an index of safetensors": lambda f: (
        indexed(f, "model.safetensors.index.json", "weights-1.bin") and "weights-1.bin"
    ),
    "an index that climbs": lambda f: (
        indexed(f, "pytorch_model.bin.index.json", "../weights.bin") and "../weights.bin"
    ),
    "an absolute name": lambda f: (
        indexed(f, "pytorch_model.bin.index.json", f"{f}/w.bin") and "w.bin"
    ),
    "a subfolder": lambda f: (
        (f / "sub").mkdir()
        or indexed(f, "pytorch_model.bin.index.json", "sub/w.bin")
        and "sub/w.bin"
    ),
    "another ending": lambda f: (
        indexed(f, "pytorch_model.bin.index.json", "weights.pt") and "weights.pt"
    ),
    "a pickle called safetensors": lambda f: "model.safetensors",
    "a pickle in an index": lambda f: (
        indexed(f, "model.safetensors.index.json", "a.safetensors") and "a.safetensors"
    ),
    "named by the config": lambda f: (
        edit(f / "config.json", transformers_weights="adapter_model.bin") or "adapter_model.bin"
    ),
    "named by the config, elsewhere": lambda f: (
        edit(f / "config.json", transformers_weights="../w.safetensors") or "../w.safetensors"
    ),
}


@pytest.mark.parametrize("case", DETOURS)
def test_no_way_around_the_check_of_pickles(refused_model, folder, monkeypatch, case):
    """Refused in one line, which names the file or where it is named; and nothing has run."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = DETOURS[case](folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    CODE["os.system"](folder / file, folder / "ran")
    line = refused_model(2 if case.startswith("a pickle") else 3, f"model.name_or_path={folder}")
    assert Path(file).name in line or case.startswith("a pickle")
    assert not (folder / "ran").exists()


# What lies beside the weights and is not opened: name -> make(folder, mark).
BYSTANDERS = {
    "an old pickle": lambda f, mark: CODE["os.system"](f / "pytorch_model.bin", mark),
    "an adapter": lambda f, mark: (
        CODE["os.system"](f / "adapter_model.bin", mark),
        (f / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "evil/base", "peft_type": "LORA"})
        ),
    ),
    "a distributed checkpoint": lambda f, mark: (
        (f / ".metadata").write_bytes(pickle.dumps(touch(mark))),
        (f / "__0_0.distcp").write_bytes(b""),
    ),
    "weights of other libraries": lambda f, mark: [
        CODE["os.system"](f / name, mark)
        for name in ("tf_model.h5", "flax_model.msgpack", "training_args.bin", "optimizer.pt")
    ],
}


@pytest.mark.parametrize("case", BYSTANDERS)
def test_what_stands_beside_the_weights_is_not_opened(folder, compose, monkeypatch, case):
    from safetensors.torch import load_file

    from plumb.models import load

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    BYSTANDERS[case](folder, folder / "ran")
    model = load.load_policy(compose(f"model.name_or_path={folder}"))
    assert all(
        model.state_dict()[k].equal(v) for k, v in load_file(folder / "model.safetensors").items()
    )
    assert not (folder / "ran").exists()


def test_weights_in_the_files_that_an_index_names(folder, compose):
    """Plain names of this folder, pickles and safetensors, are taken; and a file that is not there
    is named.
    """
    from safetensors.torch import save_file

    from plumb.models import load

    for index, names, save in (
        ("pytorch_model.bin.index.json", ("weights-1.bin", "b.bin"), torch.save),
        ("model.safetensors.index.json", ("x.safetensors", "y.safetensors"), save_file),
    ):
        there = Path(shutil.copytree(folder, folder.with_name(index)))
        state = indexed(there, index, *names)
        for i, name in enumerate(names):
            save(
                {k: v for j, (k, v) in enumerate(state.items()) if j % len(names) == i},
                there / name,
            )
        model = load.load_policy(compose(f"model.name_or_path={there}"))
        assert all(model.state_dict()[k].equal(v) for k, v in state.items())
        (there / names[1]).unlink()
        with pytest.raises(UserError, match=f"{index} names {names[1]}, which is not there"):
            load.load_policy(compose(f"model.name_or_path={there}"))


def test_pickled_weights_of_2023_are_taken(train_here, folder, data):
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    pickled(folder, lambda path, mark: torch.save(state, path))
    train_here(
        f"model.name_or_path={folder}",
        f"datasets=[{data}]",
        "n_examples=2",
        "n_eval_examples=2",
        "sample_during_eval=false",
    )


@pytest.mark.parametrize("name", ["../../x", "a/b", "/tmp/x", ".."])
def test_a_template_whose_name_is_a_path(refused_model, folder, name):
    templates = [{"name": "default", "template": "{{ messages }}"}, {"name": name, "template": "x"}]
    edit(folder / "tokenizer_config.json", chat_template=templates)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert repr(name) in refused_model(3, f"model.name_or_path={folder}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["folder", "policy.pt"])
def test_weights_that_are_not_finite(refused_model, folder, tmp_path, value, kind):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = value
    if kind == "folder":
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        line = refused_model(3, f"model.name_or_path={folder}")
    else:
        torch.save({"step_idx": 1, "state": state, "metrics": {}}, tmp_path / "policy.pt")
        line = refused_model(
            3, f"model.name_or_path={folder}", f"model.archive={tmp_path}/policy.pt"
        )
        assert "policy.pt" in line
    assert "model.norm.weight" in line


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.revision=main"], "40 hexadecimal digits"),
        (["model.revision=0123456789abcdef"], "40 hexadecimal digits"),
        (["model.trust_remote_code=true"], "needs model.revision"),
        (["model.trust_remote_code=yes"], "true or false"),
        (
            [
                f"model.revision={COMMIT}",
                "model.trust_remote_code=true",
                "model.name_or_path={folder}",
            ],
            "only for a name on the hub",
        ),
        ([f"model.revision={COMMIT}", "model.name_or_path={folder}"], "only for a name on the hub"),
    ],
)
def test_revision(refused_model, folder, overrides, part):
    line = refused_model(
        2,
        "model.name_or_path=someone/model",
        *(o.replace("{folder}", str(folder)) for o in overrides),
    )
    assert part in line


def test_a_revision_is_handed_on(compose):
    """Code is asked for at the same commit, also where it lies in another repository; another
    tokenizer's is not run.
    """
    spec = compose(
        "exp_name=x",
        "model.name_or_path=a/b",
        f"model.revision={COMMIT}",
        "model.trust_remote_code=true",
    ).model
    assert source_trust.pinned(spec, "a/b") == {
        "revision": COMMIT,
        "code_revision": COMMIT,
        "trust_remote_code": True,
    }
    assert source_trust.pinned(spec, "c/d") == {"trust_remote_code": False}
