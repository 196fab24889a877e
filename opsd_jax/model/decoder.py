# SPDX-License-Identifier: Apache-2.0
"""The decoder: token ids in, hidden states out. It neither samples nor computes losses.

One parameter tree serves both roles. `apply({"params": p, "lora": l}, ...)` is the student;
leaving the collection out, `apply({"params": p}, ...)`, is the base model. For sampling alone,
matrices may be int8 with their scales in a third collection (`quantized.py`), or lie in another
order in a fourth (`weights_first.py`).

The module never writes its `cache`. It attends to the tokens it is given and, if there is one, to
that cache; with `return_kv=True` it hands back the new keys and values and the caller stores
them. Decoding token by token, it gets a small `Recent` buffer besides, puts the new keys and values
there before it reads them, and hands the buffer back. Which slots a query sees is decided by
positions alone: an empty slot carries `EMPTY_POSITION`, which no query ever reaches.

Model families differ in the switches of `ModelConfig` only. What differs from layer to layer is
a number (the window, the rotary frequencies, the query scale) and is scanned with the layers: no
window is a very wide one, and no rotation is frequency zero.

Alphabet: B batch, T queries, S keys, D model width, F MLP width, L layers, N query heads,
K key/value heads, G = N / K, H head width, R LoRA rank, V vocabulary, E experts, M = B · T.
"""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from opsd_jax.model.attention import attend_cached
from opsd_jax.model.branches import Branches
from opsd_jax.model.config import ModelConfig, layer_numbers
from opsd_jax.model.joined import joined_product
from opsd_jax.model.kv_cache import KV, KVCache, LayersKV, Recent, put
from opsd_jax.model.projection import PRODUCT, logical, project
from opsd_jax.model.quantized import scaled
from opsd_jax.model.rotation import Places, frequencies, places_of, rotate
from opsd_jax.model.sharding import dividing, in_parts, looked_up, placed, platform
from opsd_jax.model.text_attention import attend_text
from opsd_jax.model.token_attention import Settings, attend_new


