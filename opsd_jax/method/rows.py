# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step a term learns from, and how much each of their tokens counts.

A selection is a name of `SELECTIONS`, a function (step: GradedBatch) -> [B] bool of the user's
own, or a tuple of these, all of which must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.fields import check_shape
from opsd_jax.method.batch import Batch
from opsd_jax.sampling.prompts import Completion


class GradedBatch(NamedTuple):
    """All rows of a step, graded where the objective needs it.

    batch, completion: B rows; rewards: [B] grades, None without; group_size: adjacent rows that
    answer the same problem; step: [] int32, finished steps.
    """

    batch: Batch
    completion: Completion
    rewards: Any = None
    group_size: int = 1
    step: jax.Array | int = 0

    @property
    def right(self) -> jax.Array:
        """[B] bool, a grade of at least 1/2."""
        return self.rewards >= 0.5

    def of_group(self, reduce: Callable, rows: jax.Array) -> jax.Array:
        """`reduce(..., axis=1)` over the rows [B] of each group, at each of its rows."""
        groups = rows.reshape(-1, self.group_size)
        found = reduce(groups, axis=1, keepdims=True)
        return jnp.broadcast_to(found, groups.shape).reshape(-1)


def _all(step: GradedBatch) -> jax.Array:
    return jnp.ones(step.completion.mask.shape[:1], bool)


def _with_context(step: GradedBatch) -> jax.Array:
    found = step.batch.has_context
    return _all(step) if found is None else found


def _varied(step: GradedBatch) -> jax.Array:
    return step.of_group(jnp.max, step.rewards) > step.of_group(jnp.min, step.rewards)


Select = Callable[[GradedBatch], jax.Array]
SELECTIONS: dict[str, Select] = {
    "all": _all,
    "right": lambda step: step.right,
    "wrong": lambda step: ~step.right,
    "all_wrong": lambda step: ~step.of_group(jnp.any, step.right),  # no right row in the group
    "varied": _varied,  # the group's grades differ
    "context": _with_context,  # a teacher context could be built
    "complete": lambda step: step.completion.stopped,  # not truncated
}
NEED_GRADES = {"right", "wrong", "all_wrong", "varied"}
Name = Annotated[str, tuple(SELECTIONS)]
Rows = Name | Select | tuple[Name | Select, ...]


def parts_of(rows: Rows) -> tuple:
    """The selections that must all hold."""
    return rows if isinstance(rows, tuple) else (rows,)


def selected(rows: Rows, step: GradedBatch) -> jax.Array:
    """Which rows a term learns from, [B] bool."""
    chosen = _all(step)
    for part in parts_of(rows):
        mine = part(step) if callable(part) else SELECTIONS[part](step)
        check_shape("a term's rows", part, mine, chosen.shape)
        chosen &= mine
    return chosen


MEANS = ("token", "sequence", "constant")


def mean_weights(mask: jax.Array, mean: str) -> jax.Array:
    """The weight of every token in a mean over the global batch, [B, C] float32.

    Args:
      mask: [B, C] bool; a row without tokens counts nowhere.
      mean: "token" 1 / Σ mask; "sequence" 1 / (tokens of the row · rows); "constant"
        1 / (C · rows), which favours neither short nor long rows (arXiv 2503.20783).
    """
    tokens = jnp.sum(mask, axis=1, keepdims=True)
    num_rows = jnp.sum(tokens > 0)
    weight = {
        "token": 1.0 / jnp.maximum(jnp.sum(tokens), 1),
        "sequence": 1.0 / jnp.maximum(tokens * num_rows, 1),
        "constant": 1.0 / jnp.maximum(mask.shape[1] * num_rows, 1),
    }[mean]
    return jnp.where(mask, weight.astype(jnp.float32), 0.0)


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ weights · values; where a weight is 0 the value may be anything."""
    return jnp.sum(jnp.where(weights != 0, values, 0.0) * weights)
