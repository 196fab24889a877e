# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.method.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer


@pytest.mark.parametrize(
    "config, expected",
    [
        (OptimizerConfig(), [8.0, 8.0, 8.0, 8.0, 8.0, 8.0]),
        (OptimizerConfig(warmup_steps=4), [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]),
        (OptimizerConfig(schedule="linear", decay_steps=4), [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]),
        (OptimizerConfig(1, "linear", 5), [8.0, 8.0, 6.0, 4.0, 2.0, 0.0]),
        (OptimizerConfig(schedule="cosine", decay_steps=2), [8.0, 4.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_schedule(config, expected):
    schedule = learning_rate_schedule(config, 8.0)
    np.testing.assert_allclose([schedule(n) for n in range(6)], expected, atol=1e-6)


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_first_updates_equal_adamw_by_hand(mu_dtype):
    """Two steps of AdamW after a global-norm clip, in float64; the first moment rounded between."""
    config = OptimizerConfig(weight_decay=0.1, max_grad_norm=1.0, b1=0.8, b2=0.9, mu_dtype=mu_dtype)
    optimizer = make_optimizer(config, 0.5)

    def kept(x):  # optax decays it in the dtype that it is kept in
        return np.asarray(x, jnp.dtype(mu_dtype)).astype(np.float64)

    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    params, state = jnp.asarray(w), optimizer.init(jnp.asarray(w))
    for step, g in enumerate(([3.0, 4.0], [0.1, 0.2]), 1):
        updates, state = optimizer.update(jnp.array(g), state, params)
        params = params + updates
        g = np.array(g) / max(1.0, np.linalg.norm(g))
        m, v = kept(0.8 * kept(m)) + 0.2 * g, 0.9 * v + 0.1 * g**2
        direction = m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-8)
        w = w - 0.5 * (direction + 0.1 * w)
        np.testing.assert_allclose(params, w, rtol=1e-5)


def test_bad_settings_name_themselves():
    with pytest.raises(UserError, match="optimizer.schedule"):
        OptimizerConfig(schedule="step")
    with pytest.raises(UserError, match="optimizer.decay_steps"):
        OptimizerConfig(schedule="linear")
    with pytest.raises(UserError, match="optimizer.max_grad_norm"):
        OptimizerConfig(max_grad_norm=-1)
    with pytest.raises(UserError, match="train.learning_rate"):
        make_optimizer(OptimizerConfig(), 0.0)
