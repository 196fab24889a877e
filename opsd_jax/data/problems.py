# SPDX-License-Identifier: Apache-2.0
"""Problem sets: what a set of records can do, and how rows with named columns become one.

A *problem set* is any object with `len`, integer indexing and `grade`; a *source* is a frozen
dataclass whose `load(cache_dir)` gives one. Rows are hostile data: nothing is unpickled or
evaluated, and every row that does not fit stops the load with its file and row number.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Protocol

from opsd_jax.data import grading
from opsd_jax.data.record import Message, Problem, Question, question_text
from opsd_jax.data.rows import (
    advice,
    conversation,
    find,
    further_columns,
    has,
    is_number,
    leaves,
    scalar_text,
)
from opsd_jax.errors import UserError
from opsd_jax.fields import Natural, Share, check, require


class ProblemSet(Protocol):
    """Indexed problems with their own grader."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Problem: ...

    def grade(self, problem: Problem, completion: str, /) -> grading.Given:
        """Grade of one completion, in [0, 1]; hostile text goes through a `GraderPool`.

        It may be (grade, feedback): what a template of the teacher shows as {feedback}.

        A grade that is an object may also have `extract(completion) -> str | None`, the answer
        that was given, and `same(answer, other) -> bool`: then answers can vote (maj@n).
        """


class _MissingColumn(UserError):
    """A row has not a column that is read."""


class ProblemSource(Protocol):
    """Anything that config can name and the loop can load."""

    def load(self, cache_dir: str | None) -> ProblemSet: ...


@dataclasses.dataclass(frozen=True)
class LoadedProblems:
    """A problem set in memory.

    `grade` is a field and not a method so that a worker process receives the grader alone.
    """

    problems: tuple[Problem, ...]
    grade: Callable[[Problem, str], grading.Given]

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int, /) -> Problem:
        return self.problems[index]