@flax.struct.dataclass
class LayerNumbers:
    """Where layers differ; leading L when stacked, none inside a layer.

    rope: [] int32, which of the frequencies (`rotation.py`); query_scale: []; window: [] int32,
    positions seen; layer: [] int32, its number.
    """

    rope: jax.Array
    query_scale: jax.Array
    window: jax.Array
    layer: jax.Array


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · (offset + scale), computed in float32 (arXiv 1910.07467)."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", logical(init, (None,)), x.shape[-1:])
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        gain = self.offset + scale.astype(jnp.float32)
        return (x32 * jnp.expand_dims(gain, tuple(range(x.ndim - 1)))).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        places: Places,
        numbers: LayerNumbers,
        cache: KVCache | None,
        recent: Recent | None,
    ) -> tuple[jax.Array, KV]:
        c, D = self.config, x_BTD.shape[-1]
        by_kernel = c.decode_attention == "pallas" and cache and recent and platform() == "gpu"
        attend = self._attend_at_once if by_kernel else self._attend
        out_BTNH, kv = attend(x_BTD, places, numbers, cache, recent)
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        (y_BTD,) = project(self, out_BTNH, heads, o_proj={"embed": D})
        return y_BTD, kv

    def _projected(self, x_BTD: jax.Array) -> list[jax.Array]:
        """[B, T, N, H] queries, [B, T, K, H] keys and values, as the matrices give them."""
        c = self.config
        q = {"heads": c.num_heads, "head_dim": c.head_dim}
        kv = {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
        inputs = {"embed": x_BTD.shape[-1]}
        return project(self, x_BTD, inputs, q_proj=q, k_proj=kv, v_proj=kv)

    def _attend(self, x_BTD, places, numbers, cache, recent) -> tuple[jax.Array, KV]:
        c, branches, positions_BT = self.config, places.branches, places.positions
        q, k, v = self._projected(x_BTD)
        if c.qk_norm:
            q, k = self._norm(q, "q_norm"), self._norm(k, "k_norm")
        turn = places.turn(numbers.rope)
        q, k = rotate(q, turn, numbers.query_scale), rotate(k, turn)
        q, k, v = map(in_parts, (q, k, v))
        if branches:
            q, k, v = map(branches.texts, (q, k, v))
            positions_BT = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
        B, T = q.shape[:2]
        q_BKGTH = q.reshape(B, T, c.num_kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
        kv = KV(keys=k.transpose(0, 2, 3, 1), values=v.transpose(0, 2, 1, 3))
        if cache is None and recent is None:
            out = attend_text(c, q_BKGTH, kv, positions_BT, numbers.window)
        else:
            # Written before it is read: the other way round XLA would copy the buffer every step.
            positions_BS = positions_BT
            if recent is not None:
                kv, positions_BS = put(recent, kv), recent.cache.positions
            new = KVCache(kv, positions_BS)
            out = attend_cached(c, q_BKGTH, cache, new, numbers.layer, positions_BT, numbers.window)
        out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, c.num_heads, c.head_dim)
        return in_parts(branches.columns(out) if branches else out), kv

    def _attend_at_once(self, x_BTD, places, numbers, cache, recent) -> tuple[jax.Array, KV]:
        """`_attend` of one token per row by one kernel (`token_attention.py`)."""
        c, B = self.config, len(x_BTD)
        over_all = c.qk_norm and c.qk_norm_over_heads
        group: dict | None = None if over_all else self.get_variable("joined", "q_proj")
        if group is None:
            q, k, v = self._projected(x_BTD)
            if over_all:
                q, k = self._norm(q, "q_norm"), self._norm(k, "k_norm")
            heads = [x.reshape(B, c.num_kv_heads, -1) for x in (q, k, v)]
            qkv = jnp.concatenate(heads, axis=-1)
        else:
            qkv = joined_product(group, x_BTD, 1)
        norm = None
        gains: list[jax.Array] = []
        if c.qk_norm and not over_all:
            norm = (c.norm_eps, c.norm_offset)
            gains = [self.get_variable("params", f"{x}_norm")["scale"] for x in "qk"]
        cos_BTh, sin_BTh = places.turn(numbers.rope)
        out_BKGH, kv = attend_new(
            Settings(norm, c.attention_softcap),
            qkv.reshape(B, c.num_kv_heads, -1, c.head_dim),
            (cos_BTh[:, 0], sin_BTh[:, 0]),
            cache,
            recent,
            (numbers.window[None], numbers.query_scale[None], *gains),
        )
        return out_BKGH.reshape(B, 1, c.num_heads, c.head_dim), kv

    def _norm(self, x_BTxH: jax.Array, name: str) -> jax.Array:
        norm = RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)
        if self.config.qk_norm_over_heads:
            return norm(x_BTxH.reshape(*x_BTxH.shape[:2], -1)).reshape(x_BTxH.shape)
        return norm(x_BTxH)


def activate(config: ModelConfig, x: jax.Array) -> jax.Array:
    """GELU (its tanh form) or SiLU, as the MLP's gate has it."""
    return nn.gelu(x, approximate=True) if config.activation == "gelu" else nn.silu(x)


