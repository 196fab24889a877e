# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: the angles of a text, made once for all layers and heads.

Within a layer's loop a compiler makes them again for every head, and sines are dear.

Alphabet: R sets of frequencies among the layers, B batch, T tokens, H head width.
"""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.model.branches import Branches
from opsd_jax.model.config import ModelConfig, layer_numbers

Turn = tuple[jax.Array, jax.Array]  # cos and sin of angles


@flax.struct.dataclass
class Places:
    """Where tokens stand.

    positions: [B, T] int32; cos, sin: [R, B, T, H/2] float32 of position · frequency; branches:
    where several texts share a prompt.
    """

    positions: jax.Array
    cos: jax.Array
    sin: jax.Array
    branches: Branches | None = None

    def turn(self, which: jax.Array) -> Turn:
        """[B, T, H/2] each, by the frequencies of a layer."""
        number = 0 if len(self.cos) == 1 else which
        return self.cos[number], self.sin[number]


def frequencies(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Radians per position: [R, H/2] float32, none twice, and which of them a layer has, [L]."""
    rope, which = np.unique(layer_numbers(config)["rope"], axis=0, return_inverse=True)
    return rope, which.reshape(-1).astype(np.int32)


def places_of(
    config: ModelConfig, positions_BT: jax.Array, branches: Branches | None = None
) -> Places:
    """The places of tokens at these positions."""
    rope, _ = frequencies(config)
    angle_RBTh = positions_BT[None, :, :, None].astype(jnp.float32) * rope[:, None, None]
    return Places(positions_BT, jnp.cos(angle_RBTh), jnp.sin(angle_RBTh), branches)


def rotate(x_BTxH: jax.Array, turn: Turn, scale: jax.Array | float = 1.0) -> jax.Array:
    """scale · (x1, x2) turned by position · frequency, the rotary embedding on halves.

    Source: arXiv 2104.09864 in the half-split layout of the Hugging Face Llama models.

    Args:
      x_BTxH: [B, T, heads, H].
      turn: [B, T, H/2] each.
      scale: scalar factor, applied before rounding to the dtype of x.
    """
    cos, sin = (each[:, :, None] for each in turn)
    x1, x2 = jnp.split(x_BTxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return (turned * scale).astype(x_BTxH.dtype)
