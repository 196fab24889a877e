# SPDX-License-Identifier: Apache-2.0
"""Target transforms: several teachers' log-probabilities in, one target's out.

A transform takes a tuple of normalised [..., V] log-probabilities, works entry by entry (so that
it also works on a slice of the vocabulary) and may return unnormalised logs: the caller
normalises. Bind the keyword arguments and give it to `DivergenceConfig.target`; the order of
teachers is the order of the `teacher_hidden` tuple.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def mean(teacher_logps: Sequence[jax.Array]) -> jax.Array:
    """log of the mean probability over K teachers (MASS; several views of one reference)."""
    total = jax.nn.logsumexp(jnp.stack(teacher_logps), axis=0)
    return total - jnp.log(len(teacher_logps))


def contrast(
    teacher_logps: Sequence[jax.Array], *, alpha: float = 0.5, floor: float = -5.0
) -> jax.Array:
    """(1 + alpha) log p_right - alpha max(log p_wrong, floor): what only the right hint says.

    The first teacher saw the right hint, the others wrong ones, which are averaged. The floor
    keeps entries that a wrong hint rules out from being promoted without bound. RLCSD, arXiv
    2606.11709.
    """
    right, *wrong = teacher_logps
    return (1 + alpha) * right - alpha * jnp.maximum(mean(wrong), floor)


def barycentre(teacher_logps: Sequence[jax.Array], *, alpha: float = 0.15) -> jax.Array:
    """(1 - alpha) log p_first + alpha log p_second: the normalised geometric mixture.

    DemoPSD, arXiv 2607.02502, with the privileged teacher first and its unprivileged self
    second; alpha is constant here.
    """
    first, second = teacher_logps
    return (1 - alpha) * first + alpha * second
