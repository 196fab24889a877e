# SPDX-License-Identifier: Apache-2.0
"""The metadata and the tensor table of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md).

The reader of the `gguf` package spends seconds on a vocabulary, making an array of each token;
this one walks the bytes. Little-endian files, versions 2 and 3.
"""

from __future__ import annotations

import dataclasses
import math
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


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies; shape with the output axis first, kind as a ggml type number."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: list[TensorInfo]


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
        return str(self.data[self.at - size : self.at], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            values = list(struct.unpack_from(code, self.data, self.at))
            self.at += struct.calcsize(code)
            return values
        return [self.value(kind) for _ in range(count)]


def read_header(path: str, data: np.ndarray) -> Header:
    """Parses the front of a file, given (memory-mapped) as bytes.

    Raises:
      UserError: not GGUF, another version, or cut short.
    """
    cursor = _Cursor(data)
    try:
        if bytes(cursor.data[:4]) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file")
        cursor.at = 4
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF version {version} is not supported; 2 and 3 are")
        num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
        metadata, key = {}, "its first field"
        for _ in range(num_fields):
            key = cursor.text()
            metadata[key] = cursor.value(cursor.scalar("I"))
        rows = []
        for _ in range(num_tensors):
            name = cursor.text()
            shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
            rows.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    except (struct.error, KeyError) as error:
        raise UserError(f"{path}: truncated or damaged GGUF file ({error})") from error
    except RecursionError as error:
        raise UserError(f"{path}: damaged GGUF file: {key} has arrays nested too deep") from error
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f"{path}: general.alignment must be a whole number >= 1, not {alignment!r}")
    start = math.ceil(cursor.at / alignment) * alignment
    tensors = [TensorInfo(n, shape, kind, start + offset) for n, shape, kind, offset in rows]
    return Header(metadata, tensors)
