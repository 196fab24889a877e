# SPDX-License-Identifier: Apache-2.0
"""Problems from JSON lines and parquet files: local ones, or a data set of the Hub by its name.

Files are streamed in the order of their names, row by row; nothing in them is unpickled or run.
"""

import dataclasses
import glob
import gzip
import io
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, BinaryIO, ClassVar

from opsd_jax.data.problems import TableProblems
from opsd_jax.data.rows import advice, find, scalar_text
from opsd_jax.data.splits import hub_files, is_hidden, of_split, of_subset
from opsd_jax.errors import UserError
from opsd_jax.host.hub import is_hub_name

_MOST_LINE_BYTES = 64 * 2**20  # of a line, also of one that was a kilobyte when compressed
_MOST_DIGITS = 3000  # of a decimal number; Python writes integers of 4,300


@dataclasses.dataclass(frozen=True)
class _FileProblems(TableProblems):
    """Rows of files with named columns.

    Attributes:
      path: a file, a directory (searched with its sub-directories), a glob pattern, or
        `owner/name[@revision]` of a data set on the Hub; several files are read in the order of
        their names.
      subset, split: of the data set, where it has several; which files they are is told by its
        card on the Hub, or by the names of folders and files.
      split_column: the column that tells the split, where not the files do: rows are taken whose
        value is `split`.
    """

    path: str
    _: dataclasses.KW_ONLY
    subset: str | None = None
    split: str | None = None
    split_column: str | None = None

    suffixes: ClassVar[tuple[str, ...]]

    def __post_init__(self):
        super().__post_init__()
        if self.split_column is not None and self.split is None:
            name = type(self).__name__
            raise UserError(
                f"{name}.split must be one of the values of {name}.split_column, not None"
            )

    def _where(self) -> str:
        return self.path

    def _rows(self):
        paths = self._paths()
        root = os.path.commonpath([path.parent for path in paths])
        values = set()
        for path in paths:
            number = 0
            for number, row in self._read(path):
                if self.split_column is not None:
                    value = scalar_text(find(row, self.split_column))
                    values.add(str(value))
                    if value != self.split:
                        continue
                yield f"{path}:{number}", f"{path.relative_to(root)}:{number}", row
            if not number:
                raise UserError(f"{path} has no rows; remove it or fill it.")
        if self.split_column is not None and self.split not in values:
            known = ", ".join(map(repr, sorted(values)[:8]))
            raise UserError(
                f"{type(self).__name__}.split must be a value of `{self.split_column}` in "
                f"{self.path}, of which there are {known}, not {self.split!r}"
            )

    def _paths(self) -> list[pathlib.Path]:
        source, split = type(self).__name__, None if self.split_column else self.split
        if is_hub_name(self.path):
            return hub_files(self.path, source, self.subset, split, self.suffixes)
        path = pathlib.Path(self.path).expanduser()
        root, found = path.parent, [path]
        if not path.is_file():
            root, found = self._found(path)
        if self.subset is None and split is None:
            return found
        names = [str(file.relative_to(root)) for file in found]
        if self.subset is not None:
            names = of_subset(self.path, source, names, self.subset)
        if split is not None:
            names = of_split(self.path, source, names, split)
        return [root / name for name in names]

    def _found(self, path: pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
        """The folder in which files are looked for, and those that are there."""
        if path.is_dir():
            root, found = path, [file for end in self.suffixes for file in path.rglob(f"*{end}")]
        else:
            root, pattern = _split_pattern(path)
            found = [root / match for match in glob.glob(pattern, root_dir=root, recursive=True)]
        found = sorted(p for p in found if p.is_file() and not is_hidden(p.relative_to(root)))
        if not found:
            raise UserError(
                f"{type(self).__name__}.path: {self.path} is no file, no directory or pattern "
                f"with {self.suffixes[0]} files in it, and no name of the Hub (owner/name)."
            )
        return root, found

    def _read(self, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row numbers from 1 and the rows."""
        raise NotImplementedError


class JsonlProblems(_FileProblems):
    """JSON lines: one object a line, UTF-8, plain or as gzip or zstd; blank lines are skipped."""

    suffixes = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    def _read(self, path):
        with _opened(path) as file:
            for number, line in enumerate(_lines(path, file), start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(
                        line.decode("utf-8-sig"), object_pairs_hook=_once, parse_float=_decimal
                    )
                except (ValueError, RecursionError) as error:
                    reason = str(error).splitlines()[0][:100]
                    if isinstance(error, json.JSONDecodeError):  # its own line number is another
                        reason = f"{error.msg} at character {error.pos + 1}"
                    raise UserError(f"{path}:{number}: not a line of JSON ({reason}).") from None
                if not isinstance(row, dict):
                    raise UserError(
                        f"{path}:{number}: a line must be a JSON object with named columns, "
                        f"but this is of type {type(row).__name__}."
                    )
                yield number, row


class ParquetProblems(_FileProblems):
    """Parquet files, as published on the Hugging Face Hub."""

    suffixes = (".parquet",)

    def _read(self, path):
        import pyarrow  # comes with tensorflow-datasets, and only this source needs it
        import pyarrow.parquet

        named = {self.question_column, self.solution_column, self.answer_column, self.split_column}
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                columns = table.schema_arrow.names
                inside = {c for c in named if c is not None and c not in columns}
                wanted = {c.split(".")[0] if c in inside else c for c in named if c is not None}
                doubled = [c for c in {*wanted, self.id_column} if columns.count(c) > 1]
                if doubled:
                    raise UserError(
                        f"{path} has two columns `{doubled[0]}`; write it with one of them."
                    )
                if missing := wanted - set(columns):
                    name, known = type(self).__name__, _empty(table.schema_arrow)
                    raise UserError(
                        f"{path} has no column `{min(missing)}`, only {', '.join(columns)}; "
                        f"set the column names of {name} (solution_column=None where there are no "
                        f"solutions){advice(known, name)}."
                    )
                number = 0
                for batch in table.iter_batches(columns=self._read_columns(table.schema_arrow)):
                    for row in _as_written(batch).to_pylist():
                        number += 1
                        yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0][:100]
            raise UserError(f"{path}: not a readable parquet file ({reason}).") from None

    def _read_columns(self, schema: Any) -> list[str]:
        """Those that a problem is made of and, without images and the like, all that it keeps."""
        used = [self.question_column, self.solution_column, self.answer_column, self.id_column]
        used += [self.split_column, *(self.keep_columns or ())]
        tops = {top for c in used if c is not None for top in (c, c.split(".")[0])}
        names = schema.names
        return [
            field.name
            for field in schema
            if field.name in tops
            or (
                self.keep_columns is None
                and names.count(field.name) == 1
                and "binary" not in str(field.type)
            )
        ]


def _opened(path: pathlib.Path) -> Any:
    """The bytes of a file, decompressed where its name says so."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        import pyarrow  # comes with tensorflow-datasets; Python 3.11 has no zstd

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _lines(path: pathlib.Path, file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; a UserError for one without end or a damaged archive."""
    try:
        while line := file.readline(_MOST_LINE_BYTES):
            if len(line) == _MOST_LINE_BYTES and not line.endswith(b"\n"):
                raise UserError(f"{path}: a line of more than {_MOST_LINE_BYTES:,} bytes")
            yield line
    except (OSError, EOFError, zlib.error) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"{path}: cut short or not what its name says ({reason}).") from None


def _as_written(batch: Any) -> Any:
    """The same with each float32 as the decimals that it stands for: 0.1, not 0.10000000149."""
    import pyarrow

    for i, field in enumerate(batch.schema):
        if field.type == pyarrow.float32():
            decimals = batch.column(i).cast(pyarrow.string()).cast(pyarrow.float64())
            batch = batch.set_column(i, field.name, decimals)
    return batch


def _empty(schema: Any) -> dict[str, Any]:
    """A row of a parquet schema without values, to look for known layouts in."""

    def of(kind: Any) -> Any:
        if not str(kind).startswith("struct"):
            return None
        return {kind.field(i).name: of(kind.field(i).type) for i in range(kind.num_fields)}

    return {field.name: of(field.type) for field in schema}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is written twice, JSON would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it has two values of {doubled!r}")
    return found


def _decimal(text: str) -> float | Decimal:
    """A float, or all digits of a number that has more of them than a float holds."""
    value = float(text)
    if not value or not math.isfinite(value):  # an exponent that Decimal may not even read
        return value
    exact = Decimal(text)
    num_digits = len(exact.as_tuple().digits)
    if num_digits <= 17 or abs(exact.adjusted()) >= 1000:
        return value
    if num_digits > _MOST_DIGITS:
        raise ValueError(f"a number of {num_digits:,} digits")
    return exact


def _split_pattern(path: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The folder that is there and the pattern below it: `[1]` in a folder's name is its name."""
    root = next(parent for parent in path.parents if parent.is_dir())
    return root, str(path.relative_to(root))
