# SPDX-License-Identifier: Apache-2.0
"""Products and their gradients: NumPy's in float64, and the dtypes of operands and sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.model.head import Head, head_logits
from opsd_jax.model.products import linear, product

SHAPES = {
    "md,df->mf": ((6, 5), (5, 4)),
    "md,vd->mv": ((6, 5), (7, 5)),
    "bkgth,bkhs->bkgts": ((2, 3, 2, 4, 5), (2, 3, 5, 6)),
}


def drawn(subscripts):
    """x, y and the gradient to their product, float64 of bfloat16's values."""
    rng = np.random.default_rng(0)
    shapes = SHAPES[subscripts]
    out = np.einsum(subscripts, *map(np.zeros, shapes)).shape
    arrays = [rng.normal(size=shape) for shape in (*shapes, out)]
    return [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in arrays]


def gradients(subscripts, x, y, g, dtype):
    z, pull = jax.vjp(lambda x, y: product(subscripts, x, y, dtype), x, y)
    return z, *pull(g.astype(z.dtype))


@pytest.mark.parametrize("subscripts", SHAPES)
def test_values_and_gradients_are_those_of_numpy(subscripts):
    x, y, g = drawn(subscripts)
    inputs, out = subscripts.split("->")
    of_x, of_y = inputs.split(",")
    wanted = (
        np.einsum(subscripts, x, y),
        np.einsum(f"{out},{of_y}->{of_x}", g, y),
        np.einsum(f"{of_x},{out}->{of_y}", x, g),
    )
    found = gradients(subscripts, *(jnp.asarray(a, jnp.float32) for a in (x, y, g)), None)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("subscripts", SHAPES)
def test_gradients_of_masters_are_summed_and_kept_in_float32(subscripts):
    """The inputs are bfloat16's, so that only sums round: no worse than float32's."""
    x, y, g = drawn(subscripts)
    inputs, out = subscripts.split("->")
    narrow, wide = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.float32)
    z, to_x, to_y = gradients(subscripts, narrow, wide, jnp.asarray(g), jnp.float32)
    assert (z.dtype, to_x.dtype, to_y.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact = np.einsum(f"{inputs.split(',')[0]},{out}->{inputs.split(',')[1]}", x, g)
    np.testing.assert_allclose(to_y, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(z, np.einsum(subscripts, x, y), rtol=1e-5, atol=1e-5)


def operands_of_products(function, *args):
    """The dtypes that meet in each dot_general of a function's program."""
    found = set()

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.add(tuple(v.aval.dtype.name for v in equation.invars))
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    look(getattr(inner, "jaxpr", inner))

    look(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.parametrize("subscripts", SHAPES)
def test_no_product_has_a_wide_operand(subscripts):
    x, y, g = map(jnp.asarray, drawn(subscripts))
    x = x.astype(jnp.bfloat16)
    met = operands_of_products(lambda *a: gradients(subscripts, *a, jnp.float32), x, y, g)
    assert met == {("bfloat16", "bfloat16")}


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_costs_no_product_and_keeps_nothing(frozen):
    x, y, g = map(jnp.asarray, drawn("md,df->mf"))
    operands = [x, y]
    moving = operands.pop(1 - frozen)

    def run(moving):
        return product("md,df->mf", *(operands + [moving] if frozen == 0 else [moving] + operands))

    z, pull = jax.vjp(run, moving)
    assert jax.make_jaxpr(lambda g: pull(g))(g).pretty_print().count("dot_general") == 1
    kept = {leaf.shape for leaf in jax.tree.leaves(pull) if leaf.ndim}
    assert kept == {operands[0].shape} and z.shape == g.shape


@pytest.mark.parametrize("num_in", [1, 2])
def test_linear_is_a_tensordot(num_in):
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(4, 5, 6, 7)[2 - num_in :])
    wanted = np.tensordot(x, kernel, num_in)
    found = linear(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), num_in)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_head_learns_in_float32():
    """Of masters: what a batch adds to a row is not rounded before devices add theirs."""
    rng = np.random.default_rng(2)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    gradient = jax.grad(lambda k: jnp.sum(head_logits(Head(k), hidden)))(kernel)
    exact = np.broadcast_to(np.asarray(hidden, np.float64).sum((0, 1)), (7, 5))
    np.testing.assert_allclose(gradient, exact, rtol=1e-6, atol=1e-6)
