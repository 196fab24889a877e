# SPDX-License-Identifier: Apache-2.0
"""What a compiled step does, read from its text: kernels of a decoded token, collectives and bytes.

The text is XLA's scheduled HLO: computations, of which the entry runs and `while` loops run
others. A kernel is an instruction that a GPU launches; a TPU runs the same text as one program, so
there the count says nothing about launches. Of loops that end when all rows are done, the text does
not say how often they run: `with_trips` is told.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_SILENT = ("parameter", "constant", "get-tuple-element", "bitcast", "copy")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CALLED = re.compile(
    r"(?:to_apply|calls|branch_computations|true_computation|false_computation)=\{?%?([\w.\-, %]+)"
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]+(?:[a-z0-9]*)?|pred)\[([0-9,]*)\]")
# What never becomes a launch: names, tuples and parts of them, and the second half of a pair.
_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "opt-barrier", "get-dimension-size"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done", "copy-done", "async-done"),
    "async-update",
}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}: of an axis of 4 the last two, here
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}"
)


class Instruction(NamedTuple):
    """opcode; result: its type as text; line: all of it."""

    opcode: str
    result: str
    line: str


class Collective(NamedTuple):
    """kind; axes: of the mesh, that it spans; num_bytes: of its result on one device; times: it
    runs in a step; scope: "rollout", "update" or "" (unknown)."""

    kind: str
    axes: tuple[str, ...]
    num_bytes: int
    times: float
    scope: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module, one device's part of it.

    entry: name of the computation that runs; computations: name -> instructions; trips: body of a
    loop -> how often it runs, where the text does not say.
    """

    entry: str
    computations: dict[str, list[Instruction]]
    trips: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Program:
        """From `compiled.as_text()`."""
        entry, name = "", None
        computations: dict[str, list[Instruction]] = {}
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                name = start.group(2)
                computations[name] = []
                entry = name if start.group(1) else entry
            elif line == "}":  # not `}}, metadata=…`: what kernels say of themselves has lines
                name = None
            elif name is not None and (found := _INSTRUCTION.match(line)):
                computations[name].append(Instruction(found.group(2), found.group(1), line))
        return cls(entry, computations)

    def with_trips(self, segments: Sequence[int], blocks: float) -> Program:
        """The same with the trips of loops that the data ends.

        Args:
          segments: of each stage of the rollout, in order (`sampling.rollout.stages`).
          blocks: of every other such loop: blocks of tokens in the fused loss.
        """
        left = list(segments)
        trips: dict[str, float] = {}
        for instructions in self.computations.values():
            trips |= {body_of(i): blocks for i in instructions if i.opcode == "while"}
        for loop in self._rollout_loops():
            trips[body_of(loop)] = left.pop(0) if left else 1
        return dataclasses.replace(self, trips=trips)

    def kernels(self, name: str) -> float:
        """Launches of one run of a computation, inner loops and branches (the longest) included."""
        total = 0.0
        for each in self.computations.get(name, ()):
            if each.opcode == "while":
                total += self._times(each) * self.kernels(body_of(each))
            elif each.opcode in ("call", "conditional"):
                total += max([self.kernels(c) for c in _called(each)], default=0.0)
            elif each.opcode not in _NO_KERNEL:
                total += 1
        return total

    def kernels_per_token(self) -> float | None:
        """Launches for one decoded token of all rows (of the longest stage); None: none decoded."""
        bodies = [body_of(loop) for loop in self.token_loops()]
        return max(map(self.kernels, bodies), default=None)

    def token_loops(self) -> list[Instruction]:
        """The loops over the tokens of a segment, one for each stage of the rollout."""
        return [i for outer in self._rollout_loops() for i in self._whiles(body_of(outer))]

    def _rollout_loops(self) -> list[Instruction]:
        """The loops over segments: they end with their rows, and hold a loop over tokens."""
        return [
            loop
            for loop in self._whiles(self.entry)
            if scope_of(loop.line) == "rollout" and self._known_times(loop) is None
        ]

    def _whiles(self, name: str) -> list[Instruction]:
        return [each for each in self.computations.get(name, ()) if each.opcode == "while"]

    def _times(self, loop: Instruction) -> float:
        known = self._known_times(loop)
        return self.trips.get(body_of(loop), 1.0) if known is None else known

    def _known_times(self, loop: Instruction) -> float | None:
        """Trips that the text says: a GPU's and a CPU's beside the loop, a TPU's in its condition,
        where that is nothing but `counter < constant` (JAX counts its scans from 0)."""
        if found := _TRIPS.search(loop.line):
            return float(found.group(1))
        condition = self.computations.get(_CONDITION.search(loop.line).group(1), [])  # type: ignore[union-attr]
        steps = [each for each in condition if each.opcode not in _SILENT]
        limits = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(c.line for c in condition))
        if [each.opcode for each in steps] != ["compare"] or len(limits) != 1:
            return None
        return float(limits[0]) if "direction=LT" in steps[0].line else None

    def collectives(self, axes_of: Callable[[str], tuple[str, ...]]) -> list[Collective]:
        """All that devices exchange in one run of the program.

        `axes_of` takes an instruction's line to the mesh axes that it spans (`spanned_axes`).
        """
        return list(self._collectives(self.entry, 1.0, "", axes_of))

    def _exchanged_in(self, fusion: Instruction, seen: set[str]) -> Iterator[Instruction]:
        """Collectives inside a fusion whose channel is not among `seen`, which they join."""
        for called in _called(fusion):
            for each in self.computations.get(called, ()):
                if each.opcode in _COLLECTIVES and channel_of(each) not in seen:
                    seen.add(channel_of(each))
                    yield each

    def _collectives(
        self, name: str, times: float, scope: str, axes_of: Callable[[str], tuple[str, ...]]
    ) -> Iterator[Collective]:
        seen: set[str] = set()  # a TPU's exchange goes on through several fusions, on one channel
        for each in self.computations.get(name, ()):
            here = scope_of(each.line) or scope
            if each.opcode == "fusion":
                for found in self._exchanged_in(each, seen):
                    size = num_bytes(found.result)
                    yield Collective(found.opcode, axes_of(found.line), size, times, here)
            kind = each.opcode.removesuffix("-start")
            if each.opcode == "while":
                inner = times * self._times(each)
                yield from self._collectives(body_of(each), inner, here, axes_of)
            elif each.opcode in ("call", "conditional", "async-start"):
                for called in _called(each):
                    yield from self._collectives(called, times, here, axes_of)
            elif kind in _COLLECTIVES:
                size = num_bytes(each.result, last=each.opcode.endswith("-start"))
                yield Collective(kind, axes_of(each.line), size, times, here)


