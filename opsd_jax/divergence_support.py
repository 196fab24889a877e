# SPDX-License-Identifier: Apache-2.0
"""Which entries of the vocabulary a divergence sees, and what becomes of the others.

K: entries of the support (V, k, k + 1 with a tail, up to 2k + 1 for a union).
"""

import jax
import jax.numpy as jnp

from opsd_jax.divergence_config import DivergenceConfig


def project_support(
    config: DivergenceConfig,
    student_logps: jax.Array,
    teacher_logps: jax.Array,
    ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of both sides on the configured support, completed as configured.

    Args:
      config: `support`, `top_k`, `completion`; "sampled_token" sees the sampled id alone.
      student_logps: [..., V] normalised.
      teacher_logps: [..., V] normalised.
      ids: [...] int32, the sampled ids.

    Returns:
      Two [..., K] arrays; entries that do not count are -inf on both sides.
    """
    if config.name == "sampled_token":
        index = ids[..., None]
    elif config.support == "full":
        return student_logps, teacher_logps
    else:
        index = support_index(config, student_logps, teacher_logps)
    return tuple(_project(config, logps, index) for logps in (student_logps, teacher_logps))


def support_index(
    config: DivergenceConfig, student_logps: jax.Array, teacher_logps: jax.Array
) -> jax.Array:
    """Indices [..., K] of the truncated support; -1 fills the places that a union leaves over.

    Ties go to the lower index, as in `lax.top_k`.
    """
    _, teacher = jax.lax.top_k(teacher_logps, config.top_k)
    if config.support == "teacher_top_k":
        return teacher
    _, student = jax.lax.top_k(jax.lax.stop_gradient(student_logps), config.top_k)
    if config.support == "student_top_k":
        return student
    repeated = jnp.any(student[..., :, None] == teacher[..., None, :], axis=-1)
    return jnp.concatenate([teacher, jnp.where(repeated, -1, student)], axis=-1)


def complete(logps: jax.Array, tail: jax.Array, completion: str) -> jax.Array:
    """Completes log-probabilities on a support, whose complement has log-probability `tail`.

    Args:
      logps: [..., K]; -inf where a place is unused.
      tail: [...]; -inf when nothing is left.
      completion: "renormalise", "tail" or "truncate".
    """
    if completion == "renormalise":
        return jax.nn.log_softmax(logps)
    if completion == "tail":
        return jnp.concatenate([logps, tail[..., None]], axis=-1)
    return logps


def _project(config, logps, index):
    gathered = jnp.take_along_axis(logps, jnp.maximum(index, 0), axis=-1)
    gathered = jnp.where(index >= 0, gathered, -jnp.inf)
    if config.name == "sampled_token":
        return gathered
    tail = None
    if config.completion == "tail":
        V = logps.shape[-1]
        # log(1 - sum p) loses every digit when the support has nearly all the mass.
        inside = jnp.any(jax.nn.one_hot(index, V, dtype=bool), axis=-2)
        tail = log_sum_exp(jnp.where(inside, -jnp.inf, logps))
    return complete(gathered, tail, config.completion)


def log_sum_exp(logps: jax.Array) -> jax.Array:
    """log sum exp over the last axis; -inf, with gradient 0, when every entry is -inf."""
    top = jax.lax.stop_gradient(jnp.max(logps, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    possible = logps > -jnp.inf
    total = jnp.sum(jnp.where(possible, jnp.exp(jnp.where(possible, logps, 0) - top), 0), -1)
    safe = jnp.log(jnp.where(total > 0, total, 1)) + top[..., 0]
    return jnp.where(total > 0, safe, -jnp.inf)
