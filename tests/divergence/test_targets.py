# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.divergence import targets
from opsd_jax.divergence.losses import DivergenceConfig, logit_divergence, token_divergence
from opsd_jax.divergence.vocabulary import Vocabulary
from opsd_jax.errors import UserError
from opsd_jax.model.head import Head
from tests.divergence import oracle
from tests.divergence.test_fused import QUICK, mesh_of

V, K = 9, 3
LOGITS = np.random.default_rng(0).normal(size=(K + 1, V)).astype(np.float32) * 2


def normalise(weights):
    return weights / weights.sum()


def contrast(p):
    wrong = np.maximum(np.log((p[1] + p[2]) / 2), -1.5)
    return normalise(np.exp(1.5 * np.log(p[0]) - 0.5 * wrong))


def jensen_shannon(p, q):
    m = (p + q) / 2
    return ((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2


def cautious(p):
    alpha = 0.4 * 2 * (1 / (1 + np.exp(-5.0 * jensen_shannon(*p))) - 0.5)
    assert 0.001 < alpha < 0.399
    return normalise(p[0] ** (1 - alpha) * p[1] ** alpha)


def least_likely(teacher_logps, vocabulary):
    """A user's own: each teacher counts by its largest probability, over all slices."""
    weights = [jnp.exp(vocabulary.max(logps))[..., None] for logps in teacher_logps]
    return sum(w * logps for w, logps in zip(weights, teacher_logps, strict=True))


TARGETS = {
    "cautious_barycentre": (
        functools.partial(targets.cautious_barycentre, max_alpha=0.4, beta=5.0),
        2,
        cautious,
    ),
    "own": (least_likely, K, lambda p: normalise(np.exp(sum(x.max() * np.log(x) for x in p)))),
    "mean": (targets.mean, K, lambda p: sum(p) / 3),
    "contrast": (functools.partial(targets.contrast, alpha=0.5, floor=-1.5), K, contrast),
    "barycentre": (
        functools.partial(targets.barycentre, alpha=0.25),
        2,
        lambda p: normalise(p[0] ** 0.75 * p[1] ** 0.25),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_target(name, temperature):
    """KL(target || student), and diagnostics of the target, not of any one teacher."""
    transform, num_teachers, expected = TARGETS[name]
    teachers = tuple(LOGITS[1 : 1 + num_teachers])
    config = DivergenceConfig(target=transform, temperature=temperature)
    got = logit_divergence(config, LOGITS[0], teachers, np.int32(4))
    target = expected([oracle.probabilities(z, temperature) for z in teachers])
    student = oracle.probabilities(LOGITS[0], temperature)
    np.testing.assert_allclose(got.objective, (target * np.log(target / student)).sum(), rtol=2e-6)
    plain = expected([oracle.probabilities(z) for z in teachers])
    np.testing.assert_allclose(got.teacher_entropy, -(plain * np.log(plain)).sum(), rtol=2e-6)
    np.testing.assert_allclose(got.teacher_logps, np.log(plain[4]), rtol=2e-6)


def test_tokens_that_a_teacher_excludes():
    logps = jax.nn.log_softmax(np.array([[0.0, 1.0, -np.inf], [1.0, -np.inf, -np.inf]]))
    np.testing.assert_allclose(np.exp(targets.mean(logps))[2], 0)
    assert targets.contrast(logps, floor=-5.0)[1] == 1.5 * logps[0, 1] + 2.5
    assert targets.barycentre(logps)[1] == -np.inf
    same = targets.cautious_barycentre(logps[:1].repeat(2, 0), Vocabulary(3))
    np.testing.assert_allclose(same, logps[0], rtol=1e-6)
    leaning = targets.cautious_barycentre(logps, Vocabulary(3))
    assert leaning[1] == -np.inf and np.isfinite(leaning[0])


def test_a_barycentre_of_three_is_refused():
    config = DivergenceConfig(target=targets.cautious_barycentre)
    with pytest.raises(UserError, match="@target_cautious_barycentre is made of two teacher cont"):
        logit_divergence(config, LOGITS[0], tuple(LOGITS[1:]))


B, C, D, S = 4, 3, 5, 1.3


def rows(num_teachers):
    """Hidden states of the student and of teachers with a head of their own; a row that is NaN."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(1 + num_teachers, B, C, D)).astype(np.float32)
    kernels = rng.normal(size=(2, 13, D)).astype(np.float32)
    ids = rng.integers(0, 13, (B, C)).astype(np.int32)
    sampled = np.log(rng.uniform(0.02, 0.9, (B, C))).astype(np.float32)
    mask = np.arange(C) < np.array([0, 3, 1, 2])[:, None]
    hidden[:, 0], sampled[0] = np.nan, np.nan
    return hidden, kernels, ids, sampled, mask


def numpy_loss(expected, hidden, kernels, ids, sampled, mask, temperatures, clip):
    """Sum of w KL(target || student), its gradient in the student's hidden states and head."""
    total, d_hidden, d_head = 0.0, np.zeros((B, C, D)), np.zeros((13, D))
    hidden, kernels = hidden.astype(np.float64), kernels.astype(np.float64)
    clipped = 0
    for b, t in zip(*np.nonzero(mask), strict=True):
        student = oracle.probabilities(kernels[0] @ hidden[0, b, t], temperatures[0])
        target = expected(
            [oracle.probabilities(kernels[1] @ h[b, t], temperatures[1]) for h in hidden[1:]]
        )
        ratio = student[ids[b, t]] / np.exp(np.float64(sampled[b, t]))
        clipped += ratio > clip
        weight = min(ratio, clip)
        total += weight * (target * np.log(target / student)).sum()
        d_logits = weight * (student - target) / temperatures[0]
        d_hidden[b, t] = kernels[0].T @ d_logits
        d_head += np.outer(d_logits, hidden[0, b, t])
    assert 0 < clipped < mask.sum()
    return total, d_hidden, d_head


@pytest.mark.parametrize(
    "name",
    [
        "cautious_barycentre",
        *(pytest.param(n, marks=pytest.mark.slow) for n in TARGETS if n != "cautious_barycentre"),
    ],
)
def test_dense_fused_and_split_are_numpy(name):
    """Temperatures of their own, an importance clip, a vocabulary that 4 devices do not divide."""
    transform, num_teachers, expected = TARGETS[name]
    hidden, kernels, ids, sampled, mask = rows(num_teachers)
    want = numpy_loss(expected, hidden, kernels, ids, sampled, mask, (S, 0.8), 0.7)

    def found(implementation, mesh=None):
        config = DivergenceConfig(
            target=transform,
            temperature=S,
            teacher_temperature=0.8,
            importance_clip=0.7,
            implementation=implementation,
            token_block=5,
            vocab_block=4,
        )

        def loss(student_hidden, kernel):
            tokens = token_divergence(
                config,
                student_hidden,
                Head(kernel),
                tuple(hidden[1:]),
                (Head(kernels[1]),) * num_teachers,
                ids,
                mask,
                sampled_logps=sampled,
                mesh=mesh,
            )
            return jnp.sum(tokens.objective)

        step = jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=QUICK)
        value, gradients = step(hidden[0], kernels[0])
        return value, *gradients

    for got in (found("dense"), found("fused"), found("fused", mesh_of(2, 4))):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)
