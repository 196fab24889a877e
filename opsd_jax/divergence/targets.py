# SPDX-License-Identifier: Apache-2.0
"""Targets: the log-probabilities of several teachers in, those of one target out.

A target takes a tuple of normalised [..., V] log-probabilities, works entry by entry (so that it
also works on a slice of the vocabulary) and may return unnormalised logs: the caller normalises.
One that needs sums over all of the vocabulary takes a `vocabulary`, too, whose `sum` and `max`
are over every slice. Entries that a teacher excludes are -inf, as are those of padding.

In a run the tuple is the teacher in each of its views (`Batch.views`), or, where it has but one
context, (the teacher there, the same teacher in the student's context): what it says with the
privilege and without. `token_divergence` takes any number of teachers.
"""

import functools
import inspect
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from opsd_jax.divergence.config import Target
from opsd_jax.divergence.terms import jensen_shannon_terms
from opsd_jax.divergence.vocabulary import Vocabulary
from opsd_jax.errors import UserError
from opsd_jax.fields import NotNegative, Share, check_shape


def make_target(
    target: Target, teacher_logps: Sequence[jax.Array], vocabulary: Vocabulary
) -> jax.Array:
    """The target's logs [..., U], normalised or not; [..., U] log-probabilities of each teacher."""
    if "vocabulary" in inspect.signature(target).parameters:
        target = functools.partial(target, vocabulary=vocabulary)
    made = target(teacher_logps)
    check_shape("divergence.target", target, made, teacher_logps[0].shape)
    return made


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

    Of all p it has the least (1 - alpha) KL(p || p_first) + alpha KL(p || p_second).
    """
    first, second = _two("barycentre", teacher_logps)
    return (1 - alpha) * first + alpha * second


def cautious_barycentre(
    teacher_logps: Sequence[jax.Array],
    vocabulary: Vocabulary,
    *,
    max_alpha: Share = 0.15,
    beta: NotNegative = 50.0,
) -> jax.Array:
    """`barycentre` that leans to the second teacher where the two disagree, token by token.

        alpha = max_alpha · 2 (sigmoid(beta · JSD) - 1/2),  JSD = KL(p1 || m) / 2 + KL(p2 || m) / 2
        with m = (p1 + p2) / 2, in nats over the full vocabulary: 0 where they agree.

    The second is the teacher without its privilege: what it would not say without is not followed
    to the end. DemoPSD (arXiv 2607.02502).
    """
    first, second = _two("cautious_barycentre", teacher_logps)
    jsd = vocabulary.sum(jensen_shannon_terms(first, second, 0.5))
    alpha = (max_alpha * jnp.tanh(beta * jsd / 2))[..., None]
    # 0 · -inf would be NaN.
    leaning = jnp.where(alpha > 0, alpha * second, 0)
    return (1 - alpha) * first + leaning


def _two(name: str, teacher_logps: Sequence[jax.Array]) -> Sequence[jax.Array]:
    if len(teacher_logps) != 2:
        raise UserError(
            f"divergence.target = @target_{name} is made of two teacher contexts, not of "
            f"{len(teacher_logps)}: leave contexts.views one view, or none for the student's"
        )
    return teacher_logps
