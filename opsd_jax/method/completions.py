# SPDX-License-Identifier: Apache-2.0
"""Where the completions of a step come from: a role's own rollout, a mixture, or the data.

A source is a small frozen value called as
`source(student, teacher, batch, key, config) -> Completion`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp

from opsd_jax.errors import UserError
from opsd_jax.fields import Count, check, require
from opsd_jax.method.batch import Batch, Policy
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion, Context
from opsd_jax.sampling.rollout import rollout


class CompletionSource(Protocol):
    """See the head of this file."""

    @property
    def on_policy(self) -> bool:
        """Whether every completion is the student's own, from its own context."""

    @property
    def generates(self) -> bool:
        """Whether tokens are sampled at all; their log-probabilities are then known."""

    def __call__(
        self, student: Policy, teacher: Policy, batch: Batch, key: jax.Array, config: RolloutConfig
    ) -> Completion:
        """One completion per row."""


@dataclasses.dataclass(frozen=True)
class StudentRollouts:
    """The student answers from its own context."""

    on_policy = True
    generates = True

    def __call__(self, student, teacher, batch, key, config) -> Completion:
        return _sample(student, batch.student, key, config)


@dataclasses.dataclass(frozen=True)
class TeacherRollouts:
    """The teacher answers from its context: off-policy distillation on generated data."""

    on_policy = False
    generates = True

    def __call__(self, student, teacher, batch, key, config) -> Completion:
        return _sample(teacher, batch.teacher, key, config)


@dataclasses.dataclass(frozen=True)
class MixedRollouts:
    """The last `teacher_rows` of every `of` rows are the teacher's, the others the student's.

    Fixed places and not a draw: every device has the same share, and shapes are static. Row b
    draws from the same key whoever answers.

    Args:
      teacher_rows, of: 1 of 2 is the half that EDGE-OPD (arXiv 2605.23493) samples with context.
    """

    teacher_rows: Count = 1
    of: Count = 2

    on_policy = False
    generates = True

    def __post_init__(self):
        require("MixedRollouts", self)
        check("MixedRollouts.of", self.of, Annotated[int, f"> {self.teacher_rows}"])

    def __call__(self, student, teacher, batch, key, config) -> Completion:
        num_rows = batch.student.ids.shape[0]
        if num_rows % self.of:
            raise UserError(
                f"train.batch_size = {num_rows} must be a multiple of MixedRollouts.of = {self.of}"
            )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows))
        places = slice(None, -self.teacher_rows), slice(-self.teacher_rows, None)
        parts = []
        for policy, context, place in zip(
            (student, teacher), (batch.student, batch.teacher), places, strict=True
        ):
            mine, mine_keys = jax.tree.map(self._taker(place), (context, keys))
            mine = dataclasses.replace(mine, copies=1)
            out = _sample(policy, mine, mine_keys, config)
            parts.append(
                jax.tree.map(lambda x: x.reshape(num_rows // self.of, -1, *x.shape[1:]), out)
            )
        return jax.tree.map(
            lambda *x: jnp.concatenate(x, axis=1).reshape(num_rows, *x[0].shape[2:]), *parts
        )

    def _taker(self, place: slice) -> Callable[[jax.Array], jax.Array]:
        """Rows at `place` in every run of `of`; as a reshape, which keeps devices' rows there."""

        def take(x):
            runs = x.reshape(-1, self.of, *x.shape[1:])[:, place]
            return runs.reshape(-1, *x.shape[1:])

        return take


@dataclasses.dataclass(frozen=True)
class References:
    """The data's own completions: fine-tuning, or distillation on a fixed data set.

    A reference longer than `rollout.max_new_tokens` with its stop token is left out and counted
    (`contexts.too_long = "error"` stops instead), never cut.

    Args:
      template: text of a completion with {solution} and {answer} in it, or a function
        (problem) -> text.
    """

    template: str | Callable[[Any], str] = "{solution}"

    on_policy = False
    generates = False

    def __post_init__(self):
        if callable(self.template):
            return
        # Not behind a letter, ^ or _: that is LaTeX.
        names = set(re.findall(r"(?<![\w^])\{([a-z]+)\}", self.template))
        unknown = names - {"solution", "answer"}
        if unknown or not re.search(r"\{(solution|answer)\}", self.template):
            raise UserError(
                "References.template must hold {solution} or {answer}, which alone are filled, not "
                f"{self.template!r}"
            )

    def __call__(self, student, teacher, batch, key, config) -> Completion:
        reference = batch.reference
        mask = jnp.arange(reference.ids.shape[1]) < reference.lengths[:, None]
        return Completion(
            ids=reference.ids,
            mask=mask,
            logps=jnp.zeros(mask.shape, jnp.float32),
            stopped=jnp.ones(mask.shape[:1], bool),
        )


def _sample(policy: Policy, prompts: Context, key: jax.Array, config: RolloutConfig) -> Completion:
    return rollout(*policy, prompts.ids, prompts.lengths, key, config, prompts.copies)
