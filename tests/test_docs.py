"""The two walks of docs/walks.md: their functions are those that run; their counts and picture.
docs/options.md is what config/ and the schema say, docs/losses.md what the losses say.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT
from runs import records
from shell import BASH

from plumb.losses.registry import LOSSES
from plumb.settings import schema

WALKS = (ROOT / "docs/walks.md").read_text(encoding="utf-8")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def draw_walks():
    return script("draw_walks")


def test_the_walks_name_functions_that_exist(draw_walks):
    """And every numbered line is read, so that none escapes for its form."""
    walks = draw_walks.walks(WALKS)
    assert len(walks) == 2
    stops = [stop for walk in walks.values() for stop in walk]
    assert len(stops) == len(re.findall(r"^\d+\. ", WALKS, re.M))
    for stop in stops:
        draw_walks.definition(stop)


# Where each walk begins; the feed is a thread of its own.
ENTRIES = [
    {"plumb.data.prepare.load_examples"},
    {"plumb.batching.feed.Feed.step", "trainers.BasicTrainer.train"},
]


def function_of(frame):
    """Its name in its module; a function within a function is part of it."""
    return frame.f_code.co_qualname.partition(".<locals>")[0]


def running(frame):
    """The functions of the house that are running, the innermost first, but the exchange between
    processes.
    """
    names = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        ours = module.startswith("plumb.") or (ROOT / f"{module}.py").is_file()
        if ours and not module.startswith("plumb.distributed."):
            names.append(f"{module}.{function_of(frame)}")
        frame = frame.f_back
    return names


def test_the_walks_are_what_runs(draw_walks, train_here, tiny_model):
    """One row of HH, one step: each stop is called, in the listed order, and what is running then
    has been listed before it.
    """
    walks = draw_walks.walks(WALKS).values()
    functions = {stop.function for walk in walks for stop in walk}
    found = [{}, {}]  # of each walk: function -> what was running at its first call

    def watch(frame, event, _):
        if event == "call" and function_of(frame) in functions:
            stack = running(frame)
            for called, entries in zip(found, ENTRIES, strict=True):
                within = [i for i, name in enumerate(stack) if name in entries]
                if within:
                    called.setdefault(stack[0], stack[: within[-1] + 1])

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        train_here(
            f"model.name_or_path={tiny_model}",
            "datasets=[hh]",
            f"dataset_paths.hh={ROOT}/tests/fixtures/hh.jsonl",
            "eval_share=0",
            *("max_length=96", "max_prompt_length=48", "loss=dpo", "loss.beta=0.1"),
            *("reference=live", "batch_size=2", "n_examples=2"),
            *("do_first_eval=false", "do_last_eval=false"),
        )
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    for walk, called in zip(walks, found, strict=True):
        names = [f"{stop.module}.{stop.function}" for stop in walk]
        assert not [name for name in names if name not in called], "listed, and not called"
        for i, name in enumerate(names):
            assert set(called[name]) <= set(names[: i + 1]), "runs then, and is not listed before"


def test_a_function_that_is_gone_is_named(draw_walks):
    with pytest.raises(LookupError, match="no function plumb.batching.layout.fold"):
        draw_walks.definition(draw_walks.Stop("plumb.batching.layout", "fold", ""))


def test_the_counts_of_the_walks(draw_walks):
    """Functions and files as they are now, and lines to a tenth: a small edit needs no new table.
    `python docs/draw_walks.py` rewrites it.
    """
    rows = re.compile(r"^\| (.+) \| (\d+) \| (\d+) \| (\d+) \|$", re.M)
    now = rows.findall(draw_walks.table(draw_walks.walks(WALKS)))
    written = rows.findall(draw_walks.COUNTS.search(WALKS)[0])
    assert [row[:3] for row in written] == [row[:3] for row in now]
    assert [int(row[3]) for row in written] == pytest.approx([int(row[3]) for row in now], rel=0.1)


def test_lines_of_code_are_counted_without_docstring_comments_and_blanks(
    draw_walks, tmp_path, monkeypatch
):
    """def, two arguments, the closing line, a string over two lines, return: seven of eleven."""
    (tmp_path / "some.py").write_text(
        'def f(\n    a,\n    b,\n):\n    """Text.\n    """\n\n    # why\n'
        '    x = """one\n    two"""\n    return x\n'
    )
    monkeypatch.setattr(draw_walks, "ROOT", tmp_path)
    assert draw_walks.n_code_lines(draw_walks.Stop("some", "f", "")) == 7


def test_the_picture_is_drawn(draw_walks, tmp_path):
    draw_walks.main(tmp_path)
    assert (tmp_path / "walks.png").read_bytes().startswith(b"\x89PNG")
    assert "docs/walks.png" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_of_options():
    """`python docs/list_options.py` writes it anew."""
    list_options = script("list_options")
    assert (ROOT / "docs/options.md").read_text(encoding="utf-8") == list_options.page()
    listed = {option.name for option in list_options.options("config.yaml")} | {
        option.name for option in list_options.options("model/blank_model.yaml", "model.")
    }
    assert listed == set(schema.KNOBS) | set(schema.GROUPS)
    assert all(option.meaning for option in list_options.options("config.yaml"))


def test_the_page_of_losses():
    """`python docs/list_losses.py` writes it anew."""
    page = script("list_losses").page()
    assert (ROOT / "docs/losses.md").read_text(encoding="utf-8") == page
    sections = re.findall(r"^### (\w+)$", page.partition("<!-- sections: begin -->")[2], re.M)
    assert set(sections) == set(LOSSES)


def test_the_picture_of_losses(tmp_path):
    """Each loss on pairs has a finite curve, and `python docs/draw_losses.py` draws them."""
    draw_losses = script("draw_losses")
    draw_losses.main(tmp_path)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    for name, declared in LOSSES.items():
        if declared.group == "pair":
            values = draw_losses.curve(draw_losses.build_loss(draw_losses.knobs_of(name)))
            assert np.isfinite(values).all(), name


def test_the_readmes_own_loss_trains(run_train, tmp_path):
    """The function, the YAML and the command, as they stand there; the YAML as the text says for
    one that is kept out of the repository.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Your own loss")[2].partition("\n## ")[0]
    function, options, command = re.findall(r"```\w*\n(.*?)```", section, re.S)
    (tmp_path / "my_config/loss").mkdir(parents=True)
    (tmp_path / "my_config/loss/squared_hinge.yaml").write_text(options)
    (tmp_path / "my_loss.py").write_text(function)
    _, script, *overrides = shlex.split(command.replace("\\\n", " "))
    assert script == "train.py"
    overrides = [x.replace("[my_loss.py]", f"[{tmp_path}/my_loss.py]") for x in overrides]
    done = run_train(*overrides, "--config-dir", f"{tmp_path}/my_config")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").glob("*/squared_*")
    assert len(records(run_dir, "train")) == 20


