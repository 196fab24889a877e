# SPDX-License-Identifier: Apache-2.0
"""An `Experiment` that was built or changed in Python, as the lines of a gin file."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.run.experiment import Experiment
from opsd_jax.run.finished_run import FinishedRun
from opsd_jax.run.registry import AREAS, FUNCTIONS, SOURCES


def gin_lines(experiment: Experiment) -> list[str]:
    """Bindings of all that differs from the defaults, each object in a scope of its own.

    Raises:
      UserError: a value that no gin file can name, such as a function of a notebook.
    """
    lines = [f"import {module}" for module in experiment.imports]
    for area in AREAS:
        _bind(lines, area, getattr(experiment, area), area)
    return lines


def _bind(lines: list[str], target: str, config: Any, place: str) -> None:
    """Appends `target.field = value` for the fields of a dataclass that are not the default."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "read" and isinstance(config, FinishedRun):
            continue  # config.py gives it
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default or type(value) is not type(default):
            text = _value(lines, value, f"{place}.{field.name}")
            lines.append(f"{target}.{field.name} = {text}")


def _value(lines: list[str], value: Any, place: str) -> str:
    """A value as gin writes it; what an object is made of goes to `lines`."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list):
        inner = [_value(lines, item, f"{place}.{i}") for i, item in enumerate(value)]
        return f"({''.join(text + ', ' for text in inner)})"
    if isinstance(value, dict):
        items = ((repr(k), _value(lines, v, f"{place}.{k}")) for k, v in value.items())
        return "{" + ", ".join(f"{key}: {text}" for key, text in items) + "}"
    if dataclasses.is_dataclass(value) and (name := _name_of(type(value), SOURCES)):
        scope = place.replace(".", "_")
        _bind(lines, f"{scope}/{name}", value, place)
        return f"@{scope}/{name}()"
    if inspect.isfunction(value) and (name := _name_of(value, FUNCTIONS)):
        return f"@{name}"
    if isinstance(value, functools.partial) and (name := _name_of(value, FUNCTIONS)):
        scope = place.replace(".", "_")
        for key, bound in value.keywords.items():
            lines.append(f"{scope}/{name}.{key} = {_value(lines, bound, f'{place}.{key}')}")
        return f"@{scope}/{name}"
    raise UserError(
        f"{place} = {value!r} cannot be kept in config.gin, which evaluation and export read: "
        "define it in a module beside a gin file that binds it, and train from that file"
    )


def _name_of(of: Any, named: dict[str, str]) -> str | None:
    """The gin name of a class or function of ours."""
    if of is FinishedRun:
        return "FinishedRun"
    place = f"{of.__module__}:{getattr(of, '__qualname__', None)}"
    return next((name for name, other in named.items() if other == place), None)
