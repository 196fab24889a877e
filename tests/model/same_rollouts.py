# SPDX-License-Identifier: Apache-2.0
"""Rollouts whose tokens attend by a kernel are those that attend by XLA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from opsd_jax.model.config import ModelConfig
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import FULLY_SHARDED, MeshConfig, make_mesh
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.rollout import rollout
from opsd_jax.sampling.slots import Sampler
from tests.tiny import tiny_batch, tiny_variables


def assert_rollouts_are_the_same(
    model_config: ModelConfig, by_xla: RolloutConfig, by_kernel: RolloutConfig, seed: int
) -> None:
    """Alone, split over 4 x 2 devices, and through slots; of rows that end at different places."""
    model, variables = Decoder(model_config), tiny_variables(model_config)
    prompts, key = tiny_batch(8).student, jax.random.key(seed)

    def run(config):
        sample = jax.jit(partial(rollout, model, config=config))
        return sample(variables, prompts.ids, prompts.lengths, key)

    want, alone = run(by_xla), run(by_kernel)
    with jax.set_mesh(make_mesh(MeshConfig(4, 2))), nn.logical_axis_rules(FULLY_SHARDED):
        split = run(by_kernel)
    for out in (alone, split):
        assert out.ids.tolist() == want.ids.tolist()
        np.testing.assert_allclose(out.logps, want.logps, atol=1e-5)
    assert want.mask.sum(1).min() < want.mask.sum(1).max() == 14

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
    asked = [ids[:n].tolist() for ids, n in zip(prompts.ids, prompts.lengths, strict=True)]
    mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    sampler = Sampler(model, 0, mesh, FULLY_SHARDED, 4)
    for one in sampler(variables, asked, by_kernel, keys):
        assert one.ids == want.ids[one.prompt][want.mask[one.prompt]].tolist()
