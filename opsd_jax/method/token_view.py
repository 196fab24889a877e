# SPDX-License-Identifier: Apache-2.0
"""What token weights and advantage shapes see of each token: `Tokens`.

Both are functions (tokens: Tokens, mask) -> [B, C], constant for differentiation. A token weight
multiplies a term's loss (`divergence.weights`, `Distillation.weights`, …); an advantage shape gives
the advantages in place of `tokens.advantages` (`PolicyGradient.shape`). `token_weights.py` and
`advantage_shapes.py` hold those of the literature.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from opsd_jax.divergence.losses import per_token
from opsd_jax.divergence.rows import TokenDivergence
from opsd_jax.errors import UserError
from opsd_jax.method.objective import Reader, masked_sums


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of some rows, each property read only if it is asked for; without a gradient.

    Besides those below it has every field of `TokenDivergence`, such as argmax_agreement, where
    that was computed; then both sides' log-probabilities and entropies are those of its target.

    Args:
      reader: of the rows.
      rows: name -> [B], what the term's plan says of them: rewards, advantages.
      terms: the divergence, for a term that has it.
    """

    reader: Reader
    rows: dict[str, jax.Array]
    terms: TokenDivergence | None = None

    @property
    def ids(self) -> jax.Array:
        """[B, C] int32."""
        return self.reader.completion.ids

    @property
    def mask(self) -> jax.Array:
        """[B, C] bool, tokens that count in rows with a teacher context."""
        return self.reader.batch.in_context(self.reader.completion.mask)

    @property
    def positions(self) -> jax.Array:
        """[B, C] int32 from 0, the place in the completion."""
        ids = self.ids
        return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)

    @property
    def step(self) -> jax.Array | int:
        """[] int32, finished steps."""
        return self.reader.step

    @property
    def rewards(self) -> jax.Array:
        """[B, 1], the rows' grades."""
        return self._of_rows("rewards", "grades, so the step must be graded: set the term's rows")

    @property
    def advantages(self) -> jax.Array:
        """[B, 1], the rows' advantages before any shape."""
        return self._of_rows("advantages", "advantages, which PolicyGradient alone has")

    @cached_property
    def student_logps(self) -> jax.Array:
        """[B, C], log pS(y) at temperature 1."""
        return jax.lax.stop_gradient(self._student[0])

    @cached_property
    def student_entropy(self) -> jax.Array:
        """[B, C], nats."""
        return jax.lax.stop_gradient(self._student[1])

    @property
    def teacher_logps(self) -> jax.Array:
        """[B, C], log pT(y) at temperature 1 in the teacher's context."""
        return self._teacher[0]

    @property
    def teacher_entropy(self) -> jax.Array:
        """[B, C], nats."""
        return self._teacher[1]

    @property
    def plain_logps(self) -> jax.Array:
        """[B, C], log pT(y) of the teacher in the *student's* context: without its privilege."""
        return self.reader.plain_logps

    @property
    def gap(self) -> jax.Array:
        """[B, C], log pT(y) - log pS(y)."""
        return self.teacher_logps - self.student_logps

    @property
    def view_logps(self) -> jax.Array:
        """[K, B, C], log pT(y) in the K teacher contexts, `teacher` first, then `Batch.views`."""
        return self.reader.view_logps

    @property
    def _student(self) -> tuple[jax.Array, jax.Array]:
        if self.terms is not None:
            return self.terms.student_logps, self.terms.student_entropy
        return self.reader.student_logps

    @cached_property
    def _teacher(self) -> tuple[jax.Array, jax.Array]:
        if self.terms is not None:
            return self.terms.teacher_logps, self.terms.teacher_entropy
        return self.reader.teacher_logps

    def sums_of_teacher(self) -> dict[str, jax.Array]:
        """Sums for `Loss.context_sums` of what functions asked of the teacher, and nothing else."""
        if "_teacher" not in vars(self):
            return {}
        logps, entropy = self._teacher
        per_id = {"teacher/nll_of_rollout": -logps, "teacher/entropy": entropy}
        return masked_sums(per_id, self.mask)

    def _of_rows(self, name: str, why: str) -> jax.Array:
        if name not in self.rows:
            raise UserError(f"a token weight or advantage shape reads {why}")
        return self.rows[name][:, None]

    def __getattr__(self, name: str) -> Any:
        # Only for what is not defined above; dunders must not look for `terms` before it is set.
        if name.startswith("_") or self.terms is None:
            raise AttributeError(f"tokens have no {name!r} here")
        return getattr(self.terms, name)


Function = Callable[[Any, jax.Array], jax.Array]


def weighed(
    values: jax.Array, functions: Sequence[Function], tokens: Tokens
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(values [B, C] times all token weights, the sum of these for `Loss.context_sums`)."""
    if not functions:
        return values, {}
    found = [per_token("a token weight", f, tokens, tokens.mask) for f in functions]
    product = math.prod(found[1:], start=found[0])
    return values * product, masked_sums({"loss/token_weight": product}, tokens.mask)
