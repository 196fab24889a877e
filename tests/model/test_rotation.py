# SPDX-License-Identifier: Apache-2.0
"""Rotary angles are made once, for all layers and heads that turn alike."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.model.config import layer_numbers
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.rotation import frequencies, places_of, rotate
from tests.tiny import tiny_config, tiny_variables


def test_a_pair_turns_by_its_position_times_its_frequency():
    config = tiny_config(window=4, window_layers=(1,), local_rope_theta=10.0)
    positions = jnp.array([[0, 1, 2], [7, 0, 500]])
    places, (rope, which) = places_of(config, positions), frequencies(config)
    assert len(rope) == 2 and len(which) == config.num_layers
    np.testing.assert_array_equal(rope[which], layer_numbers(config)["rope"])
    x = np.random.default_rng(0).normal(size=(2, 3, 2, config.head_dim)).astype(np.float32)
    for layer in range(config.num_layers):
        got = rotate(jnp.asarray(x), places.turn(jnp.int32(which[layer])), 0.5)
        pairs = x[..., : config.head_dim // 2] + 1j * x[..., config.head_dim // 2 :]
        angle = np.asarray(positions, np.float64)[..., None, None] * rope[which[layer]]
        want = 0.5 * pairs * np.exp(1j * angle)
        np.testing.assert_allclose(got, np.concatenate([want.real, want.imag], -1), atol=1e-4)


def test_the_compiled_program_makes_each_angle_once():
    """No sine has the size of the heads, nor one of all layers, forward or backward."""
    config = tiny_config()
    variables = tiny_variables(config)
    ids = jnp.zeros((2, 24), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(24), ids.shape)

    def loss(variables):
        return jnp.sum(Decoder(config).apply(variables, ids, positions)[0] ** 2)

    text = jax.jit(jax.grad(loss)).lower(variables).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]*)\]\S* (?:sine|cosine)\(", text)
    assert shapes and {np.prod([int(n) for n in s.split(",")]) for s in shapes} == {
        2 * 24 * config.head_dim // 2
    }
    assert len(shapes) <= 4  # of student and of what is computed again
