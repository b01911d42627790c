"""Signals: the first asks a run to stop, the second quits at once.

Once training has begun a signal only sets a flag, which the training loop reads after each step
(see trainers.py).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

from plumb.console import under_torchrun

# torchrun and a queue may both pass a signal on: within this time it is the same one.
REPEAT_SECS = 10


class Stopped(BaseException):
    """Report that the run was asked to stop. Not an Exception, for the same reason as
    KeyboardInterrupt. `code`: 130 or 143.
    """

    def __init__(self, code: int, reason: str):
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


@dataclass
class SignalState:
    """Hold what signals asked of this process."""

    requested: int = 0  # the number of the first signal
    at: float = 0.0  # when the last one came
    # The training loop asks for `requested` after each step; until then a signal ends the process.
    waits_for_the_loop: bool = False
    # Another process started this one, passes signals on, and prints what there is to print.
    has_launcher: bool = False


state = SignalState()  # of this process: a signal handler has no other way to its data


def listen() -> None:
    """Handle SIGTERM, SIGHUP and SIGINT from here on. A second one, once training has begun, quits
    at once.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _handle)


def _handle(number: int, _frame: Any) -> None:
    again = state.requested
    state.requested = state.requested or number
    if not state.waits_for_the_loop:
        # a terminal and a launcher may both pass one on, while the first is being handled
        if again:
            if time.monotonic() - state.at > 1:
                os._exit(exit_code(again))
            return
        state.at = time.monotonic()
        if not state.has_launcher:
            _tell(b"")
        raise Stopped(
            exit_code(number), f"stopped by {signal.Signals(number).name} before the first step"
        )
    if (
        again
        and time.monotonic() - state.at > (REPEAT_SECS if under_torchrun() else 0)
        and not state.has_launcher
    ):
        _tell(b"")
        os._exit(exit_code(again))
    if not again and not state.has_launcher:
        _tell(b"stopping after this step; Ctrl-C again quits at once\n")
    state.at = time.monotonic()


def _tell(text: bytes) -> None:
    """Write to a terminal in place of a progress bar, and not by print, in which the signal may
    have come.
    """
    if sys.stderr.isatty():
        os.write(2, b"\r\x1b[J" + text)


def end_quietly() -> None:
    """Let a signal end this process silently from here on, since another one has printed the
    reason.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def reset() -> None:
    """Forget earlier signals: another run begins in the same process (a sweep)."""
    state.requested = 0
    state.waits_for_the_loop = False


def exit_code(number: int) -> int:
    """Return the exit code of a run that was stopped: 130 for SIGINT, 143 for all other signals and
    for 0 (out of time).
    """
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def stop_requested() -> int:
    """Return the number of the signal that asked this process to stop, or 0. From the first call
    on, signals only set this.
    """
    state.waits_for_the_loop = True
    return state.requested
