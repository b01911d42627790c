"""The short form of `make torture`: some twenty SIGKILLs, some system calls of a save, errors, full
disks.
"""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SHORT = ["--seed=0", "--kills=16", "--calls=4", "--errors=4", "--disks=1"]


@pytest.fixture(scope="module")
def tallies(tmp_path_factory):
    """[(name, counts, wrong)]; in a process of its own, which has used no thread before it
    forks.
    """
    path = tmp_path_factory.mktemp("torture") / "report.json"
    command = [sys.executable, "tests/support/torture.py", *SHORT, f"--json={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert path.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return [
        (tally["name"], tally["counts"], tally["wrong"]) for tally in json.loads(path.read_text())
    ]


def of(tallies, what):
    return [(counts, wrong) for name, counts, wrong in tallies if what in name]


def test_killed_at_random_every_run_ends_as_if_it_had_not_been(tallies):
    found = of(tallies, "SIGKILL at random")
    assert [wrong for _, wrong in found if wrong] == []
    kills, inside = (
        sum(counts.get(name, 0) for counts, _ in found) for name in ("kills", "kills in a save")
    )
    assert len(found) == 4 and kills >= 16
    assert inside >= kills / 4, "too few of them inside a save: too weak a test"


def test_the_kills_find_what_is_wrong(tallies):
    assert of(tallies, "control")[0][1] == []


def test_killed_at_system_calls_of_a_save(tallies):
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    ((counts, wrong),) = of(tallies, "each system call")
    assert not wrong and counts["kills"] == 4


def test_errors_of_system_calls(tallies):
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    ((counts, wrong),) = of(tallies, "an error in place")
    assert not wrong and counts["exit 5"] > 2


def test_a_full_disk(tallies):
    if not of(tallies, "a full disk"):
        pytest.skip("needs unshare -rm")
    ((counts, wrong),) = of(tallies, "a full disk")
    assert not wrong and counts["full disks"] == 1
