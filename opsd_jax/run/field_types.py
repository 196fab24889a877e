# SPDX-License-Identifier: Apache-2.0
"""Whether values from outside fit the annotations of the fields that they are meant for."""

from __future__ import annotations

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from opsd_jax.errors import UserError

_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "text in quotes",
    types.NoneType: "None",
    collections.abc.Callable: "a function",
    collections.abc.Mapping: "a {...: ...}",
}


def check_fields(
    area: str, of: Callable[..., Any], values: Mapping[str, Any], names: Mapping[Any, str]
) -> None:
    """Refuses values that are not what a dataclass or a function is annotated with.

    Args:
      area: what the user calls it.
      of: the dataclass or function.
      values: its arguments by name.
      names: words for types that are not among the ordinary ones.

    Raises:
      UserError: area and field, what is wanted and what was given.
    """
    try:
        hints = typing.get_type_hints(of)
    except (NameError, TypeError):  # A function of the user's may be annotated with anything.
        return
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            wanted = " or ".join(_words(hint, names) for hint in _choices(hints[name]))
            given = f"@{value.__name__}" if inspect.isroutine(value) else repr(value)
            if f"{given}()" in names.values():
                given += " without parentheses"
            elif isinstance(value, int) and abs(value) >= 2**31:
                given += ", which has more than 32 bits"
            raise UserError(f"{area}.{name} must be {wanted}, not {given}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; True for annotations that say nothing here."""
    if len(choices := _choices(hint)) > 1:
        return any(fits(value, choice) for choice in choices)
    origin = typing.get_origin(hint) or hint
    if origin is int:  # no seed is larger, and jax would overflow
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and -(2**31) <= value < 2**32
    if origin is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)  # a config.gin could not say inf
    if origin is tuple and isinstance(value, (tuple, list)):
        arguments = typing.get_args(hint)
        return not arguments or all(fits(inner, arguments[0]) for inner in value)
    if getattr(origin, "_is_protocol", False):
        return _has_members(value, origin)
    return not isinstance(origin, type) or isinstance(value, origin)


def _has_members(value: Any, protocol: type) -> bool:
    """Whether an instance has what a protocol names, and methods that take as many arguments."""
    if isinstance(value, type):
        return False
    for name, member in vars(protocol).items():
        if name.startswith("_") and name != "__call__":
            continue
        if not hasattr(value, name):
            return False
        if inspect.isfunction(member):
            arguments = list(inspect.signature(member).parameters)[1:]
            try:
                inspect.signature(getattr(value, name)).bind(*arguments)
            except TypeError:
                return False
    return True


def _choices(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _words(hint: Any, names: Mapping[Any, str]) -> str:
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        inner = typing.get_args(hint)[:1]
        return f"a tuple ({_words(inner[0], names) if inner else 'a value'}, ...)"
    return names.get(origin) or _WORDS.get(origin) or str(getattr(origin, "__name__", origin))
