# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention of whole texts, in prefill and in the loss: xla, splash or cuDNN flash.

    "xla"     anywhere; in blocks of queries, so that memory grows with T and not with its square
    "splash"  TPU: the splash attention kernel of jax.experimental.pallas
    "cudnn"   NVIDIA GPU: cuDNN's flash attention, in bfloat16

The two kernels never hold scores; they take a text's positions to be 0, 1, 2, … Where a gin file
names none, a run takes what `fastest` says.

Alphabet: B batch, T queries and keys, N query heads, K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from opsd_jax.model.attention import attend, on_each_device
from opsd_jax.model.config import NO_WINDOW, ModelConfig
from opsd_jax.model.kv_cache import KV, KVCache
from opsd_jax.model.sharding import axis_size

QUERY_BLOCK, NUM_SPANS = 512, 4


def fastest(config: ModelConfig, platform: str) -> str:
    """The implementation for devices of a kind (cpu, gpu, tpu) that computes what "xla" does."""
    if platform == "tpu":
        return "splash"
    # Heads of 256 numbers would need Hopper, of which a compiler without a card knows nothing.
    flash = config.dtype == "bfloat16" and config.head_dim <= 128 and config.head_dim % 8 == 0
    if platform == "gpu" and flash and config.attention_softcap is None:
        return "cudnn"
    return "xla"


