"""Share what the commands other than train.py need: options, one-line errors, and files that are
either complete or absent.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TextIO

from plumb.console import one_line
from plumb.errors import UserError
from plumb.paths import new_file, version


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line like all others, and refuses abbreviated options."""

    def __init__(self, description: str, **options: Any):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=_Help, **options
        )
        if " " not in self.prog:  # not for a subcommand
            self.add_argument("--version", action="version", version=version())

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse the arguments; options may stand between positional arguments."""
        parse = super().parse_args if self._subparsers else self.parse_intermixed_args
        return parse(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python {self.prog} --help")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help if action.default in (None, False, []) else super()._get_help_string(action)
        )


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> NoReturn:
    """Run a command: parse, call, and print errors the user can cause in one line. Exits with 0,
    the error's code, or 130.
    """
    code = 0
    try:
        main(parser.parse_args())
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a name or a disk that no command checked
        print(
            f"error: {one_line(error.filename or 'a file')}: {error.strerror or one_line(error)}",
            file=sys.stderr,
        )
        code = UserError.exit_code
    sys.exit(code)


@contextmanager
def temporary_jsonl(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Path]:
    """Write rows to a file of this name, which is removed afterwards: data from Python take the
    same path as files, with the same checks.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        write_jsonl(path, map(dict, rows), "rows")
        yield path


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]], option: str = "--out") -> int:
    """Write one object per line. Return how many."""
    n = 0
    with new_file(path, option) as file:
        n = sum(_line(file, row) for row in rows)
    return n


def _line(file: TextIO, row: dict[str, Any]) -> int:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 1
