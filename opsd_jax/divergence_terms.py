# SPDX-License-Identifier: Apache-2.0
"""Per-entry terms of each divergence, and the clips that turn them into one number per token.

Every divergence here is a sum over the vocabulary of terms l(log pS, log pT); logs are natural,
S is the student, T the teacher. A side with probability 0 has log-probability -inf.
"""

import functools

import jax
import jax.numpy as jnp

from opsd_jax.divergence_config import DivergenceConfig, Terms


def forward_kl_terms(student_logps: jax.Array, teacher_logps: jax.Array) -> jax.Array:
    """KL(teacher || student), entry by entry: pT (log pT - log pS); 0 where pT = 0."""
    return _weighted_gap(teacher_logps, student_logps)


def reverse_kl_terms(student_logps: jax.Array, teacher_logps: jax.Array) -> jax.Array:
    """KL(student || teacher), entry by entry: pS (log pS - log pT); 0 where pS = 0."""
    return _weighted_gap(student_logps, teacher_logps)


def jensen_shannon_terms(
    student_logps: jax.Array, teacher_logps: jax.Array, beta: float
) -> jax.Array:
    """beta KL(T || m) + (1 - beta) KL(S || m), entry by entry, with m = beta pT + (1 - beta) pS.

    As beta -> 0 the sum behaves like beta KL(T || S), as beta -> 1 like (1 - beta) KL(S || T):
    it vanishes at both ends, so the KLs have their own names instead of being end points.
    """
    mixture = jnp.logaddexp(
        jnp.log(beta) + _floored(teacher_logps), jnp.log1p(-beta) + _floored(student_logps)
    )
    teacher = _weighted_gap(teacher_logps, mixture)
    student = _weighted_gap(student_logps, mixture)
    return beta * teacher + (1 - beta) * student


def sampled_token_terms(student_logps: jax.Array, teacher_logps: jax.Array) -> jax.Array:
    """-sg[log pT - log pS] log pS at the sampled entry; its gradient estimates KL(S || T)'s.

    The value is not a divergence: only its gradient means something, in expectation over
    ids sampled from the student.
    """
    advantage = jax.lax.stop_gradient(teacher_logps - student_logps)
    return -advantage * student_logps


def entry_terms(config: DivergenceConfig) -> Terms:
    """The terms named by the configuration, as one function of (student, teacher) logs."""
    if callable(config.name):
        return _defined_everywhere(config.name)
    named: dict[str, Terms] = {
        "forward_kl": forward_kl_terms,
        "reverse_kl": reverse_kl_terms,
        "jensen_shannon": functools.partial(jensen_shannon_terms, beta=config.beta),
        "sampled_token": sampled_token_terms,
    }
    return named[config.name]


def clip_terms(config: DivergenceConfig, terms: jax.Array, sum_terms=jnp.sum):
    """Sums terms [..., K] under the configured clip.

    Returns:
      objective [...]: the clipped sum; clipped [...]: bool, the clip acted; kept [..., K]:
      bool, entries whose gradient the clip did not remove.
    """
    tau = config.clip_threshold
    kept = jnp.ones(terms.shape, bool)
    if config.clip == "entry":
        kept = terms < tau
        objective = sum_terms(jnp.where(kept, terms, tau), axis=-1)
        return objective, sum_terms(~kept, axis=-1) > 0, kept
    total = sum_terms(terms, axis=-1)
    if config.clip == "none":
        return total, jnp.zeros(total.shape, bool), kept
    clipped = total >= tau
    if config.clip == "token":
        return jnp.where(clipped, tau, total), clipped, kept & ~clipped[..., None]
    scale = tau / jnp.where(clipped, total, tau)
    return jax.lax.stop_gradient(scale) * total, clipped, kept


def _weighted_gap(logps: jax.Array, reference_logps: jax.Array) -> jax.Array:
    """p (log p - log q), and exactly 0, also in the gradient, where p = 0."""
    possible = logps > -jnp.inf
    gap = jnp.where(possible, logps, 0) - jnp.where(possible, reference_logps, 0)
    return jnp.exp(logps) * gap


def _floored(logps: jax.Array) -> jax.Array:
    # logaddexp(-inf, -inf) has a NaN gradient; any finite floor below all real logs will do.
    return jnp.maximum(logps, jnp.finfo(logps.dtype).min / 4)


def _defined_everywhere(terms: Terms) -> Terms:
    """Spares a user's function the entries that both sides exclude; they contribute 0."""

    def guarded(student_logps: jax.Array, teacher_logps: jax.Array) -> jax.Array:
        excluded = (student_logps == -jnp.inf) & (teacher_logps == -jnp.inf)
        values = terms(jnp.where(excluded, 0, student_logps), jnp.where(excluded, 0, teacher_logps))
        return jnp.where(excluded, 0, values)

    return guarded
