# SPDX-License-Identifier: Apache-2.0
"""One training step as the host dispatches it: jitted whole, or in halves graded in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from opsd_jax.data.grader_pool import Grade
from opsd_jax.data.problems import Problem, ProblemSet
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError
from opsd_jax.method.batch import Batch
from opsd_jax.method.train_step import TrainState, jit_halves, jit_sample, jit_step
from opsd_jax.model.sharding import gathered_rows, local_rows, shard_batch
from opsd_jax.run.assembly import Assembly
from opsd_jax.sampling.prompts import Completion, Context

GradeAll = Callable[[list[Problem], list[str]], list[Grade]]


class Graded(NamedTuple):
    """Grades of a batch, [B] float32, NaN without an answer to compare with.

    rewards: in [0, 1]; failed: 1 where the grader raised or took too long, which is worth 0.
    """

    rewards: np.ndarray
    failed: np.ndarray


GradeRows = Callable[[Completion, np.ndarray], Graded]


class Taken(NamedTuple):
    """A dispatched step.

    state, metrics, completion: as `train_step` gives them; grades: where they were needed,
    else None; rollout_s: how long sampling took, where that is known.
    """

    state: TrainState
    metrics: dict[str, jax.Array]
    completion: Completion
    grades: Graded | None = None
    rollout_s: float | None = None


TakeStep = Callable[[TrainState, Batch, np.ndarray], Taken]


def make_step(parts: Assembly, grade_rows: GradeRows) -> TakeStep:
    """The step of a method: (state, batch, problem numbers [B]) -> Taken."""
    built = (parts.method, parts.shardings, parts.mesh, parts.rules)
    if not parts.method.objective.needs_rewards:
        step = jit_step(*built)
        return lambda state, batch, numbers: Taken(*step(state, batch))
    sample, learn = jit_halves(*built)

    def graded(state: TrainState, batch: Batch, numbers: np.ndarray) -> Taken:
        jax.block_until_ready(state.step)  # The step before this one is not sampling.
        start = time.monotonic()
        completion = jax.block_until_ready(sample(state, batch))
        rollout_s = time.monotonic() - start
        grades = grade_rows(completion, numbers)
        rewards = shard_batch(grades.rewards, parts.mesh)
        state, metrics = learn(state, batch, completion, rewards)
        return Taken(state, metrics, completion, grades, rollout_s)

    return graded


def rollout_timer(parts: Assembly) -> Callable[[TrainState, Batch], float]:
    """Seconds that the rollout half takes alone, the compilation for a new width not counted."""
    sample = jit_sample(parts.method, parts.shardings, parts.mesh, parts.rules)
    warm: set[tuple] = set()

    def measure(state: TrainState, batch: Batch) -> float:
        contexts = (batch.student, batch.teacher, *batch.views)
        shapes = tuple(context.ids.shape for context in contexts)
        if shapes not in warm:
            jax.block_until_ready(sample(state, batch))
            warm.add(shapes)
        start = time.monotonic()
        jax.block_until_ready(sample(state, batch))
        return time.monotonic() - start

    return measure


def row_grader(problems: ProblemSet, tokenizer: Tokenizer, grade: GradeAll) -> GradeRows:
    """(completion, problem numbers [B]) -> `Graded`.

    Every process grades the rows on its own devices.
    """

    def grade_rows(completion: Completion, numbers: np.ndarray) -> Graded:
        (mine, ids), (_, mask) = local_rows(completion.ids), local_rows(completion.mask)
        stopped = local_rows(completion.stopped)[1]  # at a stop id, which may be the run's own
        asked = [problems[int(i)] for i in numbers[mine]]
        answered = [i for i, problem in enumerate(asked) if problem.answer]
        texts = [tokenizer.decode(ids[i][mask[i]][: -1 if stopped[i] else None]) for i in answered]
        found = grade([asked[i] for i in answered], texts)
        columns = (
            [given.value for given in found],
            [float(given.outcome != "graded") for given in found],
        )
        rows = np.full((2, len(asked)), np.nan)
        rows[:, answered] = columns
        return Graded(*(gathered_rows(mine, row, len(numbers)) for row in rows))

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
        for name, those in (("right", rewards >= 0.5), ("wrong", rewards < 0.5)):
            tokens = rows.get("rows/context_tokens", rows["rows/tokens"])[those].sum()
            if tokens:
                mean = float(rows["rows/divergence"][those].sum() / tokens)
                metrics[f"loss/divergence_{name}"] = mean
    return metrics


def check_answers(problems: ProblemSet) -> None:
    """Raises a UserError unless every problem can be graded."""
    for i in range(len(problems)):
        if not problems[i].answer:
            raise UserError(
                f"problem {problems[i].id!r} has no answer, and train.objective learns from "
                "grades; leave it out, or give it one"
            )


def to_batch(rows: dict[str, Any], group_size: int = 1) -> Batch:
    """The pipeline's arrays as the contexts of a step, each problem `group_size` times."""
    rows = repeat_rows(rows, group_size)
    named = "reference_ids" in rows
    return Batch(
        student=Context(rows["student_ids"], rows["student_length"]),
        teacher=Context(rows["teacher_ids"], rows["teacher_length"]),
        reference=Context(rows["reference_ids"], rows["reference_length"]) if named else None,
    )


def repeat_rows(rows: dict[str, Any], group_size: int) -> dict[str, Any]:
    """Every row `group_size` times, copies adjacent."""
    if group_size == 1:
        return rows
    return {name: np.repeat(values, group_size, axis=0) for name, values in rows.items()}
