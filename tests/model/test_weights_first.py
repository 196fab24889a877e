# SPDX-License-Identifier: Apache-2.0
"""Turned matrices against NumPy, and that XLA keeps the order of the operands."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from opsd_jax.model.config import LoraConfig
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.quantized import quantized
from opsd_jax.model.weights_first import MAX_ROWS, turned, weights_first
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.decoding_form import decoding_form
from tests.tiny import tiny_config, tiny_variables


@pytest.mark.parametrize("rows", [(), (5,), (3, 1), (MAX_ROWS + 1,)], ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "letters"),
    [((6,), (7,), "...i,oi->...o"), ((2, 3), (7,), "...ij,oij->...o"), ((6,), (4, 2), None)],
)
def test_a_product_is_that_of_numpy(rows, inputs, outputs, letters):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(*rows, *inputs)), rng.normal(size=(*outputs, *inputs))
    want = np.einsum(letters or "...i,ohi->...oh", x, kernel)
    arguments = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), len(inputs)
    got = jax.jit(weights_first, static_argnums=2)(*arguments)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_sums_are_as_wide_as_asked_for():
    x, kernel = jnp.ones((4, 300), jnp.bfloat16), jnp.ones((2, 300), jnp.bfloat16)
    assert weights_first(x, kernel).dtype == jnp.bfloat16
    wide = weights_first(x, kernel, dtype=jnp.float32) + 1
    assert wide.dtype == jnp.float32 and (wide == 301).all()  # bfloat16 holds 300 and 302 alone.


def test_the_matrix_stays_the_first_operand():
    """Where rows are few; XLA would else exchange the operands of a product that is transposed."""
    text = {
        rows: jax.jit(weights_first).lower(jnp.ones((rows, 64)), jnp.ones((48, 64))).compile()
        for rows in (4, 2 * MAX_ROWS)
    }
    products = {rows: re.search(r"f32\[(\S+?)\]\S* dot\(", t.as_text()) for rows, t in text.items()}
    assert products[4][1] == "48,4" and products[2 * MAX_ROWS][1] == f"{2 * MAX_ROWS},48"


@pytest.mark.parametrize(("platform", "turns"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_accelerators_get_the_plain_product(platform, turns):
    x, kernel = jnp.ones((4, 64)), jnp.ones((48, 64))
    traced = jax.jit(weights_first).trace(x, kernel)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == turns
    assert re.findall(r"dot_general .*-> (\S+)", text) == [
        f"tensor<{'48x4' if turns else '4x48'}xf32>"
    ]


@pytest.mark.parametrize("stacked", [True, False])
def test_every_kernel_is_turned_and_nothing_else(stacked):
    config = tiny_config(lora=LoraConfig(rank=3, alpha=6.0), biases=("q_proj", "down_proj"))
    before = tiny_variables(config)
    if not stacked:
        form = decoding_form(Decoder(config), before, RolloutConfig(4, unroll_layers=4))[1]
        assert "turned" in form and "layers_0" in form["turned"]
    after = flatten_dict(turned(quantized(before)))
    number = 0
    for path, leaf in flatten_dict(quantized(before)).items():
        if path[0] == "params" and path[-1] == "kernel":
            number += 1
            shape = after["turned", *path[1:]].shape
            inputs = 2 if path[-2] == "o_proj" else 1
            order = [0, *range(1 + inputs, leaf.ndim), *range(1, 1 + inputs)]
            np.testing.assert_array_equal(
                after["turned", *path[1:]], np.transpose(leaf, order), err_msg=str((path, shape))
            )
        else:
            np.testing.assert_array_equal(after[path], leaf)
    assert number == 7 and len(after) == len(flatten_dict(quantized(before)))
