# SPDX-License-Identifier: Apache-2.0
"""What is learned from the completions: weighted terms, each over its rows, alone or in a `Mix`.

    L = Σ_terms weight(step) · Σ_{b,t} mean_{b,t} · token weights_{b,t} · ℓ_{b,t}

where mean_{b,t} (`rows.py`) is 0 outside the term's rows. Terms: `Distillation` (the divergence to
the teacher, the method itself), `Likelihood`, `Anchor` (the KL to the initial policy), and
`PolicyGradient` (`policy_gradient.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from opsd_jax.divergence.losses import DivergenceConfig, token_divergence
from opsd_jax.errors import UserError
from opsd_jax.fields import Count, NotNegative, check_shape, require
from opsd_jax.method.completions import References
from opsd_jax.method.objective import (
    Loss,
    Objective,
    Reader,
    importance_sums,
    masked_sums,
    student_sums,
    token_sums,
)
from opsd_jax.method.rows import (
    MEANS,
    NEED_GRADES,
    GradedBatch,
    Rows,
    mean_weights,
    parts_of,
    selected,
    weighted_sum,
)
from opsd_jax.method.token_view import Function, Tokens, weighed
from opsd_jax.model.head import output_head

Plan = dict[str, Any]
Schedule = Callable[[Any], Any]


def linear(
    step: jax.Array, *, start: NotNegative = 1.0, end: NotNegative = 0.0, num_steps: Count = 50
) -> jax.Array:
    """A weight that goes from `start` to `end` over `num_steps` steps, and stays there."""
    return start + (end - start) * jnp.minimum(step / num_steps, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """What all terms have in common.

    Args:
      weight: of the term, a number or a function (step: [] int32, finished steps) -> [], which is
        traced: a schedule compiles once.
      rows: that the term learns from: "all", "right" and "wrong" (a grade of at least 1/2, below),
        "all_wrong" (no right completion of the problem), "varied" (the problem's grades differ),
        "context" (a teacher context could be built), "complete" (not truncated), a function
        (`rows.py`), or a tuple of these, all of which must hold.
      mean: "token", "sequence" or "constant" (`rows.mean_weights`).
      over: what the mean divides by: the term's own "rows", or all of the "batch".
      weights: functions (tokens: Tokens, mask) -> [B, C] whose product multiplies the loss of the
        tokens (`token_weights.py`). A term with token weights leaves out rows without a teacher
        context, as `Distillation` does: the weights may look at the teacher.

    A term of your own inherits this and reads what it needs of the rows, here their entropy:

        @gin.configurable
        @dataclasses.dataclass(frozen=True)
        class EntropyBonus(Term):
            def __call__(self, reader, plan):
                _, entropy = reader.student_logps
                return Loss(weighted_sum(-entropy, plan["weights"]), {})

    plan["weights"] are those of `mean` over the whole batch, so that the values of micro-batches
    add up; the second argument of `Loss` holds sums over tokens, which are logged per token. One
    that looks at the teacher's context also says `reads_teacher = True`.
    """

    weight: NotNegative | Schedule = 1.0
    rows: Rows = "all"
    mean: Annotated[str, MEANS] = "token"
    over: Annotated[str, ("rows", "batch")] = "rows"
    weights: tuple[Function, ...] = ()

    def __post_init__(self):
        require(type(self).__name__, self)
        for name in ("rows", "weights"):  # lists, as gin may give them, are not hashable
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @property
    def needs_rewards(self) -> bool:
        """Whether its rows are chosen by grade, as any function may choose them."""
        return any(callable(part) or part in NEED_GRADES for part in parts_of(self.rows))

    @property
    def reads_teacher(self) -> bool:
        """Whether it looks at the teacher's context."""
        return bool(self.weights)

    def plan(self, step: GradedBatch) -> tuple[Plan, dict[str, jax.Array]]:
        """(rows: name -> [B, ...], metrics: name -> []) of the whole batch."""
        rows = {"weights": self.mean_weights(step, step.completion.mask, self.reads_teacher)}
        if step.rewards is not None:
            rows["rewards"] = step.rewards
        return rows, self.share_of_rows(step)

    def share_of_rows(self, step: GradedBatch) -> dict[str, jax.Array]:
        """The metric of the share of rows that it learns from, where that is not all."""
        if self.rows == "all":
            return {}
        return {"loss/rows_fraction": jnp.mean(selected(self.rows, step), dtype=jnp.float32)}

    def mean_weights(self, step: GradedBatch, mask: jax.Array, with_context: bool) -> jax.Array:
        """[B, C], the weight of every token in the loss; rows without context 0 if so asked."""
        mine = selected(self.rows, step)
        if with_context:
            mask = step.batch.in_context(mask)
        counted = mask & mine[:, None] if self.over == "rows" else mask
        weights = jnp.where(mine[:, None], mean_weights(counted, self.mean), 0.0)
        if not callable(self.weight):
            return weights * self.weight
        weight = self.weight(step.step)
        check_shape("a term's weight", self.weight, weight, ())
        return weights * weight

    def __call__(self, reader: Reader, plan: Plan) -> Loss:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Distillation(Term):
    """The divergence to the teacher (`divergence.*`), over the rows that have a teacher context.

    L = Σ_{b,t} mask · ℓ_{b,t} / Σ_{b,t} mask. Token weights of `divergence.weights` and its own
    multiply.
    """

    reads_teacher = True

    def __call__(self, reader: Reader, plan: Plan) -> Loss:
        terms, completion = reader.divergence, reader.completion
        tokens = Tokens(reader, plan, terms)
        weights = (*reader.config.weights, *self.weights)
        values, weight_sums = weighed(terms.objective, weights, tokens)
        return Loss(
            weighted_sum(values, plan["weights"]),
            {},
            {"divergence": jnp.sum(terms.divergence, axis=1)},
            token_sums(dataclasses.replace(terms, objective=values), reader.batch, completion)
            | importance_sums(reader)
            | weight_sums,
        )


@dataclasses.dataclass(frozen=True)
class Likelihood(Term):
    """The negative log-likelihood of completions, averaged over their tokens.

    L = −Σ_{b,t} mask · log pS(y_{b,t}) / Σ_{b,t} mask. On the data's completions this is supervised
    fine-tuning, on a teacher's sequence-level distillation (arXiv 1606.07947), on the right ones
    of its own rejection sampling (rows = "right").

    Args:
      of: None takes the completions of the step; @References() the data's own beside them.
    """

    of: References | None = None

    def plan(self, step: GradedBatch) -> tuple[Plan, dict[str, jax.Array]]:
        return super().plan(step._replace(completion=self._completion(step)))

    def __call__(self, reader: Reader, plan: Plan) -> Loss:
        if self.of:
            reader = dataclasses.replace(reader, completion=self._completion(reader))
        logps, entropy = reader.student_logps
        values, weight_sums = weighed(-logps, self.weights, Tokens(reader, plan))
        value, completion = weighted_sum(values, plan["weights"]), reader.completion
        if self.of:  # The metrics are per token of the step's completions.
            return Loss(value, {})
        sums = student_sums(logps, entropy, completion.logps, completion.mask)
        return Loss(value, sums, context_sums=weight_sums)

    def _completion(self, of: GradedBatch | Reader) -> Any:
        return self.of(None, None, of.batch, None, None) if self.of else of.completion


@dataclasses.dataclass(frozen=True)
class Anchor(Term):
    """The KL to the initial policy in the student's own context: keeps the student where it was.

    Args:
      name: "k3", exp(d) − d − 1 with d = log p_initial(y) − log pS(y), the non-negative one-sample
        estimate of KL(student || initial) of GRPO (arXiv 2402.03300); "reverse_kl", that KL over
        the whole vocabulary; "forward_kl", KL(initial || student) likewise.
    """

    name: Annotated[str, ("k3", "reverse_kl", "forward_kl")] = "k3"

    def __call__(self, reader: Reader, plan: Plan) -> Loss:
        if self.name == "k3":
            values = k3(reader.student_logps[0], reader.initial_logps)
        else:
            values = self._whole_kl(reader)
        found = masked_sums({"policy/kl_initial": values}, reader.completion.mask)
        values, weight_sums = weighed(values, self.weights, Tokens(reader, plan))
        value = weighted_sum(values, plan["weights"])
        return Loss(value, jax.lax.stop_gradient(found), context_sums=weight_sums)

    def _whole_kl(self, reader: Reader) -> jax.Array:
        ours, student, initial = reader.config, reader.student, reader.initial or reader.teacher
        config = DivergenceConfig(
            name=self.name,
            implementation=ours.implementation,
            token_block=ours.token_block,
            vocab_block=ours.vocab_block,
        )
        completion = reader.completion
        return token_divergence(
            config,
            reader.student_hidden,
            output_head(student.variables["params"], student.model.config),
            reader.initial_hidden,
            jax.lax.stop_gradient(output_head(initial.variables["params"], initial.model.config)),
            completion.ids,
            completion.mask,
        ).objective


def k3(logps: jax.Array, initial_logps: jax.Array) -> jax.Array:
    """exp(d) − d − 1 with d = log p_initial − log pS: estimates KL(student || initial)."""
    difference = initial_logps - logps
    return jnp.exp(difference) - difference - 1.0


@dataclasses.dataclass(frozen=True)
class Mix:
    """The sum of several terms; each is read and weighed as if it stood alone.

    Args:
      terms: such as (@PolicyGradient(), @Distillation()); two of one kind have scopes,
        (@right/Likelihood(), @wrong/Likelihood()). Where two have a metric of one name, the first
        one's is kept; loss/<term> is what each adds to loss/objective, loss/<term>_rows_fraction
        and loss/<term>_token_weight are what it would say alone.
    """

    terms: tuple[Objective, ...]

    def __post_init__(self):
        require("Mix", self)
        object.__setattr__(self, "terms", tuple(self.terms))
        if not self.terms:
            raise UserError("Mix.terms must hold a term such as @Distillation(), not ()")
        if any(isinstance(term, Mix) for term in self.terms):
            raise UserError("Mix.terms must be terms, not another @Mix(): list its terms here")

    @property
    def needs_rewards(self) -> bool:
        return any(term.needs_rewards for term in self.terms)

    def plan(self, step: GradedBatch) -> tuple[Plan, dict[str, jax.Array]]:
        plans = [term.plan(step) for term in self.terms]
        metrics: dict[str, jax.Array] = {}
        for name, (_, found) in reversed([*zip(self.names, plans, strict=True)]):
            metrics |= of_term(name, found)
        return {name: rows for name, (rows, _) in zip(self.names, plans, strict=True)}, metrics

    def __call__(self, reader: Reader, plan: Plan) -> Loss:
        parts = {
            name: term(reader, plan[name])
            for name, term in zip(self.names, self.terms, strict=True)
        }
        total = Loss(jnp.zeros(()), {})
        for name, part in reversed(parts.items()):
            total = Loss(
                total.value + part.value,
                total.sums | part.sums,
                total.rows | part.rows,
                total.context_sums | of_term(name, part.context_sums),
            )
        return dataclasses.replace(total, parts={name: part.value for name, part in parts.items()})

    @property
    def names(self) -> list[str]:
        """Of the terms in metrics: "distillation", "distillation_2"."""
        names: list[str] = []
        for term in self.terms:
            kind = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(term).__name__)[1:]
            number = 1 + sum(name.split(" ")[0] == kind for name in names)
            names.append(f"{kind} {number}" if number > 1 else kind)
        return [name.replace(" ", "_") for name in names]


def of_term(name: str, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The metrics of a mix's term, of which those that each has of its own bear its name."""
    own = ("loss/rows_fraction", "loss/token_weight")
    return {
        key.replace("loss/", f"loss/{name}_") if key in own else key: value
        for key, value in metrics.items()
    }


def terms_of(objective: Objective) -> tuple[Objective, ...]:
    """The terms of a mix, or the objective alone."""
    return objective.terms if isinstance(objective, Mix) else (objective,)
