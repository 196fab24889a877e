# SPDX-License-Identifier: Apache-2.0
"""The metadata and the tensor table of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md).

The reader of the `gguf` package spends seconds on a vocabulary, making an array of each token;
this one walks the bytes. Little-endian files, versions 2 and 3.
"""

from __future__ import annotations

import dataclasses
import reprlib
import struct
from typing import Any

import numpy as np

from opsd_jax.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 2**24  # of an array; the largest vocabularies have 2**18


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


def short(value: Any) -> str:
    """A value of a file in a message: one line, however long it is."""
    return _SHORT.repr(value)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file; shape with the output axis first, kind as a ggml type."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What stands before the numbers.

    Attributes:
      metadata: key -> value; numbers, truth values, text and lists of them.
      tensors: in the order of the file.
      start: first byte of the first tensor.
      alignment: every tensor starts at a multiple of it, counted from `start`.
    """

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    start: int
    alignment: int


class _Cursor:
    def __init__(self, data: np.ndarray):
        self.data, self.at = data.data, 0

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        if self.at + size > len(self.data):
            raise struct.error("text beyond the end of the file")
        self.at += size
        return str(self.data[self.at - size : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > min(_MAX_ENTRIES, len(self.data) - self.at):  # an entry has a byte at least
            raise struct.error(f"an array of {count} entries")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            values = list(struct.unpack_from(code, self.data, self.at))
            self.at += struct.calcsize(code)
            return values
        return [self.value(kind) for _ in range(count)]

    def tensor(self) -> TensorInfo:
        """One row of the tensor table, its offset counted from the first tensor."""
        name, rank = self.text(), self.scalar("I")
        if rank > 4:
            raise struct.error(f"a tensor of {rank} axes")
        shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
        return TensorInfo(name, shape, self.scalar("I"), self.scalar("Q"))


def read_header(path: str, data: np.ndarray) -> Header:
    """Parses the front of a file, given (memory-mapped) as bytes.

    Raises:
      UserError: not GGUF, another version, cut short, or the same key or tensor twice.
    """
    cursor = _Cursor(data)
    if bytes(cursor.data[:4]) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file")
    cursor.at = 4
    metadata: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    key = "the number of fields"
    try:
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF version {version} is not supported; 2 and 3 are")
        num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(num_fields):
            key = cursor.text()
            if key in metadata:
                raise UserError(f"{path}: damaged GGUF file: {short(key)} is there twice")
            metadata[key] = cursor.value(cursor.scalar("I"))
        key = "the tensor table"
        for _ in range(num_tensors):
            tensor = cursor.tensor()
            if tensor.name in tensors:
                raise UserError(
                    f"{path}: damaged GGUF file: tensor {short(tensor.name)} is there twice"
                )
            tensors[tensor.name] = tensor
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: truncated or damaged GGUF file (at {short(key)}: {error})"
        ) from error
    except RecursionError as error:
        raise UserError(
            f"{path}: damaged GGUF file: {short(key)} has arrays nested too deep"
        ) from error
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment < 2**31:
        raise UserError(
            f"{path}: general.alignment must be a whole number >= 1, not {short(alignment)}"
        )
    start = -(-cursor.at // alignment) * alignment
    placed = [dataclasses.replace(t, offset=start + t.offset) for t in tensors.values()]
    return Header(metadata, placed, start, alignment)
