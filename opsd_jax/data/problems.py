# SPDX-License-Identifier: Apache-2.0
"""Problems: what a record is, what a set of them can do, and how to read them from local files.

A *problem set* is any object with `len`, integer indexing and `grade`; a *source* is a frozen
dataclass whose `load(cache_dir)` gives one. Files are read as hostile data: nothing is unpickled
or evaluated, and every row that does not fit stops the load with its file and row number.
"""

import dataclasses
import glob
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Protocol, TypeGuard

from opsd_jax.data import grading
from opsd_jax.data.numbers import plain_number
from opsd_jax.data.record import Problem
from opsd_jax.errors import UserError
from opsd_jax.fields import Natural, check, require


class ProblemSet(Protocol):
    """Indexed problems with their own grader."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem: ...

    def grade(self, problem: Problem, completion: str, /) -> float:
        """Grade of one completion, in [0, 1]; hostile text goes through a `GraderPool`.

        A grade that is an object may also have `extract(completion) -> str | None`, the answer
        that was given, and `same(answer, other) -> bool`: then answers can vote (maj@n).
        """


class ProblemSource(Protocol):
    """Anything that config can name and the loop can load."""

    def load(self, cache_dir: str | None) -> ProblemSet: ...


@dataclasses.dataclass(frozen=True)
class LoadedProblems:
    """A problem set in memory.

    `grade` is a field and not a method so that a worker process receives the grader alone.
    """

    problems: tuple[Problem, ...]
    grade: Callable[[Problem, str], float]

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int, /) -> Problem:
        return self.problems[index]


@dataclasses.dataclass(frozen=True)
class AnswerGrader:
    """Grades against `problem.answer` with a function (answer, completion) -> float.

    `extract` and `same` exist where the grader has them: a function of the user's may not.
    """

    grader: grading.Grader

    def __call__(self, problem: Problem, completion: str) -> float:
        return self.grader(problem.answer, completion)

    @property
    def extract(self) -> Callable[[str], str | None]:
        return self.grader.extract  # type: ignore[attr-defined]

    @property
    def same(self) -> Callable[[str, str], bool]:
        return self.grader.same  # type: ignore[attr-defined]

    def warm_up(self) -> None:
        """Has a parser of mathematics import and build what it builds on first use.

        No other grader: a function of the user's need not stand an answer that is not the data's.
        """
        if getattr(self.grader, "same", None) is grading.same_mathematics:
            self.grader(r"\frac{1}{2}", r"\boxed{0.5}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableProblems:
    """Rows with named columns; a subclass says where they come from.

    Attributes:
      question_column: text.
      answer_column: text or a number; None says that there are no answers, so nothing is graded
        (and nothing can be held out).
      solution_column: text; None says that the source has no solutions.
      id_column: a row without it is named by where it stands, `file:row`.
      answer_from: how to read the answer out of its column: "text" takes all of it, "boxed",
        "last_number", "hashes" (GSM8K's `#### 18`), "tagged" and "final" a part.
      grader: "exact", "last_number", "boxed", "math_verify", or a function
        (answer, completion) -> float.
      start, stop: the slice of rows to take, to hold some of a single file out.
    """

    question_column: str = "question"
    solution_column: str | None = "solution"
    answer_column: str | None = "answer"
    id_column: str = "id"
    answer_from: Annotated[str, tuple(grading.EXTRACTORS)] = "text"
    grader: str | grading.Grader = "boxed"
    start: Natural = 0
    stop: int | None = None

    def __post_init__(self):
        name = type(self).__name__
        require(name, self)
        check(f"{name}.stop", self.stop, Annotated[int, f"> {self.start}"] | None)
        grading.find_grader(self.grader, f"{name}.grader")

    def load(self, cache_dir: str | None = None) -> LoadedProblems:
        """Reads and checks every row.

        Raises:
          UserError: nothing there, not of this format, a row that lacks something, an id that
            occurs twice, or no row at all.
        """
        del cache_dir
        problems: dict[str, Problem] = {}
        for place, default_id, row in self._rows():
            problem = self._problem(place, default_id, row)
            if problem.id in problems:
                raise UserError(
                    f"{place}: the id {problem.id!r} occurs a second time; make the values of "
                    f"`{self.id_column}` unique."
                )
            problems[problem.id] = problem
        selected = tuple(problems.values())[self.start : self.stop]
        if not selected:
            raise UserError(
                f"{self._where()} has {len(problems)} rows, so the slice from {self.start} is "
                "empty."
            )
        return LoadedProblems(selected, AnswerGrader(grading.find_grader(self.grader)))

    def _where(self) -> str:
        """What the rows are of, in the user's words."""
        raise NotImplementedError

    def _rows(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Where each row stands, the id of a row without one, and the row."""
        raise NotImplementedError

    def _problem(self, place: str, default_id: str, row: dict[str, Any]) -> Problem:
        solution = ""
        if self.solution_column is not None:
            solution = self._text(place, row, "solution")
        answer = "" if self.answer_column is None else self._answer(place, row)
        has_id = row.get(self.id_column) is not None
        return Problem(
            id=self._text(place, row, "id") if has_id else default_id,
            question=self._text(place, row, "question"),
            solution=solution,
            answer=answer,
        )

    def _answer(self, place: str, row: dict[str, Any]) -> str:
        """The key of a row, which its own grader must be able to find in a completion."""
        name, column = type(self).__name__, self.answer_column
        text = self._text(place, row, "answer")
        try:
            answer = grading.reference_answer(self.answer_from, text)
        except UserError as error:
            raise UserError(f"{place}: `{column}` has {error}.") from None
        if not answer:
            raise UserError(
                f"{place}: no answer of the kind {self.answer_from!r} in `{column}`; correct the "
                f"row or set {name}.answer_from."
            )
        if fault := grading.key_fault(grading.find_grader(self.grader), answer):
            shown = answer if len(answer) <= 80 else answer[:77] + "..."
            raise UserError(
                f"{place}: the key {shown!r} {fault}, so that no completion could be right under "
                f"{name}.grader = {self.grader!r}; correct the row, or set {name}.answer_from or "
                f"{name}.grader."
            )
        return answer

    def _text(self, place: str, row: dict[str, Any], field: str) -> str:
        """The text of the column that stands for `field`; numbers only where they make sense."""
        column = getattr(self, f"{field}_column")
        value = row.get(column)
        if field in ("answer", "id") and _is_number(value):
            value = plain_number(Fraction(str(value)))
        if value is None or (isinstance(value, str) and not value.strip()):
            hint = f"set {type(self).__name__}.{field}_column to one of {', '.join(sorted(row))}"
            if field == "solution":
                hint += " or, where there are no solutions, to None"
            is_there = column in row
            fault = f"`{column}` is empty; fill" if is_there else f"the row has no `{column}`; add"
            raise UserError(f"{place}: {fault} it, or {hint}.")
        if not isinstance(value, str):
            raise UserError(
                f"{place}: `{column}` must be text, but is of type {type(value).__name__}."
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: `{column}` is not valid Unicode ({error}).") from None
        return value


@dataclasses.dataclass(frozen=True)
class _FileProblems(TableProblems):
    """Rows of local files with named columns.

    Attributes:
      path: a file, a directory (searched with its sub-directories) or a glob pattern; several
        files are read in the order of their names.
    """

    path: str

    suffix: ClassVar[str]

    def _where(self) -> str:
        return self.path

    def _rows(self):
        paths = self._paths()
        root = os.path.commonpath([path.parent for path in paths])
        for path in paths:
            number = 0
            for number, row in self._read(path):
                yield f"{path}:{number}", f"{path.relative_to(root)}:{number}", row
            if not number:
                raise UserError(f"{path} has no rows; remove it or fill it.")

    def _paths(self) -> list[pathlib.Path]:
        path = pathlib.Path(self.path).expanduser()
        if path.is_file():
            return [path]
        root, found = path, []
        if path.is_dir():
            found = list(path.rglob(f"*{self.suffix}"))
        else:
            root, pattern = _split_pattern(path)
            found = [root / match for match in glob.glob(pattern, root_dir=root, recursive=True)]
        found = sorted(p for p in found if p.is_file() and not is_hidden(p.relative_to(root)))
        if not found:
            raise UserError(
                f"{type(self).__name__}.path: {self.path} is no file, and no directory or "
                f"pattern with {self.suffix} files in it."
            )
        return found

    def _read(self, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row numbers from 1 and the rows."""
        raise NotImplementedError


class JsonlProblems(_FileProblems):
    """Local JSON lines: one object a line, UTF-8; blank lines are skipped."""

    suffix = ".jsonl"

    def _read(self, path):
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(
                        line.decode("utf-8-sig"), object_pairs_hook=_once, parse_float=_decimal
                    )
                except (ValueError, RecursionError) as error:
                    reason = str(error).splitlines()[0][:100]
                    raise UserError(f"{path}:{number}: not a line of JSON ({reason}).") from None
                if not isinstance(row, dict):
                    raise UserError(
                        f"{path}:{number}: a line must be a JSON object with named columns, "
                        f"but this is of type {type(row).__name__}."
                    )
                yield number, row


class ParquetProblems(_FileProblems):
    """Local parquet files, as published on the Hugging Face Hub."""

    suffix = ".parquet"

    def _read(self, path):
        import pyarrow  # comes with tensorflow-datasets, and only this source needs it
        import pyarrow.parquet

        wanted = {self.question_column, self.solution_column, self.answer_column, self.id_column}
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                columns = table.schema_arrow.names
                doubled = [c for c in wanted if columns.count(c) > 1]
                if doubled:
                    raise UserError(
                        f"{path} has two columns `{doubled[0]}`; write it with one of them."
                    )
                missing = wanted - {None, self.id_column} - set(columns)
                if missing:
                    raise UserError(
                        f"{path} has no column `{min(missing)}`, only {', '.join(columns)}; "
                        f"set the column names of {type(self).__name__} (solution_column=None "
                        "where there are no solutions)."
                    )
                number = 0
                for batch in table.iter_batches(columns=[c for c in columns if c in wanted]):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0][:100]
            raise UserError(f"{path}: not a readable parquet file ({reason}).") from None


@dataclasses.dataclass(frozen=True)
class OtherReferences:
    """A control: every problem keeps its answer and gets the solution of the next problem.

    A student that still improves learns from the form of the teacher's context, not from what
    it says.
    """

    source: ProblemSource

    def load(self, cache_dir: str | None = None) -> LoadedProblems:
        """The problems of `source` with their solutions moved on by one."""
        original = self.source.load(cache_dir)
        problems = [original[i] for i in range(len(original))]
        if len(problems) < 2:
            raise UserError("OtherReferences needs a source of at least two problems.")
        moved = zip(problems, problems[1:] + problems[:1], strict=True)
        return LoadedProblems(
            tuple(dataclasses.replace(p, solution=other.solution) for p, other in moved),
            original.grade,
        )


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
    more = len(exact.as_tuple().digits) > 17 and abs(exact.adjusted()) < 1000
    return exact if more else value


def _split_pattern(path: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The folder that is there and the pattern below it: `[1]` in a folder's name is its name."""
    root = next(parent for parent in path.parents if parent.is_dir())
    return root, str(path.relative_to(root))


def is_hidden(path: pathlib.Path) -> bool:
    """Editors and file managers leave copies in `.ipynb_checkpoints` and `._name`."""
    return any(part.startswith(".") for part in path.parts)


def _is_number(value: object) -> TypeGuard[int | float | Decimal]:
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]
