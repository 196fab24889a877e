# SPDX-License-Identifier: Apache-2.0
"""Text files of a run: written whole or not at all, read as far as they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opsd_jax.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Writes a whole file or, killed or out of space, leaves the old one; folders are made.

    A lone surrogate, which utf-8 cannot hold, is written as its escape.

    Raises:
      UserError: the file cannot be written.
    """
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


def read_json_lines(path: Path, increasing: str | None = None) -> list[dict[str, Any]]:
    """The whole json objects of a file, one a line; none if it is missing.

    Args:
      path: what is read; a torn last line, or any other that is no json object, is left out.
      increasing: an integer field; lines that do not raise it are left out.
    """
    found: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        if increasing is not None:
            at = line.get(increasing)
            if not isinstance(at, int) or (found and at <= found[-1][increasing]):
                continue
        found.append(line)
    return found


def read_json(path: str) -> dict[str, Any]:
    """A JSON object of a model directory, such as config.json."""
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
