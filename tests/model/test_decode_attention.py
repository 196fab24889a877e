# SPDX-License-Identifier: Apache-2.0
"""The kernel for new tokens against NumPy in float64, and rollouts through it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.model import attention, decode_attention
from opsd_jax.model.attention import attend_both
from opsd_jax.model.decode_attention import attend_store
from opsd_jax.model.kv_cache import KV
from opsd_jax.sampling.config import RolloutConfig
from tests.model.same_rollouts import assert_rollouts_are_the_same
from tests.tiny import tiny_config

L, B, K, G, H, S = 3, 5, 2, 2, 8, 300
CONFIG = RolloutConfig(max_new_tokens=14, segment_len=3, stop_ids=(3,), attention="pallas")


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel where there is no TPU, in blocks of which a few rows need several."""
    monkeypatch.setattr(attention, "attend_both", partial(attend_both, interpret=True))
    monkeypatch.setattr(decode_attention, "BLOCK", 128)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_row_attends_to_what_it_holds_and_may_see(interpreted, softcap):
    """Rows of one slot, over block borders, to the end, with a window, and with nothing."""
    rng = np.random.default_rng(0)
    q, keys, values = (
        rng.normal(size=s).astype(np.float32)
        for s in ((B, K, G, H), (L, B, K, H, S), (L, B, K, S, H))
    )
    starts, stops = np.array([0, 100, -5, 256, 0]), np.array([1, 130, S, 300, 0])
    for b in range(B):  # Nothing outside may matter, whatever it is.
        keys[:, b, :, :, stops[b] :] = values[:, b, :, stops[b] :] = np.nan
    out, logsum = jax.jit(partial(attend_store, softcap=softcap, interpret=True))(
        q, KV(keys, values), jnp.int32(1), starts, stops
    )
    for b in range(B - 1):
        seen = slice(max(starts[b], 0), stops[b])
        s = np.einsum("kgh,khs->kgs", q[b].astype(np.float64), keys[1, b, :, :, seen])
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        w = np.exp(s)
        want = np.einsum("kgs,ksh->kgh", w / w.sum(-1, keepdims=True), values[1, b, :, seen])
        np.testing.assert_allclose(out[b], want, atol=1e-5)
        np.testing.assert_allclose(logsum[b], np.log(w.sum(-1)), atol=1e-5)
    assert (out[-1] == 0).all() and (logsum[-1] < -1e29).all()


@pytest.mark.parametrize(
    ("changes", "unroll_layers"),
    [
        pytest.param({}, 4, marks=pytest.mark.slow),
        (dict(window=4, window_layers=(1,), attention_softcap=2.0), 0),
    ],
    ids=["unrolled", "scanned-windowed"],
)
def test_rollouts_are_the_same_through_the_kernel(interpreted, changes, unroll_layers):
    """Alone, split over 4 x 2 devices, and through slots."""
    config = dataclasses.replace(CONFIG, unroll_layers=unroll_layers)
    by_xla = dataclasses.replace(config, attention="xla")
    assert_rollouts_are_the_same(tiny_config(**changes), by_xla, config, seed=3)
