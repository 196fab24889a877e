# SPDX-License-Identifier: Apache-2.0
"""Text files of a run: atomic writes, and checked reads of JSON, JSON lines and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from opsd_jax.errors import UserError

# No file that a run writes as text comes near it; what does would fill the memory.
MOST_BYTES = 2**31
# The index of a model with a million tensors has this size.
_MOST_JSON_BYTES = 100 * 2**20


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a workdir is named as gs://BUCKET/RUN or s3://BUCKET/RUN."""
    return isinstance(path, str) and re.match("(gs|s3)://", path) is not None


def split_bucket(url: str) -> tuple[str, str, str]:
    """(scheme, bucket, name in it) of gs://BUCKET/RUN or s3://BUCKET/RUN.

    Raises:
      UserError: no bucket or no name, or a name that is no path below the bucket.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.rstrip("/").partition("/")
    known = re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket)
    if not known or any(part in ("", ".", "..") for part in key.split("/")):
        raise UserError(f"must be {scheme}://BUCKET/RUN, not {url!r}")
    return scheme, bucket, key


def require_mounted(path: str | os.PathLike[str], name: str = "") -> None:
    """Raises a UserError for gs://bucket/run and its like, which would silently become a local
    folder "gs:" of each host. As a Path it has lost its second slash."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):
        raise UserError(
            f"{name} must be a path on a file system that is mounted here, not "
            f"{os.fspath(path)!r}: in buckets there are workdirs alone, named as gs://BUCKET/RUN "
            "or s3://BUCKET/RUN".lstrip()
        )


def write_whole(path: Path, text: str) -> None:
    """Writes a whole file or, killed or out of space, leaves the old one; folders are made.

    A lone surrogate, which utf-8 cannot hold, is written as its escape.

    Raises:
      UserError: the file cannot be written.
    """
    if not path.name or path.is_dir():
        raise UserError(f"cannot write {str(path)!r}: it must be the name of a file, not a folder")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder to fill before its files take their names; removed in the end with what is left.

    Args:
      parent: where it is made, on the file system of the names; made if missing.
      prefix: of its own name.

    Raises:
      UserError: something cannot be written there.
    """
    scratch = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=prefix, dir=parent)
        yield Path(scratch)
    except Exception as error:
        # What is written in Rust (safetensors, tokenizers) has errors of its own kind.
        told = re.search(r"([^:]*) \(os error \d+\)", str(error))
        if not told and not isinstance(error, OSError):
            raise
        reason = told.group(1).strip() if told else getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {parent}: {reason}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one json object a line, as `write_whole`."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_text(path: Path) -> str:
    """The text of a file of a run; bytes that are not UTF-8 become U+FFFD.

    Raises:
      UserError: it is no regular file (a pipe would be waited for without end), is larger than
        `MOST_BYTES` or cannot be read.
    """
    return read_bytes(path).decode(errors="replace")


def read_bytes(path: Path) -> bytes:
    """The content of a regular file of at most `MOST_BYTES`; a UserError for anything else."""
    try:
        if not path.is_file():
            raise UserError(f"{path} must be a file, not a folder, a pipe or a device")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(f"{path} must have at most {MOST_BYTES:,} bytes, not {size:,}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def parsed_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """(line with its end, its JSON object or None where it is none); no line if it is missing."""
    for line in read_bytes(path).splitlines(keepends=True) if path.exists() else []:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested without end
            found = None
        yield line, found if isinstance(found, dict) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; what is torn or something else is left out."""
    return [found for _, found in parsed_lines(path) if found is not None]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl as far as they are whole; none if it is missing.

    Returns:
      dicts with an integer "step", strictly increasing, and else numbers or None. A line
      or a value that is anything else is left out, as if it had never been logged.
    """
    found: list[dict[str, Any]] = []
    for line in read_json_lines(path):
        step = line.get("step")
        if not is_count(step) or (found and step <= found[-1]["step"]):
            continue
        kept = {name: value for name, value in line.items() if value is None or is_number(value)}
        found.append(kept)
    return found


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a JSON file is a number, and one that sums and squares cannot overflow."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and -1e100 <= value <= 1e100  # False for NaN and the infinities


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON file is an integer from 0 to 2**53, so exact as a float64 too."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


def require_writable(folder: Path) -> None:
    """Tries to write to a folder, or where it would be made, before minutes are spent on it.

    Raises:
      UserError: that cannot be.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def read_json(path: str) -> dict[str, Any]:
    """A JSON object of a model directory, such as config.json.

    Raises:
      UserError: no such file, no file at all (a pipe would be waited for), or no JSON object.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a file")
    if os.path.exists(path) and os.path.getsize(path) > _MOST_JSON_BYTES:
        raise UserError(f"{path}: larger than {_MOST_JSON_BYTES} bytes, which no such file is")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; name a Hugging Face model directory") from error
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested without end
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
