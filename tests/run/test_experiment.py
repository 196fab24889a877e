# SPDX-License-Identifier: Apache-2.0
"""The state that a run starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.host.checkpoint import Checkpoints
from opsd_jax.model.sharding import make_mesh
from opsd_jax.run.assembly import assemble, frozen_variables, initial_state
from opsd_jax.run.config import load_experiment
from opsd_jax.run.loop import saved
from tests.tiny import WordTokenizer, tiny_config, tiny_variables

CHAINS = (
    "train.model = @RandomModel()",
    "train.problems = @ChainArithmetic()",
    "train.num_steps = 1",
    "train.batch_size = 8",
    "train.learning_rate = 1e-5",
    "rollout.max_new_tokens = 4",
)
LORA = ("train.lora = @lora()", "lora.rank = 2", "lora.alpha = 2.0")


def parts_and_params(*bindings):
    """An assembly over eight devices and a base that was loaded in bfloat16."""
    experiment, _ = load_experiment([], [*CHAINS, *bindings])
    config = tiny_config(vocab_size=100)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_variables(config)["params"])
    mesh = make_mesh(experiment.mesh)
    return assemble(experiment, config, WordTokenizer(), mesh), params


def dtypes(tree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_what_is_trained_of_a_bfloat16_base_is_float32_and_can_be_restored(tmp_path):
    parts, params = parts_and_params()
    state = initial_state(parts, params, seed=0)
    assert dtypes(state.trainable) == {"float32"} and state.frozen == {}
    assert jax.tree.map(lambda x: x.sharding, state.trainable) == parts.shardings.trainable
    jax.tree.map(np.testing.assert_array_equal, state.trainable["params"], params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved(state))
        checkpoints.wait()
        found = checkpoints.restore(saved(parts.abstract)).state
    jax.tree.map(np.testing.assert_array_equal, found.trainable, state.trainable)


def test_what_lies_frozen_below_adapters_keeps_its_dtype():
    parts, params = parts_and_params(*LORA)
    state = initial_state(parts, params, seed=0)
    assert dtypes(state.frozen) == {"bfloat16"} and dtypes(state.trainable) == {"float32"}
    assert dtypes(frozen_variables(parts, params)) == {"bfloat16"}


def test_the_schedule_counts_steps_and_not_passes():
    """Adam moves by the learning rate as long as the gradient stays the same."""
    linear = ("optimizer.schedule = 'linear'", "optimizer.decay_steps = 4")
    changes = ("train.num_updates = 3", "train.learning_rate = 8.0", *linear)
    parts, _ = parts_and_params(*changes)
    optimizer, params = parts.method.optimizer, jnp.zeros(())
    state, moved = optimizer.init(params), []
    for _ in range(4 * 3):
        update, state = optimizer.update(jnp.ones(()), state, params)
        moved.append(-update)
    np.testing.assert_allclose(moved, np.repeat([8.0, 6.0, 4.0, 2.0], 3), rtol=1e-4)


@pytest.mark.parametrize("setting", ["keep_checkpoints = 0", "grader_workers = -1"])
def test_bad_settings_name_themselves(setting):
    with pytest.raises(UserError, match=f"train.{setting.split()[0]} must be an integer"):
        load_experiment([], [*CHAINS, f"train.{setting}"])
