# SPDX-License-Identifier: Apache-2.0
"""Divergence between student and teacher next-token distributions, one number per token.

`token_divergence` is what the train step calls: hidden states and heads in, objective and
diagnostics out. `forward_kl`, `reverse_kl`, `jensen_shannon` and `sampled_token` are the same
from logits. No reduction happens here: the caller masks and averages. Nothing is differentiated
with respect to the teacher. The dense implementation is in this file and is the one to read;
`fused.py` computes the same numbers without ever holding [B, C, V].

Alphabet: B batch, C completion, D width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from opsd_jax.divergence.config import DivergenceConfig, Weight
from opsd_jax.divergence.fused import fused_divergence
from opsd_jax.divergence.rows import TokenDivergence, prepare_rows, row_divergence
from opsd_jax.divergence.vocabulary import Vocabulary, vocabulary_mesh
from opsd_jax.errors import UserError
from opsd_jax.fields import check_shape
from opsd_jax.model.head import Head, head_logits

__all__ = [
    "DivergenceConfig",
    "TokenDivergence",
    "forward_kl",
    "fused",
    "jensen_shannon",
    "logit_divergence",
    "reverse_kl",
    "sampled_token",
    "token_divergence",
]


def token_divergence(
    config: DivergenceConfig,
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array | tuple[jax.Array, ...],
    teacher_head: Head | tuple[Head, ...],
    completion_ids: jax.Array,
    completion_mask: jax.Array,
    *,
    sampled_logps: jax.Array | None = None,
    mesh: Any = None,
) -> TokenDivergence:
    """Per-token loss and diagnostics from hidden states that predict `completion_ids`.

    Args:
      config: which divergence, support, clip, weights, temperature and implementation.
      student_hidden: [B, C, D]; row t predicts completion_ids[:, t].
      student_head: kernel [V, D].
      teacher_hidden: [B, C, D'], or a tuple of them when `config.target` combines teachers.
      teacher_head: kernel [V, D'], or a tuple of heads.
      completion_ids: [B, C] int32.
      completion_mask: [B, C] bool, True = counts; masked rows may hold anything, NaN included.
      sampled_logps: [B, C] float32, see `importance_weights`; read by "sampled_token" and with
        `config.importance_clip`, which must have them.
      mesh: for the fused implementation, the mesh whose `data` axis splits the rows and whose
        `model` axis splits the vocabulary; the mesh of `jax.set_mesh` when left out.

    Returns:
      TokenDivergence of [B, C] float32; gradients reach `student_hidden` and `student_head`
      through `objective` alone.

    Raises:
      UserError: vocabularies differ, top_k exceeds them, several teachers have no target, or an
        importance clip has no `sampled_logps`.
    """
    hiddens, heads = _as_tuple(teacher_hidden), _as_tuple(teacher_head)
    _check(config, student_head.kernel.shape[0], [head.kernel.shape[0] for head in heads])
    if config.implementation == "fused":
        place = vocabulary_mesh(mesh, completion_ids.shape)
        tokens = fused_divergence(
            config,
            student_hidden,
            student_head,
            hiddens,
            heads,
            completion_ids,
            completion_mask,
            place,
        )
        return _weigh(config, tokens, completion_mask, sampled_logps)

    def logits(head, hidden):
        return head_logits(head, jnp.where(completion_mask[..., None], hidden, 0))

    return logit_divergence(
        config,
        logits(student_head, student_hidden),
        tuple(map(logits, heads, hiddens)),
        completion_ids,
        completion_mask,
        sampled_logps,
    )


def logit_divergence(
    config: DivergenceConfig,
    student_logits: jax.Array,
    teacher_logits: jax.Array | tuple[jax.Array, ...],
    completion_ids: jax.Array | None = None,
    completion_mask: jax.Array | None = None,
    sampled_logps: jax.Array | None = None,
) -> TokenDivergence:
    """`token_divergence` from logits [B, C, V] (or [..., V]), always dense.

    Args:
      config: which divergence, support, clip, weights and temperature.
      student_logits: [..., V], any float dtype.
      teacher_logits: [..., V], or a tuple of them when `config.target` combines teachers.
      completion_ids: [...] int32; zeros when left out.
      completion_mask: [...] bool; all True when left out.
      sampled_logps: [...] float32, see `importance_weights`.
    """
    if completion_mask is None:
        completion_mask = jnp.ones(student_logits.shape[:-1], bool)
    if completion_ids is None:
        completion_ids = jnp.zeros(student_logits.shape[:-1], jnp.int32)
    teachers = _as_tuple(teacher_logits)
    _check(config, student_logits.shape[-1], [z.shape[-1] for z in teachers])

    def prepared(logits):
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return jnp.where(completion_mask[..., None], logits, 0)

    student, teachers = prepared(student_logits), tuple(map(prepared, teachers))
    vocabulary = Vocabulary(student.shape[-1])
    rows = prepare_rows(config, vocabulary, student, teachers, completion_ids)
    tokens = row_divergence(config, vocabulary, rows, completion_ids)
    tokens = jax.tree.map(lambda x: jnp.where(completion_mask, x.astype(student.dtype), 0), tokens)
    tokens = jax.lax.stop_gradient(tokens).replace(objective=tokens.objective)
    return _weigh(config, tokens, completion_mask, sampled_logps)


def forward_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, mask: jax.Array | None = None, **config
) -> jax.Array:
    """KL(teacher || student) per token: sum_v pT(v) (log pT(v) - log pS(v)), in nats.

    Args:
      student_logits: [B, C, V].
      teacher_logits: [B, C, V]; constant for differentiation.
      mask: [B, C] bool; 0 where False.
      **config: further `DivergenceConfig` fields, such as clip or temperature.

    Returns:
      [B, C] float32: `TokenDivergence.objective`.
    """
    return _objective("forward_kl", student_logits, teacher_logits, None, mask, config)


def reverse_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, mask: jax.Array | None = None, **config
) -> jax.Array:
    """KL(student || teacher) per token: sum_v pS(v) (log pS(v) - log pT(v)), in nats.

    Arguments and result as in `forward_kl`.
    """
    return _objective("reverse_kl", student_logits, teacher_logits, None, mask, config)


def jensen_shannon(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    mask: jax.Array | None = None,
    *,
    beta: float = 0.5,
    **config,
) -> jax.Array:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta pT + (1 - beta) pS.

    `beta` lies strictly inside (0, 1), where the divergence vanishes at both ends. Arguments
    and result as in `forward_kl`.
    """
    config["beta"] = beta
    return _objective("jensen_shannon", student_logits, teacher_logits, None, mask, config)


def sampled_token(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    completion_ids: jax.Array,
    mask: jax.Array | None = None,
    sampled_logps: jax.Array | None = None,
    **config,
) -> jax.Array:
    """-sg[w(y) (log pT(y) - log pS(y))] log pS(y) per token y: a one-sample gradient of KL(S || T).

    Args:
      student_logits: [B, C, V].
      teacher_logits: [B, C, V]; constant for differentiation.
      completion_ids: [B, C] int32, sampled from the student, or from q with `sampled_logps`.
      mask: [B, C] bool; 0 where False.
      sampled_logps: [B, C] float32, log q(y) for w = `importance_weights`; 1 when left out.
      **config: further `DivergenceConfig` fields.

    Returns:
      [B, C] float32; only its gradient means something.
    """
    chosen = DivergenceConfig(name="sampled_token", **config)
    ids = completion_ids
    return logit_divergence(
        chosen, student_logits, teacher_logits, ids, mask, sampled_logps
    ).objective


def importance_weights(
    tokens: TokenDivergence, sampled_logps: jax.Array, clip: float | None = None
) -> jax.Array:
    """w = sg[min(pS(y) / q(y), clip)] of ids y that were sampled from q, [B, C].

    E_{y ~ q} w(y) g(y) = E_{y ~ pS} g(y) whatever q is (an older student, the teacher, another
    temperature, 8-bit weights), as long as q(y) > 0 wherever pS(y) > 0: nothing is filtered. It
    corrects the token at hand; its prefix stays one that q wrote. Without a clip nothing bounds
    w, nor the variance: it is small as long as q is near pS. With one the estimate is biased, and
    less so the less often w reaches it (truncated importance sampling).

    Args:
      tokens: holds log pS(y) at the loss temperature.
      sampled_logps: [B, C] log q(y), as sampled (`Completion.sampled_logps`): after temperature,
        filters and penalties, in the sampler's own numerics.
      clip: None is none.
    """
    weights = jnp.exp(tokens.student_loss_logps - sampled_logps)
    return jax.lax.stop_gradient(weights if clip is None else jnp.minimum(weights, clip))


def fused(
    student_hidden: jax.Array,
    student_head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    completion_ids: jax.Array,
    completion_mask: jax.Array,
    *,
    mesh: Any = None,
    **config,
) -> TokenDivergence:
    """`token_divergence` with `implementation="fused"` and the other fields as keywords."""
    return token_divergence(
        DivergenceConfig(**config, implementation="fused"),
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        completion_ids,
        completion_mask,
        mesh=mesh,
    )


def _objective(name, student_logits, teacher_logits, ids, mask, config):
    config = DivergenceConfig(name=name, **config)
    return logit_divergence(config, student_logits, teacher_logits, ids, mask).objective


def _weigh(config, tokens, mask, sampled_logps):
    factors = [per_token("divergence.weights", weight, tokens, mask) for weight in config.weights]
    if config.importance_clip is not None and sampled_logps is None:
        raise UserError(
            "divergence.importance_clip needs completions that were sampled, with the "
            "log-probabilities under what sampled them"
        )
    if config.weighs_importance and sampled_logps is not None:
        weight = importance_weights(tokens, sampled_logps, config.importance_clip)
        # Masked tokens weigh 1: what was not sampled may have any log-probability.
        factors.append(jnp.where(mask, weight, 1))
    for factor in factors:
        tokens = tokens.replace(objective=tokens.objective * factor)
    return tokens


def per_token(name: str, function: Weight, tokens: Any, mask: jax.Array) -> jax.Array:
    """What a function of the user's says of each token [B, C], or row [B, 1], as a constant."""
    values = jax.lax.stop_gradient(function(tokens, mask))
    check_shape(name, function, values, mask.shape, (*mask.shape[:-1], 1))
    return values


def _as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def _check(config, student_size, teacher_sizes):
    if len(teacher_sizes) > 1 and config.target is None:
        raise UserError(
            f"{len(teacher_sizes)} teachers were given: set divergence.target to combine them"
        )
    for size in teacher_sizes:
        if size != student_size:
            raise UserError(
                f"the student's vocabulary has {student_size} entries and the teacher's {size}: "
                "both heads must rank the same tokens"
            )
    if config.support != "full" and config.top_k > student_size:
        raise UserError(
            f"divergence.top_k ({config.top_k}) exceeds the vocabulary ({student_size})"
        )
