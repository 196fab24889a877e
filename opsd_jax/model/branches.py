# SPDX-License-Identifier: Apache-2.0
"""Texts that begin alike: a prompt's tokens stand once, and all its answers after it.

    [prompt | answer 1 | … | answer G]   where the layers work token by token, P + G · C columns
    [prompt | answer g | 0]              where a text attends to itself, G rows of P + C

All products are made in the first form, which has each token once. Attention is in the second, so
that any implementation will do; the prompt's own is made G times. The prompt of a row has a length
of its own: in the second form its answer follows at once, in the first at column P.

Alphabet: B prompts, G answers of each, R = B · G, P columns of a prompt, C of an answer.
"""

from __future__ import annotations

from functools import partial

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Branches:
    """lengths: [B] int32 of the prompts, >= 1 and <= width; width: P; number: G."""

    lengths: jax.Array
    width: int = flax.struct.field(pytree_node=False)
    number: int = flax.struct.field(pytree_node=False)

    def positions(self, num_columns: int) -> jax.Array:
        """[B, num_columns] int32 of the tokens in the first form."""
        t = jnp.arange(num_columns)
        C = (num_columns - self.width) // self.number
        said = self.lengths[:, None] + (t - self.width) % C
        return jnp.where(t < self.width, t, said).astype(jnp.int32)

    def texts(self, x: jax.Array) -> jax.Array:
        """[R, P + C, ...] of [B, P + G · C, ...]: one text a row."""
        return _texts(self.width, self.number, True, x, self.lengths)

    def columns(self, x: jax.Array) -> jax.Array:
        """[B, P + G · C, ...] of [R, P + C, ...]; a prompt is that of its first row."""
        return _columns(self.width, self.number, False, x, self.lengths)


# Each is the other's transpose, where all rows have the prompt and are summed, or one alone. Told
# so, both ways are copies of rows; XLA would make the gradients by scattering.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _texts(P: int, G: int, all_rows: bool, x: jax.Array, lengths: jax.Array) -> jax.Array:
    B, ends = len(x), lengths[:, None, None]
    said = x[:, P:].reshape(B, G, -1, *x.shape[2:])
    C = said.shape[2]
    t = jnp.arange(P + C)
    there = jnp.broadcast_to(jnp.clip(t - ends, 0, C - 1), (B, G, P + C))
    said = jax.vmap(jax.vmap(lambda row, at: row[at]))(said, there)
    prompt = jnp.pad(x[:, None, :P], [(0, 0), (0, 0), (0, C), *[(0, 0)] * (x.ndim - 2)])
    owns = (t < ends) & (all_rows | (jnp.arange(G) == 0)[:, None])
    says = (t >= ends) & (t < ends + C)
    owns, says = (_beside(mask, said.ndim) for mask in (owns, says))
    out = jnp.where(owns, prompt, jnp.where(says, said, 0))
    return out.reshape(B * G, P + C, *x.shape[2:])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _columns(P: int, G: int, all_rows: bool, x: jax.Array, lengths: jax.Array) -> jax.Array:
    B, C = len(lengths), x.shape[1] - P
    x = x.reshape(B, G, P + C, *x.shape[2:])
    there = jnp.broadcast_to(lengths[:, None, None] + jnp.arange(C), (B, G, C))
    said = jax.vmap(jax.vmap(lambda row, at: row[at]))(x, there)
    prompt = x[:, :, :P]
    prompt = jnp.sum(prompt, axis=1, dtype=jnp.float32) if all_rows else prompt[:, 0]
    owns = _beside(jnp.arange(P) < lengths[:, None], prompt.ndim)
    prompt = jnp.where(owns, prompt, 0).astype(x.dtype)
    return jnp.concatenate([prompt, said.reshape(B, G * C, *x.shape[3:])], axis=1)


def _beside(mask: jax.Array, ndim: int) -> jax.Array:
    return mask.reshape(*mask.shape, *[1] * (ndim - mask.ndim))


def _forward(function, P, G, all_rows, x, lengths):
    return function(P, G, all_rows, x, lengths), lengths


def _backward(transpose, P, G, all_rows, lengths, cotangent):
    return transpose(P, G, all_rows, cotangent, lengths), None


_texts.defvjp(partial(_forward, _texts), partial(_backward, _columns))
_columns.defvjp(partial(_forward, _columns), partial(_backward, _texts))
