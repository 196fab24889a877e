# SPDX-License-Identifier: Apache-2.0
"""Valid files made odd, with a fixed seed: what every reader of foreign files is tried with."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Values that real files and bug reports had where another was meant.
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    10**12,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "2",
    "false",
    "two\nlines \ud800",
    "x" * 10_000,
    [],
    [1, 2],
    ["a"],
    [None],
    {},
    {"a": 1},
    [[[[[[[[]]]]]]]],
)


def mutants(value: Any, count: int, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """`count` copies of a JSON value, each changed in one random place: (what was done, copy).

    A place is removed, gets an odd value, or has a neighbour added to it.
    """
    rng = random.Random(seed)
    places = list(_places(value))
    for _ in range(count):
        changed = copy.deepcopy(value)
        place = rng.choice(places)
        holder = changed
        for step in place[:-1]:
            holder = holder[step]
        odd, action = rng.choice(ODD), rng.randrange(8)
        if action == 0:
            del holder[place[-1]]
            done = "removed"
        elif action == 1 and isinstance(holder, dict):
            holder[f"{place[-1]}_2"] = copy.deepcopy(odd)
            done = f"neighbour {odd!r:.60}"
        else:
            holder[place[-1]] = copy.deepcopy(odd)
            done = f"{odd!r:.60}"
        yield ".".join(map(str, place)) + ": " + done, changed


def _places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Every place of a value, each level of it as likely as the next: long lists are sampled."""
    steps = value if isinstance(value, dict) else ()
    if isinstance(value, list):
        steps = range(min(len(value), 2))
    for step in steps:
        yield (*at, step)
        yield from _places(value[step], (*at, step))


def damaged_texts(value: Any) -> Iterator[tuple[str, bytes]]:
    """The bytes of a JSON file that are no JSON, or hardly."""
    text = json.dumps(value)
    yield "empty", b""
    yield "cut", text[: len(text) // 2].encode()
    yield "not text", b"\xff\xfe\x00" + text.encode()
    yield "a byte order mark", b"\xef\xbb\xbf" + text.encode()
    yield "nested without end", b"[" * 100_000
    yield "an object without end", b'{"a":' * 100_000
    yield "a list", b"[1, 2]"
    yield "digits without end", b'{"a": ' + b"9" * 10_000 + b"}"
