# SPDX-License-Identifier: Apache-2.0
"""From logits to a token: temperature, top-k, top-p, and one uniform number per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def filter_logits(
    logits_BV: jax.Array, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Logits of the distribution that is sampled: scaled by 1 / temperature, then truncated.

    Top-k keeps the k largest entries; top-p then keeps the smallest set of largest entries whose
    probability reaches p (always at least one). Entries tied with the last kept one stay, so the
    result does not depend on the order of the vocabulary.

    Args:
      logits_BV: [B, V].
      temperature: > 0.
      top_k: number of entries kept, 0 = all.
      top_p: probability mass kept, 1 = all (arXiv 1904.09751).

    Returns:
      [B, V] float32 with -inf at removed entries.
    """
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    vocab_size = logits_BV.shape[-1]
    top_k = min(top_k, vocab_size) if top_k else vocab_size
    if top_k == vocab_size and top_p >= 1.0:
        return logits_BV
    largest, _ = jax.lax.top_k(logits_BV, top_k)  # [B, k], descending
    if top_p >= 1.0:
        threshold = largest[:, -1:]
    else:
        probs = jax.nn.softmax(largest, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        threshold = jnp.min(jnp.where(mass_before < top_p, largest, jnp.inf), -1, keepdims=True)
    return jnp.where(logits_BV >= threshold, logits_BV, -jnp.inf)


def sample(logits_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Draws one id per row through the inverse of the cumulative distribution.

    One uniform number instead of V Gumbel variables: over a large vocabulary the noise would
    cost as much as a layer of the model.

    Args:
      logits_BV: [B, V]; -inf entries are never drawn.
      uniform_B: [B] in [0, 1).

    Returns:
      [B] int32.
    """
    cumulative = jnp.cumsum(jax.nn.softmax(logits_BV.astype(jnp.float32), axis=-1), axis=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, also after rounding: the first entry above the target then has
    # positive probability.
    target = jnp.minimum(uniform_B[:, None] * total, jnp.nextafter(total, 0.0))
    return jnp.sum(cumulative <= target, axis=-1, dtype=jnp.int32)
