# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.model.head import Head, head_logits, output_head
from tests.tiny import tiny_config, tiny_variables


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_capped_products(softcap):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(2, 3, 4)), rng.normal(size=(7, 4))
    want = hidden @ kernel.T
    want = want if softcap is None else softcap * np.tanh(want / softcap)
    got = head_logits(Head(jnp.float32(kernel), softcap), jnp.float32(hidden))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bfloat16_accumulates_in_float32():
    """4096 ones: a bfloat16 accumulator stops at 256."""
    logits = head_logits(Head(jnp.ones((3, 4096))), jnp.ones((2, 4096), jnp.bfloat16))
    assert logits.dtype == jnp.float32 and np.all(logits == 4096)


@pytest.mark.parametrize("tied", [False, True])
def test_output_head_is_the_models_own_array(tied):
    config = tiny_config(tie_embeddings=tied)
    params = tiny_variables(config)["params"]
    assert output_head(params, config).kernel is params["embed" if tied else "lm_head"]
