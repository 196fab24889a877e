# SPDX-License-Identifier: Apache-2.0
"""Decode attention as a Pallas TPU kernel: one query per row over a large store of keys and values.

`attend` reads as many slots of every row as the window of the batch has. This kernel reads, of each
row, only the blocks that hold something its query may see (`rollout.attention = "pallas"`), and of
a store of all layers only the layer asked for. It is compiled for blocks of 128 slots and more:
`NUM_LANES` must divide the slots of a store, or the compiler copies all of it at every token.

Alphabet: L layers, B batch, K key/value heads, G query heads of each, H head width, S slots.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from opsd_jax.model.head import soft_cap
from opsd_jax.model.kv_cache import KV

NUM_LANES = 128
BLOCK = 256
UNSEEN = -1e30


def attend_store(
    q_BKGH: jax.Array,
    kv: KV,
    layer: jax.Array,
    starts_B: jax.Array,
    stops_B: jax.Array,
    softcap: float | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to the slots from `starts` to before `stops` of each row, online softmax in blocks.

    Source: arXiv 2205.14135.

    Args:
      q_BKGH: queries, already scaled.
      kv: keys [L, B, K, H, S], values [L, B, K, S, H].
      layer: [] int32.
      starts_B, stops_B: [B] int32; beyond the store's ends they mean those.
      softcap: c > 0 replaces a score s by c · tanh(s / c).
      interpret: without a TPU, slowly.

    Returns:
      [B, K, G, H] float32, and the logarithm of the sum of exp(score), [B, K, G] float32; where a
      row sees nothing, zeros and about -1e30.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (B, K, G, H), S = q_BKGH.shape, kv.keys.shape[-1]
    size = min(BLOCK, -(-S // NUM_LANES) * NUM_LANES)
    number = pl.cdiv(S, size)
    first_B = jnp.clip(starts_B // size, 0, number - 1)
    last_B = jnp.clip((stops_B - 1) // size, 0, number - 1)
    queries, keys, values, sums = _block_specs(K, G, H, size)
    out, logsum = pl.pallas_call(
        partial(_add_block, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B, number),
            in_specs=[queries, keys, values],
            out_specs=[queries, sums],
            scratch_shapes=[pltpu.VMEM((K, G, n), jnp.float32) for n in (1, 1, H)],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, K, G, n), jnp.float32) for n in (H, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(layer[None], first_B, last_B, starts_B, stops_B, q_BKGH, kv.keys, kv.values)
    return out, logsum[..., 0]


def _block_specs(K: int, G: int, H: int, size: int) -> tuple:
    """What a step (row, block of the store) sees: queries, keys, values, one number per query."""
    from jax.experimental import pallas as pl

    def row(b, s, *_):
        return b, 0, 0, 0

    def block(b, s, first, last):
        # Outside of these the block stays the same, and the same block is not fetched again.
        return jnp.clip(s, first[b], last[b])

    def of_keys(b, s, layer, first, last, *_):
        return layer[0], b, 0, 0, block(b, s, first, last)

    def of_values(b, s, layer, first, last, *_):
        return layer[0], b, 0, block(b, s, first, last), 0

    return (
        pl.BlockSpec((None, K, G, H), row),
        pl.BlockSpec((None, None, K, H, size), of_keys),
        pl.BlockSpec((None, None, K, size, H), of_values),
        pl.BlockSpec((None, K, G, 1), row),
    )


def _add_block(
    layer,
    first,
    last,
    starts,
    stops,
    q,
    keys,
    values,
    out,
    logsum,
    highest,
    total,
    sums,
    *,
    softcap,
):
    """Step s of row b: one more block of slots goes into the running maximum and the sums."""
    from jax.experimental import pallas as pl

    b, s = pl.program_id(0), pl.program_id(1)
    size = keys.shape[-1]

    @pl.when(s == 0)
    def _():
        highest[...] = jnp.full_like(highest, UNSEEN)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def seen(shape, axis):
        slots = s * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (slots >= starts[b]) & (slots < stops[b])

    def batched(x, y, dtype=jnp.float32):
        """[K, m, n] x [K, n, o] -> [K, m, o]."""
        return jax.lax.dot_general(x, y, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype)

    @pl.when((s >= first[b]) & (s <= last[b]))
    def _():
        scores_KGs = soft_cap(batched(q[...], keys[...]), softcap)
        seen_s = seen((1, 1, size), 2)
        scores_KGs = jnp.where(seen_s, scores_KGs, UNSEEN)
        now = jnp.maximum(highest[...], jnp.max(scores_KGs, axis=-1, keepdims=True))
        rescale = jnp.exp(highest[...] - now)
        weights_KGs = jnp.where(seen_s, jnp.exp(scores_KGs - now), 0.0)
        # Zeros, as what lies beyond the end of the store may be NaN.
        held = jnp.where(seen((1, size, 1), 1), values[...], 0)
        total[...] = total[...] * rescale + jnp.sum(weights_KGs, axis=-1, keepdims=True)
        sums[...] = sums[...] * rescale + batched(weights_KGs.astype(held.dtype), held)
        highest[...] = now

    @pl.when(s == pl.num_programs(1) - 1)
    def _():
        least = jnp.maximum(total[...], 1e-30)
        out[...] = sums[...] / least
        logsum[...] = highest[...] + jnp.log(least)
