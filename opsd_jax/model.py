# SPDX-License-Identifier: Apache-2.0
"""The decoder: token ids in, hidden states out. It neither samples nor computes losses.

One parameter tree serves both roles. `apply({"params": p, "lora": l}, ...)` is the student;
leaving the collection out, `apply({"params": p}, ...)`, is the base model.

The module never writes a cache. It attends to the tokens it is given and, if there is one,
to a read-only `KVCache`; with `return_kv=True` it hands back the new keys and values and the
caller stores them. Which cached slots a query sees is decided by positions alone: an empty slot
carries `EMPTY_POSITION`, which no query ever reaches.

Alphabet: B batch, T queries, S keys, D model width, F MLP width, L layers, N query heads,
K key/value heads, G = N / K, H head width, R LoRA rank, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from opsd_jax.model_config import LoraConfig, ModelConfig

EMPTY_POSITION = 2**30


@flax.struct.dataclass
class KV:
    """Keys and values of every layer, laid out so that both attention products are matmuls.

    keys: [L, B, K, H, S]; values: [L, B, K, S, H].
    """

    keys: jax.Array
    values: jax.Array


@flax.struct.dataclass
class KVCache:
    """What has been said so far: keys, values and the position of each slot.

    positions: [B, S] int32; `EMPTY_POSITION` marks a slot that no query may see.
    """

    kv: KV
    positions: jax.Array


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale, computed in float32 (arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        scale = self.param("scale", ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype)


class Projection(nn.Module):
    """A bias-free linear map over the trailing `in_shape` axes, with an optional adapter.

    y = x W + scale · (x A) B, where A and B live in the "lora" collection and B starts at zero.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num_in = len(self.in_shape)
        init = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(num_in)),
            out_axis=tuple(range(num_in, num_in + len(self.out_shape))),
        )
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.in_axes + self.out_axes),
            self.in_shape + self.out_shape,
        )
        y = jnp.tensordot(x, kernel.astype(x.dtype), num_in)
        # Absent collection = base model; during init the collection is mutable and is created.
        if self.lora and (self.has_variable("lora", "a") or self.is_mutable_collection("lora")):
            y = y + self._adapter(x, num_in, self.lora)
        return y

    def _adapter(self, x: jax.Array, num_in: int, lora: LoraConfig) -> jax.Array:
        fan_in = math.prod(self.in_shape)

        def init_a():
            init = nn.initializers.normal(fan_in**-0.5)
            axes = self.in_axes + ("lora_rank",)
            shape = self.in_shape + (lora.rank,)
            return nn.with_logical_partitioning(init, axes)(self.make_rng("params"), shape)

        def init_b():
            axes = ("lora_rank",) + self.out_axes
            shape = (lora.rank,) + self.out_shape
            return nn.with_logical_partitioning(nn.initializers.zeros, axes)(None, shape)

        a = self.variable("lora", "a", init_a).value
        b = self.variable("lora", "b", init_b).value
        x_R = jnp.tensordot(x, a.astype(x.dtype), num_in)
        return jnp.tensordot(x_R, b.astype(x.dtype), 1) * lora.scale


