# SPDX-License-Identifier: Apache-2.0
"""Grading in worker processes with a hard time limit, because a model's text is hostile.

    pool thread --(problem, completion)--> worker process --grade, answer--> pool thread
    pool thread --(answer, other answer)--> worker process --are they one?--> pool thread

Scorers parse, simplify and, in some of reasoning-gym's data sets, even evaluate what the model
wrote. So each grade runs in a process that has no device, little memory and no way to write
files or start programs by ordinary means, and that is killed and replaced when time is up.
"""

import concurrent.futures
import json
import logging
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import cloudpickle

from opsd_jax.data.grading import MAX_ANSWER_LEN
from opsd_jax.errors import UserError

log = logging.getLogger(__name__)

_MAX_REPLY_BYTES = 2**16  # an answer of MAX_ANSWER_LEN characters takes at most 12 bytes for each
_START_LIMIT_S = 120.0  # for imports; a busy host can take long over them
_BOOT = (
    "from opsd_jax.data import grader_pool; grader_pool.serve({fd}, {limit_s!r}, {memory_bytes})"
)
_REFUSED_EVENTS = frozenset(
    "os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty os.kill os.killpg os.remove "
    "os.rename os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod os.chown os.putenv "
    "pty.spawn subprocess.Popen socket.connect socket.bind socket.sendto shutil.rmtree "
    "shutil.move ctypes.dlsym ctypes.call_function".split()
)


class Grade(NamedTuple):
    """What came of one answer.

    Attributes:
      value: in [0, 1]; 0 unless `outcome` is "graded".
      outcome: "graded", "timeout", "died" (the worker did) or "error" (the grader raised).
      detail: the error, else "".
      answer: what the grader found to compare, None if it found nothing, something longer than
        `grading.MAX_ANSWER_LEN`, or has no `extract`.
    """

    value: float
    outcome: str = "graded"
    detail: str = ""
    answer: str | None = None


class GraderPool:
    """Worker processes that grade completions; a context manager.

    Args:
      grade: (problem, completion) -> float in [0, 1], for example the `grade` of a problem set.
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
        grade: Callable[[Any, str], float],
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
        self._in_process = num_workers == 0
        self._threads = concurrent.futures.ThreadPoolExecutor(num_workers or 1, "grader")
        self._own = threading.local()  # each thread talks to a worker of its own
        self._workers: set[_Worker] = set()
        self._closed = False
        self._error_told = False
        self._lock = threading.Lock()  # guards the three above
        self._pickled = b"" if self._in_process else cloudpickle.dumps(grade)

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
        if self._in_process:
            return json.loads(_reply(self._grade, what, *arguments))
        worker = getattr(self._own, "worker", None) or self._start_worker()
        reply = worker.ask(pickle.dumps((what, *arguments)), self._time_limit_s)
        if reply is not None:
            return json.loads(reply)
        self._own.worker = None
        with self._lock:
            self._workers.discard(worker)
        return {"outcome": "timeout" if worker.timed_out else "died"}

    def _start_worker(self) -> "_Worker":
        worker = _Worker(self._time_limit_s, self._memory_bytes)
        with self._lock:
            self._workers.add(worker)
            if self._closed:
                worker.kill()
        worker.load(self._pickled)
        self._own.worker = worker
        return worker


class _Worker:
    """One child process and the pipe to it."""

    def __init__(self, time_limit_s: float, memory_bytes: int):
        self.timed_out = False
        self._pipe, child_end = Pipe()
        boot = _BOOT.format(fd=child_end.fileno(), limit_s=time_limit_s, memory_bytes=memory_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", boot],
            pass_fds=[child_end.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent, which then closes the pool
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "JAX_PLATFORMS": "cpu",  # the accelerator belongs to the parent
            },
        )
        child_end.close()

    def load(self, pickled_grader: bytes) -> None:
        """Waits until the worker has the grader."""
        ready = self.ask(pickled_grader, _START_LIMIT_S)
        if ready != b"ready":
            self.kill()
            reason = ready.decode(errors="replace") if ready else "the process ended"
            raise RuntimeError(f"A grader worker could not start: {reason}")

    def ask(self, message: bytes, limit_s: float) -> bytes | None:
        """The reply, or None once the worker is dead, which the limit makes sure of.

        The limit covers sending too: a worker may be too busy to read.
        """
        timer = threading.Timer(limit_s, self._time_out)
        timer.start()
        try:
            self._pipe.send_bytes(message)
            reply = self._pipe.recv_bytes(_MAX_REPLY_BYTES)
        except (OSError, EOFError):
            reply = None
        timer.cancel()
        timer.join()  # or it might still kill the worker under the next question
        if reply is None or self.timed_out:
            self.kill()
            return None
        return reply

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _time_out(self) -> None:
        self.timed_out = True
        self._process.kill()


def serve(fd: int, time_limit_s: float, memory_bytes: int) -> None:
    """The worker's life: read the grader, then grade one message after the other until the end."""
    pipe = Connection(fd)
    try:
        grade = pickle.loads(pipe.recv_bytes())
        getattr(grade, "warm_up", lambda: None)()
    except EOFError:
        return
    except Exception as error:
        pipe.send_bytes(_describe(error).encode())
        return
    logging.disable()  # what a scorer thinks of hostile text is no news to the user
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)
    pipe.send_bytes(b"ready")
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        # The parent keeps the limit; should it be gone, the kernel ends a runaway orphan.
        signal.setitimer(signal.ITIMER_REAL, 2 * time_limit_s)
        pipe.send_bytes(_reply(grade, *pickle.loads(message)))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _reply(grade: Any, what: str, *arguments: Any) -> bytes:
    """The fields of a `Grade`, or whether two answers are one, as JSON."""
    try:
        if what == "same":
            return json.dumps({"same": True} if grade.same(*arguments) else {}).encode()
        value = float(grade(*arguments))
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"a grade must be in [0, 1], got {value}")
        answer = grade.extract(arguments[1]) if hasattr(grade, "extract") else None
        if not answer or len(answer) > MAX_ANSWER_LEN:
            answer = None
        return json.dumps({"value": value, "answer": answer}).encode()
    except Exception as error:
        return json.dumps({"outcome": "error", "detail": _describe(error)}).encode()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _refuse(event: str, args: tuple) -> None:
    """Audit hook: no files written, no programs started, no connections. A fence, not a jail."""
    if event in _REFUSED_EVENTS or (event == "open" and _writes(args)):
        raise PermissionError(f"a grader may not use {event}")


def _writes(open_args: tuple) -> bool:
    _, mode, flags = open_args
    if isinstance(mode, str) and set(mode) & set("wax+"):
        return True
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
