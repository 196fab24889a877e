# SPDX-License-Identifier: Apache-2.0
"""Top-k supports: the entries of the vocabulary that a divergence sees, and what of the others.

K: entries of the support; k, up to 2k for a union, 1 for a sampled token.
"""

import jax
import jax.numpy as jnp

from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.divergence.vocabulary import Vocabulary


def support_index(
    config: DivergenceConfig,
    vocabulary: Vocabulary,
    student_logps: jax.Array,
    teacher_logps: jax.Array,
    ids: jax.Array,
) -> jax.Array | None:
    """Indices [..., K] of the support, or None for the full vocabulary.

    Args:
      config: `support` and `top_k`; "sampled_token" sees the sampled id alone.
      vocabulary: how the last axis is laid out.
      student_logps: [..., U].
      teacher_logps: [..., U].
      ids: [...] int32, the sampled ids.

    Returns:
      int32, no index twice; -1 fills the places that an overlap in a union leaves over.
    """
    if config.name == "sampled_token":
        return ids[..., None]
    if config.support == "full":
        return None
    student_logps = jax.lax.stop_gradient(student_logps)
    if config.support == "student_top_k":
        return vocabulary.top_k(student_logps, config.top_k)
    teacher = vocabulary.top_k(teacher_logps, config.top_k)
    if config.support == "teacher_top_k":
        return teacher
    student = vocabulary.top_k(student_logps, config.top_k)
    repeated = jnp.any(student[..., :, None] == teacher[..., None, :], axis=-1)
    return jnp.concatenate([teacher, jnp.where(repeated, -1, student)], axis=-1)


def support_logps(
    config: DivergenceConfig, vocabulary: Vocabulary, logps: jax.Array, index: jax.Array
) -> jax.Array:
    """Log-probabilities [..., K] at `index`, and the tail's as one more entry if it is kept.

    Entries that do not count are -inf.
    """
    chosen = vocabulary.take(logps, index)
    if not has_tail(config):
        return chosen
    outside = outside_support(vocabulary, logps, index)
    # Summed over the entries: log(1 - sum p) loses every digit when the rest is small.
    tail = vocabulary.log_sum_exp(jnp.where(outside, logps, -jnp.inf))
    return jnp.concatenate([chosen, tail[..., None]], axis=-1)


def complete(config: DivergenceConfig, logps: jax.Array) -> jax.Array:
    """Normalises `support_logps` where the configuration asks for it."""
    renormalise = config.name != "sampled_token" and config.completion == "renormalise"
    return jax.nn.log_softmax(logps) if renormalise else logps


def has_tail(config: DivergenceConfig) -> bool:
    """Whether `support_logps` ends with the tail."""
    return config.completion == "tail" and config.name != "sampled_token"


def outside_support(vocabulary: Vocabulary, logps: jax.Array, index: jax.Array) -> jax.Array:
    """[..., U] bool: the entries that `index` leaves out."""
    return vocabulary.put(jnp.ones(index.shape, jnp.int8), index, logps) == 0
