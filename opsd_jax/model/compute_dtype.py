# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: float32 masters cast to the dtype of the computation, once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def narrowed(variables: dict, dtype: str) -> dict:
    """The variables in the dtype of the computation, where that changes not one bit of it.

    A decoder casts every matrix and bias to the dtype that it computes in where it meets them;
    norms alone multiply by their gains in float32. Cast before, float32 masters take half the
    memory and half the way over the network.

    Args:
      variables: collections of a decoder, flat or nested in any way.
      dtype: what the decoder computes in.

    Returns:
      The same tree. Gains of norms, what is no wider than `dtype`, and the scales of int8 matrices
      are what they were.
    """

    def leaf(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        narrow = x.dtype.itemsize <= jnp.dtype(dtype).itemsize
        return x if narrow or path[-1].key == "scale" else x.astype(dtype)

    return {
        name: tree if name == "scales" else jax.tree_util.tree_map_with_path(leaf, tree)
        for name, tree in variables.items()
    }
