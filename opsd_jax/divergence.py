# SPDX-License-Identifier: Apache-2.0
"""Divergence between student and teacher next-token distributions, one number per token.

`token_divergence` is what the train step calls: hidden states and heads in, objective and
diagnostics out. `forward_kl`, `reverse_kl`, `jensen_shannon` and `sampled_token` are the same
from logits. No reduction happens here: the caller masks and averages. Nothing is
differentiated with respect to the teacher. This file is the dense, readable implementation;
`divergence_fused.py` computes the same numbers without ever holding [B, C, V].

Alphabet: B batch, C completion, D width, V vocabulary, K entries of the support.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from opsd_jax.divergence_config import DivergenceConfig
from opsd_jax.divergence_support import project_support
from opsd_jax.divergence_terms import clip_terms, entry_terms
from opsd_jax.errors import UserError
from opsd_jax.head import Head, head_logits


@flax.struct.dataclass
class TokenDivergence:
    """What one pass over the logits says about each token; every field [B, C] float32.

    Masked tokens are exactly 0 in every field. Only `objective` carries a gradient.

    Attributes:
      objective: the clipped loss term, to be averaged over the tokens of the global batch.
      divergence: the named divergence in nats, unclipped and over the full vocabulary
        (KL(student || teacher) for "sampled_token"), at the loss temperature.
      clipped: 1 where the clip acted, else 0.
      kept_teacher_mass: teacher probability on the entries that the clip left alone.
      student_entropy: nats, at temperature 1 like all the fields below.
      teacher_entropy: nats.
      student_logps: log-probability of the sampled ids under the student.
      teacher_logps: log-probability of the sampled ids under the teacher.
      argmax_agreement: 1 where both sides prefer the same token, else 0.
    """

    objective: jax.Array
    divergence: jax.Array
    clipped: jax.Array
    kept_teacher_mass: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    student_logps: jax.Array
    teacher_logps: jax.Array
    argmax_agreement: jax.Array


def token_divergence(
    config: DivergenceConfig,
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: Any,
    teacher_head: Any,
    completion_ids: jax.Array,
    completion_mask: jax.Array,
) -> TokenDivergence:
    """Per-token loss and diagnostics from hidden states that predict `completion_ids`.

    Args:
      config: which divergence, support, clip, temperature and implementation.
      student_hidden: [B, C, D]; row t predicts completion_ids[:, t].
      student_head: kernel [V, D].
      teacher_hidden: [B, C, D'], or a tuple of them when `config.target` combines teachers.
      teacher_head: kernel [V, D'], or a tuple of heads.
      completion_ids: [B, C] int32.
      completion_mask: [B, C] bool, True = counts; masked rows may hold anything, NaN included.

    Returns:
      TokenDivergence of [B, C] float32; gradients reach `student_hidden` and `student_head`
      through `objective` alone.
    """
    mask = completion_mask[..., None]
    student_logits = head_logits(student_head, jnp.where(mask, student_hidden, 0))
    hiddens, heads = _as_tuple(teacher_hidden), _as_tuple(teacher_head)
    teacher_logits = tuple(
        head_logits(head, jnp.where(mask, hidden, 0))
        for head, hidden in zip(heads, hiddens, strict=True)
    )
    return logit_divergence(config, student_logits, teacher_logits, completion_ids, completion_mask)


def logit_divergence(
    config: DivergenceConfig,
    student_logits: jax.Array,
    teacher_logits: Any,
    completion_ids: jax.Array | None = None,
    completion_mask: jax.Array | None = None,
) -> TokenDivergence:
    """`token_divergence` from logits [B, C, V] (or [..., V]), always dense.

    Args:
      config: which divergence, support, clip and temperature.
      student_logits: [..., V], any float dtype.
      teacher_logits: [..., V], or a tuple of them when `config.target` combines teachers.
      completion_ids: [...] int32; zeros when left out.
      completion_mask: [...] bool; all True when left out.
    """
    if completion_mask is None:
        completion_mask = jnp.ones(student_logits.shape[:-1], bool)
    if completion_ids is None:
        completion_ids = jnp.zeros(student_logits.shape[:-1], jnp.int32)
    teachers = _as_tuple(teacher_logits)
    _check(config, student_logits, teachers)

    def prepared(logits):
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return jnp.where(completion_mask[..., None], logits, 0)

    student = prepared(student_logits)
    teachers = tuple(jax.lax.stop_gradient(prepared(logits)) for logits in teachers)

    def log_probs(temperature):
        student_logps = jax.nn.log_softmax(student / temperature)
        teacher_logps = tuple(jax.nn.log_softmax(z / temperature) for z in teachers)
        return student_logps, _target(config, teacher_logps)

    student_logps, teacher_logps = log_probs(config.temperature)
    terms = entry_terms(config)(
        *project_support(config, student_logps, teacher_logps, completion_ids)
    )
    objective, clipped, kept = clip_terms(config, terms)
    _, support_teacher = project_support(config, student_logps, teacher_logps, completion_ids)
    out = TokenDivergence(
        objective=objective,
        divergence=_full_divergence(config, student_logps, teacher_logps),
        clipped=clipped,
        kept_teacher_mass=jnp.sum(jnp.where(kept, jnp.exp(support_teacher), 0), axis=-1),
        **_diagnostics(*log_probs(1.0), completion_ids),
    )
    out = jax.tree.map(lambda x: jnp.where(completion_mask, x.astype(student.dtype), 0), out)
    return jax.lax.stop_gradient(out).replace(objective=out.objective)


def _full_divergence(config, student_logps, teacher_logps):
    if config.name == "sampled_token":
        config = dataclasses.replace(config, name="reverse_kl")
    return jnp.sum(entry_terms(config)(student_logps, teacher_logps), axis=-1)


def _diagnostics(student_logps, teacher_logps, ids):
    def entropy(logps):
        return -jnp.sum(jnp.where(logps > -jnp.inf, jnp.exp(logps) * logps, 0), axis=-1)

    def at_ids(logps):
        return jnp.take_along_axis(logps, ids[..., None], axis=-1)[..., 0]

    agreement = jnp.argmax(student_logps, axis=-1) == jnp.argmax(teacher_logps, axis=-1)
    return dict(
        student_entropy=entropy(student_logps),
        teacher_entropy=entropy(teacher_logps),
        student_logps=at_ids(student_logps),
        teacher_logps=at_ids(teacher_logps),
        argmax_agreement=agreement,
    )


def _target(config, teacher_logps):
    if config.target is None:
        (only,) = teacher_logps
        return only
    return jax.nn.log_softmax(config.target(teacher_logps))


def _as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def _check(config, student, teachers):
    if len(teachers) > 1 and config.target is None:
        raise UserError(
            f"{len(teachers)} teachers were given; set divergence.target to combine them"
        )
    for teacher in teachers:
        if teacher.shape != student.shape:
            raise UserError(
                f"student logits {student.shape} and teacher logits {teacher.shape} must have "
                "the same rows and the same vocabulary"
            )
    if config.support != "full" and config.top_k > student.shape[-1]:
        raise UserError(
            f"divergence.top_k ({config.top_k}) exceeds the vocabulary ({student.shape[-1]})"
        )
