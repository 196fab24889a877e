# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens from hidden states, a block of tokens at a time.

On a mesh every device reads its own tokens with its own slice of the vocabulary, as in `fused.py`:
left to the compiler, the head would cross the devices once a block, and its gradient again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from opsd_jax.divergence.vocabulary import Vocabulary, vocabulary_mesh
from opsd_jax.model.head import Head, head_logits
from opsd_jax.model.sharding import axis_size

Process = Callable[[jax.Array], jax.Array]


def token_logps(
    head: Head,
    hidden: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    token_block: int | None = None,
    process: Process | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log p(ids) and the entropy of p in nats, at temperature 1, each [B, C] float32.

    Both have gradients.

    Args:
      head: kernel [V, D], of floats.
      hidden: [B, C, D]; row t predicts ids[:, t].
      ids: [B, C] int32.
      mask: [B, C] bool; masked tokens are exactly 0 and may hold anything.
      token_block: about so many rows of logits exist at a time on a device, forward and backward,
        by recomputation; None holds [B, C, V].
      process: logits to logits, [..., V], before they are normalised; removed ones are -inf. It
        sees the whole vocabulary, which no axis splits then.
    """
    size = head.kernel.shape[0]
    hidden = jnp.where(mask[..., None], hidden, 0)
    place = vocabulary_mesh(None, ids.shape)
    axis = None if token_block is None or process is not None else place.vocab_axis
    read = partial(_read, Vocabulary(size, axis), head.softcap, process)
    if token_block is None:
        found = read(head.kernel, hidden, ids)
    else:
        in_blocks, kernel = partial(_in_blocks, read, token_block), head.kernel
        if place.mesh is not None:
            in_blocks = jax.shard_map(
                in_blocks,
                mesh=place.mesh,
                in_specs=(PartitionSpec(axis), place.tokens, place.tokens),
                out_specs=(place.tokens, place.tokens),
                check_vma=False,  # sums over the vocabulary are made by hand
            )
            kernel = jnp.pad(kernel, ((0, -size % axis_size(place.mesh, axis)), (0, 0)))
        found = in_blocks(kernel, hidden, ids)
    logps, entropy = found
    return jnp.where(mask, logps, 0.0), jnp.where(mask, entropy, 0.0)


def _read(
    vocabulary: Vocabulary,
    softcap: float | None,
    process: Process | None,
    kernel: jax.Array,
    hidden: jax.Array,
    ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(log p(ids), entropy) [...] of hidden [..., D] and a slice [U, D] of the head."""
    logits = vocabulary.without_padding(head_logits(Head(kernel, softcap), hidden))
    logps = vocabulary.log_softmax(process(logits) if process else logits)
    chosen = vocabulary.take(logps, ids[..., None])[..., 0]
    entropy = -vocabulary.sum(jnp.exp(logps) * jnp.where(logps > -jnp.inf, logps, 0.0))
    return chosen, entropy


def _in_blocks(
    read: Callable[..., tuple[jax.Array, jax.Array]],
    token_block: int,
    kernel: jax.Array,
    hidden: jax.Array,
    ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`read` of a device's tokens, recomputed backwards."""
    shape, N = ids.shape, ids.size
    num_blocks = -(-N // token_block)
    width = -(-N // num_blocks)

    def blocks(x):
        flat = x.reshape(N, *x.shape[2:])
        filled = jnp.pad(flat, [(0, num_blocks * width - N)] + [(0, 0)] * (flat.ndim - 1))
        return filled.reshape(num_blocks, width, *flat.shape[1:])

    def one(block):
        return jax.checkpoint(read)(kernel, *block)

    found = jax.lax.map(one, (blocks(hidden), blocks(ids)))
    return jax.tree.map(lambda x: x.reshape(-1)[:N].reshape(shape), found)
