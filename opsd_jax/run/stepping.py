# SPDX-License-Identifier: Apache-2.0
"""One training step as the host dispatches it: jitted whole, or in halves graded in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from opsd_jax.method.batch import Batch
from opsd_jax.method.train_step import TrainState, jit_halves, jit_sample, jit_step
from opsd_jax.model.sharding import shard_batch
from opsd_jax.run.after_rollout import AfterRollout
from opsd_jax.run.assembly import Assembly
from opsd_jax.run.graded_rows import Graded, GradeRows
from opsd_jax.sampling.prompts import Completion, Context


class Taken(NamedTuple):
    """A dispatched step.

    state, metrics, completion: as `train_step` gives them; grades: where they were needed,
    else None; rollout_s: how long sampling took, where that is known; contexts: metrics of those
    that were built after the rollout; lengths: [B] of their prompts, by name.
    """

    state: TrainState
    metrics: dict[str, jax.Array]
    completion: Completion
    grades: Graded | None = None
    rollout_s: float | None = None
    contexts: Mapping[str, float] = MappingProxyType({})
    lengths: Mapping[str, np.ndarray] = MappingProxyType({})


TakeStep = Callable[[TrainState, Batch, np.ndarray], Taken]


def make_step(
    parts: Assembly, grade_rows: GradeRows, after: AfterRollout | None = None
) -> TakeStep:
    """The step of a method: (state, batch, problem numbers [B]) -> Taken.

    Args:
      parts: what the step is made of.
      grade_rows: grades a batch.
      after: builds contexts from the graded completions, where they are asked so.
    """
    built = (parts.method, parts.shardings, parts.mesh, parts.rules)
    if after is None and not parts.method.objective.needs_rewards:
        step = jit_step(*built)
        return lambda state, batch, numbers: Taken(*step(state, batch))
    sample, learn = jit_halves(*built)

    def graded(state: TrainState, batch: Batch, numbers: np.ndarray) -> Taken:
        jax.block_until_ready(state.step)  # The step before this one is not sampling.
        start = time.monotonic()
        completion = jax.block_until_ready(sample(state, batch))
        rollout_s = time.monotonic() - start
        grades = grade_rows(completion, numbers)
        contexts: Mapping[str, float] = {}
        lengths: Mapping[str, np.ndarray] = {}
        if after is not None:
            batch, contexts, lengths = after(batch, grades, numbers)
        rewards = shard_batch(grades.rewards, parts.mesh)
        state, metrics = learn(state, batch, completion, rewards)
        return Taken(state, metrics, completion, grades, rollout_s, contexts, lengths)

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


def to_batch(
    rows: dict[str, Any], group_size: int = 1, teachers: Sequence[str] = ("teacher",)
) -> Batch:
    """The pipeline's arrays as the contexts of a step, each problem `group_size` times, adjacent.

    Args:
      rows: arrays by name.
      group_size: G.
      teachers: names of the teacher's contexts; the student's stands for one that is built after
        the rollout, until then.
    """
    if group_size > 1:
        rows = {name: np.repeat(values, group_size, axis=0) for name, values in rows.items()}

    def context(name: str) -> Context:
        return Context(rows[f"{name}_ids"], rows[f"{name}_length"], group_size)

    known = [name if f"{name}_ids" in rows else "student" for name in teachers]
    teacher, *views = map(context, known)
    return Batch(
        student=context("student"),
        teacher=teacher,
        reference=context("reference") if "reference_ids" in rows else None,
        views=tuple(views),
    )
