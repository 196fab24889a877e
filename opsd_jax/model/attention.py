# SPDX-License-Identifier: Apache-2.0
"""Softmax attention of tokens to stores of keys and values, and what both need on a mesh.

Decoding reads stores through `attend` or, on a TPU, through a kernel (`decode_attention.py`); whole
texts are read as `text_attention.py` has it.

Alphabet: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from opsd_jax.model.config import ModelConfig
from opsd_jax.model.decode_attention import UNSEEN, attend_store
from opsd_jax.model.head import soft_cap
from opsd_jax.model.kv_cache import EMPTY_POSITION, KV, KVCache, Parts, parts
from opsd_jax.model.products import product
from opsd_jax.model.sharding import dividing, platform


def attend(
    q_BKGTH: jax.Array,
    sources: Sequence[KVCache],
    positions_BT: jax.Array,
    window: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention over several stores of keys and values as if they were one.

    Args:
      q_BKGTH: queries, already scaled; every group of G query heads shares a key head.
      sources: of one layer, none in parts; a query sees the keys whose positions are its own
        or up to `window` - 1 before it.
      positions_BT: positions of the queries.
      window: [] int32.
      softcap: c > 0 replaces a score s by c · tanh(s / c).

    Returns:
      [B, K, G, T, H] in the dtype of the queries; softmax in float32.
    """
    queries = [q_BKGTH] * len(sources)
    if platform() == "gpu":
        # One product for all would be one of keys that are copied side by side, at every token.
        queries[1:] = map(jax.lax.optimization_barrier, queries[1:])
    scores = [
        scores_of(q, source.kv.keys, source.positions, positions_BT, window, softcap)
        for q, source in zip(queries, sources, strict=True)
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out, start = jnp.zeros_like(q_BKGTH), 0
    for source in sources:
        stop = start + source.positions.shape[1]
        w = weights[..., start:stop].astype(q_BKGTH.dtype)
        out = out + jnp.einsum("bkgts,bksh->bkgth", w, source.kv.values.astype(q_BKGTH.dtype))
        start = stop
    return out


def scores_of(
    q_BKGTH: jax.Array,
    keys_BKHS: jax.Array,
    positions_BS: jax.Array,
    positions_BT: jax.Array,
    window: jax.Array,
    softcap: float | None,
) -> jax.Array:
    """[B, K, G, T, S] float32 scores of one source, about -1e30 where a query sees nothing."""
    s = product("bkgth,bkhs->bkgts", q_BKGTH, keys_BKHS, jnp.float32)
    distance_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
    seen_BTS = (distance_BTS >= 0) & (distance_BTS < window)
    # Finite, so that a padded query that sees nothing averages instead of giving NaN.
    return jnp.where(seen_BTS[:, None, None], soft_cap(s, softcap), jnp.float32(UNSEEN))


def attend_both(
    store: KV,
    filled_BS: jax.Array,
    q_BKGTH: jax.Array,
    keys_BKHS: jax.Array,
    values_BKSH: jax.Array,
    positions_BS: jax.Array,
    layer: jax.Array,
    positions_BT: jax.Array,
    window: jax.Array,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attend` of one query per row to a compact store, by the kernel, and to a buffer, as one.

    Args:
      store: keys [L, B, K, H, S] and values [L, B, K, S, H].
      filled_BS: positions of its slots.
      q_BKGTH: T = 1, already scaled.
      keys_BKHS, values_BKSH, positions_BS: of the buffer of newer tokens.
      layer: [] int32, which of the store's layers.
      positions_BT: of the queries.
      window: [] int32, positions seen.
      softcap, interpret: see `attend_store`.

    Returns:
      [B, K, G, 1, H] in the dtype of the queries.
    """
    starts_B = positions_BT[:, 0] - window + 1
    stops_B = jnp.sum(filled_BS != EMPTY_POSITION, axis=1, dtype=jnp.int32)
    older_BKGH, logsum_BKG = attend_store(
        q_BKGTH[..., 0, :], store, layer, starts_B, stops_B, softcap, interpret
    )
    s = scores_of(q_BKGTH, keys_BKHS, positions_BS, positions_BT, window, softcap)[..., 0, :]
    weights = jax.nn.softmax(s, axis=-1)
    newer_BKGH = jnp.einsum("bkgs,bksh->bkgh", weights, values_BKSH.astype(jnp.float32))
    share = jax.nn.sigmoid(logsum_BKG - jax.nn.logsumexp(s, axis=-1))[..., None]
    out_BKGH = share * older_BKGH + (1 - share) * newer_BKGH
    return out_BKGH.astype(q_BKGTH.dtype)[..., None, :]


def attend_cached(
    config: ModelConfig,
    q_BKGTH: jax.Array,
    cache: KVCache | None,
    new: KVCache,
    layer: jax.Array,
    positions_BT: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """Attention to what was said before, and to new tokens.

    Args:
      config: says by which implementation.
      q_BKGTH: queries, already scaled; T = 1 for "pallas".
      cache: keys and values of this layer, or of all layers for "pallas", whole or in parts;
        None: there is none.
      new: keys and values of this layer alone, as a source of `attend`.
      layer: [] int32, the number of this layer.
      positions_BT: positions of the queries.
      window: [] int32.

    Returns:
      [B, K, G, T, H] in the dtype of the queries.
    """
    softcap = config.attention_softcap
    if cache is None:
        return attend(q_BKGTH, (new,), positions_BT, window, softcap)
    if isinstance(cache.kv, Parts):
        return attend_parts(config, q_BKGTH, cache, new, layer, positions_BT, window)
    if config.decode_attention == "xla":
        return attend(q_BKGTH, (cache, new), positions_BT, window, softcap)
    kv = cache.kv
    if kv.keys.ndim == 4:  # of this layer alone
        kv, layer = KV(kv.keys[None], kv.values[None]), jnp.zeros_like(layer)
    kernel: Callable[..., jax.Array] = partial(attend_both, softcap=softcap)
    return on_each_device(
        lambda keys, values, *rest: kernel(KV(keys, values), *rest),
        ("lbk", kv.keys),
        ("lbk", kv.values),
        ("b", cache.positions),
        ("bk", q_BKGTH),
        ("bk", new.kv.keys),
        ("bk", new.kv.values),
        ("b", new.positions),
        ("", layer),
        ("b", positions_BT),
        ("", window),
    )


def attend_parts(
    config: ModelConfig,
    q_BKGTH: jax.Array,
    cache: KVCache,
    new: KVCache,
    layer: jax.Array,
    positions_BT: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """`attend_cached` of the rows of every part to that part."""
    out = []
    for (kv, rows), filled in zip(parts(cache.kv), cache.positions, strict=True):
        q, ours, now = jax.tree.map(operator.itemgetter(rows), (q_BKGTH, new, positions_BT))
        part = KVCache(kv, filled)
        out.append(attend_cached(config, q, part, ours, layer, now, window))
    return jnp.concatenate(out)


def on_each_device(
    function: Callable[..., jax.Array], *operands: tuple[str, jax.Array]
) -> jax.Array:
    """A function of whole arrays, on a mesh computed by every device on its own rows and heads.

    The compiler cannot split a kernel: left alone, it would compute the whole batch everywhere.

    Args:
      function: gives [B, K, …].
      operands: ("bk", array) for an array [B, K, …], "lbk" for [L, B, K, …], "" for a number.
    """
    arrays = [array for _, array in operands]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    rows_and_heads = next(array.shape[:2] for axes, array in operands if axes == "bk")
    batch, heads = dividing(rows_and_heads, "batch", "kv_heads")
    place = {"l": None, "b": batch, "k": heads}

    def spec(axes: str) -> PartitionSpec:
        return PartitionSpec(*(place[axis] for axis in axes))

    return jax.shard_map(
        function,
        in_specs=tuple(spec(axes) for axes, _ in operands),
        out_specs=spec("bk"),
        check_vma=False,
    )(*arrays)
