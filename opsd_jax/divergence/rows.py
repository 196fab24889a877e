# SPDX-License-Identifier: Apache-2.0
"""Rows of logits to divergences, diagnostics, and the closed-form gradient.

Both implementations meet here. Dense: `row_divergence` on all rows at once, differentiated by
JAX. Fused: `row_divergence` and `logit_gradient` on one block of rows at a time, where the
vocabulary may be split over devices. Alphabet: U local vocabulary entries, K support entries.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.divergence.support import (
    complete,
    has_tail,
    outside_support,
    support_index,
    support_logps,
)
from opsd_jax.divergence.targets import make_target
from opsd_jax.divergence.terms import clip_terms, entry_terms
from opsd_jax.divergence.vocabulary import Vocabulary


@flax.struct.dataclass
class TokenDivergence:
    """What one pass over the logits says about each token; every field [B, C] float32.

    Masked tokens are exactly 0 in every field. Only `objective` carries a gradient.

    Attributes:
      objective: the clipped and weighted loss term, to be averaged over the tokens of the
        global batch.
      divergence: the named divergence in nats, unclipped, unweighted and over the full
        vocabulary (KL(student || teacher) for "sampled_token"), at the loss temperatures.
      clipped: 1 where the clip acted, else 0.
      kept_teacher_mass: teacher probability on the entries of the support whose pull the clip
        left in place; a kept tail is one entry.
      student_support_mass: student probability on the entries of the support, without a tail.
      student_entropy: nats, at temperature 1 like all the fields below.
      teacher_entropy: nats.
      student_logps: log-probability of the sampled ids under the student.
      teacher_logps: log-probability of the sampled ids under the teacher.
      argmax_agreement: 1 where some token is the most probable one on both sides, else 0.
      student_loss_logps: `student_logps` at the loss temperature.
    """

    objective: jax.Array
    divergence: jax.Array
    clipped: jax.Array
    kept_teacher_mass: jax.Array
    student_support_mass: jax.Array
    student_entropy: jax.Array
    teacher_entropy: jax.Array
    student_logps: jax.Array
    teacher_logps: jax.Array
    argmax_agreement: jax.Array
    student_loss_logps: jax.Array

    @classmethod
    def zeros(cls, num_tokens: int, dtype: jnp.dtype) -> "TokenDivergence":
        """Of tokens that do not count, [num_tokens] each."""
        return cls(*[jnp.zeros(num_tokens, dtype)] * len(dataclasses.fields(cls)))


@dataclasses.dataclass(frozen=True)
class RowLogps:
    """Log-probabilities of both sides on the same rows, at the loss temperature and at 1.

    Args:
      student: [..., U] log pS at the loss temperature.
      teacher: [..., U] log pT at its loss temperature, after the target transform.
      plain: (log pS, log pT) at temperature 1.
      index: [..., K] entries of the support, None for all.
    """

    student: jax.Array
    teacher: jax.Array
    plain: tuple[jax.Array, jax.Array]
    index: jax.Array | None


def prepare_rows(
    config: DivergenceConfig,
    vocabulary: Vocabulary,
    student_logits: jax.Array,
    teacher_logits: tuple[jax.Array, ...],
    ids: jax.Array,
) -> RowLogps:
    """Normalises logits [..., U] and chooses the support; nothing flows back to the teachers."""
    teacher_logits = jax.lax.stop_gradient(teacher_logits)

    def student_at(temperature):
        return vocabulary.log_softmax(student_logits, temperature)

    def teacher_at(temperature):
        teachers = tuple(vocabulary.log_softmax(z, temperature) for z in teacher_logits)
        if config.target is None:
            return teachers[0]
        # What a target makes of padding's -inf may be NaN: barycentre's 0 · -inf is.
        made = vocabulary.without_padding(make_target(config.target, teachers, vocabulary))
        return vocabulary.log_softmax(made)

    teacher_temperature = config.teacher_temperature or config.temperature
    student, teacher = student_at(config.temperature), teacher_at(teacher_temperature)
    plain = (
        student if config.temperature == 1 else student_at(1.0),
        teacher if teacher_temperature == 1 else teacher_at(1.0),
    )
    index = support_index(config, vocabulary, student, teacher, ids)
    return RowLogps(student, teacher, plain, index)


def row_divergence(
    config: DivergenceConfig, vocabulary: Vocabulary, rows: RowLogps, ids: jax.Array
) -> TokenDivergence:
    """Every field for rows [..., U]; `objective` is differentiable where U = V."""
    student, teacher, over = rows.student, rows.teacher, vocabulary
    seen: tuple[jax.Array, ...] = ()
    if rows.index is not None:
        seen = tuple(support_logps(config, vocabulary, x, rows.index) for x in (student, teacher))
        student, teacher = (complete(config, logps) for logps in seen)
        over = Vocabulary(student.shape[-1])
    clip = clip_terms(config, over, entry_terms(config)(student, teacher))
    kept, student_mass = _masses(config, over, seen, clip, teacher)
    return TokenDivergence(
        objective=clip.objective,
        divergence=_whole_divergence(config, vocabulary, rows),
        clipped=clip.clipped,
        kept_teacher_mass=kept,
        student_support_mass=student_mass,
        student_loss_logps=vocabulary.take(rows.student, ids[..., None])[..., 0],
        **_diagnostics(vocabulary, *rows.plain, ids),
    )


def logit_gradient(config: DivergenceConfig, vocabulary: Vocabulary, rows: RowLogps) -> jax.Array:
    """d objective / d student logits, [..., U], in closed form.

    With s_v = d objective / d log pS(v), the logs taken as free variables, and temperature h:
    (s_j - pS(j) sum_v s_v) / h. For the forward KL s = -pT, which gives (pS - pT) / h; under
    the entry clip s = -pT on A = {v: term < threshold}, which gives
    (PT(A) pS - pT 1_A) / h.
    """
    if rows.index is None:
        terms, pull = jax.vjp(lambda logps: entry_terms(config)(logps, rows.teacher), rows.student)
        (slope,) = pull(clip_terms(config, vocabulary, terms).slope(terms))
        total = vocabulary.sum(slope)
    else:
        slope, total = _support_slope(config, vocabulary, rows)
    gradient = slope - jnp.exp(rows.student) * total[..., None]
    return gradient if config.temperature == 1 else gradient / config.temperature


def _support_slope(config, vocabulary, rows):
    """The slope s [..., U] and its sum over the vocabulary, for a truncated support."""
    student = support_logps(config, vocabulary, rows.student, rows.index)
    teacher = complete(config, support_logps(config, vocabulary, rows.teacher, rows.index))

    def objective(logps):
        terms = entry_terms(config)(complete(config, logps), teacher)
        return jnp.sum(clip_terms(config, Vocabulary(terms.shape[-1]), terms).objective)

    chosen_slope = jax.grad(objective)(student)
    K = rows.index.shape[-1]
    slope = vocabulary.put(chosen_slope[..., :K], rows.index, rows.student)
    if has_tail(config):
        # A logit outside moves the tail by its share p / p_tail of it.
        outside = outside_support(vocabulary, rows.student, rows.index)
        share = jnp.exp(jnp.where(outside, rows.student - student[..., K:], -jnp.inf))
        slope = slope + share * chosen_slope[..., K:]
    return slope, jnp.sum(chosen_slope, axis=-1)


def _masses(config, over, seen, clip, teacher):
    """(kept teacher mass, student mass on the support); exactly 1 where that is known.

    `seen` are the two sides on a truncated support, as they were before `complete`.
    """
    kept = student_mass = jnp.ones_like(clip.objective)
    if config.name == "sampled_token":
        return kept, student_mass
    if clip.kept is not None:
        kept = over.sum(jnp.where(clip.kept, jnp.exp(teacher), 0))
    if seen:
        chosen = [jnp.exp(x[..., :-1] if has_tail(config) else x) for x in seen]
        student_mass, teacher_mass = (jnp.sum(x, axis=-1) for x in chosen)
        # What is truncated was counted with the kept entries; a tail leaves nothing out.
        whole = config.completion == "tail" or (
            config.completion == "truncate" and clip.kept is not None
        )
        kept = kept if whole else kept * teacher_mass
    return jnp.where(clip.clipped, 0, kept) if config.clip == "token" else kept, student_mass


def _whole_divergence(config, vocabulary, rows):
    if config.name == "sampled_token":
        config = dataclasses.replace(config, name="reverse_kl")
    return vocabulary.sum(entry_terms(config)(rows.student, rows.teacher))


def _diagnostics(vocabulary, student_logps, teacher_logps, ids):
    def entropy(logps):
        possible = logps > -jnp.inf
        return -vocabulary.sum(jnp.exp(logps) * jnp.where(possible, logps, 0))

    def at_ids(logps):
        return vocabulary.take(logps, ids[..., None])[..., 0]

    # Zero only where both are at their maximum; an argmax pass costs several times as much.
    student_gap = student_logps - vocabulary.max(student_logps)[..., None]
    teacher_gap = teacher_logps - vocabulary.max(teacher_logps)[..., None]
    return dict(
        student_entropy=entropy(student_logps),
        teacher_entropy=entropy(teacher_logps),
        student_logps=at_ids(student_logps),
        teacher_logps=at_ids(teacher_logps),
        argmax_agreement=vocabulary.max(student_gap + teacher_gap) == 0,
    )
