# SPDX-License-Identifier: Apache-2.0
"""Names on the Hub as the commits they stand for, written into config.gin: a run goes on from the
same bytes after a branch has moved.

    # Hub: owner/name@main is 5f0c…
    PretrainedModel.path = 'owner/name@5f0c…'
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from opsd_jax.data.benchmarks import BENCHMARKS, Benchmark
from opsd_jax.errors import UserError
from opsd_jax.host.config_text import bindings
from opsd_jax.host.files import read_text
from opsd_jax.host.hub import Kind, commit_of, is_hub_name, is_pinned
from opsd_jax.host.pod import refuse_together, text_of_first_process
from opsd_jax.run.gin_files import HUB_FIELDS

Source = TypeVar("Source")
_RECORD = re.compile(r"^# Hub: (\S+) is ([0-9a-f]{40})$", re.MULTILINE)


def pinned(
    experiment: Source, config_text: str = "", workdir: Path | None = None
) -> tuple[Source, str]:
    """An experiment whose Hub names are commits, and its config text with the same.

    Args:
      experiment: or any dataclass with sources in it.
      config_text: its operative config.
      workdir: of the run, whose config.gin has the commits that it began with; these are taken.

    Raises:
      UserError: a name that the Hub cannot be asked for; on all processes of a pod.
    """
    names = dict(_names(experiment))
    commits: dict[str, str] = {}
    if workdir is not None and (workdir / "config.gin").is_file():
        commits = dict(_RECORD.findall(read_text(workdir / "config.gin")))
    commits |= _commits({name: kind for name, kind in names.items() if name not in commits})
    full = {name: f"{name.partition('@')[0]}@{commit}" for name, commit in commits.items()}
    if names:
        experiment, config_text = _replaced(experiment, full), _bound(config_text, full)
    kept = [name for name in sorted(commits) if full[name] in config_text]
    return experiment, "".join(f"# Hub: {n} is {commits[n]}\n" for n in kept) + config_text


def _commits(names: Mapping[str, Kind]) -> dict[str, str]:
    """name -> commit; process 0 asks for its pod."""
    if not names:
        return {}
    found: dict[str, str] = {}
    refusal: UserError | None = None
    if jax.process_index() == 0:
        try:
            found = {name: commit_of(kind, name) for name, kind in names.items()}
        except UserError as error:
            refusal = error
    refuse_together(refusal, ", ".join(names))
    return json.loads(text_of_first_process(json.dumps(found)))


def _names(source: Any) -> Iterator[tuple[str, Kind]]:
    """What an experiment names on the Hub without a commit."""
    for config in _dataclasses(source):
        _, kind = HUB_FIELDS.get(type(config).__name__, ("", "model"))
        name = _name(config)
        if is_hub_name(name) and not is_pinned(name):
            yield name, kind


def _name(config: Any) -> str:
    """What a source may name on the Hub; a benchmark without a path names its own data set."""
    field, _ = HUB_FIELDS.get(type(config).__name__, ("", "model"))
    name = str(getattr(config, field, ""))
    return BENCHMARKS[config.name].hub_id if isinstance(config, Benchmark) and not name else name


def _dataclasses(source: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(source) and not isinstance(source, type):
        yield source
        for field in dataclasses.fields(source):
            yield from _dataclasses(getattr(source, field.name))


def _replaced(source: Any, full: Mapping[str, str]) -> Any:
    """The same dataclass with full names; one without any is itself."""
    if not any(True for _ in _names(source)):
        return source
    changes: dict[str, Any] = {}
    own = HUB_FIELDS.get(type(source).__name__, ("", "model"))[0]
    for field in dataclasses.fields(source):
        value = getattr(source, field.name)
        new = full.get(_name(source), value) if field.name == own else _replaced(value, full)
        if new is not value and field.init:
            changes[field.name] = new
    return dataclasses.replace(source, **changes)


def _bound(text: str, full: Mapping[str, str]) -> str:
    """The config text with full names where a field, or a macro, is bound to one."""
    quoted = "|".join(map(re.escape, full))
    fields = "|".join(dict.fromkeys(field for field, _ in HUB_FIELDS.values()))
    bound = re.compile(
        rf"^((?:[\w./]+\.(?:{fields})|\w+) = (?:\\\n\s+)?)(['\"])({quoted})\2$", re.MULTILINE
    )
    text = bound.sub(lambda m: f"{m[1]}{m[2]}{full[m[3]]}{m[2]}", text)
    values = bindings(text)

    def own(match: re.Match[str]) -> str:
        name = values[f"{match[1]}.name"]
        name = values.get(name.removeprefix("%"), name).strip("'\"")
        return f"{match[1]}.path = '{full.get(BENCHMARKS[name].hub_id, '')}'"

    return re.sub(r"^([\w./]*\bBenchmark)\.path = ''$", own, text, flags=re.MULTILINE)
