"""About 200 malformed files: each ends in one line with file, row and field, exit code 2, and
nothing written.

The rest of the 200, knobs, model folders and policy.pt, stands in test_bad_input.py,
test_security.py and test_unsafe_files.py. The cases run through `load_examples`, which is what
train.py calls before it loads a model.
"""

import time

import pytest
from malformed import CASES, LEGAL

from plumb.console import one_line
from plumb.data.prepare import load_examples
from plumb.errors import UserError
from plumb.models.load import load_tokenizer


@pytest.fixture(scope="module")
def prepared(compose, tiny_model):
    config = compose(
        "exp_name=x",
        f"model.name_or_path={tiny_model}",
        "loss=dpo",
        "loss.beta=0.1",
        "eval_share=0",
        "n_eval_examples=0",
    )
    return config, load_tokenizer(config)


@pytest.fixture
def read(prepared, tmp_path):
    config, tokenizer = prepared

    def run(case):
        path = tmp_path / f"rows{case.suffix}"
        case.write(path)
        config.datasets = [str(path)]
        config.local_dirs = [str(tmp_path / "runs")]
        return path, lambda: load_examples(config, tokenizer, "pair")

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(read, tmp_path, case):
    path, load = read(case)
    start = time.process_time()  # of this process: other load on the machine does not count
    with pytest.raises(UserError) as error:
        load()
    line = one_line(error.value)
    assert error.value.exit_code == 2 and line.isprintable() and len(line) <= 1000
    where = str(path) + (
        f", line {case.line}" if case.line and path.suffix not in (".json", ".parquet") else ""
    )
    assert line.startswith(where), line
    for part in case.expected:
        assert part in line, line
    assert time.process_time() - start < 5
    assert not [f for f in (tmp_path / "runs").rglob("*") if f.is_file()]


@pytest.mark.parametrize("case", LEGAL, ids=lambda case: case.name)
def test_legal_but_suspicious(read, capsys, case):
    """Trained on, with a line that counts it."""
    load = read(case)[1]
    assert load()[0]
    shown = capsys.readouterr().out
    for part in case.expected:
        assert part in shown, shown


def test_there_are_enough():
    names = [case.name for case in CASES + LEGAL]
    assert len(names) == len(set(names)) >= 150
