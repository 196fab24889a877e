# SPDX-License-Identifier: Apache-2.0
"""Decoding on a CPU: matrix-vector products with transposed weights, each output's side by side.

    y = x W = (W' xᵀ)ᵀ,   W' [out, in]

The time of such a product is that of reading the matrix. XLA's library for CPUs reads a first
operand in order; a second one, as in x W, it first copies piece by piece into another order. On
other platforms this is x W and nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from opsd_jax.model.quantized import INPUT_AXES

MAX_ROWS = 128  # From about there on the time is that of the arithmetic, in either order.


def turned(variables: dict) -> dict:
    """Transposes the kernels of all projections, inputs last, into a collection "turned".

    Args:
      variables: {"params", …} of a decoder, layers stacked or not; the rest stays where it is.
    """
    found = {}
    for path, leaf in flatten_dict(variables).items():
        if path[0] == "params" and path[-1] == "kernel":
            axes = INPUT_AXES[path[-2]]
            path, leaf = ("turned", *path[1:]), jnp.moveaxis(leaf, axes, range(-len(axes), 0))
        found[path] = leaf
    return unflatten_dict(found)


def weights_first(x: jax.Array, kernel: jax.Array, num_in: int = 1, dtype: Any = None) -> jax.Array:
    """y = x W for a matrix that is given transposed, as W'.

    Args:
      x: [..., in], `num_in` axes of inputs.
      kernel: [out, in], any number of output axes; cast to the dtype of x.
      num_in: number of axes that are summed over.
      dtype: of the sums and the result, None: that of x.

    Returns:
      [..., out].
    """
    dtype, kernel = dtype or x.dtype, kernel.astype(x.dtype)
    num_out, rows = kernel.ndim - num_in, x.shape[: x.ndim - num_in]

    def inputs(array: jax.Array) -> tuple[int, ...]:
        return tuple(range(array.ndim - num_in, array.ndim))

    def rows_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
        summed = (inputs(x), inputs(kernel)), ((), ())
        return jax.lax.dot_general(x, kernel, summed, preferred_element_type=dtype)

    def matrix_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
        summed = (inputs(kernel), inputs(x)), ((), ())
        y = jax.lax.dot_general(kernel, x, summed, preferred_element_type=dtype)
        # The barrier keeps XLA from simplifying the two into `rows_first`.
        return jnp.moveaxis(jax.lax.optimization_barrier(y), range(num_out), range(-num_out, 0))

    if math.prod(rows) > MAX_ROWS:
        return rows_first(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=matrix_first, default=rows_first)
