# SPDX-License-Identifier: Apache-2.0
"""Advantages of tokens: functions (tokens: Tokens, mask) -> [B, C] for `PolicyGradient.shape`.

A is the row's advantage, D = log pT(y) - log pS(y) the gap of the sampled id y at temperature 1.
All are constant for differentiation. Rows without a teacher context keep A, which is what each
gives for D = 0. Bind the keyword arguments in gin (or `functools.partial`).
"""

import math
from typing import Annotated

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


def gap(tokens: Tokens, mask: jax.Array) -> jax.Array:
    """D without the reward: the sampled-token gradient of -KL(S || T). EOPD, arXiv 2603.07079."""
    return tokens.gap


def reopold(
    tokens: Tokens,
    mask: jax.Array,
    *,
    mixture: Annotated[float, "> 0", "< 1"] = 0.1,
    fraction: Share = 0.2,
    switch_steps: Count = 50,
) -> jax.Array:
    """D without the reward, floored at log(mixture) / (1 - mixture), on a part of the tokens.

    Until `switch_steps` those that the floor does not touch, then those whose student entropy is
    among the highest `fraction` of the batch. REOPOLD, arXiv 2603.11137.
    """
    floor = math.log(mixture) / (1 - mixture)
    entropy = jnp.where(mask, tokens.student_entropy, jnp.nan)
    highest = tokens.student_entropy >= jnp.nanquantile(entropy, 1 - fraction)
    kept = mask & jnp.where(tokens.step < switch_steps, tokens.gap >= floor, highest)
    return _of_kept(jnp.maximum(tokens.gap, floor), kept, mask)


def opsa(
    tokens: Tokens,
    mask: jax.Array,
    *,
    fraction: Share = 0.2,
    least: float = -1.0,
    most: float = -0.5,
) -> jax.Array:
    """Below 0 on the `fraction` of the batch's tokens that the student finds least likely, else 0.

    From `most` where the student's entropy is the lowest of these tokens to `least` where it is
    the highest. Neither teacher nor reward: a control. OPSA, arXiv 2608.31046.
    """
    logps = jnp.where(mask, tokens.student_logps, jnp.inf)
    order = jnp.argsort(jnp.argsort(logps, axis=None, stable=True)).reshape(mask.shape)
    kept = mask & (order < jnp.maximum(1, jnp.floor(fraction * jnp.sum(mask))))
    entropy = tokens.student_entropy
    lowest = jnp.min(jnp.where(kept, entropy, jnp.inf))
    width = jnp.max(jnp.where(kept, entropy, -jnp.inf)) - lowest
    rank = jnp.where(width > 1e-12, (entropy - lowest) / jnp.maximum(width, 1e-12), 1.0)
    return _of_kept(most + (least - most) * rank, kept, mask)


def _of_kept(values: jax.Array, kept: jax.Array, mask: jax.Array) -> jax.Array:
    """Values of the kept tokens, 0 elsewhere, such that the mean over all is that over the kept.

    On micro-batches the share that is kept is the micro-batch's.
    """
    return jnp.where(kept, values, 0.0) * jnp.sum(mask) / jnp.maximum(jnp.sum(kept), 1)
