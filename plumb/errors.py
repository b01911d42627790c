"""The errors that end a command in one line, and their exit codes."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can fix. `train.py` prints it as one line and exits with code 2, without
    a traceback.

    The message names the knob, or the file, row and field; its value; and the fix.
    """

    exit_code = 2


class UnsafeFile(UserError):
    """A file that would run code, or a checkpoint that is damaged with no whole one beside it:
    refused.
    """

    exit_code = 3


class NonFinite(UserError):
    """Loss, gradients or the check of the first step are not what they must be: stopped before the
    optimizer spreads it.
    """

    exit_code = 4


class StorageError(UserError):
    """The disk is full, or cannot be written; what was written before is whole."""

    exit_code = 5


class PeerLost(UserError):
    """Another process of this run died, or did not answer in time."""

    exit_code = 6


class ResumeMismatch(UserError):
    """The checkpoint does not match this configuration, or there is none."""

    exit_code = 7