def channel_of(each: Instruction) -> str:
    """The channel of a collective; its line where it has none."""
    found = re.search(r"channel_id=(\d+)", each.line)
    return found.group(1) if found else each.line


def scope_of(line: str) -> str:
    """The half of the step that an instruction belongs to: "rollout", "update" or "" (unknown)."""
    found = re.search(r'op_name="[^"]*?\b(rollout|update)\b', line)
    return found.group(1) if found else ""


def num_bytes(result: str, last: bool = False) -> int:
    """Bytes of all arrays in a type; `last`: of the last one, which is what a -start makes."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _bits(kind) // 8
        for kind, dims in _ARRAY.findall(result)
    ]
    if not sizes:
        return 0
    return sizes[-1] if last else sum(sizes)


def _bits(kind: str) -> int:
    """Of an element; the first number in a type's name, as in f8e4m3fn."""
    found = re.search(r"\d+", kind)
    return int(found.group()) if found else 8  # pred


def spanned_axes(line: str, shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which a collective's devices send to others.

    Args:
      line: of the instruction; its groups, of which the first is read, are lists, an iota, or axes
        of a mesh; its pairs, which are all read, are a list.
      shape: axis -> size, in the order of the mesh.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
        ends = np.array(re.findall(r"\d+", pairs.group(1)), int).reshape(-1, 2).T
    else:
        group = _first_group(line, math.prod(shape.values()))
        ends = np.stack([np.full_like(group, group[0]), group])
    places = np.unravel_index(ends, tuple(shape.values()))
    return tuple(n for n, (a, b) in zip(shape, places, strict=True) if (a != b).any())


def _first_group(line: str, num_devices: int) -> np.ndarray:
    """Device numbers of a collective's first group; all where none is named."""
    if named := re.search(_MESH_GROUPS, line):
        return _mesh_group(*named.groups())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source, order = (
            [int(n) for n in part.split(",")] if part else [] for part in iota.groups()
        )
        numbers = np.arange(math.prod(source)).reshape(source)
        return (numbers.transpose(order) if order else numbers).reshape(shape)[0].reshape(-1)
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return np.array([int(n) for n in listed.group(1).split(",")])
    return np.arange(num_devices)


def _mesh_group(axes: str, order: str | None, spanned: str) -> np.ndarray:
    """The first group of devices that differ along some axes of XLA's mesh, or parts of them."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    coordinates = dict(zip(sizes, np.indices(tuple(sizes.values())), strict=True))
    listed = [[int(n) for n in part.split(",")] for part in re.findall(r"[\d,]+", order or "")]
    if listed and "T" not in str(order):
        numbers = np.array(listed[0])
    else:
        numbers = np.arange(math.prod(sizes.values()))
    if len(listed) > 1:  # an iota of these dimensions, transposed
        numbers = numbers.reshape(listed[0]).transpose(listed[1])
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", spanned):
        size = int(part or sizes[name])
        behind = sizes[name] // (int(before or 1) * size)
        coordinates[name] -= coordinates[name] // behind % size * behind
    # What is left of a device's place is the number of its group.
    first = ~np.any(list(coordinates.values()), axis=0)
    return np.reshape(numbers, first.shape)[first]


def body_of(loop: Instruction) -> str:
    """The computation that a while loop repeats."""
    return _BODY.search(loop.line).group(1)  # type: ignore[union-attr]


def _called(each: Instruction) -> list[str]:
    found = _CALLED.search(each.line)
    return [name.strip(" %") for name in found.group(1).split(",")] if found else []
