# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest

from opsd_jax.data.problems import Problem
from opsd_jax.evaluation import statistics
from opsd_jax.evaluation.generations import Generation


def generation(reward=0.0, group=None, problem="p", num_tokens=1, stopped=True):
    answer = None if group is None else f"answer {group}"
    return Generation(
        Problem(problem, "", "", "a"), "", num_tokens, stopped, reward, answer=answer, group=group
    )


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples):
    for num_correct in range(num_samples + 1):
        right = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            share = np.mean([any(chosen) for chosen in itertools.combinations(right, k)])
            assert statistics.pass_at_k(num_correct, num_samples, k) == pytest.approx(share)


def test_pass_at_k_of_fewer_samples_is_refused():
    with pytest.raises(ValueError, match="pass@3 of 2"):
        statistics.pass_at_k(1, 2, 3)


@pytest.mark.parametrize(
    "num_samples, ks", [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (12, [1, 2, 4, 8, 12])]
)
def test_pass_ks(num_samples, ks):
    assert statistics.pass_ks(num_samples) == ks


@pytest.mark.parametrize(
    ("votes", "grade", "answer"),
    [
        ([(1.0, 0), (1.0, 0), (0.0, 1)], 1.0, "answer 0"),
        ([(1.0, 0), (0.0, 1), (0.0, 1)], 0.0, "answer 1"),
        ([(1.0, 0), (0.0, 1)], 0.5, "answer 0"),  # a tie: what a fair draw gives on average
        ([(0.0, 0), (1.0, 1), (0.0, 2)], 1 / 3, "answer 0"),
        ([(1.0, 1), (0.0, None), (0.0, None)], 1.0, "answer 1"),  # no answer, no vote
        ([(0.0, None), (0.0, None)], 0.0, None),
    ],
)
def test_majority(votes, grade, answer):
    found = statistics.majority([generation(reward, group) for reward, group in votes])
    assert found == (pytest.approx(grade), answer)


def test_errors_are_over_problems():
    rewards = np.array([[1, 0], [1, 1], [0, 0], [1, 0]], float)
    sampled = [generation(reward) for reward in rewards.ravel()]
    found = statistics.metrics_of(statistics.by_problem(sampled, [], 2, False), sampled)
    per_problem = [0.5, 1.0, 0.0, 0.5]
    assert found["accuracy"] == np.mean(per_problem)
    assert found["accuracy_se"] == pytest.approx(np.std(per_problem, ddof=1) / 2)
    assert math.isnan(statistics.mean_and_error([1.0])[1])


def test_all_numbers_of_a_hand_computed_case():
    """Two problems of four samples: 2 right and tied, 1 right and outvoted."""
    sampled = [
        generation(1.0, 0, "p", 10),
        generation(1.0, 0, "p", 20),
        generation(0.0, 1, "p", 30),
        generation(0.0, 1, "p", 40, stopped=False),
        generation(1.0, 0, "q", 10),
        generation(0.0, 1, "q", 10),
        generation(0.0, 1, "q", 10),
        generation(0.0, None, "q", 80, stopped=False),
    ]
    greedy = [generation(1.0, problem="p"), generation(0.0, problem="q")]
    rows = statistics.by_problem(sampled, greedy, num_samples=4, can_vote=True)
    found = statistics.metrics_of(rows, sampled)
    # pass@2 of 2 in 4: 1 - 1/6; of 1 in 4: 1 - 3/6.
    expected = {
        "accuracy": 3 / 8,
        "accuracy_se": 0.125,
        "pass_at_1": 3 / 8,
        "pass_at_2": (5 / 6 + 1 / 2) / 2,
        "pass_at_2_se": 1 / 6,
        "pass_at_4": 1.0,
        "maj_at_4": 0.25,
        "maj_at_4_se": 0.25,
        "greedy_accuracy": 0.5,
        "formatted_fraction": 7 / 8,
        "truncated_fraction": 2 / 8,
        "length_mean": 210 / 8,
        "length_p50": 15.0,
        "length_p90": np.percentile([10, 20, 30, 40, 10, 10, 10, 80], 90),
        "length_max": 80.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert [row["id"] for row in rows] == ["p", "q"]
    assert rows[0] == {
        "id": "p",
        "answer": "a",
        "num_samples": 4,
        "accuracy": 0.5,
        "num_correct": 2,
        "majority": 0.5,
        "majority_answer": "answer 0",
        "num_formatted": 4,
        "greedy": 1.0,
        "num_truncated": 1,
        "length_mean": 25.0,
    }
    shown = statistics.table({f"eval/student/{name}": value for name, value in found.items()})
    assert "0.375 ±0.125" in shown and "maj_at_4 " in shown and "_se" not in shown


def test_a_partial_grade_is_not_a_pass():
    sampled = [generation(0.9), generation(0.0)]
    found = statistics.metrics_of(statistics.by_problem(sampled, [], 2, False), sampled)
    assert found["accuracy"] == 0.45 and found["pass_at_2"] == 0.0
    assert "maj_at_2" not in found and "formatted_fraction" not in found


def test_what_could_not_be_graded_is_counted():
    outcomes = ("graded", "error", "timeout", "graded")
    sampled = [generation(0.0)._replace(outcome=outcome) for outcome in outcomes]
    found = statistics.metrics_of(statistics.by_problem(sampled, [], 2, False), sampled)
    assert (found["ungraded_fraction"], found["num_problems"]) == (0.5, 2)


def test_one_sample_has_neither_pass_nor_majority():
    sampled = [generation(1.0, 0)]
    found = statistics.metrics_of(statistics.by_problem(sampled, [], 1, True), sampled)
    assert not [name for name in found if name.startswith(("pass", "maj"))]
    assert found["formatted_fraction"] == 1.0
