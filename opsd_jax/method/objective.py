# SPDX-License-Identifier: Apache-2.0
"""The loss: one completion read under two contexts, compared token by token.

An objective is a small frozen value with two functions. `plan(step: GradedBatch)` sees the whole
batch and says what each row must know of it (its weight in the mean, its advantage); calling it on
a `Reader` of some rows and their plan gives a `Loss` whose values of all micro-batches and devices
simply add up. `mix.py` has the objectives: `Distillation` is the method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp

from opsd_jax.divergence.likelihood import token_logps
from opsd_jax.divergence.losses import (
    DivergenceConfig,
    TokenDivergence,
    importance_weights,
    token_divergence,
)
from opsd_jax.errors import UserError
from opsd_jax.method.batch import Batch, Policy
from opsd_jax.method.rows import GradedBatch
from opsd_jax.method.scoring import completion_hidden, hidden_of_each
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import output_head
from opsd_jax.model.sharding import platform
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion, Context
from opsd_jax.sampling.tokens import filter_logits


def compare(
    model: Decoder,
    config: DivergenceConfig,
    student_variables: dict,
    teacher_variables: dict,
    batch: Batch,
    completion: Completion,
    dropout_key: jax.Array | None = None,
    *,
    teacher_model: Decoder | None = None,
    student_hidden: jax.Array | None = None,
    teacher_hidden: tuple[jax.Array, ...] | None = None,
) -> TokenDivergence:
    """Per-token terms of the loss on the student's own completion, each [B, C].

    Both roles read the very same ids, each at its own prompt's offset; no gradient reaches the
    teacher's variables. Rows without a teacher context are 0, as masked tokens are. Dropout, if
    any, acts on the student's adapters alone. An external teacher brings its own `teacher_model`;
    `student_hidden` and `teacher_hidden` spare passes that were made before.

    Raises:
      UserError: a loss that asks what was sampled, on completions that nobody sampled.
    """
    if config.weighs_importance and completion.sampled_logps is None:
        asks = "name 'sampled_token'" if config.name == "sampled_token" else "importance_clip"
        raise UserError(
            f"divergence.{asks} needs completions that were sampled: set train.completions to "
            "@StudentRollouts()"
        )
    teacher_model = teacher_model or model
    teacher_variables = jax.lax.stop_gradient(teacher_variables)
    if student_hidden is None:
        student_hidden = completion_hidden(
            model, student_variables, batch.student, completion, dropout_key
        )
    if teacher_hidden is None:
        contexts = teacher_contexts(config, batch)
        teacher_hidden = hidden_of_each(teacher_model, teacher_variables, contexts, completion)
    return token_divergence(
        config,
        student_hidden,
        output_head(student_variables["params"], model.config),
        jax.lax.stop_gradient(teacher_hidden),
        (output_head(teacher_variables["params"], teacher_model.config),) * len(teacher_hidden),
        completion.ids,
        batch.in_context(completion.mask),
        sampled_logps=completion.sampled_logps,
    )


def teacher_contexts(config: DivergenceConfig, batch: Batch) -> tuple[Context, ...]:
    """The contexts whose teachers make the divergence's target.

    Without a target the teacher's own alone. A target makes one teacher of the K views; where
    there is one view, of the teacher as privileged and as it answers without.
    """
    if config.target is None:
        return (batch.teacher,)
    return (batch.teacher, *(batch.views or (batch.student,)))


@dataclasses.dataclass(frozen=True)
class Reader:
    """Some rows of a batch, read only as far as an objective asks, and each reading made once.

    rollout: how the completions were sampled, None as the model itself; initial: the policy that
    training started from, None the teacher; step: [] int32, finished steps.
    """

    student: Policy
    teacher: Policy
    batch: Batch
    completion: Completion
    config: DivergenceConfig
    dropout_key: jax.Array | None = None
    rollout: RolloutConfig | None = None
    initial: Policy | None = None
    step: jax.Array | int = 0

    @cached_property
    def student_hidden(self) -> jax.Array:
        """[B, C, D]."""
        context = self.batch.student
        return completion_hidden(*self.student, context, self.completion, self.dropout_key)

    @cached_property
    def divergence(self) -> TokenDivergence:
        """Student in its context against teacher in the teacher's, each field [B, C].

        Its objective is without the token weights, which may ask for more than is known here.
        """
        return compare(
            self.student.model,
            dataclasses.replace(self.config, weights=()),
            self.student.variables,
            self.teacher.variables,
            self.batch,
            self.completion,
            teacher_model=self.teacher.model,
            student_hidden=self.student_hidden,
            teacher_hidden=self._target_hidden,
        )

    @cached_property
    def view_logps(self) -> jax.Array:
        """[K, B, C] log-probabilities of the sampled ids in (batch.teacher, *batch.views).

        Under the teacher's weights, at temperature 1 and without a gradient; 0 where masked and
        in rows without a context. What token weights and advantages know of the views.
        """
        mask = self.batch.in_context(self.completion.mask)
        views = (self.teacher_hidden, *self.views_hidden)
        found = [self._logps(self.teacher, hidden, mask)[0] for hidden in views]
        return jax.lax.stop_gradient(jnp.stack(found))

    @cached_property
    def teacher_hidden(self) -> jax.Array:
        """[B, C, D'] in the teacher's own context, without a gradient like all it reads."""
        return self._teacher_reads((self.batch.teacher,))[0]

    @cached_property
    def views_hidden(self) -> tuple[jax.Array, ...]:
        """K - 1 of them, [B, C, D'], in `batch.views`."""
        return self._teacher_reads(self.batch.views, self.teacher_hidden)

    @cached_property
    def plain_hidden(self) -> jax.Array:
        """[B, C, D'] of the teacher in the *student's* context."""
        return self._teacher_reads((self.batch.student,))[0]

    @property
    def _target_hidden(self) -> tuple[jax.Array, ...]:
        """As `teacher_contexts` has it."""
        if self.config.target is None:
            return (self.teacher_hidden,)
        return (self.teacher_hidden, *(self.views_hidden or (self.plain_hidden,)))

    @cached_property
    def student_logps(self) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of the completion and entropies, [B, C], both with gradients."""
        return self._logps(self.student, self.student_hidden, self.completion.mask)

    @cached_property
    def teacher_logps(self) -> tuple[jax.Array, jax.Array]:
        """As `student_logps`, of the teacher in its own context; 0 in rows without one."""
        mask = self.batch.in_context(self.completion.mask)
        return jax.lax.stop_gradient(self._logps(self.teacher, self.teacher_hidden, mask))

    @cached_property
    def plain_logps(self) -> jax.Array:
        """[B, C] under the teacher's weights in the *student's* context."""
        mask = self.completion.mask
        return jax.lax.stop_gradient(self._logps(self.teacher, self.plain_hidden, mask)[0])

    @cached_property
    def sampled_logps(self) -> tuple[jax.Array, jax.Array]:
        """log pS(y) now and log p(y) as sampled, [B, C], of the distribution that was sampled.

        Both under `rollout.temperature`, top_k, top_p and min_p. Filters are applied to the
        student's logits of now: an id that they remove has -inf, and no gradient.
        """
        rollout, completion = self.rollout, self.completion
        if rollout is None or rollout.is_plain:
            return self.student_logps[0], completion.logps
        check_ratio(rollout)
        filters = (rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p)
        hidden, mask = self.student_hidden, completion.mask
        now, _ = self._logps(self.student, hidden, mask, partial(sampled_logits, filters))
        old: Any = completion.sampled_logps
        return now, old

    @cached_property
    def initial_hidden(self) -> jax.Array:
        """[B, C, D'] of the initial policy in the *student's* context, without a gradient."""
        if self.initial is None:
            return self.plain_hidden
        model, variables = self.initial
        variables = jax.lax.stop_gradient(variables)
        return completion_hidden(model, variables, self.batch.student, self.completion)

    @cached_property
    def initial_logps(self) -> jax.Array:
        """[B, C] of the initial policy in the *student's* context."""
        if self.initial is None:
            return self.plain_logps
        mask = self.completion.mask
        return jax.lax.stop_gradient(self._logps(self.initial, self.initial_hidden, mask)[0])

    def _teacher_reads(
        self, contexts: tuple[Context, ...], after: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        model, variables = self.teacher
        variables = jax.lax.stop_gradient(variables)
        return hidden_of_each(model, variables, contexts, self.completion, after)

    def _logps(
        self,
        policy: Policy,
        hidden: jax.Array,
        mask: jax.Array,
        process: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        fused = self.config.implementation == "fused"
        block = self.config.rows_of_logits(platform() == "cpu") if fused else None
        head = output_head(policy.variables["params"], policy.model.config)
        return token_logps(head, hidden, self.completion.ids, mask, block, process)


def sampled_logits(filters: tuple[float, int, float, float], logits: jax.Array) -> jax.Array:
    """What is sampled from, [..., V], under (temperature, top_k, top_p, min_p).

    Which entries stay is constant for differentiation.
    """
    logits = logits.astype(jnp.float32)
    logits -= jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    stays = filter_logits(jax.lax.stop_gradient(logits), *filters) > -jnp.inf
    return jnp.where(stays, logits / filters[0], -jnp.inf)


def check_ratio(rollout: RolloutConfig) -> None:
    """Raises a UserError unless log-probabilities of what was sampled can be computed again."""
    if rollout.temperature == 0 or rollout.penalises or rollout.min_new_tokens:
        raise UserError(
            "PolicyGradient compares log-probabilities of the distribution that was sampled, under "
            "a temperature, top_k, top_p and min_p: set rollout.temperature above 0, "
            "rollout.repetition_penalty = 1.0, rollout.presence_penalty = 0.0 and "
            "rollout.min_new_tokens = 0"
        )


@flax.struct.dataclass
class Loss:
    """What some rows add to the step.

    value: [], minimised, divided by the global batch's denominators already; sums: name -> []
    sums over tokens, which become metrics per token; rows: name -> [B] sums over a row's tokens;
    context_sums: as sums, over the tokens of rows with a teacher context (`Batch.in_context`);
    parts: name -> [], what the terms of a mix add to the value.
    """

    value: jax.Array
    sums: dict[str, jax.Array]
    rows: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    context_sums: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    parts: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Objective(Protocol):
    """See the head of this file."""

    @property
    def needs_rewards(self) -> bool:
        """Whether the loop must grade the completions before the update."""

    def plan(self, step: GradedBatch) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """(rows: name -> [B, ...], metrics: name -> []) of the whole batch."""

    def __call__(self, reader: Reader, plan: dict[str, Any]) -> Loss:
        """The loss of the reader's rows."""


def masked_sums(per_token: dict[str, jax.Array], mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens; dividing by their number gives the metrics of the step.

    Sums and not means, so that micro-batches and devices add up to the mean over the global
    batch, the same denominator as the loss.
    """
    return {
        name: jnp.sum(jnp.where(mask, value, 0.0), dtype=jnp.float32)
        for name, value in per_token.items()
    }


def token_sums(
    terms: TokenDivergence, batch: Batch, completion: Completion
) -> dict[str, jax.Array]:
    """What a divergence says about the tokens of rows with a teacher context, summed."""
    mask = batch.in_context(completion.mask)
    per_token = {
        "loss/divergence": terms.divergence,
        "loss/clip_fraction": terms.clipped,
        # What rounding makes of 0 is not below it.
        "loss/negative_fraction": terms.objective < -1e-6,
        "loss/kept_teacher_mass": terms.kept_teacher_mass,
        "loss/student_support_mass": terms.student_support_mass,
        "teacher/entropy": terms.teacher_entropy,
        "teacher/nll_of_rollout": -terms.teacher_logps,
        "teacher/argmax_agreement": terms.argmax_agreement,
    }
    return masked_sums(per_token, mask) | student_sums(
        terms.student_logps, terms.student_entropy, completion.logps, mask
    )


def importance_sums(reader: Reader) -> dict[str, jax.Array]:
    """What an importance clip does to the tokens, summed; nothing where there is none."""
    clip, completion = reader.config.importance_clip, reader.completion
    if clip is None or completion.sampled_logps is None:
        return {}
    ratios = importance_weights(reader.divergence, completion.sampled_logps)
    per_token = {
        "loss/importance_mean": jnp.minimum(ratios, clip),
        "loss/importance_clip_fraction": ratios > clip,
    }
    return masked_sums(per_token, reader.batch.in_context(completion.mask))


def student_sums(
    logps: jax.Array, entropy: jax.Array, rollout_logps: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """What the student says about the tokens, summed; every argument [B, C]."""
    per_token = {
        "student/entropy": entropy,
        "student/nll_of_rollout": -logps,
        # Zero up to rounding as long as rollout and scoring are the same function.
        "rollout/logp_gap": jnp.abs(logps - rollout_logps),
    }
    return masked_sums(jax.lax.stop_gradient(per_token), mask)
