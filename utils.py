"""What every other module needs and none owns: the user's error, rank-0 printing, and the run directory.

Imports neither torch nor transformers, so that the data path can be read and tested without them.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm


def plain(config: Any) -> dict[str, Any]:
    """An OmegaConf node as a plain dict, its interpolations resolved; {} for None."""
    from omegaconf import OmegaConf

    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)) if config is not None else {}


class UserError(Exception):
    """A mistake the user can mend. `train.py` prints it as one line and exits with code 2, without a traceback.

    The message names the knob, or the file, row and field; its value; and the fix.
    """

    exit_code = 2


class UnsafeFile(UserError):
    """A file that would run code, or a checkpoint that is damaged with no whole one beside it: refused."""

    exit_code = 3


class NonFinite(UserError):
    """Loss, gradients or the check of the first step are not what they must be: stopped before the optimizer spreads it."""

    exit_code = 4


class StorageError(UserError):
    """The disk is full, or cannot be written; what was written before is whole."""

    exit_code = 5


class PeerLost(UserError):
    """Another process of this run died, or did not answer in time."""

    exit_code = 6


class ResumeMismatch(UserError):
    """What is to be resumed was made of something else, or is not there."""

    exit_code = 7


# What passes for a key or a password: of the hub, of OpenAI and its like, GitHub, GitLab, Slack, AWS; of wandb (40 hexadecimal
# digits, but not a commit, which stands after "revision=" or a slash); and in a URL.
SECRET = re.compile(
    r"""\b(?:hf_[A-Za-z0-9]{16,} | sk-[\w-]{16,} | gh[opsru]_\w{20,} | github_pat_\w{20,} | glpat-[\w-]{16,}
        | xox[abprs]-[\w-]{10,} | AKIA[0-9A-Z]{16} | wandb_v\d_\w{20,})
    | (?<![\w/])(?<!revision=)[0-9a-f]{40}(?!\w) | (?<=://)[^/\s@]+(?=@)""",
    re.X,
)


def redact(text: str) -> str:
    """The text without what looks like a secret.

    >>> redact("wandb.entity=hf_0123456789abcdefghij model.revision=" + 40 * "a")
    'wandb.entity=<secret> model.revision=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'
    """
    return SECRET.sub("<secret>", text)


def redacted(value: Any) -> Any:
    """A config, or what it is made of, fit to be logged."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    if isinstance(value, dict):
        return {redacted(key): inner if key == "revision" else redacted(inner) for key, inner in value.items()}
    return redacted(plain(value)) if hasattr(value, "_metadata") else value


def said(error: object) -> str:
    """An error as one line that a terminal shows as it is, whatever the file or knob that it quotes holds."""
    line = redact(" ".join(str(error).split("\n")))
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= 1000 else f"{line[:800]} ... {line[-190:]}"


def rank() -> int:
    """This process's rank in its group; before the group exists, the one torchrun gave it; 0 when there is one process.

    A stray RANK in the environment means nothing.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if under_torchrun() else 0


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank0_print(text: str) -> None:
    """Print a line on rank 0 only, above a progress bar if there is one."""
    if rank() == 0:
        tqdm.write(text)


def quiet() -> bool | None:
    """tqdm's `disable`: one process draws bars, and only on a terminal; elsewhere the log lines say how much is left."""
    return True if rank() != 0 else None


def get_local_dir(local_dirs: Sequence[str]) -> Path:
    """`<first of local_dirs that exists>/<user>`; the last of them stands in when none exists. Creates nothing."""
    return local_root(local_dirs) / getpass.getuser()


def local_root(local_dirs: Sequence[str]) -> Path:
    return Path(next((d for d in local_dirs if Path(d).is_dir()), local_dirs[-1]))


def get_local_run_dir(exp_name: str, local_dirs: Sequence[str]) -> str:
    """`<local dir>/<exp_name>_<timestamp>`. A name only: the directory is made after validation (2023: by the resolver)."""
    return str(get_local_dir(local_dirs) / f"{exp_name}_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}")


def environment() -> str:
    """JSON record of what ran: command, time, host, commit, versions and device. A log is evidence only with these."""
    import platform
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy", "hydra-core", "wandb")
    record = {
        "command": [Path(sys.executable).name, *map(redact, sys.argv)],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "packages": {name: version(name) for name in packages},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        record["threads"] = torch.get_num_threads()
        record["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return json.dumps(record, indent=2) + "\n"


def _git(*arguments: str) -> str | None:
    try:
        here = Path(__file__).parent
        # Without optional locks: a run that is killed here would leave one in the checkout.
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def sync_directory(directory: Path) -> None:
    """A new file or a rename is on the disk once its directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def peak_memory_gb() -> float:
    """The most memory this process has held: allocated on the GPU where one was used, else resident in RAM."""
    import resource

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
