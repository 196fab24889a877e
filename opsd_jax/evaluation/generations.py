# SPDX-License-Identifier: Apache-2.0
"""Graded completions, and the file that keeps them while an evaluation runs.

One line of generations.jsonl is one graded completion, written when its grade is known. An
evaluation that is killed reads the file and samples what is not in it: every sample has its own
key, so the numbers at the end are those of an evaluation that was never interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opsd_jax.data.problems import Problem
from opsd_jax.errors import UserError
from opsd_jax.host.files import write_whole

RECORD_FILE = "evaluation.json"
GENERATIONS_FILE = "generations.jsonl"
BY_PROBLEM_FILE = "by_problem.jsonl"


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
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            fields = json.loads(line)
            place = Place(*(fields[name] for name in Place._fields))
            generation_of(Problem("", "", "", ""), place.sample, fields)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a generation; remove the line") from None
        if place in found:
            raise UserError(f"{path}:{number}: {place} occurs a second time; remove the line")
        found[place] = fields
        whole_bytes += len(line)
    return found, whole_bytes


def _check_record(folder: Path, record: dict[str, Any]) -> None:
    """Raises a UserError if the folder belongs to something else."""
    path = folder / RECORD_FILE
    if not path.exists():
        if (folder / GENERATIONS_FILE).exists():
            raise UserError(f"{folder} has generations but no {RECORD_FILE}; use another --out")
        return
    try:
        old = json.loads(path.read_text())
    except ValueError:
        old = {}
    for name in sorted(old.keys() | record.keys()):
        if old.get(name) != record.get(name):
            raise UserError(
                f"{folder} holds another evaluation: {name} was {old.get(name)} and is now "
                f"{record.get(name)}; use another --out"
            )
