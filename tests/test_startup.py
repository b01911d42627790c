"""Start-up: what only prints help or refuses a knob imports neither torch nor transformers."""

import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser

from plumb.errors import UserError
from plumb.models.forward_path import DTYPES
from plumb.settings import schema

HEAVY = "torch", "transformers", "datasets", "pyarrow", "matplotlib", "wandb", "accelerate"
COMMANDS = "train.py", "eval.py", "sample.py", "score.py", "report.py", "export.py"
# Runs a command as __main__ and prints, last, which heavy libraries it has imported.
WATCHED = f"""
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *sorted({set(HEAVY)} & sys.modules.keys()))
"""
DEMO = ["exp_name=x", "model=demo", "wandb.enabled=false", "max_length=64", "max_prompt_length=32"]


def start(command, *arguments):
    """Run the command with these arguments. -> its exit code, what it wrote, the heavy imports"""
    code = f"import sys; sys.argv = {[command, *arguments]}; sys.path.insert(0, '.'){WATCHED}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    printed, _, imported = done.stdout.rpartition("imported:")
    return done.returncode, printed + done.stderr, imported.split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    code, text, imported = start(command, "--help")
    assert (code, imported) == (0, []) and command.removesuffix(".py") in text


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        (["lr=-1"], "missing: exp_name, model.name_or_path; add exp_name=... "),
        (["model=demo"], "missing: exp_name"),
        ([*DEMO, "learning_rate=1"], "learning_rate=1: no such knob"),
        ([*DEMO, "lr=-1"], "lr=-1: expected a number above 0"),
        ([*DEMO, "datasets=[hhh]"], "unknown data set 'hhh'; did you mean 'hh'?"),
        ([*DEMO, "tp_size=2"], "tp_size=2: is for trainer=TensorParallelTrainer"),
        ([*DEMO, "loss=nosuch"], "loss=nosuch: no such file in config/loss"),
        ([*DEMO, "model.archive=/nosuch"], "model.archive=/nosuch: no such file"),
    ],
)
def test_a_refused_knob_imports_nothing_heavy(knobs, line):
    code, text, imported = start("train.py", *knobs)
    assert (code, imported) == (2, []) and text.startswith("error: ") and line in text


def test_a_run_composes_its_config_once(monkeypatch, capsys):
    composed = []
    load = ConfigLoaderImpl.load_configuration

    def counted(*arguments, **options):
        composed.append(1)
        return load(*arguments, **options)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    monkeypatch.setattr(sys, "argv", ["train.py", *DEMO, "lr=-1"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("train").main()
    assert (ended.value.code, len(composed)) == (2, 1)
    assert "lr=-1: expected a number above 0" in capsys.readouterr().err


def test_an_evaluation_refuses_what_only_training_reads():
    (lr,) = OverridesParser.create().parse_overrides(["lr=1"])
    with pytest.raises(UserError, match="^lr=1: not applicable to evaluation"):
        importlib.import_module("eval").check_override(lr, None)


def test_the_schema_knows_the_names_of_the_dtypes():
    assert set(schema.DTYPE_NAMES) == set(DTYPES)


def test_the_benchmark_s_table():
    """Median, range and CPU time of each side."""
    spec = importlib.util.spec_from_file_location("startup", ROOT / "benchmarks/startup.py")
    startup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(startup)
    times = {("help", "now"): [startup.Time(wall, 0.5) for wall in (3.0, 1.0, 2.0)]}
    assert startup.table(times, ["now"]).splitlines()[2] == "| help | 2.00 | 1.00-3.00 | 0.50 |"
    case = startup.Case("refused", ["train.py", "lr=-1"], 2, until="missing: exp_name")
    assert startup.measure(case, ROOT).wall > 0
    with pytest.raises(RuntimeError, match="refused ended with 2"):
        startup.measure(case._replace(code=0), ROOT)
