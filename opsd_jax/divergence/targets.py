# SPDX-License-Identifier: Apache-2.0
"""Targets: the log-probabilities of several teachers in, those of one target out.

A target takes a tuple of normalised [..., V] log-probabilities, works entry by entry (so that it
also works on a slice of the vocabulary) and may return unnormalised logs: the caller normalises.
In a run the tuple is (the teacher in its own context, the same teacher in the student's): what it
says with the privilege and without. `token_divergence` takes any number of teachers.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from opsd_jax.fields import NotNegative, Share


def mean(teacher_logps: Sequence[jax.Array]) -> jax.Array:
    """log of the mean probability over K teachers: the arithmetic mixture (MASS)."""
    total = jax.nn.logsumexp(jnp.stack(teacher_logps), axis=0)
    return total - jnp.log(len(teacher_logps))


def contrast(
    teacher_logps: Sequence[jax.Array], *, alpha: NotNegative = 0.5, floor: float = -5.0
) -> jax.Array:
    """(1 + alpha) log p_first - alpha max(log p_others, floor): what only the first one says.

    The others are averaged. The floor keeps entries that they rule out from being promoted without
    bound. RLCSD (arXiv 2606.11709) sets the right hint against wrong ones, a run against none.
    """
    right, *wrong = teacher_logps
    return (1 + alpha) * right - alpha * jnp.maximum(mean(wrong), floor)


def barycentre(teacher_logps: Sequence[jax.Array], *, alpha: Share = 0.15) -> jax.Array:
    """(1 - alpha) log p_first + alpha log p_second: the normalised geometric mixture.

    DemoPSD (arXiv 2607.02502); alpha is constant here.
    """
    first, second = teacher_logps
    return (1 - alpha) * first + alpha * second
