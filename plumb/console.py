"""Print on rank 0, in one line, without secrets. Imports neither torch nor transformers."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, cast

from tqdm import tqdm


def to_dict(config: Any) -> dict[str, Any]:
    """Return an OmegaConf node as a plain dict with its interpolations resolved; {} for None."""
    from omegaconf import OmegaConf

    return (
        cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        if config is not None
        else {}
    )


# What passes for a key or a password: of the hub, of OpenAI and its like, GitHub, GitLab, Slack,
# AWS; of wandb (40 hexadecimal digits, but not a commit, which stands after "revision=" or a
# slash); and in a URL.
SECRET = re.compile(
    r"""\b(?:hf_[A-Za-z0-9]{16,} | sk-[\w-]{16,} | gh[opsru]_\w{20,}
        | github_pat_\w{20,} | glpat-[\w-]{16,}
        | xox[abprs]-[\w-]{10,} | AKIA[0-9A-Z]{16} | wandb_v\d_\w{20,})
    | (?<![\w/])(?<!revision=)[0-9a-f]{40}(?!\w) | (?<=://)[^/\s@]+(?=@)""",
    re.X,
)


def redact(text: str) -> str:
    """Return the text without anything that looks like a secret.

    >>> redact("wandb.entity=hf_0123456789abcdefghij model.revision=" + 40 * "a")
    'wandb.entity=<secret> model.revision=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'
    """
    return SECRET.sub("<secret>", text)


def redacted(value: Any) -> Any:
    """Return a config, or a value in it, with secrets removed so that it can be logged."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    if isinstance(value, dict):
        return {
            redacted(key): inner if key == "revision" else redacted(inner)
            for key, inner in value.items()
        }
    return redacted(to_dict(value)) if hasattr(value, "_metadata") else value


def one_line(error: object) -> str:
    """Return an error as one line that is safe for a terminal, whatever the file or option that it
    quotes holds.
    """
    line = redact(" ".join(str(error).split("\n")))
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= 1000 else f"{line[:800]} ... {line[-190:]}"


def rank() -> int:
    """Return this process's rank in its group; before the group exists, the rank given by torchrun;
    0 for a single process.

    A stray RANK in the environment is ignored.
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
    """Return tqdm's `disable`: one process draws progress bars, and only on a terminal; elsewhere
    the log lines report progress.
    """
    return True if rank() != 0 else None
