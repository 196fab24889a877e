# SPDX-License-Identifier: Apache-2.0
import os
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.data import grading
from opsd_jax.data.grader_pool import Grade, GraderPool
from opsd_jax.data.problems import AnswerGrader, Problem
from opsd_jax.errors import UserError

PROBLEM = Problem(id="p", question="2 + 2", solution="", answer="4")


def evaluating_grader():
    """The worst scorer there is: it runs what the model wrote. Some of reasoning-gym's do."""

    def grade(problem, completion):
        return float(str(eval(completion)) == problem.answer)

    return grade


@pytest.fixture(scope="module")
def pool():
    with GraderPool(evaluating_grader(), time_limit_s=0.7, memory_gib=1) as pool:
        yield pool


HANGS = [
    "9**9**9**9",
    "9**9**9",
    "str(9**9**8)",
    "__import__('time').sleep(1000)",
    "[0 for _ in iter(int, 1)]",
    "all(iter(lambda: 1, 0))",
    "sum(range(10**15))",
    "10**14 in map(int, range(10**15))",
    "__import__('re').match('(a+)+$', 'a' * 40 + 'b')",
    "__import__('threading').Event().wait()",
    "__import__('signal').pause()",
    "(lambda f: f(f))(lambda f: [f for _ in iter(int, 1)])",
]
DEATHS = [
    "__import__('os')._exit(0)",
    "__import__('os').abort()",
    "__import__('signal').raise_signal(9)",
    "__import__('signal').raise_signal(11)",
    "__import__('os').closerange(0, 100)",
    "__import__('sys').exit(3)",
    "exit()",
    "(_ for _ in ()).throw(KeyboardInterrupt)",
    "__import__('faulthandler')._sigsegv()",
]
ERRORS = [
    "",
    "\x00",
    "4 4",
    "1/0",
    "undefined",
    "(" * 5_000,
    "(" * 90 + "4" + ")" * 90 + "(",
    "[" * 100_000 + "]" * 100_000,
    "{" * 1_000_000,
    "{" * 500_000 + "}" * 500_000,
    "-" * 50_000 + "4",
    "4" + "+4" * 50_000 + "+",
    "9" * 100_000,
    "'" * 1_000_001,
    "\\" * 1_000_000,
    "\\boxed{" * 100_000,
    "\n" * 1_000_000 + "(",
    "'4' * 10**12",
    "[0] * 10**11",
    "bytearray(10**12)",
    "bytearray(2 * 10**9)",  # there is that much, but not for a grader
    "(lambda f: f(f))(lambda f: f(f))",
    "float('nan') + None",
    "__import__('os').system('true')",
    "__import__('os').fork()",
    "__import__('os').execv('/bin/true', ['true'])",
    "__import__('os').kill(__import__('os').getppid(), 9)",
    "__import__('os').remove('/nonexistent')",
    "__import__('os').mkdir('/tmp/never')",
    "__import__('subprocess').run(['true'])",
    "__import__('socket').create_connection(('127.0.0.1', 9))",
    "__import__('socket').socket().bind(('127.0.0.1', 0))",
    "__import__('pathlib').Path('never').write_text('x')",
    "open('/tmp/never', 'w')",
    "open('/tmp/never', 'a')",
    "open('/tmp/never', 'r+')",
    "__import__('os').open('/tmp/never', 65)",
    "__import__('ctypes').CDLL(None).abort()",
]
WRONG = [
    "5",
    "'\U0010ffff' * 1000",
    "print('4' * 10**6)",
    "__import__('sys').stderr.close()",
    "__import__('sys').setrecursionlimit(10**9)",
    "__import__('signal').signal(14, __import__('signal').SIG_IGN)",
]


def test_there_are_enough_hostile_cases():
    assert len(set(HANGS + DEATHS + ERRORS + WRONG)) >= 60


@pytest.mark.parametrize(
    ("texts", "outcomes"),
    [
        (HANGS, {"timeout"}),
        (DEATHS, {"died"}),
        (ERRORS, {"error", "timeout"}),  # a busy machine may not get as far as the error
        (WRONG, {"graded"}),
    ],
    ids=["hangs", "deaths", "errors", "wrong"],
)
def test_hostile_text_costs_one_answer(pool, texts, outcomes):
    """Every bad text is 0, and the good one after each is graded as if nothing had been."""
    answers = [text for bad in texts for text in (bad, "2 + 2")]
    grades = pool.grade([PROBLEM] * len(answers), answers)
    for text, bad, good in zip(texts, grades[::2], grades[1::2], strict=True):
        assert bad.value == 0.0 and bad.outcome in outcomes, (text[:60], bad)
        assert good == Grade(1.0), (text[:60], good)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="9*()[]{}+-eE,'\"\\\n._x\x00\u221e"))
def test_any_text_gets_a_grade(pool, text):
    grade = pool.submit(PROBLEM, text).result()
    assert 0 <= grade.value <= 1
    assert grade.outcome in ("graded", "timeout", "died", "error")


HOSTILE_MATHS = [
    "9^{9^{9^9}}",
    "(10^{10})!",
    r"\sum_{i=1}^{10^{12}} i^i",
    "(" * 900 + ")" * 900,
    r"\frac{" * 200 + "1" + "}{2}" * 200,
    "{" * 1_000_000 + "}" * 1_000_000,
    "1" * 1999,
    "1e999999999",
]


