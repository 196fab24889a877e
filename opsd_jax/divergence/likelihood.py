# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens from hidden states, a block of positions at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from opsd_jax.divergence.vocabulary import Vocabulary
from opsd_jax.model.head import Head, head_logits
from opsd_jax.model.sharding import axis_size, length_axis


def token_logps(
    head: Head,
    hidden: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    token_block: int | None = None,
    process: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log p(ids) and the entropy of p in nats, at temperature 1, each [B, C] float32.

    Args:
      head: kernel [V, D].
      hidden: [B, C, D]; row t predicts ids[:, t].
      ids: [B, C] int32.
      mask: [B, C] bool; masked tokens are exactly 0 and may hold anything.
      token_block: about so many rows of logits exist at a time, forward and backward, by
        recomputation; None holds [B, C, V].
      process: logits to logits, [..., V], before they are normalised; removed ones are -inf.
    """
    B, C = ids.shape
    vocabulary = Vocabulary(head.kernel.shape[0])
    hidden = jnp.where(mask[..., None], hidden, 0)

    def read(hidden, ids):
        logits = head_logits(head, hidden)
        logps = vocabulary.log_softmax(process(logits) if process else logits)
        chosen = jnp.take_along_axis(logps, ids[..., None], axis=-1)[..., 0]
        finite = jnp.where(logps > -jnp.inf, logps, 0.0) if process else logps
        entropy = -jnp.sum(jnp.exp(logps) * finite, axis=-1)
        return chosen, jax.lax.stop_gradient(entropy)

    if token_block is None:
        logps, entropy = read(hidden, ids)
    else:
        # Blocks run over positions and never over rows or parts of a text, which may be sharded.
        mesh = jax.sharding.get_abstract_mesh()
        num_parts = axis_size(mesh, length_axis(mesh, C))
        part = C // num_parts
        width = max(1, min(part, token_block // (B * num_parts)))
        num_blocks = -(-part // width)

        def blocks(x):
            x = x.reshape(B, num_parts, part, *x.shape[2:])
            rest = (0, num_blocks * width - part)
            filled = jnp.pad(x, [(0, 0), (0, 0), rest] + [(0, 0)] * (x.ndim - 3))
            filled = filled.reshape(B, num_parts, num_blocks, width, *x.shape[3:])
            return jnp.moveaxis(filled, 2, 0)

        def whole(x):
            return jnp.moveaxis(x, 0, 2).reshape(B, num_parts, -1)[:, :, :part].reshape(B, C)

        found = jax.lax.map(lambda x: jax.checkpoint(read)(*x), (blocks(hidden), blocks(ids)))
        logps, entropy = jax.tree.map(whole, found)
    return jnp.where(mask, logps, 0.0), jnp.where(mask, entropy, 0.0)
