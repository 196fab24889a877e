# SPDX-License-Identifier: Apache-2.0
"""`Batch` and `Policy`: what both roles are shown, and who they are."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from opsd_jax.model.decoder import Decoder
from opsd_jax.sampling.prompts import Context


@flax.struct.dataclass
class Batch:
    """One batch of problems as the two roles see them: [B, P] and [B, Q] prompts.

    reference: [B, C] the data's own completions, stop token included, where a method reads them;
    views: K - 1 further teacher contexts of each row, [B, Q_k]; `teacher` is the first of K;
    has_context: [B] bool, False where no teacher context could be built: such a row may hold any
    context there and weighs 0 in every term that looks at the teacher. None is all True.
    """

    student: Context
    teacher: Context
    reference: Context | None = None
    views: tuple[Context, ...] = ()
    has_context: jax.Array | None = None

    def in_context(self, mask: jax.Array) -> jax.Array:
        """Tokens [B, C] that count and whose row has a teacher context."""
        return mask if self.has_context is None else mask & self.has_context[:, None]

    def without_context(self) -> jax.Array:
        """The share of rows for which no teacher context could be built, [] float32."""
        if self.has_context is None:
            return jnp.zeros((), jnp.float32)
        return jnp.mean(~self.has_context, dtype=jnp.float32)


def ungrouped(tree: Any) -> Any:
    """The same, of which adjacent rows need not have a prompt in common: for rows that are picked.

    Args:
      tree: a `Batch`, a `Context` or a tree of them.
    """
    is_context = lambda x: isinstance(x, Context)  # noqa: E731

    def apart(leaf: Any) -> Any:
        return dataclasses.replace(leaf, copies=1) if is_context(leaf) else leaf

    return jax.tree.map(apart, tree, is_leaf=is_context)


class Policy(NamedTuple):
    """A decoder with its variables."""

    model: Decoder
    variables: dict
