# SPDX-License-Identifier: Apache-2.0
"""Which files of a data set are a split of a subset: by its card, or by the names of its files.

main/train-00000-of-00001.parquet   subset "main", split "train"
data/test.jsonl.gz                  split "test"
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.host.hub import Listing, fetch

_WORDS = "train training test testing validation valid val dev eval evaluation heldout".split()
_EDGE = r"[/_.\-]|\d{3}"


def hub_files(
    name: str, source: str, subset: str | None, split: str | None, suffixes: Sequence[str]
) -> list[Path]:
    """The files of a data set of the Hub, fetched if they are not in the cache.

    Args:
      name: `owner/name[@revision]`.
      source: what the user calls what reads it, such as "ParquetProblems".
      subset, split: None where there is only one.
      suffixes: of the files that are read.

    Raises:
      UserError: it cannot be fetched, or has none, or several to choose from.
    """

    found: list[str] = []

    def choose(listing: Listing) -> list[str]:
        files = [file for file in listing.sizes if not is_hidden(PurePosixPath(file))]
        found.extend(_chosen(name, source, files, listing.configs, subset, split, suffixes))
        return found

    folder = fetch("dataset", name, choose)
    return [folder / file for file in found]


def _chosen(
    name: str,
    source: str,
    files: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    subset: str | None,
    split: str | None,
    suffixes: Sequence[str],
) -> list[str]:
    if configs and (named := _of_card(name, source, files, configs, subset, split)) is not None:
        readable = _readable(name, source, named, suffixes)
    else:
        readable = of_subset(name, source, _readable(name, source, files, suffixes), subset)
        readable = of_split(name, source, readable, split)
    return sorted(readable)


def _readable(name: str, source: str, files: Iterable[str], suffixes: Sequence[str]) -> list[str]:
    files = list(files)
    if found := [file for file in files if file.endswith(tuple(suffixes))]:
        return found
    others = sorted({Path(file).suffix for file in files} - {""})
    hint = "; @ParquetProblems() reads .parquet" * (".parquet" in others)
    hint += "; @JsonlProblems() reads .jsonl" * any(".jsonl" in file for file in files)
    raise UserError(
        f"{source}.path = {name!r}: no {' or '.join(suffixes)} file there, only "
        f"{', '.join(others) or 'files without a suffix'}{hint}"
    )


def of_subset(name: str, source: str, files: Sequence[str], subset: str | None) -> list[str]:
    """Those in the folder of a subset; without one, there must be one folder."""
    if subset is not None:
        found = [file for file in files if subset in file.split("/")[:-1]]
        if found:
            return found
    tops = {file.split("/")[0] for file in files if "/" in file}
    folders = sorted(top for top in tops if top != "data" and top.lower() not in _WORDS)
    if subset is not None or len(folders) > 1:
        what = f"must be one of {', '.join(folders)}" if folders else "must be None: there is none"
        raise UserError(f"{source}.subset {what}, not {subset!r} ({name})")
    return list(files)


def of_split(name: str, source: str, files: Sequence[str], split: str | None) -> list[str]:
    """Those whose names have the split's as a word; without one, there must be one split."""
    words = [word for word in _WORDS if any(_names(file, word) for file in files)]
    if split is not None:
        if found := [file for file in files if _names(file, split)]:
            return found
    elif len(words) <= 1:
        return list(files)
    known = f"one of {', '.join(words)}" if words else "None: no file's name tells one"
    raise UserError(
        f"{source}.split must be {known}, not {split!r} ({name}); where a column tells it, set "
        f"{source}.split_column"
    )


def _names(file: str, word: str) -> bool:
    return bool(re.search(rf"(?:^|{_EDGE}){re.escape(word)}(?:{_EDGE}|$)", file, re.I))


def _of_card(
    name: str,
    source: str,
    files: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    subset: str | None,
    split: str | None,
) -> list[str] | None:
    """The files that a data set's card names; None where it names none for this subset."""
    known = {str(c.get("config_name", "default")): c for c in configs if isinstance(c, Mapping)}
    chosen = subset
    if chosen is None:
        first = [n for n, c in known.items() if c.get("default") or n == "default"]
        chosen = first[0] if first else next(iter(known)) if len(known) == 1 else None
    if chosen not in known:
        raise UserError(
            f"{source}.subset must be one of {', '.join(sorted(known))}, not {subset!r} ({name})"
        )
    patterns = _patterns(known[chosen].get("data_files"))
    if patterns is None:
        return None
    if split is None and len(patterns) == 1:
        split = next(iter(patterns))
    if split not in patterns:
        raise UserError(
            f"{source}.split must be one of {', '.join(sorted(patterns))}, not {split!r} ({name})"
        )
    return [f for f in files if any(_fits(f, pattern) for pattern in patterns[split])]


def _patterns(data_files: Any) -> dict[str, list[str]] | None:
    """split -> patterns of a card's data_files, in each of the forms that it may have."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    if isinstance(data_files, Mapping):
        data_files = [{"split": k, "path": v} for k, v in data_files.items()]
    if not isinstance(data_files, list) or not data_files:
        return None
    found: dict[str, list[str]] = {}
    for entry in data_files:
        if isinstance(entry, str):
            entry = {"split": "train", "path": entry}
        if not isinstance(entry, Mapping):
            return None
        paths = entry.get("path")
        paths = paths if isinstance(paths, list) else [paths]
        found.setdefault(str(entry.get("split", "train")), []).extend(map(str, paths))
    return found


def _fits(file: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./").replace("**/", "*")
    is_folder = file.startswith(pattern.rstrip("/") + "/")
    return is_folder or fnmatch.fnmatchcase(file, pattern)


def is_hidden(path: PurePath) -> bool:
    """Editors and file managers leave copies in `.ipynb_checkpoints` and `._name`."""
    return any(part.startswith(".") for part in path.parts)
