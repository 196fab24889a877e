# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens from hidden states, a block of positions at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from opsd_jax.divergence.vocabulary import Vocabulary
from opsd_jax.model.head import Head, head_logits


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
        # Blocks run over positions and never over rows, which may be sharded.
        width = max(1, min(C, token_block // B))
        num_blocks = -(-C // width)

        def blocks(x):
            filled = jnp.pad(x, [(0, 0), (0, num_blocks * width - C)] + [(0, 0)] * (x.ndim - 2))
            return filled.reshape(B, num_blocks, width, *x.shape[2:]).swapaxes(0, 1)

        def whole(x):
            return x.swapaxes(0, 1).reshape(B, -1)[:, :C]

        found = jax.lax.map(lambda x: jax.checkpoint(read)(*x), (blocks(hidden), blocks(ids)))
        logps, entropy = jax.tree.map(whole, found)
    return jnp.where(mask, logps, 0.0), jnp.where(mask, entropy, 0.0)
