"""Provide what the files at the root need: the run directory's name, the environment record, and
peak memory.

Imports neither torch nor transformers, so that the data path can be read and tested without them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

from plumb.console import redact
from plumb.paths import get_local_dir


def get_local_run_dir(exp_name: str, local_dirs: Sequence[str]) -> str:
    """Return `<local dir>/<exp_name>_<timestamp>`. Only the name: the directory is created after
    validation, not by the resolver as in the original.
    """
    return str(get_local_dir(local_dirs) / f"{exp_name}_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}")


def environment() -> str:
    """Return a JSON record of what ran: command, time, host, commit, versions and device. Without
    these, a log proves little.
    """
    import platform

    packages = (
        "torch",
        "transformers",
        "tokenizers",
        "datasets",
        "accelerate",
        "numpy",
        "hydra-core",
        "wandb",
    )
    record = {
        "command": [Path(sys.executable).name, *map(redact, sys.argv)],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "packages": {name: _version(name) for name in packages},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        record["threads"] = torch.get_num_threads()
        record["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return json.dumps(record, indent=2) + "\n"


@cache
def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


@cache  # this process runs the code of its start
def _git(*arguments: str) -> str | None:
    try:
        here = Path(__file__).parent
        # Without optional locks: a run that is killed here would leave one in the repository.
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_gb() -> float:
    """Return the peak memory of this process: allocated on the GPU if one was used, otherwise
    resident in RAM.
    """
    import resource

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
