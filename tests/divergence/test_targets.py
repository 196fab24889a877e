# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import numpy as np
import pytest

from opsd_jax.divergence import targets
from opsd_jax.divergence.losses import DivergenceConfig, logit_divergence
from tests.divergence import oracle

V, K = 9, 3
LOGITS = np.random.default_rng(0).normal(size=(K + 1, V)).astype(np.float32) * 2


def normalise(weights):
    return weights / weights.sum()


def contrast(p):
    wrong = np.maximum(np.log((p[1] + p[2]) / 2), -1.5)
    return normalise(np.exp(1.5 * np.log(p[0]) - 0.5 * wrong))


TARGETS = {
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
