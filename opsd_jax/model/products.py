# SPDX-License-Identifier: Apache-2.0
"""Products with weights and scores whose gradients are products of the same kind.

    z = x y          in the dtype of x, sums kept as `dtype` says
    x̄ = z̄ yᵀ         in the dtype of x
    ȳ = xᵀ z̄         of operands in the dtype of x, summed and handed on in float32 if y is

Left to itself, JAX turns both operands of these products to float32 where z is float32 (scores,
logits), and rounds ȳ to the dtype of x where y is a float32 master: devices and micro-batches
would then add up rounded gradients. On a CPU ȳ of matrices with more than two axes also costs
XLA's compiler a transposition that it fuses with all that made z̄.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """einsum(subscripts, x, y) in the dtype of x, with gradients as above.

    Args:
      subscripts: as of einsum, of two operands; no axis stands in one of the three terms alone.
      x: activations; what they multiply with is cast to their dtype.
      y: weights, or other activations.
      dtype: of the result and its sums; None is that of x.
    """
    return jnp.einsum(subscripts, x, y.astype(x.dtype), preferred_element_type=dtype)


def _forward(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any) -> Any:
    return product(subscripts, x, y, dtype), (x, y)


def _backward(subscripts: str, dtype: Any, operands: Any, gradient: jax.Array) -> Any:
    x, y = operands
    inputs, out = subscripts.split("->")
    of_x, of_y = inputs.split(",")
    g = gradient.astype(x.dtype)
    to_x = jnp.einsum(f"{out},{of_y}->{of_x}", g, y.astype(x.dtype))
    wide = jnp.promote_types(x.dtype, y.dtype)
    to_y = jnp.einsum(f"{of_x},{out}->{of_y}", x, g, preferred_element_type=wide)
    return to_x, to_y.astype(y.dtype)


product.defvjp(_forward, _backward)


def linear(x: jax.Array, kernel: jax.Array, num_in: int) -> jax.Array:
    """x · kernel over the last `num_in` axes of x and the first of the kernel, as one of matrices.

    Returns:
      [..., out] in the dtype of x.
    """
    rows, out = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    size = math.prod(kernel.shape[:num_in])
    y = product("md,df->mf", x.reshape(-1, size), kernel.reshape(size, -1))
    return y.reshape(*rows, *out)
