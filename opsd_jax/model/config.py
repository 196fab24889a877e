# SPDX-License-Identifier: Apache-2.0
"""What a decoder is made of, as numbers and switches: `ModelConfig` and `LoraConfig`.

A model family is a set of these values; `pretrained/families.py` has the row of each.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import warnings
from typing import Annotated

import numpy as np

from opsd_jax.errors import UserError
from opsd_jax.fields import Count, Natural, Positive, check, require
from opsd_jax.model.rope import RopeScaling, rope_frequencies

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DTYPES = ("float32", "bfloat16")
TEXT_ATTENTION = ("xla", "splash", "cudnn")
DECODE_ATTENTION = ("xla", "pallas")
REMATS = ("keep_projections", "offload_projections")
LORA_TARGETS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS

# The window of a layer that sees everything: more than any position, and not near overflow.
NO_WINDOW = 2**30


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters W + scale · A B on the named projections (arXiv 2106.09685).

    Args:
      rank: R, the inner width of A [in, R] and B [R, out].
      alpha: numerator of the scale, which is alpha / rank.
      targets: names or patterns ("q_proj", "*_proj", "[qv]_proj") of the projections of each
        layer that carry an adapter.
      dropout: probability of zeroing an input of A; acts only where `apply` is given a
        "dropout" random key. Rows that are scored as a group have that of their prompt in common.
      rank_stabilized: scale is alpha / sqrt(rank) instead (arXiv 2312.03732).
    """

    rank: Count
    alpha: Positive
    targets: tuple[str, ...] = LORA_TARGETS
    dropout: Annotated[float, ">= 0", "< 1"] = 0.0
    rank_stabilized: bool = False

    def __post_init__(self):
        require("lora", self)
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = [t for t in self.targets if not fnmatch.filter(LORA_TARGETS, t)]
        if unknown or not self.targets:
            raise UserError(
                f"lora.targets: {unknown or 'empty'}; choose from {list(LORA_TARGETS)}, "
                "or a pattern such as '*_proj'"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def covers(self, projection: str) -> bool:
        return any(fnmatch.fnmatchcase(projection, target) for target in self.targets)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder-only transformer.

    Args:
      vocab_size: V, rows of the embedding and of the output head.
      num_layers: L.
      embed_dim: D, the width of the residual stream.
      num_heads: N query heads.
      num_kv_heads: K key/value heads; N must be a multiple of K.
      head_dim: H.
      mlp_dim: F, the inner width of the gated MLP (of one expert, with experts).
      rope_theta: base of the rotary position frequencies.
      norm_eps: added to the mean square inside every RMSNorm; above 0, as padding may be 0.
      tie_embeddings: the output head is the embedding table.
      qk_norm: RMSNorm on queries and keys before the rotation, over H (Qwen3).
      dtype: compute dtype of activations, "float32" or "bfloat16"; the parameters keep
        their own dtype (float32 masters in training).
      attention: how whole texts are attended to, "xla", "splash" (TPU) or "cudnn" (NVIDIA GPU,
        bfloat16); see `text_attention.py`.
      decode_attention: how one new token attends to what was said, "xla" or "pallas", a kernel:
        on TPUs `decode_attention.py`, on NVIDIA GPUs `token_attention.py`.
      remat: recompute each layer in the backward pass instead of storing its activations (True),
        all but the outputs of its projections, which are stored ("keep_projections") or wait in the
        host's memory ("offload_projections"), or nothing (False).
      scan_layers: one scan over stacked layers, compiled once whatever L is; False is for
        decoding, see `model.unstacked`.
      lora: adapters that live in the "lora" collection, or None.
      rope_scaling: stretches the rotation of the layers that see everything.
      local_rope_theta: rotary base, unstretched, of the layers with a window; None: as others.
      no_rope_layers: layers whose queries and keys are not rotated (SmolLM3).
      window: a query sees this many positions, itself included; None sees all.
      window_layers: the layers the window holds for; None is every layer.
      biases: names of the projections that add a bias.
      activation: of the gate, "silu" or "gelu" (tanh form).
      pre_norm, post_norm: RMSNorm before each sublayer, and on its output (Gemma 2 has both,
        OLMo-2 only the latter).
      qk_norm_over_heads: the q/k norm is over all heads at once, N·H (OLMo-2).
      norm_offset: norms multiply by (offset + scale); 1 in Gemma.
      query_scale: factor on queries; None is H^-1/2.
      attention_softcap, final_softcap: c · tanh(x / c) on attention scores, and on logits
        (applied by `head.py`).
      embed_scale, residual_scale, output_scale: factors on the embedding, on what each
        sublayer adds, and on the hidden states handed to the head.
      num_experts: 0 for a dense MLP, else a router picks `experts_per_token` of them.
      norm_topk_prob: the weights of the picked experts are made to sum to 1.
      max_positions: longest sequence of the pretraining; exported, not enforced.
      family: the `model_type` that export writes; None picks one by the switches.
    """

    vocab_size: Count
    num_layers: Count
    embed_dim: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    mlp_dim: Count
    rope_theta: Positive = 10_000.0
    norm_eps: Positive = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    dtype: Annotated[str, DTYPES] = "float32"
    attention: Annotated[str, TEXT_ATTENTION] = "xla"
    decode_attention: Annotated[str, DECODE_ATTENTION] = "xla"
    remat: bool | Annotated[str, REMATS] = True
    scan_layers: bool = True
    lora: LoraConfig | None = None
    rope_scaling: RopeScaling | None = None
    local_rope_theta: Positive | None = None
    no_rope_layers: tuple[Natural, ...] = ()
    window: Count | None = None
    window_layers: tuple[Natural, ...] | None = None
    biases: tuple[Annotated[str, LORA_TARGETS], ...] = ()
    activation: Annotated[str, ("silu", "gelu")] = "silu"
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm_over_heads: bool = False
    norm_offset: float = 0.0
    query_scale: float | None = None
    attention_softcap: Positive | None = None
    final_softcap: Positive | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    output_scale: float = 1.0
    num_experts: Natural = 0
    experts_per_token: Natural = 0
    norm_topk_prob: bool = False
    max_positions: Count = 32768
    family: str | None = None

    def __post_init__(self):
        require("model", self)
        for name in ("no_rope_layers", "window_layers", "biases"):
            if isinstance(getattr(self, name), list):  # gin gives lists, which do not hash
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads ({self.num_heads}) must be a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads})"
            )
        if self.num_experts:
            some = Annotated[int, ">= 1", f"<= {self.num_experts}"]
            check("model.experts_per_token", self.experts_per_token, some)
        if self.num_experts and self.lora:
            self._leave_experts_out(self.lora)

    def _leave_experts_out(self, lora: LoraConfig) -> None:
        if not any(lora.covers(name) for name in ATTENTION_PROJECTIONS):
            raise UserError(
                f"lora.targets {list(lora.targets)} names only expert projections, which carry "
                f"no adapters; choose from {list(ATTENTION_PROJECTIONS)}"
            )
        if any(lora.covers(name) for name in MLP_PROJECTIONS):
            warnings.warn(
                "lora.targets: the experts of this model carry no adapters; only "
                f"{[n for n in ATTENTION_PROJECTIONS if lora.covers(n)]} do",
                stacklevel=4,
            )

    def windows(self, layer: int) -> bool:
        """Whether the sliding window holds for this layer."""
        return self.window is not None and (
            self.window_layers is None or layer in self.window_layers
        )


def layer_numbers(config: ModelConfig) -> dict[str, np.ndarray]:
    """The numbers in which layers differ, stacked so that they can be scanned with the layers.

    Returns:
      rope: [L, H/2] float32 angle per position, 0 where nothing is rotated;
      query_scale: [L] float32; window: [L] int32, `NO_WINDOW` where all is seen; layer: [L] int32,
      its number.
    """
    rope, query_scale, window = [], [], []
    for layer in range(config.num_layers):
        local = config.windows(layer)
        theta, scaling = config.rope_theta, config.rope_scaling
        if local and config.local_rope_theta is not None:
            theta, scaling = config.local_rope_theta, None
        frequency, factor = rope_frequencies(config.head_dim, theta, scaling)
        if layer in config.no_rope_layers:
            frequency, factor = np.zeros_like(frequency), 1.0
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        rope.append(frequency)
        # Yarn multiplies q and k by `factor`; only their product matters.
        query_scale.append(scale * factor * factor)
        window.append(config.window if local else NO_WINDOW)
    return {
        "rope": np.stack(rope).astype(np.float32),
        "query_scale": np.asarray(query_scale, np.float32),
        "window": np.asarray(window, np.int32),
        "layer": np.arange(config.num_layers, dtype=np.int32),
    }
