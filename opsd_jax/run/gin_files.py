# SPDX-License-Identifier: Apache-2.0
"""Where a gin file's includes and imports are: beside the file that says so, and in the cwd."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.host.hub import Kind, is_hub_name

_HEADER = "# Imports from "
_MODULES = (".py", os.sep + "__init__.py")


# Fields that may name something on the Hub, and what.
HUB_FIELDS: Mapping[str, tuple[str, Kind]] = {
    "PretrainedModel": ("path", "model"),
    "JsonlProblems": ("path", "dataset"),
    "ParquetProblems": ("path", "dataset"),
    "Benchmark": ("path", "dataset"),
    "RandomModel": ("tokenizer", "model"),
}
_PATHS = ("path", "workdir", "cache_dir", "data_dir")
_FOLDERS = ("RandomModel.tokenizer", "RandomModel.config")  # or something else than a folder


def absolute_path(name: str, field: str, value: Any) -> Any:
    """The value of a source's field, absolute if it is a relative path; else as it is.

    Args:
      name: of the source, such as "JsonlProblems".
      field: of it.
      value: anything.
    """
    if not isinstance(value, str) or value in ("", "smollm2") or "://" in value or value[0] == "~":
        return value
    if name in HUB_FIELDS and is_hub_name(value):
        return value
    is_folder = f"{name}.{field}" in _FOLDERS and os.path.isdir(value)
    return os.path.abspath(value) if field in _PATHS or is_folder else value


def make_absolute(config: Mapping[tuple[str, str], dict[str, Any]]) -> None:
    """Makes relative paths absolute, so that a config.gin means the same in every folder.

    Args:
      config: gin's bindings by (scope, selector), changed in place: those of our own sources and
        the macros that stand there.
    """
    for (_, selector), values in config.items():
        module, _, name = selector.rpartition(".")
        for field, value in values.items() if module == "opsd_jax" else ():
            if repr(value).startswith("%"):
                if macro := config.get((repr(value)[1:], "gin.macro")):
                    macro["value"] = absolute_path(name, field, macro["value"])
            else:
                values[field] = absolute_path(name, field, value)


def with_absolute_paths(source: Any) -> Any:
    """The same for the fields of a dataclass and of the dataclasses in it."""
    if not dataclasses.is_dataclass(source) or isinstance(source, type):
        return source
    changes = {
        field.name: absolute_path(
            type(source).__name__, field.name, with_absolute_paths(getattr(source, field.name))
        )
        for field in dataclasses.fields(source)
        if field.init
    }
    return dataclasses.replace(source, **changes)


class GinFiles:
    """The files of one config, read for gin; makes their folders importable.

    Attributes:
      folders: of all files so far, and the cwd.
    """

    def __init__(self) -> None:
        self.folders: list[str] = []
        self._open: list[str] = []  # each included by the one before
        self._add(os.getcwd())

    @contextmanager
    def read(self, path: str) -> Iterator[io.StringIO]:
        """Opens a gin file, or what an include names.

        Raises:
          UserError: there is no such file, it includes itself, it is no text or it ends too early.
        """
        path = self._find(path)
        if any(os.path.samefile(path, file) for file in self._open):
            raise UserError(f'{self._open[-1]}: include "{path}" makes the file include itself')
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not a gin file: {error}") from None
        self._open.append(path)
        self._add(os.path.dirname(os.path.abspath(path)))
        for line in text.splitlines():
            if line.startswith(_HEADER):
                self._add(line.removeprefix(_HEADER))
        lines = io.StringIO(text)
        lines.name = path  # type: ignore[attr-defined]  # Gin's messages take it from here.
        try:
            yield lines
        except tokenize.TokenError as error:  # knows no file
            reason, (line, _) = error.args
            raise UserError(f"{path}, line {line}: {reason}") from None
        self._open.pop()

    def header(self, modules: Iterable[str]) -> str:
        """Comments by which `read` finds these modules again, wherever it is called."""
        names = {module.partition(".")[0] for module in modules}
        found = [
            folder
            for folder in self.folders
            if any(os.path.exists(os.path.join(folder, n + end)) for n in names for end in _MODULES)
        ]
        return "".join(f"{_HEADER}{folder}\n" for folder in found)

    def check_modules(self, modules: Iterable[str]) -> None:
        """Raises a UserError for a module beside the files that is not the one of its name."""
        for name in sorted({module.partition(".")[0] for module in modules} - {"opsd_jax"}):
            files = [os.path.join(folder, name) for folder in self.folders]
            own = [f + end for f in files for end in _MODULES if os.path.isfile(f + end)]
            if not own:
                continue
            if name in sys.modules:
                found = getattr(sys.modules[name], "__file__", None)
            else:
                spec = importlib.util.find_spec(name)
                found = spec.origin if spec else None
            if found is None or not os.path.isfile(found):
                found = "a module of Python itself"
            elif any(os.path.samefile(found, path) for path in own):
                continue
            raise UserError(
                f"import {name}: not {own[0]} would be imported but {found}, which has the same "
                "name: rename yours"
            )

    def _add(self, folder: str) -> None:
        if folder not in self.folders:
            self.folders.append(folder)
        if folder not in sys.path:
            sys.path.append(folder)

    def _find(self, path: str) -> str:
        including = [os.path.dirname(file) for file in reversed(self._open)]
        # The folder above, so that ablations include "quickstart.gin".
        above = [os.path.join(folder, os.pardir) for folder in including]
        for folder in (*including, *above, "", *self.folders):
            if os.path.isfile(found := os.path.normpath(os.path.join(folder, path))):
                return found
        place = f"{self._open[-1]}: " if self._open else ""
        raise UserError(
            f'{place}include "{path}": no such file beside it, in the folder above it or in '
            f"{os.getcwd()}"
        )
