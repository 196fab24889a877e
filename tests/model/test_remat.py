# SPDX-License-Identifier: Apache-2.0
"""What the backward pass computes again changes what is stored and not what comes out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.model.config import REMATS, ModelConfig
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import MeshConfig, batch_sharding, make_mesh, on_mesh
from opsd_jax.run.assembly import layout
from tests.representatives import representatives
from tests.tiny import VOCAB, tiny_config, tiny_variables

B, T = 8, 12
IDS = np.random.default_rng(0).integers(0, VOCAB, (B, T)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


def loss_of(config: ModelConfig):
    """A function of the variables and ids whose gradient differs in every place."""

    def loss(variables, ids):
        hidden, _ = Decoder(config).apply(variables, ids, jnp.asarray(POSITIONS))
        return jnp.sum(jnp.sin(hidden))

    return loss


def stored_bytes(config: ModelConfig) -> int:
    """Of all that the forward pass leaves to the backward pass, without the variables."""
    variables = tiny_variables(dataclasses.replace(config, remat=False))

    def backward(variables):
        return jax.vjp(lambda v: loss_of(config)(v, jnp.asarray(IDS)), variables)[1]

    left = jax.tree.leaves(jax.eval_shape(backward, variables))
    own = {leaf.shape for leaf in jax.tree.leaves(variables)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in left if leaf.shape not in own)


def assert_same_gradients(found, want):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5 * np.max(np.abs(other)))


@pytest.fixture(scope="module")
def plain_gradients():
    """Of the model that stores everything, on one device."""
    return jax.jit(jax.grad(loss_of(tiny_config())))(tiny_variables(tiny_config()), IDS)


@pytest.mark.parametrize("remat", representatives([True, *REMATS], "keep_projections"))
def test_gradients_on_eight_devices_are_those_that_store_everything(remat, plain_gradients):
    config, placed = tiny_config(remat=remat), MeshConfig(model=2)
    mesh = make_mesh(placed)
    shardings = layout(Decoder(config), mesh, placed.rules)[1]
    variables = jax.device_put(tiny_variables(tiny_config()), shardings)
    gradient = jax.jit(jax.grad(loss_of(config)), out_shardings=shardings)
    found = on_mesh(gradient, mesh, placed.rules)(
        variables, jax.device_put(IDS, batch_sharding(mesh))
    )
    assert_same_gradients(found, plain_gradients)


def test_experts_recompute_the_same_gradients():
    plain = tiny_config(num_experts=4, experts_per_token=2)
    variables = tiny_variables(plain)
    kept = dataclasses.replace(plain, remat="keep_projections")
    assert_same_gradients(
        *(jax.jit(jax.grad(loss_of(config)))(variables, IDS) for config in (kept, plain))
    )


def test_what_is_stored_is_what_the_names_say():
    """Exactly the outputs of six projections: nothing needs that of down_proj."""
    c = tiny_config()
    found = {
        remat: stored_bytes(dataclasses.replace(c, remat=remat)) for remat in (True, *REMATS, False)
    }
    width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.embed_dim + 2 * c.mlp_dim
    assert found["keep_projections"] - found[True] == B * T * c.num_layers * width * 4
    assert found["offload_projections"] == found["keep_projections"] < found[False]


def test_the_compiled_program_needs_memory_in_the_order_of_the_names():
    def temporaries(remat):
        config = tiny_config(remat=remat)
        step = jax.jit(jax.grad(loss_of(config))).lower(tiny_variables(tiny_config()), IDS)
        return step.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(True) < temporaries("keep_projections") < temporaries(False)


def test_offloading_moves_the_projections_to_the_host():
    text = {}
    for remat in REMATS:
        gradient = jax.grad(loss_of(tiny_config(remat=remat)))
        text[remat] = str(jax.make_jaxpr(gradient)(tiny_variables(tiny_config()), IDS))
    moved = f"f32<host>[2,{B},{T},{tiny_config().mlp_dim}]"
    assert moved in text["offload_projections"] and "<host>" not in text["keep_projections"]
