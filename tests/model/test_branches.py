# SPDX-License-Identifier: Apache-2.0
"""A prompt and its answers, side by side and as texts, against slow loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.model.branches import Branches

SIZES = [(5, 3, 4), (1, 2, 1), (3, 1, 2), (4, 4, 7)]  # P, G, C
B = 3


def branches_of(P, G) -> Branches:
    return Branches(jnp.asarray(np.random.default_rng(P).integers(1, P + 1, B)), P, G)


@pytest.mark.parametrize("P, G, C", SIZES)
def test_each_answer_follows_its_prompt_at_once(P, G, C):
    branches = branches_of(P, G)
    columns = np.random.default_rng(0).normal(size=(B, P + G * C, 2)).astype(np.float32)
    texts = np.asarray(branches.texts(jnp.asarray(columns)))
    again = np.asarray(branches.columns(jnp.asarray(texts)))
    positions = np.asarray(branches.positions(P + G * C))
    for b, n in enumerate(branches.lengths.tolist()):
        for g in range(G):
            said = slice(P + g * C, P + g * C + C)
            expected = [*columns[b, :n], *columns[b, said], *np.zeros((P - n, 2))]
            np.testing.assert_array_equal(texts[b * G + g], expected)
            assert positions[b, said].tolist() == list(range(n, n + C))
        assert positions[b, :n].tolist() == list(range(n))
        np.testing.assert_array_equal(again[b, P:], columns[b, P:])
        np.testing.assert_array_equal(again[b, :P], [*columns[b, :n], *np.zeros((P - n, 2))])


@pytest.mark.parametrize("P, G, C", SIZES)
@pytest.mark.parametrize("name", ["texts", "columns"])
def test_gradients_are_the_transpose(name, P, G, C):
    """Both maps are linear: every entry of their matrix, read off unit vectors."""
    function = getattr(branches_of(P, G), name)
    shape = (B, P + G * C, 1) if name == "texts" else (B * G, P + C, 1)
    units = jnp.eye(np.prod(shape)).reshape(-1, *shape)
    matrix = jax.vmap(function)(units).reshape(len(units), -1)
    out, pull = jax.vjp(function, jnp.zeros(shape))
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.float32)
    expected = (matrix @ cotangent.ravel()).reshape(shape)
    np.testing.assert_allclose(pull(cotangent)[0], expected, atol=1e-5)


def test_no_gradient_is_scattered():
    """Scatters of rows are what this form would cost on accelerators."""
    branches = branches_of(5, 3)

    def loss(x):
        return jnp.sum(branches.columns(jnp.sin(branches.texts(x))) ** 2)

    x = jnp.ones((B, 5 + 3 * 4, 2))
    assert "scatter" not in jax.jit(jax.grad(loss)).lower(x).as_text()
