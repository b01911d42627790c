"""From Python: docs/api.md, what `import plumb` costs, and what an installation adds."""

import doctest
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT
from setuptools import find_packages

import plumb
import train
from plumb.errors import UserError


class AfterTheLog(doctest.OutputChecker):
    """What a run prints on its way stands before the value that the page shows."""

    def check_output(self, want, got, optionflags):
        return not want or got.endswith(want)


def test_the_page(tmp_path, monkeypatch):
    """Its commands give what it shows; runs and caches go to tmp_path."""
    spelled_out = train.spelled_out
    here = [f"local_dirs=[{tmp_path}]"]
    monkeypatch.setattr(train, "spelled_out", lambda words: spelled_out([*words, *here]))
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    page = doctest.DocTestParser().get_doctest(text, {}, "api.md", "docs/api.md", 0)
    failed, tried = doctest.DocTestRunner(AfterTheLog()).run(page)
    assert tried > 10 and not failed
    assert list(tmp_path.glob("*/dpo_*/LATEST/policy.pt"))


def test_import_plumb_is_light():
    code = "import sys; before = {*sys.modules}; import plumb; print(*({*sys.modules} - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {name.split(".")[0] for name in done.stdout.split()}
    assert imported - sys.stdlib_module_names == {"plumb"}


def test_names_of_the_package():
    assert all(callable(getattr(plumb, name)) for name in plumb.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        plumb.trian  # noqa: B018


def test_rows_are_checked_like_a_file_s(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    demo = ["model=demo", "max_length=64", "max_prompt_length=32", f"local_dirs=[{tmp_path}]"]
    with pytest.raises(UserError, match="rows.jsonl, line 2: no field 'rejected'"):
        train.train_on([good, {"prompt": "a", "chosen": "b"}], *demo, "loss=dpo", "loss.beta=1")
    with pytest.raises(UserError, match="lr=-1: expected a number above 0"):
        train.train_on([good], *demo, "lr=-1")


def test_an_installation_adds_one_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    found = project["tool"]["setuptools"]["packages"]["find"]
    packages = find_packages(str(ROOT), include=found["include"])
    assert {name.split(".")[0] for name in packages} == {"plumb"}
    assert "py-modules" not in project["tool"]["setuptools"]
    rooms = {path.parent for path in ROOT.glob("plumb/**/*.py")}
    assert {ROOT / name.replace(".", "/") for name in packages} == rooms
