# SPDX-License-Identifier: Apache-2.0
"""Grading in worker processes with a hard time limit, because a model's text is hostile.

    pool thread --(problem, completion)--> worker process --grade, answer--> pool thread
    pool thread --(answer, other answer)--> worker process --are they one?--> pool thread

Scorers parse, simplify and, in some of reasoning-gym's data sets, even evaluate what the model
wrote. So each grade runs in a process that has no device, little memory and no way to write
files or start programs by ordinary means, and that is killed and replaced when time is up.
"""

import concurrent.futures
import dataclasses
import json
import logging
import math
import pickle
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import cloudpickle

from opsd_jax.data.grading import MAX_ANSWER_LEN
from opsd_jax.data.worker import Worker, describe
from opsd_jax.errors import UserError

log = logging.getLogger(__name__)

MAX_FEEDBACK_LEN = 2**14  # characters
_MAX_REPLY_BYTES = 2**12 + 12 * (MAX_ANSWER_LEN + MAX_FEEDBACK_LEN)  # JSON's, for a character


class Grade(NamedTuple):
    """What came of one answer.

    Attributes:
      value: in [0, 1]; 0 unless `outcome` is "graded".
      outcome: "graded", "timeout", "died" (the worker did) or "error" (the grader raised).
      detail: the error, else "".
      answer: what the grader found to compare, None if it found nothing, something longer than
        `grading.MAX_ANSWER_LEN`, or has no `extract`.
      feedback: what the grader said beside the grade, "" for nothing.
    """

    value: float
    outcome: str = "graded"
    detail: str = ""
    answer: str | None = None
    feedback: str = ""


class GraderPool:
    """Worker processes that grade completions; a context manager.

    Args:
      grade: (problem, completion) -> float in [0, 1], for example the `grade` of a problem set; or
        (float, feedback text of at most `MAX_FEEDBACK_LEN` characters).
        It is sent to the workers once, so it should be light. Its method `warm_up()`, if it
        has one, runs first and outside the limit: for imports and first-use costs. With
        `extract` and `same` (see `ProblemSet.grade`) answers can vote.
      num_workers: processes, started when first needed. 0 grades in this process, without any
        protection: for graders that cannot hang, and for debugging.
      time_limit_s: after so long an answer is worth 0 and its worker is killed.
      memory_gib: address space of a worker; past it the grader sees a MemoryError.
    """

    def __init__(
        self,
        grade: Callable[[Any, str], Any],
        *,
        num_workers: int = 2,
        time_limit_s: float = 5.0,
        memory_gib: float = 4.0,
    ):
        if num_workers < 0 or time_limit_s <= 0 or memory_gib <= 0:
            raise UserError(
                "GraderPool needs num_workers >= 0, time_limit_s > 0 and memory_gib > 0, got "
                f"{num_workers}, {time_limit_s} and {memory_gib}."
            )
        self._grade = grade
        self.num_workers = num_workers
        self.can_vote = hasattr(grade, "extract") and hasattr(grade, "same")
        self._time_limit_s = time_limit_s
        self._memory_bytes = int(memory_gib * 2**30)
        self._threads = concurrent.futures.ThreadPoolExecutor(num_workers or 1, "grader")
        self._own = threading.local()  # each thread talks to a worker of its own
        self._workers: set[Worker] = set()
        self._closed = False
        self._error_told = False
        self._lock = threading.Lock()  # guards the three above
        self._pickled = cloudpickle.dumps(_Answers(grade)) if num_workers else b""

    def submit(self, problem: Any, completion: str) -> concurrent.futures.Future[Grade]:
        """Starts grading and returns at once; the future holds the `Grade`."""
        return self._threads.submit(self._grade_one, problem, completion)

    def grade(self, problems: Iterable[Any], completions: Iterable[str]) -> list[Grade]:
        """Grades of pairs, in their order."""
        pairs = zip(problems, completions, strict=True)
        return [f.result() for f in [self.submit(*pair) for pair in pairs]]

    def same(self, answer: str, other: str) -> bool:
        """Whether two answers are one; waits for it. What cannot be told in time is a no."""
        return "same" in self._threads.submit(self._ask, "same", answer, other).result()

    def close(self) -> None:
        """Drops what is queued and ends the workers, whatever they are doing."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        self._threads.shutdown()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()

    def _grade_one(self, problem: Any, completion: str) -> Grade:
        grade = Grade(**({"value": 0.0} | self._ask("grade", problem, completion)))
        if grade.outcome == "error":
            with self._lock:
                first, self._error_told = not self._error_told, True
            if first:
                log.warning(
                    "The grader raised %s; such answers are worth 0 and are counted in "
                    "ungraded_fraction, this is said once.",
                    grade.detail,
                )
        return grade

    def _ask(self, what: str, *arguments: Any) -> dict[str, Any]:
        """The reply of a worker, or of this process, to `what`."""
        if self.num_workers == 0:
            return json.loads(_reply(self._grade, what, *arguments))
        worker = getattr(self._own, "worker", None) or self._start_worker()
        reply = worker.ask(pickle.dumps((what, *arguments)), self._time_limit_s)
        if reply is not None:
            return json.loads(reply)
        self._own.worker = None
        with self._lock:
            self._workers.discard(worker)
        return {"outcome": "timeout" if worker.timed_out else "died"}

    def _start_worker(self) -> Worker:
        worker = Worker(self._time_limit_s, self._memory_bytes, _MAX_REPLY_BYTES)
        with self._lock:
            self._workers.add(worker)
            if self._closed:
                worker.kill()
        worker.load(self._pickled)
        self._own.worker = worker
        return worker


@dataclasses.dataclass(frozen=True)
class _Answers:
    """What a worker does with a message."""

    grade: Any

    def warm_up(self) -> None:
        getattr(self.grade, "warm_up", lambda: None)()

    def __call__(self, message: bytes) -> bytes:
        return _reply(self.grade, *pickle.loads(message))


def _reply(grade: Any, what: str, *arguments: Any) -> bytes:
    """The fields of a `Grade`, or whether two answers are one, as JSON."""
    try:
        if what == "same":
            return json.dumps({"same": True} if grade.same(*arguments) else {}).encode()
        value, feedback = _value_and_feedback(grade(*arguments))
        answer = grade.extract(arguments[1]) if hasattr(grade, "extract") else None
        if not answer or len(answer) > MAX_ANSWER_LEN:
            answer = None
        found = {"value": value, "answer": answer, "feedback": feedback}
        return json.dumps(found).encode()
    except Exception as error:
        return json.dumps({"outcome": "error", "detail": describe(error)}).encode()


def _value_and_feedback(given: Any) -> tuple[float, str]:
    """What a grader returned: a number, or a number and a text."""
    value, feedback = given if isinstance(given, tuple) and len(given) == 2 else (given, "")
    value = float(value)
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"a grade must be in [0, 1], got {value}")
    if not isinstance(feedback, str) or len(feedback) > MAX_FEEDBACK_LEN:
        raise ValueError(
            f"feedback must be text of at most {MAX_FEEDBACK_LEN:,} characters, got "
            f"{type(feedback).__name__} {str(feedback)[:40]!r}"
        )
    return value, feedback.encode(errors="replace").decode()  # a surrogate is no text
