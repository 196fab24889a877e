# SPDX-License-Identifier: Apache-2.0
"""Sampling a token from logits: penalties, temperature, top-k, top-p, min-p; one uniform per row.

Nothing here sorts the vocabulary, and logits split over devices stay where they are: there every
function is a few sums over V. Where a device has all of a row, top-k looks for the largest entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from opsd_jax.model.sharding import axis_size

NUM_BLOCKS = 64  # of the inverse CDF; a multiple of any sensible number of model devices


def penalise(
    logits_BV: jax.Array,
    in_text_BV: jax.Array,
    in_completion_BV: jax.Array,
    repetition: float = 1.0,
    presence: float = 0.0,
) -> jax.Array:
    """Makes tokens that occurred less likely.

    z / repetition if z > 0 else z · repetition, for tokens of the prompt and the completion
    (arXiv 1909.05858); then z - presence for tokens of the completion (the OpenAI API's and
    vLLM's convention).

    Args:
      logits_BV: [B, V].
      in_text_BV: [B, V] bool, tokens that stand in prompt or completion.
      in_completion_BV: [B, V] bool, tokens sampled so far.
      repetition: > 0; 1 is off.
      presence: 0 is off.
    """
    repeated = jnp.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition)
    logits_BV = jnp.where(in_text_BV, repeated, logits_BV)
    return logits_BV - presence * in_completion_BV


def filter_logits(
    logits_BV: jax.Array,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> jax.Array:
    """Logits of the distribution that is sampled: scaled by 1 / temperature, then truncated.

    Top-k keeps the k largest entries; top-p then keeps the smallest set of largest entries whose
    probability reaches p (always at least one); min-p then keeps those with at least min_p times
    the largest probability. Entries tied with the last kept one stay, so the result does not
    depend on the order of the vocabulary.

    Args:
      logits_BV: [B, V].
      temperature: > 0.
      top_k: number of entries kept, 0 = all.
      top_p: probability mass kept, 1 = all (arXiv 1904.09751).
      min_p: share of the largest probability, 0 = all (arXiv 2407.01082).

    Returns:
      [B, V] float32 with -inf at removed entries.
    """
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    limited = 0 < top_k < logits_BV.shape[-1]
    if limited and not is_split("vocab"):
        logits_BV = on_own_rows(partial(keep_largest, k=top_k, top_p=top_p), logits_BV)
    else:
        if limited:
            logits_BV = keep_above(logits_BV, jnp.ones_like(logits_BV), float(top_k))
        if top_p < 1.0:
            logits_BV = keep_above(logits_BV, jax.nn.softmax(logits_BV, axis=-1), top_p)
    if min_p > 0.0:
        lowest = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p)
        logits_BV = jnp.where(logits_BV >= lowest, logits_BV, -jnp.inf)
    return logits_BV


def is_split(axis: str) -> bool:
    """Whether the compiler splits a logical axis over devices of the mesh that is set."""
    mesh, name = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules()).get(axis)
    split = {n: k == AxisType.Auto for n, k in zip(mesh.axis_names, mesh.axis_types, strict=True)}
    names = (name,) if isinstance(name, str) else name or ()
    return all(split.get(n, False) for n in names) and axis_size(mesh, names) > 1


def on_own_rows(function: Callable[[jax.Array], jax.Array], x_BV: jax.Array) -> jax.Array:
    """A function of each row, on a mesh of a device's own rows: XLA gathers what a top-k reads."""
    axis = dict(nn.get_logical_axis_rules()).get("batch")
    if not is_split("batch") or len(x_BV) % axis_size(jax.sharding.get_abstract_mesh(), axis):
        return function(x_BV)
    rows = PartitionSpec(axis)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(x_BV)


def keep_largest(logits_BV: jax.Array, k: int, top_p: float) -> jax.Array:
    """Top-k, then top-p among what it keeps, as `filter_logits` has them, without a loop.

    All entries above one that top-k keeps are among the k largest.
    """
    largest_Bk = largest(logits_BV, k)
    highest_B1, lowest_B1 = largest_Bk[..., :1], largest_Bk[..., -1:]
    if top_p < 1.0:
        # Over the vocabulary, as more than k entries stay where some are tied with the last.
        weights_BV = jnp.where(logits_BV >= lowest_B1, jnp.exp(logits_BV - highest_B1), 0.0)
        limit_B1 = top_p * jnp.sum(weights_BV, axis=-1, keepdims=True)
        weights_Bk = jnp.exp(largest_Bk - highest_B1)
        above_Bk = jnp.cumsum(weights_Bk, axis=-1) - weights_Bk
        kept_Bk = jnp.where(above_Bk < limit_B1, largest_Bk, jnp.inf)
        lowest_B1 = jnp.min(kept_Bk, axis=-1, keepdims=True)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)


