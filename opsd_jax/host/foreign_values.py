# SPDX-License-Identifier: Apache-2.0
"""Typed reading of a JSON object or header that somebody else wrote.

Every value of a foreign file passes through one of these methods, so that a wrong one is told by
file and key and never becomes a traceback further in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from opsd_jax.errors import UserError

_REQUIRED: Any = object()
# The largest size that any axis of a real model has, far below where int32 overflows.
_MOST = 2**30


@dataclasses.dataclass(frozen=True)
class ForeignValues:
    """The keys of one file. An absent key and a null are the default, if there is one.

    Attributes:
      where: what the user calls the file, the first words of every error.
      values: as parsed, of whatever type.
      path: of an object inside the file, such as "rope_parameters.".
    """

    where: str
    values: Mapping[str, Any]
    path: str = ""

    def count(self, key: str, default: Any = _REQUIRED, least: int = 1, most: int = _MOST) -> Any:
        """A whole number from `least` to `most`."""
        value = self._value(key, default)
        if value is default:
            return value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(key, f"must be a whole number >= {least}")
        if value > most:
            self.refuse(key, f"must be at most {most}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, positive: bool = False) -> Any:
        """A finite number, as it is written: whole or not."""
        value = self._value(key, default)
        if value is default:
            return value
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not abs(value) < 1e300 or (positive and not value > 0):
            self.refuse(key, f"must be a {'positive' if positive else 'finite'} number")
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """true or false; the text "false" is neither."""
        value = self._value(key, default)
        if value is not default and not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is not default and not isinstance(value, str):
            self.refuse(key, "must be text")
        return value

    def items(self, key: str, kind: type, what: str, default: Any = _REQUIRED) -> Any:
        """A list of values of one type; `what` is their name in the plural."""
        value = self._value(key, default)
        if value is default:
            return value
        if not isinstance(value, list | tuple) or any(type(item) is not kind for item in value):
            self.refuse(key, f"must be a list of {what}")
        return list(value)

    def ids(self, key: str, vocab_size: int | None = None) -> tuple[int, ...]:
        """Token ids: one, a list of them, or none (null or -1); below `vocab_size` where that is
        known."""
        value = self.values.get(key)
        if value is None or (type(value) is int and value == -1):
            return ()
        found = value if isinstance(value, list | tuple) else (value,)
        if any(type(item) is not int or item < 0 for item in found):
            self.refuse(key, "must be a token id (a whole number >= 0) or a list of them")
        if vocab_size is not None and any(item >= vocab_size for item in found):
            self.refuse(key, f"must be below the vocabulary's size {vocab_size}")
        return tuple(found)

    def object(self, key: str) -> ForeignValues:
        """The object at a key, empty where there is none."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            self.refuse(key, "must be an object")
        return ForeignValues(self.where, value, f"{self.path}{shown(key)}.")

    def name(self, key: str) -> str:
        """What an error calls a key: "config.json: rope_parameters.factor"."""
        return f"{self.where}: {self.path}{shown(key)}"

    def refuse(self, key: str, wanted: str) -> None:
        """Raises the UserError "WHERE: KEY must be ..., not VALUE"."""
        value = self.values.get(key)
        raise UserError(f"{self.name(key)} {wanted}, not {shown(value, quote=True)}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is not _REQUIRED:
            return default
        if key not in self.values:
            raise UserError(f"{self.name(key)} is missing")
        return None  # a null, which the caller's own check refuses


def shown(value: Any, quote: bool = False, limit: int = 80) -> str:
    """A foreign value for one line of a message: short, printable, ascii where it is odd.

    Args:
      value: anything; the parts of a large one are not all visited.
      quote: text in quotes, as Python writes it.
      limit: of characters.
    """
    if isinstance(value, str):
        text = ascii(value[:limit])
        text = text if quote or not value[:limit].isprintable() else value[:limit]
        return text + ("..." if len(value) > limit else "")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return "a whole number of more than 60 digits"
    if isinstance(value, list | tuple | Mapping) and len(value) > limit:
        return f"a {'object' if isinstance(value, Mapping) else 'list'} of {len(value)}"
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # digits beyond Python's limit; nested without end
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
