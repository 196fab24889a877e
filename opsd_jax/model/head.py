# SPDX-License-Identifier: Apache-2.0
"""The output head: hidden states to vocabulary logits, kept apart from the trunk.

Losses and samplers receive `(hidden, Head)` instead of logits, so that they choose how many
rows of logits exist at a time. Alphabet: V vocab, D model width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from opsd_jax.model.config import ModelConfig
from opsd_jax.model.products import of_rows
from opsd_jax.model.quantized import scaled


@flax.struct.dataclass
class Head:
    """A linear map onto the vocabulary, optionally followed by a soft cap.

    Attributes:
      kernel: [V, D]; rows are token vectors (the layout of an embedding, so tying is free).
      softcap: None, or c > 0 for logits c * tanh(z / c) (Gemma).
      scale: None, or [V, 1] of an int8 kernel (`quantized.py`).
    """

    kernel: jax.Array
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)
    scale: jax.Array | None = None


def soft_cap(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Bounds logits smoothly to (-c, c): c * tanh(z / c); the identity when `softcap` is None."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def hidden_first(hidden: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """hidden @ kernelᵀ: [..., D] x [V, D] -> [..., V] in a dtype."""
    return of_rows(hidden, kernel, "fd", dtype)


def head_logits(
    head: Head, hidden: jax.Array, multiply: Callable[..., jax.Array] = hidden_first
) -> jax.Array:
    """Logits z = softcap(hidden @ kernel^T), accumulated in float32.

    The kernel is cast to the dtype of `hidden`, so that float32 masters multiply in bfloat16
    when the trunk computes in bfloat16.

    Args:
      head: the output head, kernel [V, D].
      hidden: [..., D], after the final norm; bfloat16 or float32.
      multiply: another way to compute `hidden_first`.

    Returns:
      [..., V] float32.
    """
    accumulator = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = multiply(hidden, head.kernel, dtype=accumulator)
    scale_V = None if head.scale is None else head.scale[:, 0]
    return soft_cap(scaled(logits, scale_V), head.softcap)


def output_head(
    params: Mapping[str, Any], config: ModelConfig, scales: Mapping[str, Any] | None = None
) -> Head:
    """The head of a decoder's parameter tree: the embedding when tied, else its own kernel.

    Args:
      params: the decoder's "params" collection; its array is taken as is, nothing is copied.
      config: the decoder's configuration; `tie_embeddings` decides.
      scales: the decoder's "scales" collection, where the parameters are int8.
    """
    name = "embed" if config.tie_embeddings else "lm_head"
    softcap = getattr(config, "final_softcap", None)
    return Head(params[name], softcap, scales[name] if scales else None)