def largest(x_BV: jax.Array, k: int) -> jax.Array:
    """The k largest entries of each row, descending: [B, k], those of the k best of many blocks.

    A GPU's top-k sorts whole rows; here it gets two short ones, of about (V k)^1/2 each.
    """
    rows, V = x_BV.shape[:-1], x_BV.shape[-1]
    number = math.isqrt(V * k)
    size = -(-V // number)
    if size == 1:
        return jax.lax.top_k(x_BV, k)[0]
    padding = [(0, 0)] * len(rows) + [(0, number * size - V)]
    blocks_BNs = jnp.pad(x_BV, padding, constant_values=-jnp.inf).reshape(*rows, number, size)
    best_Bk = jax.lax.top_k(jnp.max(blocks_BNs, axis=-1), k)[1]
    found = jnp.take_along_axis(blocks_BNs, best_Bk[..., None], axis=-2)
    return jax.lax.top_k(found.reshape(*rows, k * size), k)[0]


def keep_above(logits_BV: jax.Array, weights_BV: jax.Array, limit: float) -> jax.Array:
    """Keeps the entries above which less than `limit` of weight lies, the others become -inf.

    The threshold is found by bisection over all float32 numbers, in their order as integers: 32
    sums over the vocabulary in place of a sort, and exact.

    Args:
      logits_BV: [B, V] float32.
      weights_BV: [B, V], of every entry.
      limit: an entry stays while Σ_{v: z_v > z} weights_v < limit.
    """
    order_BV = _as_ordered_integers(logits_BV)

    def halve(bounds, _):
        low, high = bounds  # The answer is in (low, high]; low itself lets too much through.
        middle = (low & high) + ((low ^ high) >> 1)  # The floor of the mean, without overflow.
        above = jnp.sum(jnp.where(order_BV > middle, weights_BV, 0.0), axis=-1, keepdims=True)
        enough = above < limit
        return (jnp.where(enough, low, middle), jnp.where(enough, middle, high)), None

    shape = (*logits_BV.shape[:-1], 1)
    info = jnp.iinfo(jnp.int32)
    bounds = (jnp.full(shape, info.min), jnp.full(shape, info.max))
    (_, lowest), _ = jax.lax.scan(halve, bounds, length=32)
    return jnp.where(order_BV >= lowest, logits_BV, -jnp.inf)


def _as_ordered_integers(x: jax.Array) -> jax.Array:
    """int32 in the same order as the float32 numbers; -0.0 counts as 0.0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def sample(logits_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Draws one id per row through the inverse of the cumulative distribution.

    One uniform number instead of V Gumbel variables: over a large vocabulary the noise would
    cost as much as a layer of the model. The vocabulary is cut into blocks: the first sum finds
    the block, a second one, inside it, the id.

    Args:
      logits_BV: [B, V]; -inf entries are never drawn.
      uniform_B: [B] in [0, 1).

    Returns:
      [B] int32.
    """
    B, V = logits_BV.shape
    size = -(-V // NUM_BLOCKS)
    logits_BV = logits_BV.astype(jnp.float32)
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    padded = jnp.pad(weights_BV, [(0, 0), (0, NUM_BLOCKS * size - V)])
    weights_BNs = padded.reshape(B, NUM_BLOCKS, size)
    block_BN = jnp.sum(weights_BNs, axis=-1)
    through_BN = jnp.cumsum(block_BN, axis=-1)
    block_B = _first_above(through_BN, block_BN, uniform_B * through_BN[:, -1])
    # The block by a product with one-hot rows: a gather would fetch all blocks of all devices.
    chosen_BN = jnp.arange(NUM_BLOCKS) == block_B[:, None]
    inside_Bs = jnp.sum(jnp.where(chosen_BN[:, :, None], weights_BNs, 0.0), axis=1)
    before_B = jnp.sum(jnp.where(chosen_BN, through_BN - block_BN, 0.0), axis=1)
    through_Bs = jnp.cumsum(inside_Bs, axis=-1)
    rest_B = uniform_B * through_BN[:, -1] - before_B
    return block_B * size + _first_above(through_Bs, inside_Bs, rest_B)


def _first_above(through_BN: jax.Array, weights_BN: jax.Array, target_B: jax.Array) -> jax.Array:
    """First index of positive weight whose running sum exceeds the target, else the last such.

    The weight is asked for besides: a parallel running sum is rounded in another order at every
    index, so it may rise where the weight is zero, and fall.
    """
    indices, number = jnp.arange(through_BN.shape[1], dtype=jnp.int32), through_BN.shape[1]
    positive_BN = weights_BN > 0
    above_BN = positive_BN & (through_BN > target_B[:, None])
    first_B = jnp.min(jnp.where(above_BN, indices, number), axis=-1)
    last_B = jnp.max(jnp.where(positive_BN, indices, 0), axis=-1)
    return jnp.where(first_B < number, first_B, last_B)


def log_prob(logits_BV: jax.Array, ids_B: jax.Array) -> jax.Array:
    """z_y - logsumexp(z), [B]."""
    shifted_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    # A masked sum and not a gather, which would fetch a vocabulary that is split over devices.
    here_BV = jnp.arange(logits_BV.shape[1]) == ids_B[:, None]
    picked_B = jnp.sum(jnp.where(here_BV, shifted_BV, 0.0), axis=-1)
    return picked_B - jnp.log(jnp.sum(jnp.exp(shifted_BV), axis=-1))


def prompt_tokens(ids_BP: jax.Array, lengths_B: jax.Array, vocab_size: int) -> jax.Array:
    """[B, V] int32, 1 for the tokens of each prompt, 0 for others and for padding."""
    inside_BP = jnp.arange(ids_BP.shape[1]) < lengths_B[:, None]
    rows = jnp.arange(len(ids_BP))[:, None]
    return jnp.zeros((len(ids_BP), vocab_size), jnp.int32).at[rows, ids_BP].max(inside_BP * 1)
