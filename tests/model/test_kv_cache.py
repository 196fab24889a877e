# SPDX-License-Identifier: Apache-2.0
"""A store in parts is the whole one, cut where nothing lies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.model.attention import attend_cached
from opsd_jax.model.kv_cache import (
    KV,
    KVCache,
    Parts,
    cache_of,
    joined,
    map_layers,
    merge,
    parts,
    pick_rows,
    put_rows,
    resized,
)
from tests.tiny import tiny_config

B, K, H, S, SMALL, FIRST = 7, 2, 8, 12, 8, 3
LENGTHS = np.array([11, 2, 0, 8, 1, 0, 5])


def filled(shape, r, slots=S):
    keys = r.normal(size=(*shape, K, H, slots)).astype(np.float32)
    return KV(jnp.asarray(keys), jnp.asarray(r.normal(size=(*shape, K, slots, H)), jnp.float32))


@pytest.fixture(params=["stacked", "unrolled"])
def stores(request):
    """(a store of two layers with nothing behind its lengths, a function that makes others)."""
    r = np.random.default_rng(0)

    def another(rows, slots):
        if request.param == "stacked":
            return filled((2, rows), r, slots)
        return tuple(filled((rows,), r, slots) for _ in range(2))

    empty = np.arange(S) >= LENGTHS[:, None]

    def clear(kv):
        keys = jnp.where(empty[:, None, None, :], 0, kv.keys)
        return KV(keys, jnp.where(empty[:, None, :, None], 0, kv.values))

    return map_layers(clear, another(B, S)), another


def cut(store):
    def rows(start, stop):
        return jax.tree.map(lambda x: x[..., start:stop, :, :, :], store)

    return Parts((rows(0, FIRST), resized(rows(FIRST, B), SMALL)))


def whole(store):
    """The store of `cut`, put together again."""
    one, other = (resized(part, S) for part, _ in parts(store))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=x.ndim - 4), one, other)


def assert_equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_the_parts_are_those_that_were_joined(stores):
    store, _ = stores
    assert_equal(joined([part for part, _ in parts(cut(store))]), cut(store))
    assert_equal(whole(cut(store)), store)
    ((same, rows),) = parts(store)
    assert joined([same]) is store and rows == slice(0, B)


def test_merging_reaches_every_part(stores):
    store, another = stores
    # The last row has no room in either form, the one before it none in its part.
    recent, starts = another(B, 3), jnp.asarray([9, 2, 0, 5, 1, 6, 11])
    merged = merge(store, recent, starts.at[5].set(S))
    assert_equal(whole(merge(cut(store), recent, starts)), merged)


def test_rows_are_picked_and_put_across_parts(stores):
    store, another = stores
    picked = jnp.asarray([6, 0, 3, 2])
    assert_equal(pick_rows(cut(store), picked), pick_rows(store, picked))
    new, rows = another(4, 5), jnp.asarray([4, B, 2, 0])  # The second goes nowhere.
    put = put_rows(store, new, rows)
    assert_equal(whole(put_rows(cut(store), new, rows)), put)
    taken = jax.tree.map(np.asarray, pick_rows(resized(put, 5), rows))
    for got, want in zip(jax.tree.leaves(taken), jax.tree.leaves(new), strict=True):
        kept = (..., [0, 2, 3], slice(None), slice(None), slice(None))
        np.testing.assert_array_equal(got[kept], np.asarray(want)[kept])


@pytest.mark.parametrize("window", [4, 2**30])
def test_attention_to_parts_is_attention_to_the_whole(stores, window):
    store, _ = stores
    r, G = np.random.default_rng(1), 2
    config = dataclasses.replace(tiny_config(), num_kv_heads=K, head_dim=H, attention_softcap=3.0)
    q = jnp.asarray(r.normal(size=(B, K, G, 1, H)), jnp.float32)
    now = jnp.asarray(LENGTHS)[:, None]
    recent = filled((B,), r, 1)

    def attended(store):
        cache = cache_of(store, jnp.asarray(LENGTHS))
        layers = isinstance(store.stores[0] if isinstance(store, Parts) else store, tuple)
        one = cache.kv[1] if layers else jax.tree.map(lambda x: x[1], cache.kv)
        new = KVCache(recent, now)
        cache = KVCache(one, cache.positions)
        return attend_cached(config, q, cache, new, jnp.int32(1), now, jnp.int32(window))

    np.testing.assert_allclose(attended(cut(store)), attended(store), atol=1e-6)
