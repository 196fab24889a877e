# SPDX-License-Identifier: Apache-2.0
"""Numbers of `opsd probe` against loops over tokens, and what it says of them."""

import math

import numpy as np
import pytest

from opsd_jax.evaluation import forecast

RNG = np.random.default_rng(3)
B, C = 9, 40
LENGTHS = np.array([40, 1, 7, 33, 8, 12, 40, 9, 5])
MASK = np.arange(C) < LENGTHS[:, None]
DIVERGENCE = RNG.gamma(0.3, size=(B, C))
AGREEMENT = (RNG.random((B, C)) < 0.7).astype(np.float32)
REWARDS = np.array([1, 0, 0.5, np.nan, 0, 0.49, 1, np.nan, 0])
RIGHT, WRONG = [0, 2, 6], [1, 4, 5, 8]


def slow_per_token(values, rows):
    """Mean and error of a ratio, one token and one rollout after the other."""
    sums = [sum(float(values[b, t]) for t in range(LENGTHS[b])) for b in rows]
    tokens = [int(LENGTHS[b]) for b in rows]
    mean = sum(sums) / sum(tokens)
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, tokens, strict=True))
    return mean, math.sqrt(len(rows) / (len(rows) - 1) * squares) / sum(tokens)


@pytest.mark.parametrize(
    "name, rows", [("all", range(B)), ("right", RIGHT), ("wrong", WRONG)], ids=lambda x: str(x)
)
def test_the_gap_is_what_a_loop_says(name, rows):
    found = forecast.gap_metrics(DIVERGENCE, AGREEMENT, MASK, REWARDS)
    for what, values in (("gap", DIVERGENCE), ("agreement", AGREEMENT)):
        got = found[f"{what}/{name}"], found[f"{what}/{name}_se"]
        assert got == pytest.approx(slow_per_token(values, rows), rel=1e-12)
    assert found[f"num/{name}"] == len(rows) and found["num/tokens"] == LENGTHS.sum()


def test_first_tokens_hold_their_share():
    found = forecast.gap_metrics(DIVERGENCE, AGREEMENT, MASK, REWARDS)
    total = sum(DIVERGENCE[b, t] for b in range(B) for t in range(LENGTHS[b]))
    for k in (1, 8, 32):
        first = [(b, t) for b in range(B) for t in range(min(k, LENGTHS[b]))]
        assert found[f"first/{k}"] == pytest.approx(sum(DIVERGENCE[p] for p in first) / total)
        assert found[f"first/{k}_of_tokens"] == pytest.approx(len(first) / LENGTHS.sum())


def test_the_error_is_that_of_drawing_rollouts():
    """Against the spread of the mean over many draws; tokens as units would say a third of it."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, 4000)
    sums = counts * rng.gamma(2.0, 0.1, 4000)  # all tokens of a rollout alike
    draws = rng.integers(0, 4000, (2000, 50))
    means = [sums[d].sum() / counts[d].sum() for d in draws]
    errors = [forecast.per_token(sums[d], counts[d])[1] for d in draws[:200]]
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_nothing_graded_or_nothing_said_has_no_number():
    nan = np.full(B, np.nan)
    found = forecast.gap_metrics(DIVERGENCE, AGREEMENT, MASK, nan)
    assert math.isnan(found["gap/right"]) and math.isnan(found["gap/wrong"])
    assert "right answers" not in forecast.table(found) and "accuracy" not in forecast.table(found)
    silent = forecast.gap_metrics(DIVERGENCE, AGREEMENT, np.zeros_like(MASK), nan)
    assert math.isnan(silent["gap/all"]) and "nan" not in forecast.table(silent)
    assert "says nothing" in forecast.advice(silent)
    equal = forecast.gap_metrics(np.zeros((B, C)), AGREEMENT, MASK, REWARDS)
    told = forecast.table(equal, "mine", "per token")
    assert "nan" not in told and "nats" not in told and "\nmine, per token   " in told
    assert "is 0 per token from" in forecast.advice(equal, "per token")
    assert "No answer is graded" in forecast.advice(found | {"first/8": 0.2})


def numbers(**changes):
    found = forecast.gap_metrics(DIVERGENCE, AGREEMENT, MASK, REWARDS)
    for what, values in (
        ("accuracy", {"student": [0, 1, 0, 0] * 16, "teacher": [1, 1, 1, 0] * 16}),
        ("from_wrong", {"student": [0, 0, 1, 0], "teacher": [1, 1, 1, 0]}),
        ("right_answer", {"student": [0.1, 0.3], "teacher": [0.2, 0.4]}),
    ):
        found |= forecast.role_metrics(what, values) | {"num/right_answer": 2.0}
    return found | {"first/8": 0.2, "first/8_of_tokens": 0.1} | changes


def test_of_one_graded_answer_nobody_says_who_is_better():
    one = forecast.role_metrics("accuracy", {"student": [1.0], "teacher": [0.0]})
    told = forecast.advice(numbers() | one)
    assert told.startswith("Only one answer is graded, so whether the teacher is better is not")


def test_the_table_has_every_number_beside_its_error():
    text = forecast.table(numbers(**{"probe/teacher/ok": 0.739}))
    for number in ("0.250 ±0.055", "0.750 ±0.055", "0.250 ±0.250", "0.300 ±0.100", "(2)", "0.739"):
        assert number in text
    assert "9 answers of the student's, 155 tokens: 3 right, 4 wrong" in text


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "what on-policy self-distillation needs"),
        ({"gap/all": 9e-4}, "Nothing to learn"),
        ({"teacher/accuracy": 0.0}, "worse than the student, by 0.25"),
        ({"teacher/accuracy": 0.3}, "no better than the student within two standard errors of"),
        ({"teacher/accuracy": 0.0, "teacher/from_wrong": 1.0}, "right more often, by 0.75"),
        ({"teacher/right_answer": 0.9}, "names the right answer behind wrong text (0.70 more"),
        ({"first/8": 0.9}, "90% of the gap is in the first 8 tokens"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_the_advice_follows_the_numbers(changes, words):
    assert words in forecast.advice(numbers(**changes))
