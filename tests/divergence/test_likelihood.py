# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens on a mesh: the same numbers, and how the head moves."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opsd_jax.divergence.likelihood import token_logps
from opsd_jax.method.objective import sampled_logits
from opsd_jax.model.head import Head
from opsd_jax.model.sharding import MeshConfig, make_mesh, on_mesh
from tests.representatives import representatives

MESHES = {
    "data 2 x model 4": MeshConfig(model=4),
    "data 8": MeshConfig(),
    "model 8": MeshConfig(model=8),
    "data 2 x sequence 4": MeshConfig(data=2, sequence=4),
    "replica 2 x sequence 2 x model 2": MeshConfig(replica=2, sequence=2, model=2),
}
FILTERS = partial(sampled_logits, (0.7, 5, 0.9, 0.0))


@pytest.mark.parametrize("mesh", representatives(MESHES, "data 2 x model 4", "data 2 x sequence 4"))
@pytest.mark.parametrize("process", [None, FILTERS], ids=["plain", "filtered"])
@pytest.mark.parametrize("length", [8, 5])  # five tokens do not divide, nor do 13 entries
def test_values_and_gradients_are_those_of_one_device(mesh, process, length):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(4, length, 16)), rng.normal(size=(13, 16))
    ids, mask = rng.integers(0, 13, (4, length)), rng.random((4, length)) < 0.7

    def run(hidden, kernel, ids, mask, block):
        logps, entropy = token_logps(Head(kernel, 5.0), hidden, ids, mask, block, process)
        finite = jnp.where(jnp.isfinite(logps), logps, 0.0)
        weights = jnp.cos(jnp.arange(length)), jnp.sin(jnp.arange(length))
        return jnp.sum(finite * weights[0] + entropy * weights[1]), (logps, entropy)

    both = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    floats = (jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32))
    args = (*floats, jnp.asarray(ids), jnp.asarray(mask))
    placement = MESHES[mesh]
    found = on_mesh(jax.jit(partial(both, block=6)), make_mesh(placement), placement.rules)(*args)
    expected = jax.jit(partial(both, block=None))(*args)
    assert np.isinf(expected[0][1][0]).any() == (process is not None)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("block", [None, 3])
def test_the_gradient_of_entropy_is_that_of_its_formula(block):
    """dH / dz_v = -p_v (log p_v + H): a bonus for it would otherwise do nothing, in silence."""
    rng = np.random.default_rng(1)
    logits, ids = rng.normal(size=(1, 5, 7)) * 2, np.zeros((1, 5), int)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -np.sum(p * np.log(p), axis=-1, keepdims=True)

    def total(hidden):
        head = Head(jnp.eye(7))
        return token_logps(head, hidden, jnp.asarray(ids), jnp.asarray(ids) == 0, block)[1].sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(value, entropy.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, -p * (np.log(p) + entropy), atol=1e-5)


@pytest.mark.parametrize("mesh", ["data 8", "data 2 x model 4", "data 2 x sequence 4"])
def test_the_head_crosses_the_devices_once_each_way(mesh):
    """And not once a block: no loop has an exchange of more than numbers of tokens."""
    placement, V, D = MESHES[mesh], 64, 32
    devices = make_mesh(placement)
    own_tokens = PartitionSpec(
        tuple(n for n in devices.axis_names if n not in ("model", "sequence")),
        "sequence" if placement.sequence > 1 else None,
    )
    own_head = PartitionSpec("model", dict(placement.rules)["embed"])

    def loss(hidden, kernel, ids):
        return token_logps(Head(kernel), hidden, ids, ids > 0, token_block=4)[0].sum()

    inputs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, spec))
        for shape, dtype, spec in (
            ((8, 16, D), jnp.float32, own_tokens),
            ((V, D), jnp.float32, own_head),
            ((8, 16), jnp.int32, own_tokens),
        )
    ]
    step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=tuple(x.sharding for x in inputs[:2]))
    text = on_mesh(step.lower, devices, placement.rules)(*inputs).compile().as_text()
    moves = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    moved = re.findall(rf"= (.*?) ({moves})(?:-start)?\(.*?op_name=\"([^\"]*)", text)
    head = f"f32[{V // placement.model},{D}]"
    assert sorted(kind for shape, kind, _ in moved if head in shape) == ["all-gather", "all-reduce"]
    assert not [shape for shape, _, name in moved if f",{D}]" in shape and "while" in name]
