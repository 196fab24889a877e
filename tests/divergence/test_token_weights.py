# SPDX-License-Identifier: Apache-2.0
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.divergence import token_weights
from opsd_jax.divergence.losses import DivergenceConfig, TokenDivergence, logit_divergence

MASK = np.array([[True] * 5, [True, True, True, False, False], [False] * 5])


def tokens_of(seed=0):
    """Random diagnostics of three rows: 5, 3 and 0 tokens; zero where masked."""
    rng = np.random.default_rng(seed)
    names = TokenDivergence.__dataclass_fields__
    draw = {name: rng.normal(size=MASK.shape).astype(np.float32) * MASK for name in names}
    draw["student_entropy"] = rng.random(MASK.shape).astype(np.float32) * MASK
    draw["teacher_entropy"] = rng.random(MASK.shape).astype(np.float32) * MASK
    return TokenDivergence(**draw)


def on_tokens(function):
    """Expected [B, C] from a function of (row, place, number of tokens); 0 off the mask."""
    want = np.zeros(MASK.shape)
    for b, c in zip(*np.nonzero(MASK), strict=True):
        want[b, c] = function(b, c, MASK[b].sum())
    return want


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


TOKENS = tokens_of()
GAP = TOKENS.teacher_logps - TOKENS.student_logps
EXPECTED = {
    "position_sigmoid": lambda b, c, T: 0.25 + 0.75 * sigmoid((c / T - 0.3) / 0.1),
    "top_student_entropy": lambda b, c, T: (
        sorted(TOKENS.student_entropy[b, :T])[::-1].index(TOKENS.student_entropy[b, c])
        < math.ceil(0.5 * T)
    ),
    "confident_teacher": lambda b, c, T: (
        math.exp(-TOKENS.teacher_entropy[b, c]) / np.exp(-TOKENS.teacher_entropy[MASK]).mean()
    ),
    "uncertain_teacher": lambda b, c, T: TOKENS.teacher_entropy[b, c] > 0.8,
    "gap_sigmoid": lambda b, c, T: sigmoid(5 * GAP[b, c]),
    "positive_gap": lambda b, c, T: GAP[b, c] > 0,
    "skip_first": lambda b, c, T: c >= 1,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_weight(name):
    got = getattr(token_weights, name)(TOKENS, jnp.asarray(MASK))
    assert got.shape == MASK.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got * MASK, on_tokens(EXPECTED[name]), rtol=1e-5, atol=1e-6)


def test_every_weight_is_tested():
    public = {
        n
        for n, f in vars(token_weights).items()
        if getattr(f, "__module__", "") == f"{token_weights.__name__}" and not n.startswith("_")
    }
    # `evidence` reads the student in the teacher's context too: test_methods.py (EDGE-OPD) has it.
    assert public - {"evidence"} == set(EXPECTED)


def test_weights_multiply_the_objective_and_carry_no_gradient():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, *MASK.shape, 7)).astype(np.float32)
    skip = functools.partial(token_weights.skip_first, num_tokens=2)
    weights = (token_weights.gap_sigmoid, skip)

    def total(student, weights):
        return logit_divergence(
            DivergenceConfig(weights=weights), student, teacher, None, jnp.asarray(MASK)
        ).objective

    plain = logit_divergence(DivergenceConfig(), student, teacher, None, jnp.asarray(MASK))
    factor = weights[0](plain, MASK) * skip(plain, MASK)
    np.testing.assert_allclose(total(student, weights), plain.objective * factor, rtol=1e-6)
    got = jax.grad(lambda z: total(z, weights).sum())(student)
    want = jax.grad(lambda z: (total(z, ()) * factor).sum())(student)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
