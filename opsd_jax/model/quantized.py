# SPDX-License-Identifier: Apache-2.0
"""int8 quantization of matrices, for sampling: 8-bit values in their place, a scale per output.

    W ~ scale · q,   x W ~ (x q) · scale

The scale does not depend on what is summed over, so it is applied to the product: the compiler
converts q where the product reads it, and a TPU holds no whole matrix in a wider type. (On a CPU
XLA converts all of them once, ahead of the loop: the same numbers, and no memory is saved.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

# Axes of each matrix that its product sums over, from the end: layers may be stacked or not. Those
# of an embedding are its head's, and looking up a row is a product, too.
INPUT_AXES = {
    "q_proj": (-3,),
    "k_proj": (-3,),
    "v_proj": (-3,),
    "o_proj": (-3, -2),
    "gate_proj": (-2,),
    "up_proj": (-2,),
    "down_proj": (-2,),
    "embed": (-1,),
    "lm_head": (-1,),
}


def quantized(variables: dict) -> dict:
    """Every matrix of projections, embedding and head as int8; the rest is what it was.

    Args:
      variables: {"params"[, "lora"]} of a decoder without experts, boxed or not.

    Returns:
      {"params"[, "lora"], "scales"}, where "scales" has a float32 array for every matrix at the
      matrix's path, of length 1 along the axes that are summed over.
    """
    found = {}
    for path, matrix in flatten_dict(variables).items():
        axes = INPUT_AXES.get(path[-2] if path[-1] == "kernel" else path[-1])
        if axes is not None:
            # Maps over one leaf, which may be in a box with the names of its axes.
            scale = jax.tree.map(lambda w, axes=axes: channel_scale(w, axes), matrix)
            found["scales", *path[1:]] = scale
            matrix = jax.tree.map(round_to_int8, matrix, scale)
        found[path] = matrix
    return unflatten_dict(found)


def channel_scale(matrix: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """max |W| / 127 over the axes, float32, the axes kept with length 1."""
    return jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=axes, keepdims=True) / 127


def round_to_int8(matrix: jax.Array, scale: jax.Array) -> jax.Array:
    """q = round(W / scale), int8 in [-127, 127]; 0 where the scale is 0, as W is there."""
    steps = matrix.astype(jnp.float32) / jnp.where(scale > 0, scale, 1)
    return jnp.round(steps).astype(jnp.int8)


def scaled(product: jax.Array, scale: jax.Array | None) -> jax.Array:
    """A product with int8 values times their scale, in its own dtype; as it is without one.

    Args:
      product: [..., channels].
      scale: None, or float32 that broadcasts against it.
    """
    return product if scale is None else (product * scale).astype(product.dtype)
