# SPDX-License-Identifier: Apache-2.0
"""Experts on a mesh: each device computes its own tokens, and the numbers are those of one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import MeshConfig, make_mesh, on_mesh, texts_split, variable_shardings
from tests.tiny import tiny_config, tiny_variables

B, T, K = 8, 12, 2
CONFIG = tiny_config(num_experts=4, experts_per_token=K, mlp_dim=40, remat="keep_projections")
IDS = np.random.default_rng(0).integers(1, 24, (B, T))
MESHES = {
    "data 8": MeshConfig(),
    "data 4 x model 2": MeshConfig(model=2),
    "data 2 x sequence 4": MeshConfig(data=2, sequence=4),
}


def gradient(variables, ids=IDS):
    """Of a sum over what predicts, under the rules of scoring; hidden states besides."""

    def loss(variables):
        with texts_split():
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            hidden, _ = Decoder(CONFIG).apply(variables, ids, positions)
        return jnp.sum(jnp.sin(hidden)), hidden

    return jax.grad(loss, has_aux=True)(variables)


@pytest.mark.parametrize("rows", [B, 3])  # three rows do not divide
@pytest.mark.parametrize("mesh", MESHES)
def test_numbers_are_those_of_one_device(mesh, rows):
    placement = MESHES[mesh]
    ids, variables = IDS[:rows], tiny_variables(CONFIG)
    run = jax.jit(lambda variables: gradient(variables, ids))
    found = on_mesh(run, make_mesh(placement), placement.rules)(variables)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(run(variables)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_sorts_and_multiplies_its_own_tokens(mesh):
    placement = MESHES[mesh]
    devices = make_mesh(placement)
    boxed = jax.eval_shape(lambda key: Decoder(CONFIG).init(key, IDS, IDS), jax.random.key(0))
    shardings = variable_shardings(boxed, devices, placement.rules)
    run = jax.jit(gradient, in_shardings=(shardings,), out_shardings=(shardings, None))
    text = on_mesh(run.lower, devices, placement.rules)(nn.meta.unbox(boxed)).compile().as_text()
    width = CONFIG.mlp_dim // placement.model
    rows = {int(n) for n in re.findall(rf"f32\[(\d+),{width}\]", text)}
    assert B * T * K // (8 // placement.model) in rows
    assert B * T * K not in rows
