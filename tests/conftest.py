"""What tests share: the real data beside the checkout, a tiny model, and the ways to run train.py:
in this process, in a forked one (see warm.py), and from cold.

No test needs the network, a GPU, or a path of one machine.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of transformers or datasets
os.environ["WANDB_MODE"] = "offline"
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    # Another machine is emulated: oneDNN must not see AVX-512 either, or SDPA in bfloat16 asks
    # torch for a kernel it lacks.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
# One thread to each process, whatever the caller has set: another number sums in another order,
# several pytest workers share the machine, and tests fork, which threads do not survive.
# TEST_THREADS=2 tries whether the tests' bounds hold for others.
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")

import hypothesis
import pytest
import torch
from runs import FAST, ROWS
from warm import WarmServer

import preference_datasets  # noqa: F401  registers its sets, as every command does
from plumb.reports import curves

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # where torch was imported before
# a busy one has paused within an example
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# Drawing takes longer than a tiny run does. What is about pictures asks for the fixture.
draw_all = curves.draw_all
curves.draw_all = lambda runs, further=True: b""

# Runs in this process don't wait for the disk. What its syncs are worth is shown by
# test_crash_states.py, which records them, and by torture.py, whose runs are other processes.
os.fsync = lambda handle: None

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
PATIENCE = 600  # seconds: for a hang, which a busy machine is not

# The files that take longest, which start first: else one worker ends long after the other.
# It needs --no-loadscope-reorder, since pytest-xdist starts those with most tests.
LONGEST = (
    "test_scale",
    "test_torture",
    "test_training",
    "test_resume",
    "test_moving",
    "test_signals",
    "test_families_loading",
    "test_loading",
    "test_benchmarks",
    "test_groups",
    "test_align",
    "test_bad_input",
)


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def threads_stay():
    """A run computes other bits with other threads: no test may leave their number changed."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(scope="session")
def shared():
    """`shared("data/hh")`: that path among the real data beside the checkout; skips the test where
    it is absent.
    """

    def find(relative="."):
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"needs the real data of {path}, which is not here")
        return path

    return find


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """See tiny.py."""
    from tiny import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def here(tmp_path):
    """What every run of a test is given: run directories under tmp_path, no wandb. Later overrides
    win.
    """
    return [f"local_dirs=[{tmp_path}/runs]", "wandb.enabled=false"]


@pytest.fixture
def pictures(monkeypatch):
    """Runs draw their curves."""
    monkeypatch.setattr(curves, "draw_all", draw_all)


@pytest.fixture(scope="session")
def warm():
    """See warm.py."""
    server = WarmServer(dict(os.environ))
    yield server
    server.close()


@pytest.fixture
def run_train(here, warm):
    """`run_train(*overrides, **environment)`: `python train.py` in a process of its own, forked
    after its imports. -> CompletedProcess with text.
    """

    def run(*overrides, **environment):
        command = ["train.py", *here, *map(str, overrides)]
        return warm.run(command, ROOT, os.environ | environment, PATIENCE)

    return run


@pytest.fixture
def run_train_from_cold(here):
    """The same by a new interpreter, which takes seconds: for what a fork might hide."""
    return lambda *overrides, **environment: run_command([*here, *overrides], **environment)


def run_command(overrides, **environment):
    command = [sys.executable, "train.py", *map(str, overrides)]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
    )


@pytest.fixture(scope="session")
def compose():
    """`compose(*overrides)`: the config of `python train.py <overrides>`, neither validated nor
    resolved.
    """
    import train  # noqa: F401  registers the resolver

    return compose_config


def compose_config(*overrides):
    import hydra

    from plumb.settings.hydra_guard import spelled_out

    with hydra.initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        return hydra.compose("config", spelled_out(map(str, overrides)))


@pytest.fixture
def train_here(here, compose, monkeypatch):
    """`train_here(*overrides)`: compose, validate and train in this process, which is fast. -> the
    run directory.

    exp_name is given; a UserError comes through as the exception.
    """
    from omegaconf import OmegaConf

    import train
    from plumb.runs import directory
    from plumb.settings.validation import validate

    monkeypatch.chdir(ROOT)

    def run(*overrides):
        config = compose(*here, "exp_name=test", *overrides)
        validate(config)
        config.local_run_dir = directory.find(config)
        OmegaConf.resolve(config)
        train.train(config)
        return Path(config.local_run_dir)

    return run


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def of_two(tmp_path, data, tiny_model, here, compose):
    """`of_two(name, *overrides)` -> the function that composes the config of such a run as `train`
    makes, for two processes of one group under FSDPTrainer.
    """
    two = ["trainer=FSDPTrainer", "n_cpu_processes=2"]

    def config_of(name, *overrides):
        names = [f"exp_name={name}", f"local_run_dir={tmp_path / name}"]
        names += [f"model.name_or_path={tiny_model}", f"datasets=[{data}]"]
        return partial(compose, *here, *names, *FAST, *two, *overrides)

    return config_of


@pytest.fixture
def train(tmp_path, data, tiny_model, train_here):
    """`train(name, *overrides)` -> the run directory of a short run on 18 + 2 pairs."""

    def run(name, *overrides):
        run_dir = tmp_path / name
        train_here(
            f"exp_name={name}",
            f"local_run_dir={run_dir}",
            f"model.name_or_path={tiny_model}",
            f"datasets=[{data}]",
            *FAST,
            *overrides,
        )
        return run_dir

    return run


@pytest.fixture
def trainer_of(train, monkeypatch):
    """`trainer_of(name, *overrides)`: the trainer of a run, which has ended, and its directory."""
    import trainers

    made = []
    init = trainers.BasicTrainer.__init__

    def keeping(self, *arguments):
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(trainers.BasicTrainer, "__init__", keeping)

    def run(name, *overrides):
        run_dir = train(name, *overrides)
        return made[-1], run_dir

    return run


@pytest.fixture
def halted_at(monkeypatch):
    """`halted_at(n)`: within, the process is gone after update n."""
    from groups import Halt

    import trainers

    step = trainers.BasicTrainer.step

    @contextmanager
    def install(n):
        def failing(self, *arguments):
            step(self, *arguments)
            if self.n_updates == n:
                raise Halt

        with monkeypatch.context() as patch:
            patch.setattr(trainers.BasicTrainer, "step", failing)
            yield

    return install
