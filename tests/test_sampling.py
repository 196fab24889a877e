# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.sampling import filter_logits, sample


def slow_filter(logits, temperature, top_k, top_p):
    """Row by row, in float64, straight from the definition."""
    z = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-z, kind="stable")
    kept = order[: top_k or len(z)]
    p = np.exp(z[kept] - z[kept].max())
    p /= p.sum()
    before = np.cumsum(p) - p
    kept = kept[before < top_p]
    out = np.full(len(z), -np.inf)
    out[kept] = z[kept]
    return out


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([1, 7, 12]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_filter_equals_the_definition(seed, vocab, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(size=(3, vocab)).astype(np.float32) * 2
    ours = filter_logits(jnp.asarray(logits), temperature, top_k, top_p)
    expected = [slow_filter(row, temperature, top_k, top_p) for row in logits]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_filter_keeps_ties_and_at_least_one():
    tied = filter_logits(jnp.array([[1.0, 2.0, 2.0, 2.0]]), 1.0, top_k=2)
    assert np.isfinite(tied[0]).tolist() == [False, True, True, True]
    one = filter_logits(jnp.array([[0.0, 5.0]]), 1.0, top_p=1e-6)
    assert np.isfinite(one[0]).tolist() == [False, True]


@pytest.mark.parametrize("top_k", [0, 3])
def test_samples_follow_the_distribution(top_k):
    """Chi-square at a fixed seed: 5 degrees of freedom, 99.9 % point 20.5."""
    logits = jnp.array([0.3, -1.0, 2.0, 1.0, 0.0, -0.5])
    filtered = filter_logits(logits[None], 1.3, top_k)
    n = 20_000
    uniform = jax.random.uniform(jax.random.key(0), (n,))
    ids = sample(jnp.broadcast_to(filtered, (n, 6)), uniform)
    expected = np.asarray(jax.nn.softmax(filtered[0])) * n
    counts = np.bincount(ids, minlength=6)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert np.sum((counts - expected)[kept] ** 2 / expected[kept]) < 20.5


def test_extreme_uniforms_draw_possible_tokens():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 1.0, -jnp.inf]] * 2)
    largest = np.nextafter(np.float32(1), np.float32(0))
    assert sample(logits, jnp.array([0.0, largest])).tolist() == [1, 3]
