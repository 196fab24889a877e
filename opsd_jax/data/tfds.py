# SPDX-License-Identifier: Apache-2.0
"""Any prepared data set of TensorFlow Datasets as problems, without TensorFlow."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from opsd_jax.data.problems import TableProblems
from opsd_jax.errors import UserError

_FEATURES = "features.json"  # in the folder of every data set that can be read without its code
_CLASS = re.compile(r'"pythonClassName"\s*:\s*"(.*?)"')


@dataclasses.dataclass(frozen=True)
class TfdsProblems(TableProblems):
    """One split of a data set that TFDS has prepared on disk, in its stored order.

    Only files are read: no code of the data set runs and nothing is downloaded. Prepare it once,
    `tfds build gsm8k --file_format=array_record` (or parquet; TFDS's own default, tfrecord, can be
    read by TensorFlow alone). A column inside another is written `outer.inner`; class labels are
    read as their names.

    Attributes:
      name: `set`, `set/config` or `set/config:1.0.0`.
      split: a split as it was prepared, such as "train"; `start` and `stop` take a part of it.
      data_dir: where TFDS keeps its data sets; None is TFDS's own choice.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None

    def _where(self) -> str:
        return f"the split {self.split} of {self.name}"

    def _rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        builder = _find(self.name, self.data_dir)
        if self.split not in builder.info.splits:
            raise UserError(
                f"TfdsProblems.split must be one of {', '.join(builder.info.splits)}, not "
                f"{self.split!r}; start and stop take a part of a split."
            )
        available = dict(_leaves(builder.info.features))
        features = {column: available[column] for column in self._columns(available)}
        for number, record in enumerate(_records(builder, self.split, features), start=1):
            place = f"{self.name}:{self.split}:{number}"
            row = {c: _value(_inside(record, c), f, place, c) for c, f in features.items()}
            yield place, place, row

    def _columns(self, available: Mapping[str, Any]) -> list[str]:
        for field in ("question_column", "solution_column", "answer_column"):
            column = getattr(self, field)
            if column is not None and column not in available:
                hint = "" if field == "question_column" else " (or None, where there is none)"
                raise UserError(
                    f"TfdsProblems.{field} must be one of {', '.join(sorted(available))}{hint}, "
                    f"not {column!r}"
                )
        named = (self.question_column, self.solution_column, self.answer_column, self.id_column)
        kept = self.keep_columns
        if kept is None:  # text and numbers; no image is decoded that nobody has asked for
            kept = tuple(c for c, f in available.items() if getattr(f, "shape", None) == ())
        if unknown := sorted(set(kept) - set(available)):
            raise UserError(
                f"TfdsProblems.keep_columns must be of {', '.join(sorted(available))}, not "
                f"{unknown[0]!r}"
            )
        wanted = (*(column for column in named if column in available), *kept)
        return list(dict.fromkeys(column for column in wanted if column is not None))


def _records(builder: Any, split: str, features: Mapping[str, Any]) -> Iterator[Any]:
    """The rows of a whole split (of `train[:10]`, TFDS would read all rows of a parquet file)."""
    from tensorflow_datasets.core.decode import DeserializeMethod

    read = _nested(features).deserialize_example_np
    try:
        raw = builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
        for number in range(len(raw)):
            yield read(raw[number])
    except Exception as error:  # Its readers have many names for a file cut short.
        raise UserError(f"{builder.data_dir}: cannot be read ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__


def _find(name: str, data_dir: str | None) -> Any:
    """The data set's read-only builder, made from its files.

    Raises:
      UserError: it is not there, is kept in a form that wants TensorFlow, or needs code of its own.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.file_adapters import FileFormat

    folder = _folder(name, data_dir)
    try:
        for code in _CLASS.findall((folder / _FEATURES).read_text()):
            if not code.startswith("tensorflow_datasets.core.features."):
                raise UserError(f"{folder}: needs the code of {code}, which is not run.")
        builder = tfds.builder_from_directory(folder)
        formats = {format.value for format in builder.info.available_file_formats()}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: is no data set of TFDS ({_reason(error)}).") from error
    readable = {format.value for format in FileFormat.with_random_access()}
    if not formats & readable:
        raise UserError(
            f"{folder}: is kept as {', '.join(formats)}, which TensorFlow alone can read; prepare "
            f"it in another data_dir with `tfds build {name} --file_format=array_record`."
        )
    return builder


def _folder(name: str, data_dir: str | None) -> epath.Path:
    """Where a data set lies: data_dir / set [/ config] / version, the newest if none is named."""
    parts = re.fullmatch(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?", name)
    if not parts:
        raise UserError(
            f"TfdsProblems.name must be 'set', 'set/config' or 'set/config:1.0.0', not {name!r}"
        )
    root = epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    root = root.expanduser()
    folder = root / parts[1] / (parts[2] or "")
    found = _folders_in(folder)
    versions = [f for f in found if re.fullmatch(r"\d+\.\d+\.\d+", f)]
    if parts[3] in versions:
        return folder / parts[3]
    if versions and not parts[3]:
        return folder / max(versions, key=lambda v: tuple(map(int, v.split("."))))
    if versions or found:
        there = ":" if versions else "/"
        named = ", ".join(f"{name.split(there)[0]}{there}{f}" for f in versions or found)
        raise UserError(f"TfdsProblems.name = {name!r} is not in {root}; choose from {named}.")
    others = ", ".join(_folders_in(root)) or "nothing"
    raise UserError(
        f"TfdsProblems.name = {name!r} is not in {root}, which holds {others}; prepare it with "
        f"`tfds build {name} --file_format=array_record --data_dir={root}`, or set "
        "TfdsProblems.data_dir."
    )


def _folders_in(folder: epath.Path) -> list[str]:
    if not folder.is_dir():
        return []
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return [name for name in inside if name != "downloads" and not name.startswith(".")]


def _leaves(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of the columns and what TFDS knows of each."""
    from tensorflow_datasets.core.features import FeaturesDict

    for name, feature in features.items():
        if isinstance(feature, FeaturesDict):
            yield from _leaves(feature, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", feature


def _nested(features: Mapping[str, Any]) -> Any:
    """The reader of these columns alone: no image is decoded that nobody asked for."""
    import tensorflow_datasets as tfds

    tree: dict[str, Any] = {}
    for column, feature in features.items():
        *outer, last = column.split(".")
        inner = tree
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = feature
    return tfds.features.FeaturesDict(tree)


def _inside(row: Any, column: str) -> Any:
    for part in column.split("."):
        row = row[part]
    return row


def _value(value: Any, feature: Any, place: str, column: str) -> Any:
    """Text for bytes, the name of a class for its number, a plain number for NumPy's."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: `{column}` is not valid UTF-8 ({error}).") from None
    if hasattr(feature, "int2str"):
        return feature.int2str(int(value))
    if isinstance(value, float | np.floating):
        # 0.1 of a float32, not 0.10000000149
        return float(str(np.dtype(feature.np_dtype).type(value)))
    return value.item() if isinstance(value, np.generic) else value