def test_hostile_mathematics():
    pytest.importorskip("math_verify")
    grader = AnswerGrader(grading.GRADERS["math_verify"])
    with GraderPool(grader, time_limit_s=2.0) as pool:
        answers = [t for bad in HOSTILE_MATHS for t in (f"\\boxed{{{bad}}}", r"\boxed{8/2}")]
        grades = pool.grade([PROBLEM] * len(answers), answers)
        assert [grade.value for grade in grades] == [0.0, 1.0] * len(HOSTILE_MATHS)


class EvaluatingForm:
    """The worst that answers can be compared with."""

    def __call__(self, problem, completion):
        return 0.0

    def extract(self, completion):
        return eval(completion)

    def same(self, answer, other):
        return eval(answer) == eval(other)


def test_hostile_answers_do_not_vote_and_are_nobody_s_equal():
    """Extraction and comparison run in the workers, under the same limit."""
    with GraderPool(EvaluatingForm(), time_limit_s=0.7, memory_gib=1) as pool:
        texts = ["9**9**9**9", "__import__('os')._exit(0)", "1/0", "'x' * 3000", "'ok'"]
        answers = [grade.answer for grade in pool.grade([PROBLEM] * len(texts), texts)]
        assert answers == [None, None, None, None, "ok"]
        for text in texts[:3]:
            assert not pool.same(text, "1") and not pool.same("1", text)
        assert pool.same("2 + 2", "4") and not pool.same("2 + 2", "5")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            r"\boxed{ \frac{ \sqrt{ { } ( ) [ ] ^ _ ! 9 99 , . x = < \pi \sum_{i=1} \infty".split()
        ),
        max_size=12,
    )
)
def test_any_mathematics_gets_a_grade_and_a_vote(maths_pool, parts):
    text = "\\boxed{" + "".join(parts) + "}"
    grade = maths_pool.submit(PROBLEM, text).result()
    assert 0 <= grade.value <= 1
    if grade.answer is not None:
        assert maths_pool.same("4", grade.answer) == (grade.value == 1.0)
    assert maths_pool.submit(PROBLEM, r"\boxed{8/2}").result() == Grade(1.0, answer="8/2")


@pytest.fixture(scope="module")
def maths_pool():
    pytest.importorskip("math_verify")
    with GraderPool(AnswerGrader(grading.GRADERS["math_verify"]), time_limit_s=1.0) as pool:
        yield pool


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5, None, "x"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_grade_outside_the_unit_interval_is_an_error(value, num_workers):
    with GraderPool(lambda problem, completion: value, num_workers=num_workers) as pool:
        (grade,) = pool.grade([PROBLEM], ["x"])
    assert grade.value == 0.0 and grade.outcome == "error" and grade.detail


def test_grades_come_in_order_and_partial_ones_are_kept():
    with GraderPool(lambda problem, completion: int(completion) / 100) as pool:
        grades = pool.grade([PROBLEM] * 100, [str(i) for i in range(100)])
    assert [grade.value for grade in grades] == [i / 100 for i in range(100)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_first_error_of_a_grader_is_told_once(num_workers, caplog):
    with GraderPool(evaluating_grader(), num_workers=num_workers) as pool:
        pool.grade([PROBLEM] * 4, ["4", "1/0", "1/0", "5"])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "ZeroDivisionError: division by zero" in told[0]


def test_a_worker_killed_from_outside_is_replaced():
    with GraderPool(lambda problem, completion: float(os.getpid()) / 1e9, num_workers=1) as pool:
        pid = round(pool.grade([PROBLEM], [""])[0].value * 1e9)
        assert pid != os.getpid()
        os.kill(pid, signal.SIGKILL)
        assert pool.grade([PROBLEM], [""])[0].outcome == "died"
        assert pool.grade([PROBLEM], [""])[0].outcome == "graded"


def test_close_does_not_wait_for_hostile_text():
    pool = GraderPool(evaluating_grader(), num_workers=1, time_limit_s=3600)
    assert pool.grade([PROBLEM], ["4"]) == [Grade(1.0)]
    running = pool.submit(PROBLEM, "9**9**9**9")
    queued = pool.submit(PROBLEM, "4")
    while not running.running():
        time.sleep(0.01)
    pool.close()
    assert running.result() == Grade(0.0, "died")
    assert queued.cancelled()


def test_a_grader_that_cannot_be_loaded_is_told():
    class Unloadable:
        def __reduce__(self):
            return (int, ("not a number",))

    with GraderPool(Unloadable()) as pool:
        with pytest.raises(RuntimeError, match="could not start: ValueError.*not a number"):
            pool.grade([PROBLEM], ["x"])


def test_warming_up_is_outside_the_limit():
    class Slow:
        ready = False

        def warm_up(self):
            time.sleep(0.5)
            self.ready = True

        def __call__(self, problem, completion):
            return float(self.ready)

    with GraderPool(Slow(), time_limit_s=0.4, num_workers=1) as pool:
        assert pool.grade([PROBLEM], ["x"]) == [Grade(1.0)]


def test_a_users_function_sees_nothing_but_the_data():
    """It may rely on the form of its own answers."""

    def integers(answer, completion):
        return float(int(answer) == int(completion))

    with GraderPool(AnswerGrader(integers), num_workers=1) as pool:
        assert pool.submit(PROBLEM, "4").result().value == 1.0


def test_settings_are_checked():
    with pytest.raises(UserError, match="time_limit_s > 0"):
        GraderPool(evaluating_grader(), time_limit_s=0)
