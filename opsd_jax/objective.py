# SPDX-License-Identifier: Apache-2.0
"""The loss: one completion read under two contexts, compared token by token."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp

from opsd_jax.divergence import DivergenceConfig, TokenDivergence, token_divergence
from opsd_jax.head import output_head
from opsd_jax.model import Decoder
from opsd_jax.rollouts import Completion, Context
from opsd_jax.scoring import completion_hidden


@flax.struct.dataclass
class Batch:
    """One batch of problems as the two roles see them: [B, P] and [B, Q] prompts."""

    student: Context
    teacher: Context


def compare(
    model: Decoder,
    config: DivergenceConfig,
    student_variables: dict,
    teacher_variables: dict,
    batch: Batch,
    completion: Completion,
    dropout_key: jax.Array | None = None,
) -> TokenDivergence:
    """Per-token terms of the loss on the student's own completion, each [B, C].

    Both roles read the very same ids, each at its own prompt's offset; no gradient reaches the
    teacher's variables. Dropout, if any, acts on the student's adapters alone.
    """
    teacher_variables = jax.lax.stop_gradient(teacher_variables)
    student_hidden = completion_hidden(
        model, student_variables, batch.student, completion, dropout_key
    )
    teacher_hidden = completion_hidden(model, teacher_variables, batch.teacher, completion)
    return token_divergence(
        config,
        student_hidden,
        output_head(student_variables["params"], model.config),
        jax.lax.stop_gradient(teacher_hidden),
        output_head(teacher_variables["params"], model.config),
        completion.ids,
        completion.mask,
    )


def token_sums(terms: TokenDivergence, completion: Completion) -> dict[str, jax.Array]:
    """Sums over the sampled tokens; dividing by their number gives the metrics of the step.

    Sums and not means, so that micro-batches and devices add up to the mean over the global
    batch, the same denominator as the loss.
    """
    mask = completion.mask
    per_token = {
        "loss/objective": terms.objective,
        "loss/divergence": terms.divergence,
        "loss/clip_fraction": terms.clipped,
        "loss/negative_fraction": terms.objective < 0,
        "loss/kept_teacher_mass": terms.kept_teacher_mass,
        "student/entropy": terms.student_entropy,
        "student/nll_of_rollout": -terms.student_logps,
        "teacher/entropy": terms.teacher_entropy,
        "teacher/nll_of_rollout": -terms.teacher_logps,
        "teacher/argmax_agreement": terms.argmax_agreement,
        # Zero up to rounding as long as rollout and scoring are the same function.
        "rollout/logp_gap": jnp.abs(terms.student_logps - completion.logps),
    }
    return {
        name: jnp.sum(jnp.where(mask, value, 0.0), dtype=jnp.float32)
        for name, value in per_token.items()
    }
