"""The errors that end a command in one line, and their exit codes."""

from __future__ import annotations


class UserError(Exception):
    """Report a mistake the user can fix. `train.py` prints it as one line and exits with code 2,
    without a traceback.

    The message names the knob, or the file, row and field; its value; and the fix.
    """

    exit_code = 2


class UnsafeFile(UserError):
    """Refuse a file that would run code, or a damaged checkpoint when no valid one exists."""

    exit_code = 3


class NonFinite(UserError):
    """Stop before the optimizer spreads a loss or gradient that is not finite, or when a check of
    the first step fails.
    """

    exit_code = 4


class StorageError(UserError):
    """Report that the disk is full or not writable; earlier checkpoints are valid."""

    exit_code = 5


class PeerLost(UserError):
    """Report that another process of this run died or did not respond in time."""

    exit_code = 6


class ResumeMismatch(UserError):
    """Report that the checkpoint does not match this configuration, or that there is none."""

    exit_code = 7
