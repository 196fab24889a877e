# SPDX-License-Identifier: Apache-2.0
"""Accuracy, pass@k and maj@n from grades and votes; every standard error (`_se`) is over problems.

What an evaluation writes of each role as eval/<role>/…:

  accuracy             avg@n, mean grade
  greedy_accuracy      of one greedy completion per problem
  pass_at_k            1 - C(n-c, k) / C(n, k), unbiased; k = 1, 2, 4, … and n, c of full grade
  maj_at_n             grade of the largest group of *equivalent* answers; tied groups count with
                       their mean; no answer, no vote
  formatted_fraction   an answer was found (and graded in time)
  ungraded_fraction    the grader raised or took too long, which is worth 0
  truncated_fraction   completions cut by the limit
  length_mean, length_p50, length_p90, length_max   tokens
  num_problems         asked; num_dropped were left out, this role's prompt being over its budget

Votes need a grader that can extract an answer and compare two; a plain function only grades, and
reasoning-gym's scorers do not say when two answers are equal: there, answers vote by value if
they are numbers and else by their text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opsd_jax.evaluation.generations import Generation


def mean_and_error(values_N: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean over problems and its standard error, sd / sqrt(N); NaN for a single problem."""
    values = np.asarray(values_N, np.float64)
    spread = values.std(ddof=1) if len(values) > 1 else math.nan
    return float(values.mean()), float(spread / math.sqrt(len(values)))


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right.

        1 - C(n - c, k) / C(n, k)

    Args:
      num_correct: c, samples of full grade.
      num_samples: n.
      k: at most n.

    Source: arXiv 2107.03374, equation 1.
    """
    if k > num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_ks(num_samples: int) -> list[int]:
    """1, 2, 4, ... and n itself, for which the estimate is whether any sample is right."""
    return sorted({2**i for i in range(num_samples.bit_length())} | {num_samples})


def majority(generations: Sequence[Generation]) -> tuple[float, str | None]:
    """maj@n of one problem: the grade of the largest group of equal answers, and its answer.

    Groups of equal size share the vote: the grade is the mean over them, which is what a draw
    among them gives on average, and the answer is that of the first. Without any vote it is 0.
    """
    sizes = Counter(g.group for g in generations if g.group is not None)
    if not sizes:
        return 0.0, None
    most = max(sizes.values())
    winners = [group for group, size in sizes.items() if size == most]
    rewards = [np.mean([g.reward for g in generations if g.group == w]) for w in winners]
    answer = next(g.answer for g in generations if g.group == winners[0])
    return float(np.mean(rewards)), answer


def by_problem(
    sampled: Sequence[Generation], greedy: Sequence[Generation], num_samples: int, can_vote: bool
) -> list[dict[str, Any]]:
    """One row per problem, in order.

    Args:
      sampled: `num_samples` generations of each problem, adjacent.
      greedy: one of each problem, or none at all.
      num_samples: n.
      can_vote: whether the grader finds answers that can vote.
    """
    rows = []
    for at in range(0, len(sampled), num_samples):
        samples = sampled[at : at + num_samples]
        rewards = [g.reward for g in samples]
        row: dict[str, Any] = {
            "id": samples[0].problem.id,
            "answer": samples[0].problem.answer,
            "num_samples": num_samples,
            "accuracy": float(np.mean(rewards)),
            "num_correct": sum(reward == 1.0 for reward in rewards),
        }
        if can_vote and num_samples > 1:
            row["majority"], row["majority_answer"] = majority(samples)
        if can_vote:
            row["num_formatted"] = sum(g.answer is not None for g in samples)
        if greedy:
            row["greedy"] = greedy[at // num_samples].reward
        row["num_truncated"] = sum(not g.stopped for g in samples)
        row["length_mean"] = float(np.mean([g.num_tokens for g in samples]))
        rows.append(row)
    return rows


def metrics_of(
    rows: Sequence[Mapping[str, Any]], sampled: Sequence[Generation]
) -> dict[str, float]:
    """The numbers of one role, without its name.

    With one sample a problem pass@k and maj@n would repeat the accuracy and are left out.

    Args:
      rows: `by_problem` of the role.
      sampled: the generations that they count.
    """
    num_samples = rows[0]["num_samples"]
    found: dict[str, float] = {}

    def put(name: str, values: Sequence[float]) -> None:
        found[name], found[f"{name}_se"] = mean_and_error(values)

    put("accuracy", [row["accuracy"] for row in rows])
    if num_samples > 1:
        for k in pass_ks(num_samples):
            values = [pass_at_k(row["num_correct"], num_samples, k) for row in rows]
            put(f"pass_at_{k}", values)
    if "majority" in rows[0]:
        put(f"maj_at_{num_samples}", [row["majority"] for row in rows])
    if "greedy" in rows[0]:
        found["greedy_accuracy"] = float(np.mean([row["greedy"] for row in rows]))
    for name in ("formatted", "truncated"):
        if f"num_{name}" in rows[0]:
            count = sum(row[f"num_{name}"] for row in rows)
            found[f"{name}_fraction"] = count / len(sampled)
    failed = sum(g.outcome != "graded" for g in sampled)
    found["ungraded_fraction"] = failed / len(sampled)
    lengths = [g.num_tokens for g in sampled]
    found["length_mean"] = float(np.mean(lengths))
    found["length_p50"], found["length_p90"] = map(float, np.percentile(lengths, [50, 90]))
    found["length_max"] = float(max(lengths))
    found["num_problems"] = float(len(rows))
    return found


def table(metrics: Mapping[str, float]) -> str:
    """`eval/<role>/<name>` as one column per role, errors behind a plus-minus sign."""
    cells: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith("eval/"):
            _, role, short = name.split("/", 2)
            cells.setdefault(role, {})[short] = value
    names = dict.fromkeys(name for column in cells.values() for name in column)
    lines = ["".join([f"{'':22}", *(f"{role:>24}" for role in cells)])]
    for name in (name for name in names if not name.endswith("_se")):
        line = f"{name:22}"
        for column in cells.values():
            text, error = "", column.get(f"{name}_se")
            if name in column:
                digits = {"length": 1, "num": 0}.get(name.split("_")[0], 3)
                text = f"{column[name]:,.{digits}f}"
            line += f"{text + (f' ±{error:.3f}' if error is not None else ''):>24}"
        lines.append(line)
    return "\n".join(lines)
