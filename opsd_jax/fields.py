# SPDX-License-Identifier: Apache-2.0
"""What the fields of a config may be: said in their annotations, checked by `require`.

    top_p: Annotated[float, "> 0", "<= 1"] = 1.0
    clip: Annotated[str, ("none", "entry", "token")] = "none"

A field of another type or out of its bounds is refused in one sentence: "rollout.top_p must be a
number > 0 and <= 1, not 2".
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from opsd_jax.errors import UserError

Count = Annotated[int, ">= 1"]
Natural = Annotated[int, ">= 0"]
# JAX drops the upper bits of a larger seed without a word; NumPy's generators take no negative one.
Seed = Annotated[int, ">= 0", "<= 4294967295"]
Positive = Annotated[float, "> 0"]
NotNegative = Annotated[float, ">= 0"]
Share = Annotated[float, ">= 0", "<= 1"]

_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "text in quotes",
    types.NoneType: "None",
    collections.abc.Callable: "a function",
    collections.abc.Mapping: "a {...: ...}",
}
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def require(area: str, config: object) -> None:
    """Raises a UserError for the first field of a dataclass that is not as annotated."""
    check_fields(area, type(config), vars(config), {})


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
    hints = hints_of(of)
    for name, value in values.items():
        if name in hints:
            check(f"{area}.{name}", value, hints[name], names)


def check(name: str, value: Any, hint: Any, names: Mapping[Any, str] | None = None) -> None:
    """Raises a UserError unless the value is of the annotated type; `name` is the user's."""
    if fits(value, hint):
        return
    names = names or {}
    wanted = " or ".join(_words(choice, names) for choice in _choices(hint))
    given = _called(value) if inspect.isroutine(value) else repr(value)
    if f"{given}()" in names.values():
        given += " without parentheses"
    elif isinstance(value, int) and abs(value) >= 2**31:
        given += ", which has more than 32 bits"
    elif isinstance(value, float) and not _is_float32(value):
        given += ", which is no number in float32"
    raise UserError(f"{name} must be {wanted}, not {given}")


def check_shape(
    name: str, function: Callable[..., Any], values: Any, *shapes: tuple[int, ...]
) -> None:
    """Refuses what a function of the user's gave unless its shape is one of `shapes`.

    What merely broadcasts would be another loss, and nobody would be told.
    """
    given = tuple(getattr(values, "shape", ()))
    if given not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise UserError(f"{name}: {_called(function)} must return shape {wanted}, not {given}")


@functools.cache
def hints_of(of: Callable[..., Any]) -> Mapping[str, Any]:
    """The annotations by name, with bounds; none where they cannot be read."""
    try:
        return typing.get_type_hints(of, include_extras=True)
    except (NameError, TypeError):  # A function of the user's may be annotated with anything.
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; True for annotations that say nothing here."""
    if len(choices := _choices(hint)) > 1:
        return any(fits(value, choice) for choice in choices)
    hint, rules = _parts(hint)
    if hint is int and not any(rule[0] == "<" for rule in rules):
        rules = (*rules, "< 2147483648")  # jax would overflow
    return _is_a(value, hint) and all(_keeps(value, rule) for rule in rules)


def _is_a(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= -(2**31)
    if origin is float:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and _is_float32(value)
        )
    if origin is tuple and isinstance(value, (tuple, list)):
        arguments = typing.get_args(hint)
        return not arguments or all(fits(inner, arguments[0]) for inner in value)
    if origin is collections.abc.Callable:
        return callable(value) and _takes(value, _num_arguments(hint))
    if getattr(origin, "_is_protocol", False):
        return _has_members(value, origin)
    return not isinstance(origin, type) or isinstance(value, origin)


def _called(function: Callable[..., Any]) -> str:
    """As gin has it; a partial by what it is of."""
    function = getattr(function, "func", function)
    return f"@{getattr(function, '__name__', repr(function))}"


def _num_arguments(hint: Any) -> int | None:
    """Of a Callable's annotation; None where it does not say."""
    of, *_ = typing.get_args(hint) or (None,)
    return len(of) if isinstance(of, list) else None


def _takes(function: Callable[..., Any], number: int | None) -> bool:
    """Whether a function takes so many arguments; gin may have bound further ones."""
    if number is None:
        return True
    try:
        inspect.signature(function).bind_partial(*range(number))
    except ValueError:  # some builtins tell nothing
        return True
    except TypeError:
        return False
    return True


def _is_float32(value: float) -> bool:
    """Neither infinite, which a config.gin could not say, nor rounded to 0 or infinity."""
    return value == 0 or 2.0**-126 <= abs(value) < 2.0**128


def _keeps(value: Any, rule: str | tuple) -> bool:
    if isinstance(rule, tuple):
        return value in rule
    sign, limit = rule.split()
    return _COMPARE[sign](value, float(limit))


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


def _parts(hint: Any) -> tuple[Any, tuple]:
    """A type and its bounds or choices."""
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def _words(hint: Any, names: Mapping[Any, str]) -> str:
    hint, rules = _parts(hint)
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        inner = typing.get_args(hint)[:1]
        words = " or ".join(_words(choice, names) for choice in _choices(inner[0])) if inner else ""
        return f"a tuple ({words or 'a value'}, ...)"
    if rules and isinstance(rules[0], tuple):
        *most, last = map(repr, rules[0])
        return f"{', '.join(most)} or {last}" if most else last
    kind = names.get(origin) or _WORDS.get(origin) or str(getattr(origin, "__name__", origin))
    if origin is collections.abc.Callable and (number := _num_arguments(hint)) is not None:
        kind += f" of {number} argument" + "s" * (number != 1)
    return " ".join([kind, " and ".join(rules)]).rstrip()
