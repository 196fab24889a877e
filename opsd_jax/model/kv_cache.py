# SPDX-License-Identifier: Apache-2.0
"""The KV cache: one large store of earlier tokens that is read, one small one that is written.

The store is compact: slot s of a row holds the token at position s of that row, prompt and
completion without a gap, so which slots are filled follows from the length of the row alone
(`cache_of`). Decoding reads it and never writes it. New keys and values go to a buffer of a few
tokens, `Recent`, in which every row has the same slot, so that writing a token is one slice and
never a scatter; `merge` moves a full buffer into the store, each row at its own length. A store
may be in `Parts`, of rows with more slots and rows with fewer.

Alphabet: L layers, B batch, K key/value heads, H head width, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
class Parts:
    """The first rows of a batch, those behind them, and so on, with as many slots as each needs."""

    stores: tuple[LayersKV, ...]


@flax.struct.dataclass
class KVCache:
    """A KV cache with the position of every slot: what has been said so far.

    kv: keys and values; positions: [B, S] int32, `EMPTY_POSITION` in a slot that no query may see.
    In parts: kv has `Parts` in place of every KV, and positions are a tuple.
    """

    kv: LayersKV
    positions: Any


@flax.struct.dataclass
class Recent:
    """The buffer for the tokens of a few steps, and the slot that this step's token goes to.

    cache: its positions already hold this step's; slot: [] int32, the same for every row.
    """

    cache: KVCache
    slot: jax.Array


def put(recent: Recent, kv: KV) -> KV:
    """Writes the keys and values of one token into its slot of a layer's buffer."""
    old, slot = recent.cache.kv, recent.slot
    write = jax.lax.dynamic_update_slice_in_dim
    keys = write(old.keys, kv.keys.astype(old.keys.dtype), slot, axis=3)
    return KV(keys, write(old.values, kv.values.astype(old.values.dtype), slot, axis=2))


def map_layers(function: Callable[..., Any], *stores: LayersKV) -> LayersKV:
    """Applies `function` to the KV of all layers at once, or of each layer."""
    return jax.tree.map(function, *stores, is_leaf=lambda x: isinstance(x, KV))


def empty(like: LayersKV | Parts, num_rows: int, num_slots: int) -> LayersKV:
    """An empty cache: zeros for so many rows and slots, otherwise shaped like what is given."""

    def zeros(kv: KV) -> KV:
        (*layers, _, K, H, _), dtype = kv.keys.shape, kv.keys.dtype
        return KV(
            jnp.zeros((*layers, num_rows, K, H, num_slots), dtype),
            jnp.zeros((*layers, num_rows, K, num_slots, H), dtype),
        )

    return map_layers(zeros, parts(like)[0][0])


def capacity(store: LayersKV) -> int:
    """Slots of a cache, S."""
    return jax.tree.leaves(store)[0].shape[-1]  # The first leaf holds keys, [..., S].


def parts(store: LayersKV | Parts) -> list[tuple[LayersKV, slice]]:
    """The parts of a store, or the whole as one, each with the rows of the batch that it holds."""
    found, start = [], 0
    for part in store.stores if isinstance(store, Parts) else (store,):
        rows = slice(start, start + jax.tree.leaves(part)[0].shape[-4])
        found.append((part, rows))
        start = rows.stop
    return found


def joined(stores: Sequence[LayersKV]) -> LayersKV | Parts:
    """The store of which these are the `parts`."""
    return Parts(tuple(stores)) if len(stores) > 1 else stores[0]


def cache_of(store: LayersKV | Parts, lengths_B: jax.Array) -> KVCache:
    """A compact store of which the slots behind a row's length are empty."""
    found = []
    for part, rows in parts(store):
        slots = jnp.arange(capacity(part))
        found.append(jnp.where(slots < lengths_B[rows, None], slots, EMPTY_POSITION))
    if isinstance(store, Parts):
        return KVCache(map_layers(lambda *kvs: Parts(kvs), *store.stores), tuple(found))
    return KVCache(store, *found)


def resized(store: LayersKV, num_slots: int) -> LayersKV:
    """Grows a cache by slots at its end, or cuts it there."""

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


def merge(store: LayersKV | Parts, recent: LayersKV, starts_B: jax.Array) -> LayersKV | Parts:
    """Writes the buffer's slots into the cache, from slot `starts_B` of each row on.

    A row whose slots would reach beyond the end stays as it is: the caller must have left room
    for every row that goes on.
    """

    def write(x, new, starts, slot_axis):
        slot, batch = x.ndim + slot_axis, x.ndim - 4
        # Not vmap of an update, which would transpose the whole store to bring B in front.
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(axis for axis in range(x.ndim) if axis != batch),
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=(slot,),
            operand_batching_dims=(batch,),
            scatter_indices_batching_dims=(0,),
        )
        return jax.lax.scatter(x, starts[:, None], new, numbers, unique_indices=True, mode="drop")

    merged = []
    for part, rows in parts(store):
        new = jax.tree.map(lambda x, rows=rows: x[..., rows, :, :, :], recent)

        def one(old: KV, new: KV, starts: jax.Array = starts_B[rows]) -> KV:
            return KV(
                write(old.keys, new.keys, starts, -1), write(old.values, new.values, starts, -2)
            )

        merged.append(map_layers(one, part, new))
    return joined(merged)


def take_rows(store: LayersKV, rows: jax.Array) -> LayersKV:
    """Row rows[n] of a whole store at n, the nearest row for a number that it has not."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4, mode="clip"), store)


def pick_rows(store: LayersKV | Parts, rows: jax.Array) -> LayersKV:
    """The store with row rows[b] in place of row b, with the slots of the first part for all.

    Args:
      store: its first part has at least as many slots as any other.
      rows: [B'] int32.
    """
    (first, _), *others = parts(store)
    picked = take_rows(first, rows)
    for part, own in others:
        theirs = (rows >= own.start)[:, None, None, None]
        more = resized(take_rows(part, rows - own.start), capacity(first))
        picked = jax.tree.map(lambda x, y, t=theirs: jnp.where(t, y, x), picked, more)
    return picked


def put_rows(store: LayersKV | Parts, new: LayersKV, rows: jax.Array) -> LayersKV | Parts:
    """The store with row f of `new` in the first slots of row rows[f].

    Args:
      store: of B rows.
      new: of F rows, with no more slots than any part has.
      rows: [F] int32; B: that row of `new` goes nowhere.
    """

    def put(x: jax.Array, y: jax.Array, local: jax.Array) -> jax.Array:
        m, n = y.shape[-2:]
        return x.at[..., local, :, :m, :n].set(y, mode="drop")

    found = []
    for part, own in parts(store):
        inside = (rows >= own.start) & (rows < own.stop)
        local = jnp.where(inside, rows - own.start, own.stop - own.start)
        found.append(jax.tree.map(lambda x, y, local=local: put(x, y, local), part, new))
    return joined(found)
