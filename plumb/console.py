"""Print on rank 0, in one line, without secrets. Imports neither torch nor transformers."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from functools import partial
from typing import Any, TextIO, cast

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


def significant(value: float, digits: int = 4) -> str:
    """Return a number in the digits that one reads at a glance, and no fewer than its whole ones.

    >>> significant(0.693147), significant(-0.00012), significant(31457.2)
    ('0.6931', '-0.00012', '31,457')
    """
    if abs(value) < 10 ** (digits - 1):
        return f"{value:.{digits}g}"
    return f"{value:,.0f}"


def duration(secs: float) -> str:
    """Return a time in one or two units.

    >>> duration(41.3), duration(754), duration(19_000), duration(200_000)
    ('41 s', '13 min', '5 h 17 min', '2 d 8 h')
    """
    if secs < 90:
        return f"{secs:.0f} s"
    minutes = round(secs / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = round(secs / 3600)
    return (
        f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
    )


def shortened(text: str, width: int, end: bool = False) -> str:
    """Return a text in one line of at most `width` characters, without a part of a word; `end`: its
    last words. A word that is longer than the width is cut.

    >>> shortened("How can I\\nlearn to knit?", 15)
    'How can I ...'
    >>> shortened("How can I\\nlearn to knit?", 15, end=True)
    '... to knit?'
    """
    words = "".join(c if c.isprintable() else " " for c in text).split()
    if len(line := " ".join(words)) <= width:
        return line
    room, kept = width - 4, ""
    for word in reversed(words) if end else words:
        longer = f"{word} {kept}" if end else f"{kept} {word}"
        if len(longer.strip()) > room:
            break
        kept = longer.strip()
    if end:
        return f"... {kept or line[-room:]}"
    return f"{kept or line[:room]} ..."


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank0_print(text: str) -> None:
    """Print a line on rank 0 only, above a progress bar if there is one. On a terminal, lines that
    are too long for it break between words.
    """
    if rank() == 0:
        tqdm.write(as_shown(text, sys.stdout))
        sys.stdout.flush()  # into a file, it would wait until there is much to write


def as_shown(text: str, stream: TextIO) -> str:
    """Return a text as it is written to a stream: for a terminal, lines that are too long for it
    are broken between words; paths stay whole.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrap = partial(
        textwrap.fill,
        width=width,
        subsequent_indent="  ",
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(line if len(line) <= width else wrap(line) for line in text.split("\n"))


def bar_width() -> int:
    """Return the columns of a progress bar. A typed ^C needs two places after it, or it would begin
    a new line.
    """
    return shutil.get_terminal_size().columns - 4


def on_terminal() -> bool:
    """Return whether both streams go to a terminal, so that a progress bar disturbs no log."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def quiet() -> bool | None:
    """Return tqdm's `disable`: one process draws progress bars, and only on a terminal; elsewhere
    the log lines report progress.
    """
    return True if rank() != 0 else None
