# SPDX-License-Identifier: Apache-2.0
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.sampling.tokens import (
    _first_above,
    filter_logits,
    keep_largest,
    largest,
    log_prob,
    penalise,
    prompt_tokens,
    sample,
)


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


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (dict(top_k=5), [("TopKLogitsWarper", 5)]),
        (dict(top_p=0.7), [("TopPLogitsWarper", 0.7)]),
        (dict(min_p=0.1), [("MinPLogitsWarper", 0.1)]),
        (
            dict(top_k=20, top_p=0.9, min_p=0.05),
            [("TopKLogitsWarper", 20), ("TopPLogitsWarper", 0.9), ("MinPLogitsWarper", 0.05)],
        ),
    ],
)
def test_filters_equal_those_of_transformers(ours, theirs):
    torch, logits_process = pytest.importorskip("torch"), "transformers.generation.logits_process"
    logits = np.random.default_rng(3).normal(size=(6, 50)).astype(np.float32) * 2
    expected = torch.tensor(logits) / 0.8
    for name, value in theirs:
        expected = getattr(importlib.import_module(logits_process), name)(value)(None, expected)
    got = filter_logits(jnp.asarray(logits), 0.8, **ours)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_repetition_penalty_equals_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    r = np.random.default_rng(4)
    logits, ids = r.normal(size=(3, 20)).astype(np.float32), r.integers(0, 20, (3, 6))
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor(ids), torch.tensor(logits))
    seen = prompt_tokens(jnp.asarray(ids), jnp.full(3, 6), 20) > 0
    got = penalise(jnp.asarray(logits), seen, seen, repetition=1.4)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)
    # Presence touches what has been said, and not the prompt.
    said = np.zeros((3, 20), bool)
    said[:, 2] = True
    got = penalise(jnp.asarray(logits), seen, jnp.asarray(said), presence=0.5)
    np.testing.assert_allclose(got, logits - 0.5 * said, rtol=1e-6)


def test_padding_of_a_prompt_was_not_said():
    assert prompt_tokens(jnp.array([[4, 4, 1, 0]]), jnp.array([2]), 5).tolist() == [[0, 0, 0, 0, 1]]


def test_log_prob_is_that_of_the_softmax():
    logits = np.random.default_rng(5).normal(size=(4, 9)) * 30
    ids = np.array([0, 8, 3, 3])
    top = logits.max(1)
    expected = logits[np.arange(4), ids] - top - np.log(np.exp(logits - top[:, None]).sum(1))
    got = log_prob(jnp.asarray(logits, jnp.float32), jnp.asarray(ids))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.sampled_from([1, 63, 64, 65, 200]))
def test_one_number_picks_the_entry_of_the_cumulative_distribution(seed, vocab):
    r = np.random.default_rng(seed)
    logits, uniform = r.normal(size=(5, vocab)) * 2, r.uniform(size=5)
    p = np.exp(logits - logits.max(1, keepdims=True))
    edges = np.cumsum(p / p.sum(1, keepdims=True), axis=1)
    got = sample(jnp.asarray(logits, jnp.float32), jnp.asarray(uniform, jnp.float32))
    for row, token in enumerate(got.tolist()):
        low = edges[row, token - 1] if token else 0.0
        assert low - 1e-5 <= uniform[row] <= edges[row, token] + 1e-5


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 40), top_p=st.sampled_from([0.3, 0.9, 1.0]))
def test_the_largest_are_found_in_blocks_and_with_their_ties(seed, k, top_p):
    """Of rounded, so often tied, and barred logits; against sums over what is above each entry."""
    r = np.random.default_rng(seed)
    z = np.round(r.normal(size=(4, 300)) * 3, 1)
    z[r.uniform(size=z.shape) < 0.2] = -np.inf
    above = z[:, None, :] > z[:, :, None]
    stays = above.sum(-1) < k
    weights = np.where(stays, np.exp(z - z.max(-1, keepdims=True)), 0)
    share = (above * weights[:, None, :]).sum(-1) / weights.sum(-1, keepdims=True)
    got = np.asarray(keep_largest(jnp.asarray(z, jnp.float32), k, top_p))
    sure = abs(share - top_p) > 1e-5  # Nearer than that, rounding decides.
    np.testing.assert_array_equal(
        (got > -np.inf)[sure], (stays & (share < top_p) & (z > -np.inf))[sure]
    )
    np.testing.assert_array_equal(
        largest(jnp.asarray(z, jnp.float32), k), -np.sort(-z.astype(np.float32))[:, :k]
    )


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


def test_what_has_no_weight_is_not_drawn_where_a_rounded_running_sum_rises_there():
    weights = jnp.array([[0.0, 0.5, 0.0, 0.5, 0.0]])
    through = jnp.array([[1e-8, 0.5, 0.5000001, 0.99999994, 1.0]])
    drawn = [int(_first_above(through, weights, jnp.array([u]))[0]) for u in (0, 0.50000004, 1)]
    assert drawn == [1, 3, 3]