def shell_blocks(page):
    """The bash blocks of a page, as one script."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))


@pytest.mark.skipif(BASH is None, reason="no bash")
def test_the_quickstart(warm, tmp_path):
    """Every command of the page in its order, with the demo's model and a handful of pairs in the
    place of a pretrained model and all of them; the chat is asked one question.
    """
    script = shell_blocks("quickstart.md").replace("model=smollm2-135m", "model=demo")
    script = script.replace("cp demo/train.jsonl", "head -n 60 demo/train.jsonl >")
    script = script.replace("n_eval_model_samples=4", "n_eval_model_samples=1 device=cpu")
    script = script.replace("--chat", "--chat --max-new-tokens 8 <<< 'Hello?\nquit'")
    for name in ("config", "demo", "train.py", "report.py", "sample.py", "export.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [BASH, "-euc", f"python() {{ '{warm.python}' \"$@\"; }}\n{script}"],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mine.html").is_file() and (tmp_path / "mine-hf/config.json").is_file()


def test_the_notebook(tmp_path, monkeypatch):
    """Its cells run in their order, with a handful of pairs; run directories lie under tmp_path."""
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any("[:1000]" in cell for cell in code)
    monkeypatch.chdir(ROOT)
    namespace = {}
    for cell in code:
        small = f'small = ["local_dirs=[{tmp_path}]", "device=cpu", '
        exec(cell.replace("[:1000]", "[:40]").replace("small = [", small), namespace)
    assert namespace["scores"].shape == (5, 2) and namespace["dpo"].is_relative_to(tmp_path)
