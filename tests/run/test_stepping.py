# SPDX-License-Identifier: Apache-2.0
"""Grades of a batch on the host; a pod's are in test_pod.py."""

import jax.numpy as jnp
import numpy as np

from opsd_jax.data.grader_pool import GraderPool
from opsd_jax.data.problems import Problem
from opsd_jax.run.graded_rows import grade_metrics, row_grader
from opsd_jax.sampling.prompts import Completion
from tests.tiny import WordTokenizer

# The second cannot be graded, and the third has nothing to be graded by.
PROBLEMS = [Problem("a", "q", "", "1"), Problem("b", "q", "", "x"), Problem("c", "q", "", "")]


def integer(problem, completion):
    return float(int(problem.answer) == 1)


def test_grades_that_failed_are_worth_nothing_and_are_counted():
    ids, mask = jnp.full((4, 2), 5), jnp.ones((4, 2), bool)
    with GraderPool(integer, num_workers=0) as pool:
        grade_rows = row_grader(PROBLEMS, WordTokenizer(), pool.grade)
        grades = grade_rows(Completion(ids, mask, None, jnp.zeros(4, bool)), np.array([0, 1, 2, 0]))
    np.testing.assert_array_equal(grades.rewards, [1.0, 0.0, np.nan, 1.0])
    np.testing.assert_array_equal(grades.failed, [0.0, 1.0, np.nan, 0.0])
    rows = {"rows/divergence": np.arange(4.0), "rows/tokens": np.full(4, 2.0)}
    assert grade_metrics(grades, rows) == {
        "rollout/reward_mean": np.mean([1.0, 0.0, 1.0]),
        "rollout/ungraded_fraction": np.mean([0.0, 1.0, 0.0]),
        "loss/divergence_right": (0.0 + 3.0) / 4,
        "loss/divergence_wrong": 1.0 / 2,
    }


def test_a_stop_id_of_the_run_is_no_part_of_what_is_graded():
    """9 is none of the tokenizer's stop ids; a completion that was cut has nothing to lose."""
    ids, mask, seen = jnp.array([[5, 9], [5, 9]]), jnp.ones((2, 2), bool), []
    with GraderPool(lambda problem, text: float(bool(seen.append(text))), num_workers=0) as pool:
        grade_rows = row_grader(PROBLEMS, WordTokenizer(), pool.grade)
        grade_rows(Completion(ids, mask, None, jnp.array([True, False])), np.array([0, 0]))
    assert seen == ["5", "5 9"]