class MLP(nn.Module):
    """Gated MLP: down(activation(gate(x)) · up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F = {"embed": self.config.embed_dim}, {"mlp": self.config.mlp_dim}
        gate, up = project(self, x_BTD, D, gate_proj=F, up_proj=F)
        (y_BTD,) = project(self, activate(self.config, gate) * up, F, down_proj=D)
        return y_BTD


class Experts(nn.Module):
    """A router picks a few gated MLPs per token; only those are computed (arXiv 1701.06538).

    y = Σ_e p_e(x) · down_e(activation(gate_e(x)) · up_e(x)) over the tokens' top experts, p the
    softmax over all experts. Tokens are sorted by expert for a grouped matmul: on a mesh every
    device sorts its own, with its part of each expert's width.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        D, F, E = c.embed_dim, c.mlp_dim, c.num_experts

        def weight(name, shape, axes):
            init = nn.initializers.lecun_normal(batch_axis=(0,) if len(shape) == 3 else ())
            param = self.param(name, logical(init, axes), shape)
            return param.astype(x_BTD.dtype)

        weights = (
            weight("router", (D, E), ("embed", "experts")),
            weight("gate_proj", (E, D, F), ("experts", "embed", "mlp")),
            weight("up_proj", (E, D, F), ("experts", "embed", "mlp")),
            weight("down_proj", (E, F, D), ("experts", "mlp", "embed")),
        )
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return self._own(x_BTD, *weights)
        batch, length, width = dividing((*x_BTD.shape[:2], F), "batch", "length", "mlp")
        tokens = PartitionSpec(batch, length)
        matrix = PartitionSpec(None, None, width)
        places = (tokens, PartitionSpec(), matrix, matrix, PartitionSpec(None, width))

        def own(*operands):
            y = self._own(*operands)
            return y if width is None else jax.lax.psum(y, width)

        mapped = jax.shard_map(own, in_specs=places, out_specs=tokens, check_vma=False)
        return mapped(x_BTD, *weights)

    def _own(self, x_BTD, router, gate, up, down) -> jax.Array:
        """Of these tokens, with what there is of each expert's width."""
        c = self.config
        D, E, k = c.embed_dim, c.num_experts, c.experts_per_token
        x_MD = x_BTD.reshape(-1, D)
        scores_ME = jnp.matmul(x_MD, router, preferred_element_type=jnp.float32)
        share_Mk, expert_Mk = jax.lax.top_k(jax.nn.softmax(scores_ME), k)
        if c.norm_topk_prob:
            share_Mk = share_Mk / share_Mk.sum(axis=-1, keepdims=True)
        by_expert = jnp.argsort(expert_Mk.reshape(-1))
        sizes_E = jnp.bincount(expert_Mk.reshape(-1), length=E).astype(jnp.int32)
        x = x_MD[by_expert // k]

        def grouped(x, weight):
            return checkpoint_name(jax.lax.ragged_dot(x, weight, sizes_E), PRODUCT)

        y = grouped(activate(c, grouped(x, gate)) * grouped(x, up), down)
        y_MkD = y[jnp.argsort(by_expert)].reshape(-1, k, D)
        return (y_MkD * share_Mk[:, :, None]).sum(axis=1).astype(x_BTD.dtype).reshape(x_BTD.shape)


class Block(nn.Module):
    """One transformer layer, in the (carry, scanned) form that `nn.scan` wants."""

    config: ModelConfig
    return_kv: bool

    @nn.compact
    def __call__(self, x_BTD, places, numbers, kvs, rest):
        c = self.config
        (kv, recent_kv), (all_kv, positions_BS, recent_positions_BS, slot) = kvs, rest
        kv = all_kv or kv
        cache = kv and KVCache(kv, positions_BS)
        recent = recent_kv and Recent(KVCache(recent_kv, recent_positions_BS), slot)

        def norm(x, name, wanted):
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x) if wanted else x

        y = norm(x_BTD, "attention_norm", c.pre_norm)
        y, new_kv = Attention(c, name="attention")(y, places, numbers, cache, recent)
        x_BTD = x_BTD + c.residual_scale * norm(y, "attention_post_norm", c.post_norm)
        y = norm(x_BTD, "mlp_norm", c.pre_norm)
        y = Experts(c, name="experts")(y) if c.num_experts else MLP(c, name="mlp")(y)
        x_BTD = x_BTD + c.residual_scale * norm(y, "mlp_post_norm", c.post_norm)
        return placed(x_BTD, "batch", "length", None), (new_kv if self.return_kv else None)


