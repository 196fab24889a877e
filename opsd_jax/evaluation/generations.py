# SPDX-License-Identifier: Apache-2.0
"""generations.jsonl: graded completions, kept while an evaluation runs.

One line of generations.jsonl is one graded completion, written when its grade is known. An
evaluation that is killed reads the file and samples what is not in it: every sample has its own
key, so the numbers at the end are those of an evaluation that was never interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opsd_jax.data.problems import Problem
from opsd_jax.errors import UserError
from opsd_jax.host.files import is_count, is_number, parsed_lines, read_text, write_whole

RECORD_FILE = "evaluation.json"
GENERATIONS_FILE = "generations.jsonl"
BY_PROBLEM_FILE = "by_problem.jsonl"
OUTCOMES = ("graded", "timeout", "died", "error")  # of `grader_pool.Grade`


class Generation(NamedTuple):
    """One graded completion.

    Attributes:
      problem: what was asked.
      text: the completion.
      num_tokens: of it, a stop token included.
      stopped: whether it ended by itself; if not, the length limit cut it.
      reward: its grade in [0, 1].
      sample: its number among the samples of the problem.
      answer: what the grader compared (`grader_pool.Grade.answer`).
      outcome: how grading ended (`grader_pool.Grade.outcome`).
      group: number of the group of equal answers that it votes for; None is no vote.
    """

    problem: Problem
    text: str
    num_tokens: int
    stopped: bool
    reward: float
    sample: int = 0
    answer: str | None = None
    outcome: str = "graded"
    group: int | None = None


class Place(NamedTuple):
    """Which completion of an evaluation this is."""

    role: str
    sampling: str  # "sampled" or "greedy"
    id: str
    sample: int


class GenerationLog:
    """The generations of one evaluation in a folder of their own.

    Args:
      folder: made if missing.
      record: what is evaluated and how, as JSON; kept beside the generations.
      writes: False for the other processes of a pod, which only read.

    Raises:
      UserError: the folder holds another evaluation, or something else.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], writes: bool = True):
        self._path = folder / GENERATIONS_FILE
        _check_record(folder, json.loads(json.dumps(record)))
        self.found, whole_bytes = read_generations(self._path)
        self._file = None
        if writes:
            try:
                write_whole(folder / RECORD_FILE, json.dumps(record, indent=1) + "\n")
                self._file = self._path.open("ab")
                self._file.truncate(whole_bytes)
            except OSError as error:
                raise UserError(f"cannot write {folder}: {error.strerror}") from error

    def append(self, place: Place, generation: Generation) -> None:
        """Writes one line; what a kill leaves of it is dropped on the next start."""
        if self._file is None:
            return
        line = json.dumps(place._asdict() | fields_of(generation), ensure_ascii=False)
        try:
            self._file.write(line.encode(errors="backslashreplace") + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> GenerationLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def fields_of(generation: Generation) -> dict[str, Any]:
    """What a line holds beside its place."""
    return {
        "completion": generation.text,
        "num_tokens": generation.num_tokens,
        "stopped": generation.stopped,
        "reward": generation.reward,
        "answer": generation.answer,
        "outcome": generation.outcome,
    }


def generation_of(problem: Problem, sample: int, fields: Mapping[str, Any]) -> Generation:
    """The inverse of `fields_of`."""
    return Generation(
        problem,
        fields["completion"],
        fields["num_tokens"],
        fields["stopped"],
        fields["reward"],
        sample,
        fields["answer"],
        fields["outcome"],
    )


def read_generations(path: Path) -> tuple[dict[Place, dict[str, Any]], int]:
    """Lines by place, and the bytes of all whole lines: a torn last line is left out.

    Raises:
      UserError: a line that is not one of ours, or a place that occurs twice.
    """
    found: dict[Place, dict[str, Any]] = {}
    whole_bytes = 0
    for number, (line, fields) in enumerate(parsed_lines(path), start=1):
        if not line.endswith(b"\n"):
            break
        if fields is None or not all(fits(fields.get(name)) for name, fits in _FIELDS.items()):
            raise UserError(f"{path}:{number}: not a generation; remove the line")
        place = Place(*(fields[name] for name in Place._fields))
        if place in found:
            raise UserError(f"{path}:{number}: {place} occurs a second time; remove the line")
        found[place] = fields
        whole_bytes += len(line)
    return found, whole_bytes


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What the fields of a line must be: every number of an evaluation is counted from them.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("role", "id", "completion"), _is_text),
    "sampling": lambda value: value in ("sampled", "greedy"),
    **dict.fromkeys(("sample", "num_tokens"), is_count),
    "stopped": lambda value: isinstance(value, bool),
    "reward": lambda value: is_number(value) and 0 <= value <= 1,
    "answer": lambda value: value is None or isinstance(value, str),
    "outcome": lambda value: value in OUTCOMES,
}


def _check_record(folder: Path, record: dict[str, Any]) -> None:
    """Raises a UserError if the folder belongs to something else."""
    old = read_record(folder)
    if old is None:
        if (folder / GENERATIONS_FILE).exists():
            raise UserError(
                f"{folder} has generations but no {RECORD_FILE}; use another folder as out"
            )
        return
    for name in sorted(old.keys() | record.keys()):
        if name not in old or name not in record or old[name] != record[name]:
            was, now = (_shown(side.get(name)) for side in (old, record))
            raise UserError(
                f"{folder} holds another evaluation: {name} was {was} and is now {now}; use "
                "another folder as out"
            )


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `GenerationLog` wrote in a folder; None if there is no record.

    Raises:
      UserError: it is there and is no JSON object.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged; use another folder as out")
    return found


def _shown(value: Any) -> str:
    """Any JSON value on one short line."""
    try:
        text = str(value).replace("\n", " ")
    except RecursionError:
        text = "nested without end"
    return text if len(text) <= 80 else text[:77] + "..."
