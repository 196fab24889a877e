# SPDX-License-Identifier: Apache-2.0
"""Grades of a step's completions, on the host: each process grades the rows on its devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from opsd_jax.data.attempts import RIGHT, Attempt
from opsd_jax.data.grader_pool import Grade
from opsd_jax.data.problems import Problem, ProblemSet
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError
from opsd_jax.host.pod import gathered_rows, local_rows
from opsd_jax.sampling.prompts import Completion

GradeAll = Callable[[list[Problem], list[str]], list[Grade]]


class Graded(NamedTuple):
    """Grades of a batch, [B] float32, NaN without an answer to compare with.

    rewards: in [0, 1]; failed: 1 where the grader raised or took too long, which is worth 0;
    attempts: what this process's own rows answered, by their number in the batch.
    """

    rewards: np.ndarray
    failed: np.ndarray
    attempts: dict[int, Attempt]


GradeRows = Callable[[Completion, np.ndarray], Graded]


def row_grader(problems: ProblemSet, tokenizer: Tokenizer, grade: GradeAll) -> GradeRows:
    """(completion, problem numbers [B]) -> `Graded`.

    Every process grades the rows on its own devices.
    """

    def grade_rows(completion: Completion, numbers: np.ndarray) -> Graded:
        (mine, ids), (_, mask) = local_rows(completion.ids), local_rows(completion.mask)
        stopped = local_rows(completion.stopped)[1]  # at a stop id, which may be the run's own
        asked = [problems[int(i)] for i in numbers[mine]]
        texts = [
            tokenizer.decode(row[kept][: -1 if ended else None])
            for row, kept, ended in zip(ids, mask, stopped, strict=True)
        ]
        answered = [i for i, problem in enumerate(asked) if problem.answer]
        found = grade([asked[i] for i in answered], [texts[i] for i in answered])
        rows = np.full((2, len(asked)), np.nan)
        rows[0, answered] = [given.value for given in found]
        rows[1, answered] = [given.outcome != "graded" for given in found]
        rewards, failed = (gathered_rows(mine, row, len(numbers)) for row in rows)
        said = dict(zip(answered, (given.feedback for given in found), strict=True))
        attempts = {
            int(row): Attempt(
                text, None if np.isnan(rewards[row]) else float(rewards[row]), said.get(i, "")
            )
            for i, (row, text) in enumerate(zip(mine, texts, strict=True))
        }
        return Graded(rewards, failed, attempts)

    return grade_rows


def grade_metrics(grades: Graded, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean grade, and the divergence per token of right and of wrong completions.

    Args:
      grades: of the batch.
      rows: name -> [B] sums over the tokens of each row, "rows/tokens" among them.
    """
    rewards, metrics = grades.rewards, {}
    for name, values in (("reward_mean", rewards), ("ungraded_fraction", grades.failed)):
        known = values[~np.isnan(values)].astype(np.float64)
        metrics[f"rollout/{name}"] = float(known.mean()) if known.size else float("nan")
    if "rows/divergence" in rows:
        for name, those in (("right", rewards >= RIGHT), ("wrong", rewards < RIGHT)):
            tokens = rows.get("rows/context_tokens", rows["rows/tokens"])[those].sum()
            if tokens:
                mean = float(rows["rows/divergence"][those].sum() / tokens)
                metrics[f"loss/divergence_{name}"] = mean
    return metrics


def check_answers(problems: ProblemSet, what: str) -> None:
    """Raises a UserError unless every problem can be graded; `what` needs the grades."""
    for i in range(len(problems)):
        if not problems[i].answer:
            raise UserError(
                f"problem {problems[i].id!r} has no answer, and {what} needs grades; leave it "
                "out, or give it one"
            )
