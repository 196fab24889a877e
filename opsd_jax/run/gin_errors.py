# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a gin file in one sentence, with the nearest name that exists."""

from __future__ import annotations

import difflib
import inspect
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.run.registry import AREAS

Known = Mapping[str, Callable[..., Any]]  # what a config may name -> what it stands for


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for the known name that is most like a word, "" if none is."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, 1)
    return f"; did you mean {by_lower[found[0]]}?" if found else ""


def fields_of(of: Callable[..., Any]) -> list[str]:
    """What can be bound of a dataclass or function."""
    return list(inspect.signature(of).parameters)


def nearest_field(name: str, field: str, known: Known) -> str:
    """The same for a field that `name` has not: a field of that name elsewhere comes first."""
    for area in AREAS:
        if field in fields_of(known[area]):
            return f"; did you mean {area}.{field}?"
    own = fields_of(known[name])
    found = difflib.get_close_matches(field, own, 1)
    return f"; did you mean {name}.{found[0]}?" if found else f"; it has {', '.join(own)}"


def unknown(name: str, known: Iterable[str]) -> str:
    """Says that a name is unknown, with the nearest, or else with all that there are."""
    return f"there is no {name}" + (nearest(name, known) or f"; there are {', '.join(known)}")


@contextmanager
def gin_errors_told(known: Callable[[], Known], macros: Callable[[], list[str]]) -> Iterator[None]:
    """Gin's and the dataclasses' complaints as a UserError of one line.

    Args:
      known: gives all names, those of the user's own code too.
      macros: gives all %macros that are defined.
    """
    try:
        yield
    except UserError as error:
        # Gin appends where the configurable was called; the first line is ours.
        raise UserError(str(error).splitlines()[0]) from None
    except tokenize.TokenError as error:
        raise UserError(f"gin: bindings: {error.args[0]}") from None
    except SyntaxError as error:
        place = f"{error.filename or 'bindings'}, line {error.lineno}"
        reason = (error.msg or "").splitlines()[-1].strip().rstrip(".")
        if reason.startswith("Failed to parse token"):
            reason += " (text stands in quotes)"
        raise UserError(f"gin: {place}: {reason}: {(error.text or '').strip()!r}") from None
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        raise UserError("gin: " + _one_line(error, known(), macros())) from error


def _one_line(error: BaseException, known: Known, macros: list[str]) -> str:
    reason, *place = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, ModuleNotFoundError):
        place.append("(looked for beside the gin files and among the installed packages)")
    if macro := re.match(r"No bindings specified for '(\S+)/gin.macro'", reason):
        name = macro.group(1)
        return f"the macro %{name} is used but never defined{nearest(f'%{name}', macros)}"
    if missing := re.search(r"required positional arguments?: (.*)", reason):
        reason = f"{missing.group(1)} must be bound: {reason}"
    elif field := re.match(r"Configurable '(\S+)' doesn't have a parameter named '(\w+)'", reason):
        name = field.group(1).rpartition(".")[2]
        reason = f"{name} has no {field.group(2)}{nearest_field(name, field.group(2), known)}"
    elif found := re.match(r"No configurable matching '(\S+)'", reason):
        reason = unknown(found.group(1), sorted(known))
    elif found := re.match(r"No configurable matching reference '(@\S+?)(\(\))?'", reason):
        named = sorted(f"@{name}" for name in {*known} - {*AREAS})
        reason = unknown(found.group(1), named)
    where = " ".join(line for line in place if line != "^")
    where = re.sub("In bindings string line", "in bindings, line", where)
    return f"{reason} {where}".rstrip()
