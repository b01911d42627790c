"""Files that would run code or fill the memory are refused, in one line and with exit code 3, by
each way in.
"""

import resource
import sys
import time
from contextlib import suppress

import payloads
import pytest
import torch
from payloads import BOMBS, CODE, LOADED

from plumb.errors import UnsafeFile
from plumb.runs.policy_file import check_pickled_tensors, load_policy_state

# Each way in for a file that somebody else wrote: name -> read(path).
ENTRIES = {"model.archive": lambda path: load_policy_state(str(path))}

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about pickles and quantization

each_entry = pytest.mark.parametrize("entry", ENTRIES)


def refused(entry, path):
    with pytest.raises(UnsafeFile) as error:
        ENTRIES[entry](path)
    line = str(error.value)
    assert line.startswith(f"{entry}={path}: ") and "\n" not in line and error.value.exit_code == 3
    return line


@each_entry
@pytest.mark.parametrize("case", CODE)
def test_code(tmp_path, monkeypatch, entry, case):
    """Nothing has been run, although the environment asks torch to trust pickles."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, mark = tmp_path / "policy.pt", tmp_path / "ran"
    CODE[case](path, mark)
    refused(entry, path)
    with pytest.raises(UnsafeFile):  # before torch is asked, too
        check_pickled_tensors(path, "x")
    assert not mark.exists()


@pytest.mark.parametrize("case", sorted(LOADED))
def test_the_payloads_are_loaded_guns(tmp_path, case):
    """Each does run when a pickle is trusted: the test above can fail."""
    path, mark = tmp_path / "policy.pt", tmp_path / "ran"
    CODE[case](path, mark)
    with suppress(Exception):  # after the call, for what it returned
        torch.load(path, weights_only=False)
    assert mark.exists()


@each_entry
@pytest.mark.parametrize("case", BOMBS)
def test_bomb(tmp_path, entry, case):
    """In less than 2 seconds of CPU time, and with less than 200 MB."""
    path = tmp_path / "policy.pt"
    BOMBS[case](path, None)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    refused(entry, path)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (
        time.process_time() - start < 2
        and (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 200e6
    )


def test_torch_alone_would_not_do(tmp_path):
    """What weights_only lets through: 100 KB that become 100 MB, and a tensor of 4 TB. So the form
    is checked, too.
    """
    for case in ("compressed", "stride 0", "torch.Tensor"):
        BOMBS[case](tmp_path / case, None)
        try:
            torch.load(tmp_path / case, weights_only=True, mmap=True)
        except RuntimeError as error:
            assert case == "torch.Tensor" and "allocate" in str(error)  # it tried


def test_what_torch_save_writes_is_taken(tmp_path):
    """Each type of weight, tied ones, parameters, an OrderedDict with its _metadata, buffers of
    2023, metrics, views.
    """
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    state = model.state_dict()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        state[str(dtype)] = torch.randn(3, 2).to(dtype)
    state |= {"parameter": torch.nn.Parameter(torch.ones(2)), "empty": torch.zeros(0, 3)}
    state |= {"a slice": torch.randn(8)[2:4], "transposed": torch.randn(3, 2).T}
    state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    payloads.save(tmp_path / "policy.pt", state, metrics={"loss": 0.5, "n": 3, "names": ["a"]})
    loaded = load_policy_state(str(tmp_path))
    assert loaded.keys() == state.keys() - {"h.0.attn.bias"}
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)