def rotate(x_BTxH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding on halves: (x1, x2) turned by position · theta^(-2i/H).

    Source: arXiv 2104.09864 in the half-split layout of the Hugging Face Llama models.

    Args:
      x_BTxH: [B, T, heads, H].
      positions_BT: [B, T] int32.
      theta: base of the frequencies.
    """
    half = x_BTxH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = jnp.split(x_BTxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return turned.astype(x_BTxH.dtype)


def attend(
    q_BKGTH: jax.Array,
    sources: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    positions_BT: jax.Array,
) -> jax.Array:
    """Softmax attention over several stores of keys and values as if they were one.

    Args:
      q_BKGTH: queries, already scaled; every group of G query heads shares a key head.
      sources: (keys [B, K, H, S], values [B, K, S, H], positions [B, S]) each; a key is seen
        by the queries whose position is not before its own.
      positions_BT: positions of the queries.

    Returns:
      [B, K, G, T, H] in the dtype of the queries; softmax in float32.
    """
    scores = []
    for keys_BKHS, _, positions_BS in sources:
        s = jnp.einsum(
            "bkgth,bkhs->bkgts", q_BKGTH, keys_BKHS, preferred_element_type=jnp.float32
        )
        seen_BTS = positions_BS[:, None, :] <= positions_BT[:, :, None]
        # Finite, so that a padded query that sees nothing averages instead of giving NaN.
        scores.append(jnp.where(seen_BTS[:, None, None], s, jnp.float32(-1e30)))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out, start = 0.0, 0
    for _, values_BKSH, positions_BS in sources:
        stop = start + positions_BS.shape[1]
        w = weights[..., start:stop].astype(q_BKGTH.dtype)
        out = out + jnp.einsum("bkgts,bksh->bkgth", w, values_BKSH.astype(q_BKGTH.dtype))
        start = stop
    return out


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cached: tuple | None
    ) -> tuple[jax.Array, KV]:
        c = self.config
        B, T, D = x_BTD.shape
        q_shape, kv_shape = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)

        def project(name, out_shape, heads):
            lora = c.lora if c.lora and name in c.lora.targets else None
            return Projection(
                (D,), out_shape, ("embed",), (heads, "head_dim"), lora, name=name
            )(x_BTD)

        q = project("q_proj", q_shape, "heads")
        k = project("k_proj", kv_shape, "kv_heads")
        v = project("v_proj", kv_shape, "kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, name="k_norm")(k)
        q = rotate(q, positions_BT, c.rope_theta) * c.head_dim**-0.5
        k = rotate(k, positions_BT, c.rope_theta)
        q_BKGTH = q.reshape(B, T, c.num_kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
        kv = KV(keys=k.transpose(0, 2, 3, 1), values=v.transpose(0, 2, 1, 3))
        own = (kv.keys, kv.values, positions_BT)
        out = attend(q_BKGTH, (own,) if cached is None else (cached, own), positions_BT)
        out_BTNH = out.transpose(0, 3, 1, 2, 4).reshape(B, T, c.num_heads, c.head_dim)
        lora = c.lora if c.lora and "o_proj" in c.lora.targets else None
        o_proj = Projection(
            q_shape, (D,), ("heads", "head_dim"), ("embed",), lora, name="o_proj"
        )
        return o_proj(out_BTNH), kv


class MLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) · up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config

        def project(name, x, n_in, n_out, in_axis, out_axis):
            lora = c.lora if c.lora and name in c.lora.targets else None
            return Projection((n_in,), (n_out,), (in_axis,), (out_axis,), lora, name=name)(x)

        gate = project("gate_proj", x_BTD, c.embed_dim, c.mlp_dim, "embed", "mlp")
        up = project("up_proj", x_BTD, c.embed_dim, c.mlp_dim, "embed", "mlp")
        hidden_BTF = nn.silu(gate) * up
        return project("down_proj", hidden_BTF, c.mlp_dim, c.embed_dim, "mlp", "embed")


class Block(nn.Module):
    """One pre-norm transformer layer, in the (carry, scanned) form that `nn.scan` wants."""

    config: ModelConfig
    return_kv: bool

    @nn.compact
    def __call__(self, x_BTD, positions_BT, kv, cache_positions_BS):
        c = self.config
        cached = None if kv is None else (kv.keys, kv.values, cache_positions_BS)
        normed = RMSNorm(c.norm_eps, name="attention_norm")(x_BTD)
        out, new_kv = Attention(c, name="attention")(normed, positions_BT, cached)
        x_BTD = x_BTD + out
        x_BTD = x_BTD + MLP(c, name="mlp")(RMSNorm(c.norm_eps, name="mlp_norm")(x_BTD))
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", None))
        return x_BTD, (new_kv if self.return_kv else None)


class Decoder(nn.Module):
    """Decoder-only transformer up to and including the final norm; `head.py` has the rest."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        ids_BT: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None = None,
        return_kv: bool = False,
    ) -> tuple[jax.Array, KV | None]:
        """Runs the layers over T tokens that may also look at a cache.

        Args:
          ids_BT: [B, T] int32 token ids.
          positions_BT: [B, T] int32 positions; they alone decide what is causal.
          cache: keys and values of earlier tokens, read only.
          return_kv: also return the keys and values of these T tokens.

        Returns:
          hidden [B, T, D] after the final norm, and the new `KV` (None unless asked for).
        """
        c = self.config
        embed = self.param(
            "embed",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed")),
            (c.vocab_size, c.embed_dim),
        )
        if not c.tie_embeddings:  # Declared here so that init creates it; read by `head.py`.
            self.param(
                "lm_head",
                nn.with_logical_partitioning(
                    nn.initializers.normal(c.embed_dim**-0.5), ("vocab", "embed")
                ),
                (c.vocab_size, c.embed_dim),
            )
        x_BTD = embed[ids_BT].astype(c.dtype)
        block = nn.remat(Block, prevent_cse=False) if c.remat and not return_kv else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, return_kv, name="layers")
        kv, cache_positions = (cache.kv, cache.positions) if cache else (None, None)
        x_BTD, new_kv = layers(x_BTD, positions_BT, kv, cache_positions)
        return RMSNorm(c.norm_eps, name="final_norm")(x_BTD), new_kv


def init_variables(model: Decoder, key: jax.Array) -> dict:
    """Random {"params", "lora" if configured}, still boxed with their logical axes."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return dict(model.init(key, ids, ids))
