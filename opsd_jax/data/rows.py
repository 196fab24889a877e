# SPDX-License-Identifier: Apache-2.0
"""What stands in a row of a data set: nested columns, conversations, answers, known layouts.

A column inside another is named with dots, `reward_model.ground_truth` or `messages.0.content`. A
conversation is a list of {"role", "content"} (or of {"from", "value"}). Values come from JSON or
parquet: text, numbers, booleans, lists, dicts and None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeGuard

from opsd_jax.data.numbers import plain_number
from opsd_jax.data.record import Message
from opsd_jax.errors import UserError

MOST_CHARACTERS = 4000  # of a further column that nobody has asked for by name
_MOST_DEPTH = 4
_FROM = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_FROM |= {"system": "system"}

# What the common data sets for reinforcement learning call things, the most telling first.
_LAYOUTS = (
    ("verl", "prompt", "reward_model.ground_truth"),
    ("open-instruct", "messages", "ground_truth"),
    ("TRL", "prompt", "completion"),
    ("TRL", "prompt", "ground_truth"),
    ("TRL", "prompt", "solution"),
    ("TRL", "prompt", "answer"),
)
_QUESTIONS = ("question", "problem", "prompt", "messages", "conversations", "query", "instruction")
_SOLUTIONS = ("solution", "completion", "response", "rationale", "output")
_ANSWERS = ("reward_model.ground_truth", "ground_truth", "answer", "final_answer", "target")


def find(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, None where the row has none; its whole name before its dots."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            return None
    return value


def has(row: Mapping[str, Any], column: str) -> bool:
    """Whether there is such a column, be it empty."""
    if column in row:
        return True
    outer, _, last = column.rpartition(".")
    inside = find(row, outer) if outer else None
    return isinstance(inside, Mapping) and last in inside


def leaves(row: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all that a row holds; lists are values."""
    for name, value in row.items():
        if isinstance(value, Mapping) and value and depth < _MOST_DEPTH:
            yield from leaves(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def is_number(value: object) -> TypeGuard[int | float | Decimal]:
    if isinstance(value, int):  # of any size, also one that no float can be
        return not isinstance(value, bool)
    return isinstance(value, float | Decimal) and math.isfinite(value)


def scalar_text(value: object) -> object:
    """The text of a number, in plain notation, or of a boolean; else the value itself."""
    if isinstance(value, bool):
        return str(value)
    return plain_number(Fraction(str(value))) if is_number(value) else value


def conversation(value: object) -> tuple[Message, ...] | None:
    """The turns of a list of messages; None where it is no such list.

    Raises:
      UserError: a turn with tools, images or another role, in words that follow a column's name.
    """
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(turn, Mapping) for turn in value):
        return None
    if not all(("role" in turn and "content" in turn) or "from" in turn for turn in value):
        return None
    return tuple(_message(number, turn) for number, turn in enumerate(value, start=1))


def _message(number: int, turn: Mapping[str, Any]) -> Message:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _FROM:
        raise UserError(
            f"has a turn {number} of {role!r}; only turns of 'system', 'user' and 'assistant' are "
            "read"
        )
    if turn.get("tool_calls"):
        raise UserError(f"has tool calls in turn {number}, which are not read")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"has something else than text in turn {number}, which is not read")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise UserError(f"has a turn {number} without text")
    return Message(_FROM[role], content)


def further_columns(
    row: Mapping[str, Any], used: Sequence[str | None], keep: Sequence[str] | None
) -> dict[str, str]:
    """Every column that is not used, as text: the further placeholders of templates.

    Args:
      row: of the data set.
      used: columns that have a placeholder of their own.
      keep: names of those that are wanted, whatever their length; None takes all but values of
        more than `MOST_CHARACTERS`. Lists are JSON; an empty value is "".
    """
    found = {}
    for name, value in leaves(row):
        if name in used or (keep is not None and name not in keep):
            continue
        if isinstance(value, bytes | bytearray):
            continue
        text = "" if value is None else scalar_text(value)
        if not isinstance(text, str):
            text = json.dumps(value, ensure_ascii=False, default=str)
        if (keep is not None or len(text) <= MOST_CHARACTERS) and _is_unicode(text):
            found[name] = text
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def advice(row: Mapping[str, Any], source: str) -> str:
    """How to bind the columns of a row as the common data sets are laid out, "" if it is no such.

    Args:
      row: a row, or a dict of the same names.
      source: what the user calls the source, such as "JsonlProblems".
    """
    layout = next((name for name, *columns in _LAYOUTS if all(has(row, c) for c in columns)), "")
    question = next((name for name in _QUESTIONS if has(row, name)), None)
    if question is None:
        return ""
    turns = find(row, question)
    answered = isinstance(turns, list) and len(turns) > 1 and isinstance(turns[-1], Mapping)
    answered = answered and turns[-1].get("role", turns[-1].get("from")) in ("assistant", "gpt")
    own = question if answered else None
    solution = next((name for name in _SOLUTIONS if has(row, name)), own)
    answer = next((name for name in _ANSWERS if has(row, name)), None)
    if not layout and answer is None and solution is None:
        return ""
    bound = {"question": question, "solution": solution, "answer": answer or solution}
    lines = ", ".join(f"{source}.{field}_column = {name!r}" for field, name in bound.items())
    if answer is None:
        lines += f" with {source}.answer_from = 'boxed', 'last_number' or another reading"
    return f"; this looks like the layout of {layout or 'other data sets'}: {lines}"
