"""Shell scripts without what they start: a stand-in for Python notes each command line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from conftest import ROOT

BASH = shutil.which("bash")
STAND_IN = '#!/bin/sh\nprintf \'%s\\0\' "$@" >> "$COMMANDS"\nprintf \'\\n\' >> "$COMMANDS"\n'


def commands_of(
    script: str, folder: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run a script of the checkout with the stand-in as PYTHON. Return the finished process, and
    the arguments of each command in order.
    """
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    log = folder / "commands"
    log.write_text("")
    done = subprocess.run(
        [str(BASH), str(ROOT / script), *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "COMMANDS": str(log)} | environment,
        capture_output=True,
        text=True,
    )
    return done, [line.split("\0")[:-1] for line in log.read_text().splitlines() if line]
