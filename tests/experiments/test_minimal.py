# SPDX-License-Identifier: Apache-2.0
"""experiments/minimal.py computes what `opsd_jax.train_step` computes, and its divergence falls."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import opsd_jax
from opsd_jax.sampling.random_keys import Use, key_for
from tests.tiny import tiny_batch, tiny_config, tiny_variables

PATH = Path(__file__).parents[2] / "experiments" / "minimal.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_loss_and_gradient_are_the_packages(minimal):
    """Under plain SGD of rate 1 the update is the gradient."""
    model, optimizer, key = opsd_jax.Decoder(tiny_config()), optax.sgd(1.0), jax.random.key(4)
    config = opsd_jax.RolloutConfig(max_new_tokens=6, stop_ids=(3, 5))
    params, teacher = (tiny_variables(tiny_config(), seed)["params"] for seed in (0, 1))
    method = opsd_jax.Method(
        model, config, opsd_jax.DivergenceConfig(), opsd_jax.TeacherConfig().build(), optimizer
    )
    state = opsd_jax.init_state(method, {"params": teacher}, {}, key)  # which keeps the teacher
    state = state.replace(trainable={"params": params})
    batch = tiny_batch()
    theirs, metrics, completion = jax.jit(opsd_jax.train_step, static_argnums=0)(
        method, state, batch
    )
    assert completion.stopped.any() and not completion.stopped.all()
    step = jax.jit(minimal.opsd_step, static_argnums=(0, 1, 2))
    ours, _, loss = step(
        *(model, optimizer, config, params, teacher, optimizer.init(params), batch),
        key_for(Use.COMPLETIONS, key, 0),
    )
    np.testing.assert_allclose(loss, metrics["loss/objective"], rtol=1e-5)
    assert loss > 0.1

    def gradient(after):
        return jax.tree.map(lambda new, old: np.asarray(old - new), after, params)

    for got, want in zip(
        *map(jax.tree.leaves, (gradient(ours), gradient(theirs.trainable["params"]))), strict=True
    ):
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1.0, np.abs(want).max()))


def test_its_divergence_falls(minimal, capsys):
    minimal.main(num_steps=21, B=16)
    found = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 3 and found[2] < 0.7 * found[0]
