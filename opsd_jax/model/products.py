# SPDX-License-Identifier: Apache-2.0
"""Matrix products with gradients of their own (custom_vjp): dtypes kept, sums in float32.

    z = x y          in the dtype of x, sums kept as `dtype` says
    x̄ = z̄ yᵀ         in the dtype of x
    ȳ = xᵀ z̄         of operands in the dtype of x, summed and handed on in float32 if y is

Left to itself, JAX turns both operands of these products to float32 where z is float32 (scores,
logits), and rounds ȳ to the dtype of x where y is a float32 master: devices and micro-batches
would then add up rounded gradients. On a CPU ȳ of matrices with more than two axes also costs
XLA's compiler a transposition that it fuses with all that made z̄.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Dtypes:
    """Of both operands, one of which may not be kept."""

    x: Any
    y: Any


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


def _forward(subscripts: str, x: Any, y: Any, dtype: Any) -> Any:
    # What nobody asks a gradient of (a frozen matrix) has none, and nothing is kept for it.
    kept = x.value if y.perturbed else None, y.value if x.perturbed else None
    dtypes = _Dtypes(x.value.dtype, y.value.dtype)
    return product(subscripts, x.value, y.value, dtype), (*kept, dtypes)


def _backward(subscripts: str, dtype: Any, kept: Any, gradient: Any) -> Any:
    x, y, dtypes = kept
    if isinstance(gradient, SymbolicZero):
        return None, None
    inputs, out = subscripts.split("->")
    of_x, of_y = inputs.split(",")
    g, to_x, to_y = gradient.astype(dtypes.x), None, None
    if y is not None:
        to_x = jnp.einsum(f"{out},{of_y}->{of_x}", g, y.astype(dtypes.x))
    if x is not None:
        wide = jnp.promote_types(dtypes.x, dtypes.y)
        to_y = jnp.einsum(f"{of_x},{out}->{of_y}", x, g, preferred_element_type=wide)
        to_y = to_y.astype(dtypes.y)
    return to_x, to_y


product.defvjp(_forward, _backward, symbolic_zeros=True)


def linear(x: jax.Array, kernel: jax.Array, num_in: int) -> jax.Array:
    """x · kernel over the last `num_in` axes of x and the first of the kernel, as one of matrices.

    Returns:
      [..., out] in the dtype of x.
    """
    rows, out = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    size = math.prod(kernel.shape[:num_in])
    y = of_rows(x.reshape(*rows, size), kernel.reshape(size, -1), "df")
    return y.reshape(*rows, *out)


def of_rows(x: jax.Array, y: jax.Array, axes: str, dtype: Any = None) -> jax.Array:
    """`product` of x [..., d] and a matrix "df" or "fd": [..., f], of rows of one matrix.

    Where texts are split their tokens stay an axis of their own: rows of several devices' parts
    are no matrix that has these parts, and the compiler would gather it.
    """
    rows = x.shape[:-1]
    letters = "abc"[: len(rows)]
    if len(rows) > 1 and "sequence" not in jax.sharding.get_abstract_mesh().shape:
        x, letters = x.reshape(-1, x.shape[-1]), "m"
    z = product(f"{letters}d,{axes}->{letters}f", x, y, dtype)
    return z.reshape(*rows, -1)