def attend_text(
    config: ModelConfig, q_BKGTH: jax.Array, kv: KV, positions_BT: jax.Array, window: jax.Array
) -> jax.Array:
    """Causal attention of whole texts to themselves.

    Args:
      config: says by which implementation.
      q_BKGTH: queries, already scaled.
      kv: keys [B, K, H, T] and values [B, K, T, H] of the same tokens.
      positions_BT: 0, 1, 2, … in every row, unless the implementation is "xla".
      window: [] int32, positions that a query of this layer sees.

    Returns:
      [B, K, G, T, H] in the dtype of the queries.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "sequence" in mesh.shape:
        shape = q_BKGTH.shape
        q_BKGTH, kv = more_key_heads(q_BKGTH, kv, axis_size(mesh, ("sequence", "model")))
        return attend_heads(config, q_BKGTH, kv, positions_BT, window).reshape(shape)
    if config.attention == "xla":  # which the compiler can split
        return attend_in_blocks(q_BKGTH, kv, positions_BT, window, config.attention_softcap)
    return attend_heads(config, q_BKGTH, kv, positions_BT, window)


def more_key_heads(q_BKGTH: jax.Array, kv: KV, multiple_of: int) -> tuple[jax.Array, KV]:
    """The same attention with each key head as often as makes their number a multiple.

    As it is where the query heads of a key head do not divide so.
    """
    B, K, G, T, H = q_BKGTH.shape
    times = multiple_of // math.gcd(K, multiple_of)
    if times == 1 or G % times:
        return q_BKGTH, kv
    q = q_BKGTH.reshape(B, K * times, G // times, T, H)
    return q, jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), kv)


def attend_heads(
    config: ModelConfig, q_BKGTH: jax.Array, kv: KV, positions_BT: jax.Array, window: jax.Array
) -> jax.Array:
    """`attend_text`, every device on its own rows and heads."""
    if config.attention == "xla":
        softcap = config.attention_softcap
        return on_each_device(
            lambda q, k, v, at, window: attend_in_blocks(q, KV(k, v), at, window, softcap),
            *[("bk", x) for x in (q_BKGTH, kv.keys, kv.values)],
            ("b", positions_BT),
            ("", window),
        )
    kernel: Callable[..., jax.Array] = splash if config.attention == "splash" else flash

    def run(width: int | None) -> Callable[..., jax.Array]:
        return partial(kernel, window=width, softcap=config.attention_softcap)

    # A kernel is compiled for a window, and layers are scanned: where they differ, it has both.
    local = [config.windows(layer) for layer in range(config.num_layers)]
    operands = [("bk", x) for x in (q_BKGTH, kv.keys.swapaxes(2, 3), kv.values)]
    if any(local) == all(local):
        return on_each_device(run(config.window if all(local) else None), *operands)
    return on_each_device(
        lambda *x: jax.lax.cond(x[-1] < NO_WINDOW, run(config.window), run(None), *x[:-1]),
        *operands,
        ("", window),
    )


def attend_in_blocks(
    q_BKGTH: jax.Array, kv: KV, positions_BT: jax.Array, window: jax.Array, softcap: float | None
) -> jax.Array:
    """`attend` of texts to themselves, a long one in blocks of queries, recomputed backwards.

    The blocks of a quarter of the text read the keys up to its end, 5/8 of all. So positions must
    ascend: a later token is never seen by an earlier one.
    """
    T = q_BKGTH.shape[3]
    if T <= 2 * QUERY_BLOCK:
        return attend(q_BKGTH, (KVCache(kv, positions_BT),), positions_BT, window, softcap)
    num_blocks = -(-T // QUERY_BLOCK)
    spans = min(NUM_SPANS, num_blocks)
    bounds = [min(T, num_blocks * span // spans * QUERY_BLOCK) for span in range(spans + 1)]
    out = []
    for start, stop in itertools.pairwise(bounds):
        keys, values = kv.keys[..., :stop], kv.values[:, :, :stop]
        source = KVCache(KV(keys, values), positions_BT[:, :stop])
        queries, at = q_BKGTH[:, :, :, start:stop], positions_BT[:, start:stop]
        out.append(_attend_span(queries, source, at, window, softcap))
    return jnp.concatenate(out, axis=3)


def _attend_span(
    q_BKGTH: jax.Array,
    source: KVCache,
    positions_BT: jax.Array,
    window: jax.Array,
    softcap: float | None,
) -> jax.Array:
    """`attend` to one source, a block of queries at a time."""
    T = q_BKGTH.shape[3]

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -T % QUERY_BLOCK)
        shape = (*x.shape[:axis], -1, QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, widths).reshape(shape), axis, 0)

    @jax.checkpoint
    def one(block):
        return attend(block[0], (source,), block[1], window, softcap)

    out = jnp.moveaxis(jax.lax.map(one, (blocks(q_BKGTH, 3), blocks(positions_BT, 1))), 0, 3)
    return out.reshape(*q_BKGTH.shape[:3], -1, out.shape[-1])[:, :, :, :T]


def splash(
    q_BKGTH: jax.Array,
    keys_BKTH: jax.Array,
    values_BKTH: jax.Array,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """The TPU kernel on one device's rows and heads; blocks nobody sees are skipped."""
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    B, K, G, T, H = q_BKGTH.shape
    size = min(512, -(-T // 128) * 128)
    padded = -(-T // size) * size

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, padded - T), (0, 0)])

    shape = (padded, padded)
    seen = lib.CausalMask(shape) if window is None else lib.LocalMask(shape, (window - 1, 0), 0)
    blocks = lib.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    kernel = lib.make_splash_mha(
        lib.MultiHeadMask([seen] * (K * G)),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    q_BNTH = pad(q_BKGTH.reshape(B, K * G, T, H))
    out_BNTH = jax.vmap(kernel)(q_BNTH, pad(keys_BKTH), pad(values_BKTH))
    return out_BNTH[:, :, :T].reshape(q_BKGTH.shape)


def flash(
    q_BKGTH: jax.Array,
    keys_BKTH: jax.Array,
    values_BKTH: jax.Array,
    window: int | None,
    softcap: float | None,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """jax.nn.dot_product_attention on one device's rows and heads."""
    assert softcap is None, "refused by assembly.check_devices"
    B, K, G, T, H = q_BKGTH.shape

    def tokens_first(x_BNTH: jax.Array) -> jax.Array:
        # cuDNN's gradient is for even lengths; causal attention sees nothing of one token more.
        return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, T % 2), (0, 0))).swapaxes(1, 2)

    out_BTNH = jax.nn.dot_product_attention(
        tokens_first(q_BKGTH.reshape(B, K * G, T, H)),
        tokens_first(keys_BKTH),
        tokens_first(values_BKTH),
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out_BTNH[:, :T].swapaxes(1, 2).reshape(q_BKGTH.shape)
