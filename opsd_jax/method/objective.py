# SPDX-License-Identifier: Apache-2.0
"""The loss: one completion read under two contexts, compared token by token.

An objective is a small frozen value with two functions. `plan(batch, completion, rewards,
group_size)` sees the whole batch and says what each row must know of it (its weight in the mean,
its advantage); calling it on a `Reader` of some rows and their plan gives a `Loss` whose values of
all micro-batches and devices simply add up. `Distillation` is the method; `Likelihood` and
`policy_gradient.py` are what it is compared with.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp

from opsd_jax.divergence.likelihood import token_logps
from opsd_jax.divergence.losses import DivergenceConfig, TokenDivergence, token_divergence
from opsd_jax.errors import UserError
from opsd_jax.method.batch import Batch, Policy
from opsd_jax.method.scoring import completion_hidden, hidden_of_each
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import output_head
from opsd_jax.sampling.prompts import Completion, Context


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
    """Some rows of a batch, read only as far as an objective asks, and each reading made once."""

    student: Policy
    teacher: Policy
    batch: Batch
    completion: Completion
    config: DivergenceConfig
    dropout_key: jax.Array | None = None

    @cached_property
    def student_hidden(self) -> jax.Array:
        """[B, C, D]."""
        context = self.batch.student
        return completion_hidden(*self.student, context, self.completion, self.dropout_key)

    @cached_property
    def divergence(self) -> TokenDivergence:
        """Student in its context against teacher in the teacher's, each field [B, C]."""
        return compare(
            self.student.model,
            self.config,
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
        """Log-probabilities of the completion and entropies, [B, C]; the first has a gradient."""
        return self._logps(self.student, self.student_hidden, self.completion.mask)

    @cached_property
    def initial_logps(self) -> jax.Array:
        """[B, C] under the teacher's weights in the *student's* context."""
        hidden = self.plain_hidden
        return jax.lax.stop_gradient(self._logps(self.teacher, hidden, self.completion.mask)[0])

    def _teacher_reads(
        self, contexts: tuple[Context, ...], after: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        model, variables = self.teacher
        variables = jax.lax.stop_gradient(variables)
        return hidden_of_each(model, variables, contexts, self.completion, after)

    def _logps(
        self, policy: Policy, hidden: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        fused = self.config.implementation == "fused"
        block = (self.config.token_block or 1024) if fused else None
        head = output_head(policy.variables["params"], policy.model.config)
        return token_logps(head, hidden, self.completion.ids, mask, block)


@flax.struct.dataclass
class Loss:
    """What some rows add to the step.

    value: [], minimised, divided by the global batch's denominators already; sums: name -> []
    sums over tokens, which become metrics per token; rows: name -> [B] sums over a row's tokens;
    context_sums: as sums, over the tokens of rows with a teacher context (`Batch.in_context`).
    """

    value: jax.Array
    sums: dict[str, jax.Array]
    rows: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    context_sums: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Objective(Protocol):
    """See the head of this file."""

    @property
    def needs_rewards(self) -> bool:
        """Whether the loop must grade the completions before the update."""

    def plan(
        self, batch: Batch, completion: Completion, rewards: jax.Array | None, group_size: int
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """(rows: name -> [B, ...], metrics: name -> []) of the whole batch."""

    def __call__(self, reader: Reader, plan: dict[str, jax.Array]) -> Loss:
        """The loss of the reader's rows."""


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The divergence to the teacher (`divergence.*`), averaged over the tokens of the batch.

    L = Σ_{b,t} mask · ℓ_{b,t} / Σ_{b,t} mask, over the rows that have a teacher context.
    """

    needs_rewards = False

    def plan(
        self, batch: Batch, completion: Completion, rewards: Any, group_size: int
    ) -> tuple[dict, dict]:
        return {"weights": mean_weights(batch.in_context(completion.mask), "token")}, {}

    def __call__(self, reader: Reader, plan: dict[str, jax.Array]) -> Loss:
        terms = reader.divergence
        return Loss(
            weighted_sum(terms.objective, plan["weights"]),
            {},
            {"divergence": jnp.sum(terms.divergence, axis=1)},
            token_sums(terms, reader.batch, reader.completion),
        )


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The negative log-likelihood of the completions, averaged over their tokens.

    L = −Σ_{b,t} mask · log pS(y_{b,t}) / Σ_{b,t} mask. On the data's completions this is
    supervised fine-tuning, on a teacher's sequence-level distillation (arXiv 1606.07947).
    """

    needs_rewards = False

    def plan(
        self, batch: Batch, completion: Completion, rewards: Any, group_size: int
    ) -> tuple[dict, dict]:
        return {"weights": mean_weights(completion.mask, "token")}, {}

    def __call__(self, reader: Reader, plan: dict[str, jax.Array]) -> Loss:
        logps, entropy = reader.student_logps
        value = weighted_sum(-logps, plan["weights"])
        completion = reader.completion
        return Loss(value, student_sums(logps, entropy, completion.logps, completion.mask))


def mean_weights(mask: jax.Array, mean: str) -> jax.Array:
    """The weight of every token in a mean over the global batch, [B, C] float32.

    Args:
      mask: [B, C] bool; a row without tokens counts nowhere.
      mean: "token" 1 / Σ mask; "sequence" 1 / (tokens of the row · rows); "constant"
        1 / (C · rows), which favours neither short nor long rows (arXiv 2503.20783).
    """
    tokens = jnp.sum(mask, axis=1, keepdims=True)
    num_rows = jnp.sum(tokens > 0)
    weight = {
        "token": 1.0 / jnp.maximum(jnp.sum(tokens), 1),
        "sequence": 1.0 / jnp.maximum(tokens * num_rows, 1),
        "constant": 1.0 / jnp.maximum(mask.shape[1] * num_rows, 1),
    }[mean]
    return jnp.where(mask, weight.astype(jnp.float32), 0.0)


def weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ weights · values; where a weight is 0 the value may be anything."""
    return jnp.sum(jnp.where(weights != 0, values, 0.0) * weights)


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
        "loss/negative_fraction": terms.objective < 0,
        "loss/kept_teacher_mass": terms.kept_teacher_mass,
        "teacher/entropy": terms.teacher_entropy,
        "teacher/nll_of_rollout": -terms.teacher_logps,
        "teacher/argmax_agreement": terms.argmax_agreement,
    }
    return masked_sums(per_token, mask) | student_sums(
        terms.student_logps, terms.student_entropy, completion.logps, mask
    )


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