def recomputed(remat: bool | str) -> type[Block]:
    """Rematerialisation: the layer, of which the backward pass computes again what `remat` says."""
    policies = jax.checkpoint_policies
    if remat is False:
        return Block
    policy = None
    if remat == "keep_projections":
        policy = policies.save_only_these_names(PRODUCT)
    elif remat == "offload_projections":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[PRODUCT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    # Within a scan nothing can be found common to both passes.
    return nn.remat(Block, prevent_cse=False, policy=policy)


class Decoder(nn.Module):
    """Decoder-only transformer up to and including the final norm; `head.py` has the rest."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        ids_BT: jax.Array,
        positions_BT: jax.Array,
        cache: KVCache | None = None,
        recent: Recent | None = None,
        return_kv: bool = False,
        branches: Branches | None = None,
    ) -> tuple[jax.Array, LayersKV | None]:
        """Runs the layers over T tokens that may also look at a cache.

        Args:
          ids_BT: [B, T] int32 token ids.
          positions_BT: [B, T] int32 positions; they alone decide what is causal.
          cache: keys and values of earlier tokens, read only.
          recent: a buffer to be filled and read, for T = 1.
          return_kv: also return the new keys and values: those of the T tokens, or the buffer.
          branches: of rows that hold a prompt and several answers; without any cache.

        Returns:
          hidden [B, T, D] after the final norm, and the new keys and values (None unless asked
          for), in the form that `KVCache.kv` has.
        """
        c = self.config
        embed = self.param(
            "embed",
            logical(nn.initializers.normal(0.02), ("vocab", "embed")),
            (c.vocab_size, c.embed_dim),
        )
        if not c.tie_embeddings:  # Declared here so that init creates it; read by `head.py`.
            self.param(
                "lm_head",
                logical(nn.initializers.normal(c.embed_dim**-0.5), ("vocab", "embed")),
                (c.vocab_size, c.embed_dim),
            )
        scale_V1: jax.Array | None = self.get_variable("scales", "embed")
        # In decoding every device may have the whole table.
        x_BTD = (embed[ids_BT] if return_kv else looked_up(embed, ids_BT)).astype(c.dtype)
        x_BTD = c.embed_scale * scaled(x_BTD, None if scale_V1 is None else scale_V1[ids_BT])
        layers = self._scanned if c.scan_layers else self._unrolled
        places = places_of(c, positions_BT, branches)
        x_BTD, new_kv = layers(x_BTD, places, cache, recent, return_kv)
        x_BTD = RMSNorm(c.norm_eps, c.norm_offset, name="final_norm")(x_BTD)
        return c.output_scale * x_BTD, new_kv

    def _scanned(self, x_BTD, places, cache, recent, return_kv):
        c = self.config
        block = Block if return_kv else recomputed(c.remat)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0, "scales": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, 0, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, return_kv, name="layers")
        numbers = LayerNumbers(**{k: jnp.asarray(v) for k, v in numbers_of(c).items()})
        # A layer's slice would be copied for the kernel, which picks it from the whole itself.
        whole = c.decode_attention == "pallas" and platform() != "gpu"
        apart = _apart(cache, recent, whole)
        return layers(x_BTD, places, numbers, *apart)

    def _unrolled(self, x_BTD, places, cache, recent, return_kv):
        """One `layers_<i>` after the other: the form that `unstacked` makes."""
        (kv, recent_kv), rest = _apart(cache, recent)
        new_kvs, stacked = [], numbers_of(self.config)
        for i in range(self.config.num_layers):
            numbers = {k: jnp.asarray(v[i]) for k, v in stacked.items()}
            block = Block(self.config, return_kv, name=f"layers_{i}")
            x_BTD, new_kv = block(
                x_BTD,
                places,
                LayerNumbers(**numbers),
                (kv and kv[i], recent_kv and recent_kv[i]),
                rest,
            )
            new_kvs.append(new_kv)
        return x_BTD, tuple(new_kvs) if return_kv else None


def numbers_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """The fields of `LayerNumbers`, stacked."""
    return layer_numbers(config) | {"rope": frequencies(config)[1]}


def _apart(cache: KVCache | None, recent: Recent | None, whole: bool = False):
    """Of both, keys and values, which differ from layer to layer, and the rest, which does not.

    `whole` leaves the cache of all layers together, with the rest.
    """
    kv, recent_kv = cache and cache.kv, recent and recent.cache.kv
    positions = (cache and cache.positions, recent and recent.cache.positions)
    rest = (*positions, recent and recent.slot)
    return ((None, recent_kv), (kv, *rest)) if whole else ((kv, recent_kv), (None, *rest))


def init_variables(model: Decoder, key: jax.Array) -> dict:
    """Random {"params", "lora" if configured}, still boxed with their logical axes."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return dict(model.init(key, ids, ids))
