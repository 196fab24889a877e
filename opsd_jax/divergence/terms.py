# SPDX-License-Identifier: Apache-2.0
"""Per-entry terms of each divergence, and the clips that turn them into one number per token.

Every divergence here is a sum over the vocabulary of terms l(log pS, log pT); logs are natural,
S is the student, T the teacher. A side with probability 0 has log-probability -inf.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from opsd_jax.divergence.config import DivergenceConfig, Terms
from opsd_jax.divergence.vocabulary import Vocabulary
from opsd_jax.fields import check_shape


def forward_kl_terms(student_logps: jax.Array, teacher_logps: jax.Array) -> jax.Array:
    """KL(teacher || student), entry by entry: pT (log pT - log pS); 0 where pT = 0."""
    return _weighted_gap(teacher_logps, student_logps)


def reverse_kl_terms(student_logps: jax.Array, teacher_logps: jax.Array) -> jax.Array:
    """KL(student || teacher), entry by entry: pS (log pS - log pT); 0 where pS = 0."""
    return _weighted_gap(student_logps, teacher_logps)


def mixed_kl_terms(student_logps: jax.Array, teacher_logps: jax.Array, beta: float) -> jax.Array:
    """beta KL(T || S) + (1 - beta) KL(S || T), entry by entry; 1/2 is half Jeffreys' divergence."""
    forward = forward_kl_terms(student_logps, teacher_logps)
    return beta * forward + (1 - beta) * reverse_kl_terms(student_logps, teacher_logps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def jensen_shannon_terms(
    student_logps: jax.Array, teacher_logps: jax.Array, beta: float
) -> jax.Array:
    """beta KL(T || m) + (1 - beta) KL(S || m), entry by entry, with m = beta pT + (1 - beta) pS.

    As beta -> 0 the sum behaves like beta KL(T || S), as beta -> 1 like (1 - beta) KL(S || T):
    it vanishes at both ends, so the KLs have their own names instead of being end points.
    """
    mixture = _mixture(student_logps, teacher_logps, beta)
    teacher = _weighted_gap(teacher_logps, mixture)
    student = _weighted_gap(student_logps, mixture)
    return beta * teacher + (1 - beta) * student


@jensen_shannon_terms.defjvp
def _jensen_shannon_jvp(beta, primals, tangents):
    # d term / d log pS = (1 - beta) pS (log pS - log m): the mixture's own change cancels
    # within each entry. The teacher is a constant everywhere in this package.
    student_logps, teacher_logps = primals
    gap = _weighted_gap(student_logps, _mixture(student_logps, teacher_logps, beta))
    return jensen_shannon_terms(*primals, beta), (1 - beta) * gap * tangents[0]


def _mixture(student_logps, teacher_logps, beta):
    """log m for log m = log(beta pT + (1 - beta) pS)."""
    return jnp.logaddexp(jnp.log(beta) + teacher_logps, jnp.log1p(-beta) + student_logps)


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
        return _own_terms(config.name)
    named: dict[str, Terms] = {
        "forward_kl": forward_kl_terms,
        "reverse_kl": reverse_kl_terms,
        "mixed_kl": functools.partial(mixed_kl_terms, beta=config.beta),
        "jensen_shannon": functools.partial(jensen_shannon_terms, beta=config.beta),
        "sampled_token": sampled_token_terms,
    }
    return named[config.name]


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a clip made of terms [..., K].

    Args:
      objective: [...], the clipped sum.
      clipped: [...] bool, whether the clip acted.
      kept: [..., K] bool, entries below the threshold; None when the clip is not per entry.
      scale: [...], d objective / d term of a kept entry; None for 1.
    """

    objective: jax.Array
    clipped: jax.Array
    kept: jax.Array | None = None
    scale: jax.Array | None = None

    def slope(self, terms: jax.Array) -> jax.Array:
        """[..., K]: d objective / d terms."""
        ones = jnp.ones_like(terms)
        if self.kept is not None:
            return jnp.where(self.kept, ones, 0)
        return ones if self.scale is None else ones * self.scale[..., None]


def clip_terms(config: DivergenceConfig, over: Vocabulary, terms: jax.Array) -> Clip:
    """Sums terms [..., K] under the configured clip with threshold tau.

    "entry": sum_v min(l_v, tau), the official recipe; no longer a divergence, can be negative.
    "token": min(sum_v l_v, tau); a clipped token teaches nothing.
    "rescale": sg[min(1, tau / sum_v l_v)] sum_v l_v; keeps the direction of the gradient.
    """
    tau = config.clip_threshold
    if config.clip == "entry":
        kept = ~(terms >= tau)  # NaN is kept, to be seen
        objective = over.sum(jnp.where(kept, terms, tau))
        return Clip(objective, over.max(jax.lax.stop_gradient(terms)) >= tau, kept=kept)
    total = over.sum(terms)
    clipped = (total >= tau) if config.clip != "none" else jnp.zeros(total.shape, bool)
    if config.clip == "none":
        return Clip(total, clipped)
    if config.clip == "token":
        scale = jnp.where(clipped, jnp.zeros_like(total), 1)
        return Clip(jnp.where(clipped, tau, total), clipped, scale=scale)
    scale = jax.lax.stop_gradient(tau / jnp.where(clipped, total, tau))
    # tau / inf · inf would be NaN.
    return Clip(jnp.where(total == jnp.inf, tau, scale * total), clipped, scale=scale)


def _weighted_gap(logps: jax.Array, reference_logps: jax.Array) -> jax.Array:
    """p (log p - log q), and exactly 0, also in the gradient, where p = 0.

    Where q = 0 < p it is infinite, and says so, but has gradient 0: an infinite pull on one
    entry would make every gradient of the step NaN. NaN on either side stays NaN.
    """
    possible = logps != -jnp.inf
    finite = possible & (reference_logps != -jnp.inf)
    gap = jnp.where(finite, logps, 0) - jnp.where(finite, reference_logps, 0)
    infinite = jnp.where(possible, jnp.inf, 0)
    return jnp.where(finite, jnp.exp(logps) * gap, infinite)


def _own_terms(terms: Terms) -> Terms:
    """Spares a user's function the entries that both sides exclude; they contribute 0."""

    def guarded(student_logps: jax.Array, teacher_logps: jax.Array) -> jax.Array:
        excluded = (student_logps == -jnp.inf) & (teacher_logps == -jnp.inf)
        values = terms(jnp.where(excluded, 0, student_logps), jnp.where(excluded, 0, teacher_logps))
        check_shape("divergence.name", terms, values, excluded.shape)
        return jnp.where(excluded, 0, values)

    return guarded