@dataclasses.dataclass(frozen=True)
class AnswerGrader:
    """Grades against `problem.answer` with a function (answer, completion) -> float.

    Of several right answers the best grade counts. `extract` and `same` exist where the grader has
    them: a function of the user's may not.
    """

    grader: grading.Grader

    def __call__(self, problem: Problem, completion: str) -> grading.Given:
        grades = [self.grader(a, completion) for a in (problem.answer, *problem.other_answers)]
        # A grader may give (value, feedback).
        return max(grades, key=lambda grade: grade[0] if isinstance(grade, tuple) else grade)

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

    A column inside another is written `outer.inner` (`data/rows.py`).

    Attributes:
      question_column: text, or a conversation as a list of {"role", "content"}. Where that ends
        with the assistant's turn, which must be the solution or the answer, it is cut off.
      answer_column: text, a number, a boolean, a list of them of which any is right, or a
        conversation; None says that there are no answers, so nothing is graded (and nothing can be
        held out).
      solution_column: text, or a conversation, whose last turn of the assistant's it is; None says
        that the source has no solutions.
      id_column: a row without it is named by where it stands, `file:row`.
      keep_columns: further columns that templates may show, {name}; None keeps all, but no value
        of more than 4,000 characters.
      answer_from: how to read the answer out of its column: "text" takes all of it, "boxed",
        "last_number", "hashes" (GSM8K's `#### 18`), "tagged" and "final" a part.
      grader: "exact", "last_number", "boxed", "math_verify", or a function
        (answer, completion) -> float, or (float, feedback text).
      hash_start, hash_stop: rows whose question's hash, a share between 0 and 1, is within: of
        [0, 0.9) and [0.9, 1) none has a question of the other, whatever the order of the rows.
      start, stop: the slice of the rows so far to take; those behind it are not read.
    """

    question_column: str = "question"
    solution_column: str | None = "solution"
    answer_column: str | None = "answer"
    id_column: str = "id"
    keep_columns: tuple[str, ...] | None = None
    answer_from: Annotated[str, tuple(grading.EXTRACTORS)] = "text"
    grader: str | grading.Grader = "boxed"
    hash_start: Share = 0.0
    hash_stop: Share = 1.0
    start: Natural = 0
    stop: int | None = None

    def __post_init__(self):
        name = type(self).__name__
        require(name, self)
        if self.hash_start >= self.hash_stop:
            raise UserError(
                f"{name}.hash_stop must be above {name}.hash_start = {self.hash_start}, not "
                f"{self.hash_stop}"
            )
        check(f"{name}.stop", self.stop, Annotated[int, f"> {self.start}"] | None)
        grading.find_grader(self.grader, f"{name}.grader")

    def load(self, cache_dir: str | None = None) -> LoadedProblems:
        """Reads and checks every row, in the order of the files.

        Raises:
          UserError: nothing there, not of this format, a row that lacks something, an id that
            occurs twice, or no row at all.
        """
        del cache_dir
        problems: dict[str, Problem] = {}
        takes_all = self.hash_start == 0 and self.hash_stop == 1
        for place, default_id, row in self._rows():
            try:
                problem = self._problem(place, default_id, row)
            except _MissingColumn as error:
                # Where earlier rows have it, the file is laid out as was said.
                layout = "" if problems else advice(row, type(self).__name__)
                raise UserError(f"{error}{layout}.") from None
            share = 0.0 if takes_all else hash_share(problem.question)
            if not self.hash_start <= share < self.hash_stop:
                continue
            if problem.id in problems:
                raise UserError(
                    f"{place}: the id {problem.id!r} occurs a second time; make the values of "
                    f"`{self.id_column}` unique."
                )
            problems[problem.id] = problem
            if len(problems) == self.stop:
                break
        selected = tuple(problems.values())[self.start :]
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
        answers: tuple[str, ...] = ("",)
        if self.solution_column is not None:
            solution = self._text(place, row, "solution", find(row, self.solution_column))
        if self.answer_column is not None:
            answers = self._answers(place, row)
        used = [
            getattr(self, f"{name}_column") for name in ("question", "solution", "answer", "id")
        ]
        given_id = find(row, self.id_column)
        return Problem(
            id=default_id if given_id is None else self._text(place, row, "id", given_id),
            question=self._question(place, row),
            solution=solution,
            answer=answers[0],
            other_answers=answers[1:],
            columns=further_columns(row, used, self.keep_columns),
        )

    def _question(self, place: str, row: dict[str, Any]) -> Question:
        """Text, also for a conversation of one turn; else the turns up to the user's last."""
        name, column = type(self).__name__, self.question_column
        value = find(row, column)
        turns = self._turns(place, column, value)
        if turns is None:
            return self._text(place, row, "question", value)
        if turns[-1].role == "assistant":
            if column not in (self.solution_column, self.answer_column):
                raise UserError(
                    f"{place}: `{column}` ends with the assistant's turn, which would be lost; set "
                    f"{name}.solution_column = {column!r} to take it as the solution."
                )
            turns = turns[:-1]
        if not turns or turns[-1].role != "user" or not turns[-1].content.strip():
            raise UserError(f"{place}: `{column}` asks nothing: no turn of the user's ends it.")
        for turn in turns:
            self._check_unicode(place, column, turn.content)
        return turns[0].content if len(turns) == 1 else turns

    def _turns(self, place: str, column: str, value: Any) -> tuple[Message, ...] | None:
        try:
            return conversation(value)
        except UserError as error:
            raise UserError(f"{place}: `{column}` {error}.") from None

    def _answers(self, place: str, row: dict[str, Any]) -> tuple[str, ...]:
        """The keys of a row, which its own grader must be able to find in a completion."""
        value = find(row, str(self.answer_column))
        if isinstance(value, list) and value and not any(isinstance(v, dict) for v in value):
            given = value
        else:
            given = [value]
        if self.answer_from == "text":  # True is written both ways
            given = [*given, *(str(v).lower() for v in given if isinstance(v, bool))]
        return tuple(dict.fromkeys(self._answer(place, row, each) for each in given))

    def _answer(self, place: str, row: dict[str, Any], value: Any) -> str:
        name, column = type(self).__name__, self.answer_column
        text = self._text(place, row, "answer", scalar_text(value))
        try:
            answer = grading.reference_answer(self.answer_from, text)
        except UserError as error:
            raise UserError(f"{place}: `{column}` has {error}.") from None
        if not answer:
            marked = ("boxed", "hashes", "tagged", "last_number")
            kinds = [kind for kind in marked if grading.EXTRACTORS[kind](text)]
            raise UserError(
                f"{place}: no answer of the kind {self.answer_from!r} in `{column}`; correct the "
                f"row or set {name}.answer_from"
                + (f" ({' and '.join(map(repr, kinds))} would find one)." if kinds else ".")
            )
        if fault := grading.key_fault(grading.find_grader(self.grader), answer):
            shown = answer if len(answer) <= 80 else answer[:77] + "..."
            raise UserError(
                f"{place}: the key {shown!r} {fault}, so that no completion could be right under "
                f"{name}.grader = {self.grader!r}; correct the row, or set {name}.answer_from or "
                f"{name}.grader."
            )
        return answer

    def _text(self, place: str, row: dict[str, Any], field: str, value: Any) -> str:
        """The text of a value of the column for `field`; numbers only where they make sense."""
        name, column = type(self).__name__, getattr(self, f"{field}_column")
        if field == "id" and is_number(value):
            value = scalar_text(value)
        if field != "id" and (turns := self._turns(place, column, value)):
            said = [turn.content for turn in turns if turn.role == "assistant"]
            if not said:
                raise UserError(f"{place}: `{column}` has no turn of the assistant's to take.")
            value = said[-1]
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            known = ", ".join(sorted(key for key, _ in leaves(row)))
            hint = f"set {name}.{field}_column to one of {known}"
            if field == "solution":
                hint += " or, where there are no solutions, to None"
            if has(row, column):
                raise UserError(f"{place}: `{column}` is empty; fill it, or {hint}.")
            raise _MissingColumn(f"{place}: the row has no `{column}`; add it, or {hint}")
        if not isinstance(value, str):
            raise UserError(
                f"{place}: `{column}` must be text, but is of type {type(value).__name__}."
            )
        self._check_unicode(place, column, value)
        return value

    def _check_unicode(self, place: str, column: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: `{column}` is not valid Unicode ({error}).") from None


def hash_share(question: Question) -> float:
    """A number in [0, 1) that a question has whatever stands around it; white space is no part."""
    text = " ".join(question_text(question).split())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


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
