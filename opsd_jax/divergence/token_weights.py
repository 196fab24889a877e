# SPDX-License-Identifier: Apache-2.0
"""Weights and gates per token: functions (tokens: TokenDivergence, mask) -> [B, C].

Bind the keyword arguments (gin, or `functools.partial`) and list the result in
`DivergenceConfig.weights` or a term's (`method/mix.py`); several multiply. They read only
diagnostics, which carry no gradient; in a run `tokens` is a `method.token_view.Tokens`, which has
the same and more. A gate returns 0 and 1: the mean stays over all tokens of the mask, so a gate
also scales the loss by the share that it lets through. Alphabet: B batch, C completion.
"""

from typing import Any

import jax
import jax.numpy as jnp

from opsd_jax.divergence.rows import TokenDivergence
from opsd_jax.fields import Natural, NotNegative, Positive, Share


def position_sigmoid(
    tokens: TokenDivergence,
    mask: jax.Array,
    *,
    floor: Share = 0.25,
    centre: float = 0.3,
    width: Positive = 0.1,
) -> jax.Array:
    """floor + (1 - floor) sigmoid((t / T - centre) / width): later tokens count more.

    t counts the row's tokens from 0 and T is their number. PW-OPSD, arXiv 2605.21606.
    """
    position = _position(mask)
    length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    return floor + (1 - floor) * jax.nn.sigmoid((position / length - centre) / width)


def top_student_entropy(
    tokens: TokenDivergence, mask: jax.Array, *, fraction: Share = 0.5
) -> jax.Array:
    """1 on the ceil(fraction T) tokens of each row with the highest student entropy, else 0.

    Equal entropies go to the earlier token. OPSRD; REOPOLD, arXiv 2603.11137.
    """
    entropy = jnp.where(mask, tokens.student_entropy, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-entropy, axis=-1, stable=True), axis=-1)
    wanted = jnp.ceil(fraction * jnp.sum(mask, axis=-1, keepdims=True))
    return ((rank < wanted) & mask).astype(tokens.objective.dtype)


def confident_teacher(
    tokens: TokenDivergence, mask: jax.Array, *, beta: NotNegative = 1.0
) -> jax.Array:
    """exp(-beta H_T), divided by its mean over the tokens of the batch: mean weight 1.

    On micro-batches the mean is the micro-batch's. SRPO, arXiv 2604.02288.
    """
    weight = jnp.where(mask, jnp.exp(-beta * tokens.teacher_entropy), 0)
    return weight * jnp.sum(mask) / jnp.maximum(jnp.sum(weight), 1e-30)


def uncertain_teacher(
    tokens: TokenDivergence, mask: jax.Array, *, threshold: NotNegative = 0.8
) -> jax.Array:
    """1 where the teacher's entropy exceeds the threshold in nats. EOPD, arXiv 2603.07079."""
    return (tokens.teacher_entropy > threshold).astype(tokens.objective.dtype)


def gap_sigmoid(tokens: TokenDivergence, mask: jax.Array, *, beta: NotNegative = 5.0) -> jax.Array:
    """sigmoid(beta D), D = log pT(y) - log pS(y) of the sampled id. SDAR, arXiv 2605.15155."""
    return jax.nn.sigmoid(beta * (tokens.teacher_logps - tokens.student_logps))


def positive_gap(tokens: TokenDivergence, mask: jax.Array) -> jax.Array:
    """1 where the teacher likes the sampled id better than the student does, else 0."""
    return (tokens.teacher_logps > tokens.student_logps).astype(tokens.objective.dtype)


def evidence(tokens: Any, mask: jax.Array) -> jax.Array:
    """1 where log pT(y | its context) > log pT(y | the student's), in a run; else 0.

    EDGE-OPD, arXiv 2605.23493.
    """
    return (tokens.teacher_logps > tokens.plain_logps).astype(jnp.float32)


def skip_first(tokens: TokenDivergence, mask: jax.Array, *, num_tokens: Natural = 1) -> jax.Array:
    """0 on the first `num_tokens` tokens of each row, else 1. SDFT, arXiv 2601.19897."""
    return (_position(mask) >= num_tokens).astype(tokens.objective.dtype)


def _position(mask):
    return jnp.cumsum(mask, axis=-1) - 1
