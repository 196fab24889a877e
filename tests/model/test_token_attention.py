# SPDX-License-Identifier: Apache-2.0
"""The kernel of a new token, interpreted: against NumPy in float64, and rollouts through it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.model import decoder, token_attention
from opsd_jax.model.token_attention import Settings, attend_token
from opsd_jax.sampling import decoding_form
from opsd_jax.sampling.config import RolloutConfig
from tests.model.same_rollouts import assert_rollouts_are_the_same
from tests.tiny import tiny_config

B, K, G, H, S, R = 5, 2, 3, 16, 200, 12
CONFIG = RolloutConfig(max_new_tokens=14, segment_len=3, stop_ids=(3,), attention="pallas")


def norm(x, gain, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def turn(x, cos, sin):
    x1, x2 = np.split(x, 2, axis=-1)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


@pytest.mark.parametrize("window", [2**30, 70, 4])
@pytest.mark.parametrize(("normed", "softcap"), [(True, None), (False, 1.5)])
def test_a_token_attends_to_what_it_may_see(window, normed, softcap):
    """Rows with nothing in their store, over the borders of blocks, and full; NaN elsewhere."""
    rng = np.random.default_rng(0)
    shapes = (B, K, G + 2, H), (B, K, H, S), (B, K, S, H), (B, K, H, R), (B, K, R, H)
    qkv, keys, values, near_keys, near_values = (rng.normal(size=s) for s in shapes)
    filled, slot, scale = np.array([0, 1, 64, 131, S]), 7, 0.3
    angle, gains = rng.normal(size=(B, H // 2)), rng.normal(size=(2, H))
    cos, sin = np.cos(angle), np.sin(angle)
    for b in range(B):
        keys[b, :, :, filled[b] :] = values[b, :, filled[b] :] = np.nan
    near_keys[..., slot:] = near_values[:, :, slot:] = np.nan

    def f32(x):
        return jnp.asarray(x, jnp.float32)

    numbers = (jnp.array([slot]), jnp.array([window]), f32([scale]))
    numbers += tuple(f32(gains)) if normed else ()
    arrays = map(f32, (keys, values, near_keys, near_values))
    settings = Settings((1e-5, 1.0) if normed else None, softcap, interpret=True)
    out, buffer = jax.jit(partial(attend_token, settings))(
        f32(qkv), f32(cos), f32(sin), jnp.asarray(filled), numbers, *arrays
    )
    for b in range(B):
        q, k, v = qkv[b, :, :G], qkv[b, :, G], qkv[b, :, G + 1]
        if normed:
            q, k = norm(q, 1 + gains[0], 1e-5), norm(k, 1 + gains[1], 1e-5)
        q, k = turn(q, cos[b], sin[b]) * scale, turn(k, cos[b], sin[b])
        np.testing.assert_allclose(buffer.keys[b, :, :, slot], k, atol=1e-5)
        np.testing.assert_array_equal(buffer.values[b, :, slot], f32(v))
        np.testing.assert_array_equal(buffer.keys[b, ..., :slot], f32(near_keys[b, ..., :slot]))
        near = near_keys[b, ..., :slot], k[..., None]
        all_keys = np.concatenate([keys[b, ..., : filled[b]], *near], axis=-1)[..., -window:]
        near = near_values[b, :, :slot], v[:, None]
        all_values = np.concatenate([values[b, :, : filled[b]], *near], axis=1)[:, -window:]
        s = np.einsum("kgh,khs->kgs", q, all_keys)
        w = np.exp(s if softcap is None else softcap * np.tanh(s / softcap))
        want = np.einsum("kgs,ksh->kgh", w / w.sum(-1, keepdims=True), all_values)
        np.testing.assert_allclose(out[b], want, atol=1e-5)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Decoding takes the form that it has on GPUs, with the kernel interpreted."""
    monkeypatch.setattr(decoder, "platform", lambda: "gpu")
    monkeypatch.setattr(decoding_form, "platform", lambda: "gpu")
    monkeypatch.setattr(decoder, "Settings", partial(Settings, interpret=True))
    monkeypatch.setattr(token_attention, "BLOCK", 16)


@pytest.mark.parametrize(
    ("changes", "unroll_layers"),
    [
        pytest.param(dict(qk_norm_over_heads=True), None, marks=pytest.mark.slow),
        (dict(window=4, window_layers=(1,), attention_softcap=2.0), 0),
        (dict(), None),
    ],
    ids=["over-heads", "scanned-windowed", "joined"],
)
def test_rollouts_are_the_same_through_the_kernel(on_a_gpu, changes, unroll_layers):
    """Alone, split over 4 x 2 devices, and through slots."""
    config = dataclasses.replace(CONFIG, unroll_layers=unroll_layers)
    by_xla = dataclasses.replace(config, attention="xla", unroll_layers=0)
    assert_rollouts_are_the_same(tiny_config(qk_norm=True, **changes), by_xla, config, seed=4)
