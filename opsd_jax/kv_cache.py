# SPDX-License-Identifier: Apache-2.0
"""Keys and values of earlier tokens: one large store that is read, one small one that is written.

A `KVCache` is compact: slot s of a row holds the token at position s of that row, prompt and
completion without a gap; slots beyond carry `EMPTY_POSITION`, which no query sees. Decoding reads
it and never writes it. New keys and values go to a buffer of a few tokens, `Recent`, in which
every row has the same slot, so that writing a token is one slice and never a scatter; `merge`
moves a full buffer into the cache, each row at its own length.

Alphabet: L layers, B batch, K key/value heads, H head width, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

EMPTY_POSITION = 2**30


@flax.struct.dataclass
class KV:
    """Keys and values of every layer, laid out so that both attention products are matmuls.

    keys: [L, B, K, H, S]; values: [L, B, K, S, H]; of one layer, without the L.
    """

    keys: jax.Array
    values: jax.Array


# Of all layers: one stacked KV, or a tuple of KV for a model that does not scan its layers.
LayersKV = Any


@flax.struct.dataclass
class KVCache:
    """What has been said so far.

    kv: keys and values; positions: [B, S] int32, `EMPTY_POSITION` in a slot that no query may see.
    """

    kv: LayersKV
    positions: jax.Array


@flax.struct.dataclass
class Recent:
    """Room for the tokens of a few steps, and the slot that this step's token goes to.

    cache: its positions already hold this step's; slot: [] int32, the same for every row.
    """

    cache: KVCache
    slot: jax.Array


def put(recent: Recent, kv: KV) -> KV:
    """The buffer of one layer with the keys and values of one token in its slot."""
    old, slot = recent.cache.kv, recent.slot
    write = jax.lax.dynamic_update_slice_in_dim
    keys = write(old.keys, kv.keys.astype(old.keys.dtype), slot, axis=3)
    return KV(keys, write(old.values, kv.values.astype(old.values.dtype), slot, axis=2))


def map_layers(function: Callable[..., KV], *stores: LayersKV) -> LayersKV:
    """Applies `function` to the KV of all layers at once, or of each layer."""
    return jax.tree.map(function, *stores, is_leaf=lambda x: isinstance(x, KV))


def empty(like: LayersKV, num_slots: int) -> LayersKV:
    """Zeros for so many slots, otherwise shaped like what is given."""

    def zeros(kv: KV) -> KV:
        k, v = kv.keys, kv.values
        return KV(
            jnp.zeros((*k.shape[:-1], num_slots), k.dtype),
            jnp.zeros((*v.shape[:-2], num_slots, v.shape[-1]), v.dtype),
        )

    return map_layers(zeros, like)


def resized(cache: KVCache, num_slots: int) -> KVCache:
    """The cache with empty slots added at its end, or with slots cut off there."""
    more = num_slots - cache.positions.shape[1]
    if more <= 0:
        keep = slice(num_slots)
        kv = map_layers(lambda kv: KV(kv.keys[..., keep], kv.values[..., keep, :]), cache.kv)
        return KVCache(kv, cache.positions[:, keep])

    def widened(kv: KV) -> KV:
        rest = [(0, 0)] * (kv.keys.ndim - 2)
        return KV(
            jnp.pad(kv.keys, [*rest, (0, 0), (0, more)]),
            jnp.pad(kv.values, [*rest, (0, more), (0, 0)]),
        )

    positions = jnp.pad(cache.positions, [(0, 0), (0, more)], constant_values=EMPTY_POSITION)
    return KVCache(map_layers(widened, cache.kv), positions)


def merge(cache: KVCache, recent: KVCache, starts_B: jax.Array) -> KVCache:
    """The cache with the slots of `recent` in its own, from slot `starts_B` of each row on.

    A row whose slots would reach beyond the end is shifted to end there: the caller must have left
    room for every row that goes on.
    """

    def write(x, new, slot_axis, batch_axis):
        def one_row(x, new, start):
            return jax.lax.dynamic_update_slice_in_dim(x, new, start, x.ndim + slot_axis)

        batch = x.ndim + batch_axis
        return jax.vmap(one_row, (batch, batch, 0), batch)(x, new, starts_B)

    def write_kv(old: KV, new: KV) -> KV:
        return KV(write(old.keys, new.keys, -1, -4), write(old.values, new.values, -2, -4))

    positions = write(cache.positions, recent.positions, -1, -2)
    return KVCache(map_layers(write_kv, cache.kv, recent.kv), positions)


def pick_rows(cache: KVCache, rows: jax.Array) -> KVCache:
    """The cache with row rows[b] in place of row b; rows: [B'] int32."""

    def take(kv: KV) -> KV:
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), kv)

    return KVCache(map_layers(take, cache.kv), cache.positions[rows])


def replace_rows(cache: KVCache, new: KVCache, condition_B: jax.Array) -> KVCache:
    """The cache with the rows of `new`, which has fewer slots, where the condition holds.

    The other slots of those rows become empty.
    """
    num_slots = new.positions.shape[1]
    first = slice(num_slots)

    def where(x, y, batch_axis):
        shape = [1] * x.ndim
        shape[batch_axis] = -1
        return jnp.where(condition_B.reshape(shape), x, y)

    def replaced(old: KV, kv: KV) -> KV:
        batch = old.keys.ndim - 4
        keys = where(kv.keys, old.keys[..., first], batch)
        values = where(kv.values, old.values[..., first, :], batch)
        return KV(
            old.keys.at[..., first].set(keys),
            old.values.at[..., first, :].set(values),
        )

    positions = resized(KVCache((), new.positions), cache.positions.shape[1]).positions
    positions = where(positions, cache.positions, 0)
    return KVCache(map_layers(replaced, cache.kv, new.kv), positions)
