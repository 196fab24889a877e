# SPDX-License-Identifier: Apache-2.0
"""Keys and values of earlier tokens: one large store that is read, one small one that is written.

The store is compact: slot s of a row holds the token at position s of that row, prompt and
completion without a gap, so which slots are filled follows from the length of the row alone
(`cache_of`). Decoding reads it and never writes it. New keys and values go to a buffer of a few
tokens, `Recent`, in which every row has the same slot, so that writing a token is one slice and
never a scatter; `merge` moves a full buffer into the store, each row at its own length.

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


def capacity(store: LayersKV) -> int:
    """S."""
    return jax.tree.leaves(store)[0].shape[-1]  # The first leaf holds keys, [..., S].


def cache_of(store: LayersKV, lengths_B: jax.Array) -> KVCache:
    """A compact store of which the slots behind a row's length are empty."""
    slots = jnp.arange(capacity(store))
    return KVCache(store, jnp.where(slots < lengths_B[:, None], slots, EMPTY_POSITION))


def resized(store: LayersKV, num_slots: int) -> LayersKV:
    """The store with slots added at its end, or cut off there."""

    def one(kv: KV) -> KV:
        more = num_slots - kv.keys.shape[-1]
        if more <= 0:
            return KV(kv.keys[..., :num_slots], kv.values[..., :num_slots, :])
        rest = [(0, 0)] * (kv.keys.ndim - 2)
        return KV(
            jnp.pad(kv.keys, [*rest, (0, 0), (0, more)]),
            jnp.pad(kv.values, [*rest, (0, more), (0, 0)]),
        )

    return map_layers(one, store)


def merge(store: LayersKV, recent: LayersKV, starts_B: jax.Array) -> LayersKV:
    """The store with the slots of `recent` in its own, from slot `starts_B` of each row on.

    A row whose slots would reach beyond the end stays as it is: the caller must have left room
    for every row that goes on.
    """

    def write(x, new, slot_axis):
        slot, batch = x.ndim + slot_axis, x.ndim - 4
        # Not vmap of an update, which would transpose the whole store to bring B in front.
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(axis for axis in range(x.ndim) if axis != batch),
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=(slot,),
            operand_batching_dims=(batch,),
            scatter_indices_batching_dims=(0,),
        )
        return jax.lax.scatter(x, starts_B[:, None], new, numbers, unique_indices=True, mode="drop")

    return map_layers(
        lambda old, new: KV(write(old.keys, new.keys, -1), write(old.values, new.values, -2)),
        store,
        recent,
    )


def pick_rows(store: LayersKV, rows: jax.Array) -> LayersKV:
    """The store with row rows[b] in place of row b; rows: [B'] int32."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), store)
