"""Plugins: the user's own Python files, which register data sets and losses."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from plumb.errors import UserError


def import_plugins(files: Iterable[str]) -> None:
    """Run the user's own Python files, so that their @dataset and @loss functions are
    registered.
    """
    for file in files:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"plugins={file}: no such file")
        # two files may have one name, in different folders
        folder = hashlib.blake2b(bytes(path.resolve().parent), digest_size=4).hexdigest()
        name = f"plugin_{path.stem}_{folder}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            if isinstance(error, ModuleNotFoundError) and error.name == "losses":
                raise UserError(
                    f"plugins={file}: losses.py is now a package: write 'from plumb.losses import"
                    " loss'"
                ) from None
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename == str(path)
            ]
            where = f"line {lines[-1]}: " if lines else ""  # a syntax error says its line itself
            raise UserError(
                f"plugins={file}: {where}{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from None
