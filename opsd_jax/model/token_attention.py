# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token per row as a single Pallas-Triton kernel, for NVIDIA GPUs.

From the products of q, k and v to the attended values: norms of queries and keys, rotation, the new
key and value into the buffer, and softmax over the store, the buffer and the token itself. Of a row
only those slots are read that its query may see (`rollout.attention = "pallas"`). XLA makes ten
kernels of this, and copies all keys besides. Compiled for H100s; never run on one.

Alphabet: B batch, K key/value heads, G query heads of each, X = G + 2, H head width, S slots of the
store, R of the buffer.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.model.attention import on_each_device
from opsd_jax.model.head import soft_cap
from opsd_jax.model.kv_cache import EMPTY_POSITION, KV, KVCache, Parts, Recent, parts

BLOCK = 64
LEAST = 16  # rows that a tensor core multiplies at once


class Settings(NamedTuple):
    """Numbers that are compiled in. norm: (eps, offset) of queries' and keys' norms, or None."""

    norm: tuple[float, float] | None = None
    softcap: float | None = None
    interpret: bool = False  # without a GPU, slowly


def attend_token(
    settings: Settings,
    qkv_BKXH: jax.Array,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    filled_B: jax.Array,
    numbers: tuple[jax.Array, ...],
    *arrays: jax.Array,
) -> tuple[jax.Array, KV]:
    """softmax(q Kᵀ) V of one query per head, over a store, a buffer of newer tokens and itself.

    Source: arXiv 2205.14135 (the softmax in blocks).

    Args:
      settings: what is compiled in.
      qkv_BKXH: of each key head its queries, the key and the value, as projected; H a power of 2.
      cos_Bh, sin_Bh: of the rotation, h = H / 2, float32.
      filled_B: slots of the store that hold something, int32.
      numbers: the buffer's slot for this token and the window, [1] int32; the factor on queries,
        [1] float32; with norms, the scales [H] of queries' and of keys'.
      arrays: the store's keys [B, K, H, S] and values [B, K, S, H], the buffer's with R for S.

    Returns:
      [B, K, G, H] in the dtype of the queries, and the buffer with the new key and value.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    B, K, X, H = qkv_BKXH.shape
    sizes = X - 2, arrays[-1].shape[2]
    num_rows, num_near = (max(LEAST, pl.next_power_of_2(size)) for size in sizes)

    def part(array: Any, num_grid: int, *shape: int) -> pl.BlockSpec:
        """What a program (row, key head) sees of an array whose first axes are the grid's.

        Of a `shape` beyond the array the kernel may only touch what a mask lets it.
        """
        shape = shape or array.shape[num_grid:]
        none, zeros = (None,) * num_grid, (0,) * len(shape)
        return pl.BlockSpec(none + shape, lambda *at: at[:num_grid] + zeros)

    kvs = [part(array, 2) for array in arrays[:2]]
    near = [part(arrays[2], 2, H, num_near), part(arrays[3], 2, num_near, H)]
    out = jax.ShapeDtypeStruct((B, K, X - 2, H), qkv_BKXH.dtype)
    qkv = part(qkv_BKXH, 2, max(num_rows, X), H)
    rows = [part(cos_Bh, 1), part(sin_Bh, 1), pl.BlockSpec((1,), lambda b, k: (b,))]
    attended, keys, values = pl.pallas_call(
        partial(_kernel, settings, X - 2),
        grid=(B, K),
        in_specs=[*kvs, *near, qkv, *rows, *(part(number, 0) for number in numbers)],
        out_specs=[part(out, 2, num_rows, H), *near],
        out_shape=[out, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[2:])],
        input_output_aliases={2: 1, 3: 2},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=settings.interpret,
        name="attend_token",
    )(*arrays, qkv_BKXH, cos_Bh, sin_Bh, filled_B, *numbers)
    return attended, KV(keys, values)


def _kernel(
    settings,
    G,
    keys,
    values,
    near_keys,
    near_values,
    qkv,
    cos,
    sin,
    filled,
    slot,
    window,
    scale,
    *rest,
):
    """One row and key head. Heads are kept as two halves, [rows, H/2], which the rotation mixes."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    *gains, out, new_keys, new_values = rest
    H, num_rows = qkv.shape[1], out.shape[0]
    halves, turn = _halves(H), (cos[...][None], sin[...][None])
    mine = (jnp.arange(num_rows) < G)[:, None]
    wide = jnp.broadcast_to(mine, (num_rows, H // 2))
    q = [plgpu.load(qkv.at[pl.ds(0, num_rows), at], mask=wide, other=0.0) for at in halves]
    q = _turned(settings.norm, q, gains[0] if gains else None, turn, scale[0])
    k = [qkv[pl.ds(G, 1), at] for at in halves]
    k = _turned(settings.norm, k, gains[1] if gains else None, turn, 1.0)
    v = qkv[pl.ds(G + 1, 1), :]
    for at, part in zip(halves, k, strict=True):
        new_keys[at, slot[0]] = part.reshape(H // 2).astype(new_keys.dtype)
    new_values[slot[0], :] = v.reshape(H).astype(new_values.dtype)

    # Its own token, which every query sees: from here on the highest score is finite.
    own = [x.astype(jnp.float32) * y.astype(jnp.float32) for x, y in zip(q, k, strict=True)]
    own = soft_cap(jnp.sum(own[0], axis=1) + jnp.sum(own[1], axis=1), settings.softcap)
    attended = jnp.broadcast_to(v.astype(jnp.float32), (num_rows, H))
    sums = (own, jnp.ones((num_rows,), jnp.float32), attended)
    oldest = slot[0] - window[0] + 1
    near = pl.ds(0, near_values.shape[0])
    sums = _joined(settings, q, near_keys, near_values, near, (oldest, slot[0]), sums)
    seen = jnp.maximum(filled[0] + oldest, 0), filled[0]

    def one(n, sums):
        return _joined(settings, q, keys, values, pl.ds(n * BLOCK, BLOCK), seen, sums)

    blocks = jax.lax.div(seen[0], BLOCK), jax.lax.div(seen[1] + BLOCK - 1, BLOCK)
    _, total, attended = jax.lax.fori_loop(*blocks, one, sums)
    attended = (attended / total[:, None]).astype(out.dtype)
    mask = jnp.broadcast_to(mine, (num_rows, H))
    plgpu.store(out.at[pl.ds(0, num_rows), pl.ds(0, H)], attended, mask=mask)


def _halves(H: int) -> tuple[Any, Any]:
    from jax.experimental import pallas as pl

    return pl.ds(0, H // 2), pl.ds(H // 2, H // 2)


def _turned(norm, halves, gain, turn, factor) -> list[jax.Array]:
    """The halves of heads normed, rotated and scaled, rounded as `RMSNorm` and `rotate` round."""
    dtype, (cos, sin) = halves[0].dtype, turn
    x1, x2 = (each.astype(jnp.float32) for each in halves)
    if norm is not None:
        eps, offset = norm
        H = 2 * x1.shape[1]
        square = jnp.sum(x1 * x1, axis=1) + jnp.sum(x2 * x2, axis=1)
        root = jax.lax.rsqrt(square / H + eps)[:, None]
        g1, g2 = (offset + gain[at].astype(jnp.float32)[None] for at in _halves(H))
        x1, x2 = (y.astype(dtype).astype(jnp.float32) for y in (x1 * root * g1, x2 * root * g2))
    found = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
    return [(each * factor).astype(dtype) for each in found]


def _joined(settings, q, keys, values, here, ends, sums) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The softmax (highest, total, attended) with what stands in the slots `here`, from the first
    of `ends` to before the last."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    highest, total, attended = sums
    slots = here.start + jnp.arange(here.size)
    seen = (slots >= ends[0]) & (slots < ends[1])
    H = values.shape[1]

    def held(ref, *at, mask):
        shape = tuple(each.size for each in at)
        return plgpu.load(ref.at[at], mask=jnp.broadcast_to(mask, shape), other=0.0)

    def product(x, y):
        return plgpu.dot(x.astype(y.dtype), y, allow_tf32=y.dtype != jnp.float32)

    scores = sum(
        product(x, held(keys, at, here, mask=seen[None]))
        for x, at in zip(q, _halves(H), strict=True)
    )
    scores = jnp.where(seen[None], soft_cap(scores, settings.softcap), -jnp.inf)
    now = jnp.maximum(highest, jnp.max(scores, axis=1))
    weights, rescale = jnp.exp(scores - now[:, None]), jnp.exp(highest - now)
    more = product(weights, held(values, here, pl.ds(0, H), mask=seen[:, None]))
    total = total * rescale + jnp.sum(weights, axis=1)
    return now, total, attended * rescale[:, None] + more


def attend_new(
    settings: Settings,
    qkv_BKXH: jax.Array,
    turns: tuple[jax.Array, jax.Array],
    cache: KVCache,
    recent: Recent,
    numbers: tuple[jax.Array, ...],
) -> tuple[jax.Array, KV]:
    """`attend_token` on a mesh, and where the store is in parts.

    Args:
      settings, qkv_BKXH: see there.
      turns: cosine and sine.
      cache: of this layer, compact, whole or in parts.
      recent: the buffer of this layer.
      numbers: see there, without the slot.

    Returns:
      [B, K, G, H], and the buffer with the new key and value.
    """
    whole = not isinstance(cache.kv, Parts)
    found = []
    for (kv, rows), positions in zip(
        parts(cache.kv), [cache.positions] if whole else cache.positions, strict=True
    ):
        filled = jnp.sum(positions != EMPTY_POSITION, axis=1, dtype=jnp.int32)
        operands = (qkv_BKXH, *turns, recent.cache.kv)
        qkv, cos, sin, near = jax.tree.map(operator.itemgetter(rows), operands)
        arrays = [("bk", x) for x in (kv.keys, kv.values, near.keys, near.values)]
        row = [("bk", qkv), ("b", cos), ("b", sin), ("b", filled)]
        scalars = [("", x) for x in (recent.slot[None], *numbers)]
        kernel = partial(_of_operands, settings, len(scalars))
        found.append(on_each_device(kernel, *row, *scalars, *arrays))
    return jax.tree.map(lambda *x: jnp.concatenate(x) if x[1:] else x[0], *found)


def _of_operands(settings: Settings, num_scalars: int, *operands: jax.Array) -> Any:
    """`attend_token` of its arguments in a row."""
    qkv, cos, sin, filled, *rest = operands
    numbers, arrays = tuple(rest[:num_scalars]), rest[num_scalars:]
    return attend_token(settings, qkv, cos, sin, filled, numbers, *arrays)
