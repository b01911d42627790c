"""Make files that would run code, fill the memory or take forever if they were read carelessly.

Each maker is called with (path, mark): it writes a file in place of policy.pt; code that runs
creates the file `mark`.
"""

import io
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch


class Payload:
    """An object whose pickle calls `function(*arguments)` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Do nothing: it is not called, but a pickle may name it as a function."""


def save(path, state, metrics=None, **options):
    torch.save({"step_idx": 64, "state": state, "metrics": metrics or {}}, path, **options)


def forge(path, pickled, *more, compress=zipfile.ZIP_STORED, rename=lambda name: name):
    """Write what torch.save writes for 16 zeros, with its pickle replaced by `pickled(it)`,
    followed by `more` (name, content).
    """
    buffer = io.BytesIO()
    torch.save({"state": {"w": torch.zeros(16)}}, buffer)
    with zipfile.ZipFile(buffer) as original, zipfile.ZipFile(path, "w", compress) as forged:
        for name in original.namelist():
            content = original.read(name)
            forged.writestr(
                rename(name), pickled(content) if name.endswith("data.pkl") else content
            )
        for name, content in more:
            forged.writestr(name, content)


def touch(mark):
    return Payload(os.system, f"touch {mark}")


# ---- code: the calls ----

CALLS = {
    "os.system": touch,
    "eval": lambda mark: Payload(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Payload(exec, f"open({str(mark)!r}, 'w')"),
    "subprocess.Popen": lambda mark: Payload(subprocess.check_call, ["touch", str(mark)]),
    "Path.touch": lambda mark: Payload(Path.touch, mark),
    "os.mkdir": lambda mark: Payload(os.mkdir, str(mark)),
    "open": lambda mark: Payload(open, str(mark), "w"),
    "shutil.copy": lambda mark: Payload(shutil.copy, __file__, str(mark)),
    "getattr": lambda mark: Payload(
        Payload(getattr, Payload(__import__, "os"), "system"), f"touch {mark}"
    ),
    "an argument": lambda mark: Payload(OrderedDict, [("x", touch(mark))]),
    "torch's own loader": lambda mark: Payload(torch.storage._load_from_bytes, _saved(touch(mark))),
    "numpy": lambda mark: np.array([touch(mark)], dtype=object),
}


def _saved(payload):
    buffer = io.BytesIO()
    torch.save(payload, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


# ---- code: the places ----


def _two_pickles(path, mark):
    """Write two pickles: one library may read the first, another the second."""
    forge(
        path, lambda content: content, ("archive/data.pkl", pickle.dumps({"state": touch(mark)}, 2))
    )
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(
            next(n for n in file.namelist() if n.endswith("data.pkl")),
            pickle.dumps({"state": touch(mark)}, 2),
        )


def _tar(path, mark):
    """Write the format from before 2017."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            content = pickle.dumps(touch(mark), 2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _script(path, mark):
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


PLACES = {
    "a weight": lambda path, mark: save(path, {"w": torch.zeros(4), "x": touch(mark)}),
    "a name": lambda path, mark: save(path, {"w": torch.zeros(4)}, metrics={touch(mark): 1.0}),
    "the metrics": lambda path, mark: save(
        path, {"w": torch.zeros(4)}, metrics={"loss": touch(mark)}
    ),
    "the whole": lambda path, mark: torch.save(touch(mark), path),
    "protocol 0": lambda path, mark: forge(path, lambda _: pickle.dumps({"state": touch(mark)}, 0)),
    "protocol 4": lambda path, mark: forge(path, lambda _: pickle.dumps({"state": touch(mark)}, 4)),
    "protocol 5": lambda path, mark: forge(path, lambda _: pickle.dumps({"state": touch(mark)}, 5)),
    "opcode INST": lambda path, mark: forge(
        path, lambda _: f"(S'touch {mark}'\nios\nsystem\n.".encode()
    ),
    "opcode OBJ": lambda path, mark: forge(
        path, lambda _: f"(cos\nsystem\nS'touch {mark}'\no.".encode()
    ),
    "before 1.6": lambda path, mark: save(
        path, {"x": touch(mark)}, _use_new_zipfile_serialization=False
    ),
    "a bare pickle": lambda path, mark: path.write_bytes(pickle.dumps({"state": touch(mark)})),
    "two pickles": _two_pickles,
    "a tar": _tar,
    "names that climb": lambda path, mark: forge(
        path,
        lambda _: pickle.dumps(touch(mark), 2),
        rename=lambda name: "../" + name.partition("/")[2],
    ),
    "TorchScript": _script,
}
CODE = {
    name: lambda path, mark, call=call: save(path, {"x": call(mark)})
    for name, call in CALLS.items()
} | PLACES
# A trusting torch.load runs these; the others need another way in, or are refused anyway.
LOADED = CALLS.keys() | {"a weight", "a name", "the metrics", "the whole", "before 1.6"}
LOADED |= {"protocol 0", "protocol 4", "protocol 5", "opcode INST", "opcode OBJ"}

# ---- resources ----


def _declared(path, mark):
    """Write a storage that declares a billion numbers, of which the file has 16."""
    forge(path, lambda content: content.replace(b"K\x10", b"J\x00\x00\x00\x40"))


def _attributes(path, mark):
    """Write an OrderedDict whose items() is a number."""
    state = Payload(OrderedDict)
    state.call = (OrderedDict, (), {"items": 1, "keys": 2, "values": 3}, None, iter([("w", 7)]))
    save(path, state)


BOMBS = {
    "stride 0": lambda path, mark: save(path, {"w": torch.zeros(1).expand(1 << 20, 1 << 20)}),
    "bytearray": lambda path, mark: save(path, {"w": Payload(bytearray, 10**10)}),
    "torch.Tensor": lambda path, mark: save(path, {"w": Payload(torch.Tensor, 10**5, 10**6)}),
    "compressed": lambda path, mark: forge(
        path, lambda _: pickle.dumps("x" * 10**8, 2), compress=zipfile.ZIP_DEFLATED
    ),
    "compressed weights": lambda path, mark: forge(
        path, lambda content: content, compress=zipfile.ZIP_DEFLATED
    ),
    "millions of dicts": lambda path, mark: forge(
        path, lambda _: b"\x80\x02(" + b"}" * 8_000_000 + b"l."
    ),
    "deep": lambda path, mark: forge(
        path, lambda _: b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."
    ),
    "deep, as small as weights": lambda path, mark: forge(
        path, lambda _: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
    ),
    "size declared": _declared,
    "sparse": lambda path, mark: save(
        path, {"w": torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6))}
    ),
    "no storage": lambda path, mark: save(path, {"w": torch.empty(10**6, 10**6, device="meta")}),
    "windows": lambda path, mark: save(path, {"w": torch.zeros(1000).unfold(0, 500, 1)}),
    "whole numbers": lambda path, mark: save(path, {"w": torch.zeros(4, dtype=torch.int64)}),
    "complex": lambda path, mark: save(path, {"w": torch.zeros(4, dtype=torch.complex64)}),
    "quantized": lambda path, mark: save(
        path, {"w": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)}
    ),
    "a number for a name": lambda path, mark: save(path, {7: torch.zeros(4)}),
    "state of lists": lambda path, mark: save(path, [("w", torch.zeros(4))]),
    "attributes": _attributes,
    "cut short": lambda path, mark: (save(path, {"w": torch.zeros(4000)}), os.truncate(path, 5000)),
    "not cut at all": lambda path, mark: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "safetensors": lambda path, mark: path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      "),
}
