# SPDX-License-Identifier: Apache-2.0
"""Advantages of tokens: functions (tokens: Tokens, mask) -> [B, C] for `PolicyGradient.shape`.

A is the row's advantage, D = log pT(y) - log pS(y) the gap of the sampled id y at temperature 1.
All are constant for differentiation. Rows without a teacher context keep A, which is what each
gives for D = 0. Bind the keyword arguments in gin (or `functools.partial`).
"""

import jax
import jax.numpy as jnp

from opsd_jax.divergence.targets import mean
from opsd_jax.fields import Count, NotNegative, Positive, Share
from opsd_jax.method.token_view import Tokens


def add_gap(tokens: Tokens, mask: jax.Array, *, weight: NotNegative = 1.0) -> jax.Array:
    """A + weight D: the reward, and the sampled-token gradient of -KL(S || T)."""
    return tokens.advantages + weight * tokens.gap


def rlsd(
    tokens: Tokens,
    mask: jax.Array,
    *,
    weight: Share = 0.5,
    decay_steps: Count = 50,
    clip: Share = 0.2,
) -> jax.Array:
    """A ((1 - l) + l clip(exp(sign(A) D), 1 - clip, 1 + clip)): the teacher gives the size alone.

    l falls from `weight` to 0 over `decay_steps` steps, linearly. RLSD, arXiv 2604.03128.
    """
    A = tokens.advantages
    share = weight * jnp.maximum(0.0, 1.0 - tokens.step / decay_steps)
    # exp(x) clipped, by its exponent: no infinity for a gap of 100 nats.
    size = jnp.clip(jnp.exp(jnp.minimum(jnp.sign(A) * tokens.gap, 1.0)), 1 - clip, 1 + clip)
    return A * ((1 - share) + share * size)


def antisd(tokens: Tokens, mask: jax.Array, *, weight: NotNegative = 0.5) -> jax.Array:
    """A - weight phi(D) with phi(u) = (softplus(u) - log 2) / 2: away from the teacher.

    AntiSD, arXiv 2605.11609, without its gate on the teacher's entropy, which has a memory.
    """
    return tokens.advantages - weight * 0.5 * (jax.nn.softplus(tokens.gap) - jnp.log(2.0))


def rlcsd(
    tokens: Tokens,
    mask: jax.Array,
    *,
    weight: NotNegative = 0.5,
    tau: Positive = 0.02,
    threshold: NotNegative = 0.02,
) -> jax.Array:
    """A + r of its own sign where |r| > threshold, else A, with r = weight tanh(e / tau).

    e = log p_1(y) - log of the mean of p_2(y), …, p_K(y): the first of K teacher views against the
    others, a right hint against wrong ones. A sum of the other sign than A becomes 0.
    RLCSD, arXiv 2606.11709.
    """
    first, *others = tokens.view_logps
    A, r = tokens.advantages, weight * jnp.tanh((first - mean(others)) / tau)
    moved = jnp.where(jnp.sign(A + r) == jnp.sign(A), A + r, 0.0)
    return jnp.where(jnp.abs(r) > threshold, moved, A)
