# SPDX-License-Identifier: Apache-2.0
"""What a decoder is made of, as numbers: `ModelConfig` and `LoraConfig`."""

from __future__ import annotations

import dataclasses

from opsd_jax.errors import UserError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters W + (alpha / rank) · A B on the named projections (arXiv 2106.09685).

    Args:
      rank: R, the inner width of A [in, R] and B [R, out].
      alpha: numerator of the scale; the product is multiplied by alpha / rank.
      targets: which projections of each layer carry an adapter.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank must be at least 1, not {self.rank}")
        if unknown := sorted(set(self.targets) - set(LORA_TARGETS)):
            raise UserError(
                f"lora.targets: unknown {unknown}; choose from {list(LORA_TARGETS)}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder-only transformer (Llama- and Qwen3-shaped families).

    Args:
      vocab_size: V, rows of the embedding and of the output head.
      num_layers: L.
      embed_dim: D, the width of the residual stream.
      num_heads: N query heads.
      num_kv_heads: K key/value heads; N must be a multiple of K.
      head_dim: H.
      mlp_dim: F, the inner width of the gated MLP.
      rope_theta: base of the rotary position frequencies.
      norm_eps: added to the mean square inside every RMSNorm.
      tie_embeddings: the output head is the embedding table.
      qk_norm: RMSNorm over H on queries and keys before the rotation (Qwen3).
      dtype: compute dtype of activations, "float32" or "bfloat16"; the parameters keep
        their own dtype (float32 masters in training).
      remat: recompute each layer in the backward pass instead of storing its activations.
      lora: adapters that live in the "lora" collection, or None.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    dtype: str = "float32"
    remat: bool = True
    lora: LoraConfig | None = None

    def __post_init__(self):
        for name in (
            "vocab_size num_layers embed_dim num_heads num_kv_heads head_dim mlp_dim"
        ).split():
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads ({self.num_heads}) must be a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads})"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"model.dtype must be 'float32' or 'bfloat16', not {self.dtype!r}")
