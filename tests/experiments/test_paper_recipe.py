# SPDX-License-Identifier: Apache-2.0
"""The official recipe on Qwen3 shapes, built and abstractly evaluated on 8 virtual devices."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from opsd_jax.method.batch import Batch
from opsd_jax.method.train_step import train_step
from opsd_jax.model.sharding import MeshConfig, make_mesh
from opsd_jax.run.assembly import assemble
from opsd_jax.run.config import load_experiment
from opsd_jax.sampling.prompts import Context
from tests.experiments.test_plans import plans
from tests.representatives import representatives
from tests.tiny import WordTokenizer

PAPER = Path(__file__).parents[2] / "experiments" / "paper"
# (width, layers, heads, mlp, tied, clip, parameters): the published config.json files.
SHAPES = {
    "1p7b": (2048, 28, 16, 6144, True, 0.05, 1_720_574_976),
    "4b": (2560, 36, 32, 9728, True, 0.05, 4_022_468_096),
    "8b": (4096, 36, 32, 12288, False, 0.06, 8_190_735_360),
}


@pytest.mark.parametrize("size", SHAPES)
def test_the_recipe_is_the_official_one(size):
    """The recipe of the published scripts."""
    experiment, _ = load_experiment([str(PAPER / f"qwen3_{size}.gin")])
    train, rollout, divergence = experiment.train, experiment.rollout, experiment.divergence
    assert (train.batch_size, train.num_steps, train.learning_rate) == (32, 100, 5e-6)
    assert (train.lora.rank, train.lora.alpha, train.dtype) == (64, 128.0, "bfloat16")
    assert (rollout.max_new_tokens, rollout.temperature) == (1024, 1.1)
    assert (rollout.top_p, rollout.top_k) == (0.95, 20)
    assert (divergence.name, divergence.clip, divergence.support) == ("forward_kl", "entry", "full")
    assert (divergence.temperature, divergence.clip_threshold) == (1.1, SHAPES[size][5])
    assert experiment.teacher.weights == "initial"
    assert experiment.optimizer.max_grad_norm == 0.1 and train.checkpoint_every_steps == 25
    contexts = experiment.contexts
    assert (contexts.student_thinking, contexts.teacher_thinking) == (False, True)


@pytest.mark.parametrize("size", representatives(SHAPES, "1p7b"))
@pytest.mark.parametrize("model_axis", representatives([1, 2], 2))
def test_the_whole_step_fits_together(size, model_axis):
    experiment, _ = load_experiment([str(PAPER / f"qwen3_{size}.gin")])
    mesh = make_mesh(MeshConfig(model=model_axis))
    base = plans().qwen3(*SHAPES[size][:5])
    parts = assemble(experiment, base, WordTokenizer(), mesh)
    state = parts.abstract
    counted = sum(math.prod(x.shape) for x in jax.tree.leaves(state.frozen))
    assert counted == SHAPES[size][6]
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert state.teacher == {}
    # Fully sharded: no device holds more than an eighth of the large matrices.
    kernel = state.frozen["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert math.prod(kernel.sharding.shard_shape(kernel.shape)) * 8 == math.prod(kernel.shape)

    def context(width):
        ids = jax.ShapeDtypeStruct((32, width), np.int32)
        return Context(ids, jax.ShapeDtypeStruct((32,), np.int32))

    batch = Batch(student=context(512), teacher=context(2048))
    with jax.set_mesh(mesh), nn.logical_axis_rules(parts.rules):
        new, metrics, completion = jax.eval_shape(partial(train_step, parts.method), state, batch)
    assert completion.ids.shape == (32, 1024)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (state, new))
    assert shapes[0] == shapes[1]
    assert metrics["loss/objective"].shape == () == metrics["loss/divergence"].shape
