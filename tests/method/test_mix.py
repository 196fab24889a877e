# SPDX-License-Identifier: Apache-2.0
"""Rows, means, weights and references of the terms of a loss; a user's own functions in a run."""

import dataclasses
import inspect
import json
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.main import main
from opsd_jax.method.batch import Batch, Policy
from opsd_jax.method.completions import References
from opsd_jax.method.mix import Distillation, Likelihood, Mix, Term, linear
from opsd_jax.method.objective import Loss, Reader
from opsd_jax.method.policy_gradient import PolicyGradient
from opsd_jax.method.rows import SELECTIONS, GradedBatch, selected, weighted_sum
from opsd_jax.method.train_step import sample_completion, update
from opsd_jax.model.decoder import Decoder
from opsd_jax.sampling.prompts import Completion, Context
from tests.method.test_train_step import method_of, state_of
from tests.run.test_train import QUICKSTART, TINY
from tests.tiny import tiny_batch, tiny_config, tiny_variables

LENGTHS = np.array([[3], [1], [2], [3]])


def graded(step=0) -> GradedBatch:
    """Two problems of two rows: right and wrong, truncated and without context, twice wrong."""
    prompts = Context(jnp.ones((4, 1), jnp.int32), jnp.ones(4, jnp.int32))
    mask = jnp.asarray(np.arange(3) < LENGTHS)
    stopped = jnp.array([True, False, True, True])
    completion = Completion(jnp.zeros((4, 3), jnp.int32), mask, jnp.zeros((4, 3)), stopped)
    batch = Batch(prompts, prompts, has_context=jnp.array([True, True, False, True]))
    return GradedBatch(batch, completion, jnp.array([1.0, 0.4, 0, 0]), 2, step)


def test_rows_are_chosen_by_what_their_names_say():
    chosen = {name: np.flatnonzero(selected(name, graded())).tolist() for name in SELECTIONS}
    assert chosen == {
        "all": [0, 1, 2, 3],
        "right": [0],
        "wrong": [1, 2, 3],
        "all_wrong": [2, 3],
        "varied": [0, 1],
        "context": [0, 1, 3],
        "complete": [0, 2, 3],
    }
    odd = lambda step: jnp.arange(4) % 2 == 1  # noqa: E731
    assert selected(("wrong", odd, "complete"), graded()).tolist() == [False] * 3 + [True]
    needs = [Likelihood(rows=rows).needs_rewards for rows in ("all", "context", "right", odd)]
    assert needs == [False, False, True, True]
    assert Mix((Likelihood(), Distillation(rows=("complete", "wrong")))).needs_rewards


def test_the_term_that_the_docstring_shows_moves_the_student():
    text = inspect.cleandoc(Term.__doc__)
    code = text[text.index("@dataclasses") : text.index('plan["weights"] are')]
    names = dict(Term=Term, Loss=Loss, weighted_sum=weighted_sum, dataclasses=dataclasses)
    exec(textwrap.dedent("    " + code), names)
    bonus = names["EntropyBonus"]()
    method = method_of(tiny_config(), objective=bonus, optimizer=optax.sgd(1.0))
    state, batch = state_of(method), tiny_batch(4)
    completion = jax.jit(partial(sample_completion, method))(state, batch)
    step, found = jax.jit(partial(update, method)), []
    for _ in range(3):
        state, metrics = step(state, batch, completion)
        found.append(-float(metrics["loss/objective"]))
    assert found[0] < found[1] < found[2], "the entropy rises"


@pytest.mark.parametrize(
    "term, rows",
    [
        (Likelihood(), [3 / 9, 1 / 9, 2 / 9, 3 / 9]),
        (Likelihood(rows="wrong"), [0, 1 / 6, 2 / 6, 3 / 6]),
        (Likelihood(rows="wrong", over="batch"), [0, 1 / 9, 2 / 9, 3 / 9]),
        (Likelihood(rows="wrong", mean="sequence", weight=3.0), [0, 1, 1, 1]),
        (Likelihood(weights=(lambda tokens, mask: mask,)), [3 / 7, 1 / 7, 0, 3 / 7]),
        (Distillation(), [3 / 7, 1 / 7, 0, 3 / 7]),
        (Distillation(mean="constant"), [3 / 9, 1 / 9, 0, 3 / 9]),
        (Distillation(rows="wrong", over="batch"), [0, 1 / 7, 0, 3 / 7]),
        (PolicyGradient(mean="token"), [3 / 9, 1 / 9, 2 / 9, 3 / 9]),
        (PolicyGradient(mean="token", rows=("varied", "complete")), [1, 0, 0, 0]),
    ],
)
def test_denominators_are_of_the_rows_that_count(term, rows):
    """Rows without a context weigh nothing, and are not counted, where the teacher is looked at."""
    plan, _ = term.plan(graded())
    np.testing.assert_allclose(plan["weights"].sum(axis=1), rows, rtol=1e-6)


def test_a_scheduled_weight_compiles_once():
    term = Likelihood(weight=linear)
    weight = jax.jit(lambda step: term.plan(graded(step))[0]["weights"].sum())
    found = [float(weight(jnp.int32(step))) for step in (0, 25, 50, 80)]
    np.testing.assert_allclose(found, [1, 0.5, 0, 0], atol=1e-6)
    assert weight._cache_size() == 1


@pytest.mark.parametrize(
    "term, words",
    [
        (Likelihood(rows=lambda step: jnp.ones((4, 1), bool)), "rows: .*[(]4,[)], not [(]4, 1[)]"),
        (Likelihood(weight=lambda step: jnp.ones(4)), "weight: .*[(][)], not [(]4,[)]"),
    ],
)
def test_what_would_only_broadcast_is_refused(term, words):
    with pytest.raises(UserError, match=words):
        term.plan(graded())


@pytest.mark.slow
def test_a_term_may_read_the_references_beside_the_rollouts():
    batch = tiny_batch(2)
    batch = dataclasses.replace(
        batch, reference=Context(batch.teacher.ids[:, :4], jnp.array([4, 2]))
    )
    policy = Policy(Decoder(tiny_config()), tiny_variables(tiny_config()))
    references = References()(None, None, batch, None, None)
    ids = jnp.ones((2, 3), jnp.int32)
    rollouts = Completion(ids, ids > 0, jnp.zeros((2, 3)), jnp.ones(2, bool))

    def loss(term, completion):
        reader = Reader(policy, policy, batch, completion, DivergenceConfig())
        plan, _ = term.plan(GradedBatch(batch, completion))
        return term(reader, plan)

    found = loss(Likelihood(of=References()), rollouts)
    np.testing.assert_allclose(found.value, loss(Likelihood(), references).value, rtol=1e-6)
    assert not found.sums  # metrics are per token of the rollouts
    reads_grades = Likelihood(weights=(lambda tokens, mask: tokens.rewards,))
    with pytest.raises(UserError, match="reads grades.*set the term's rows"):
        loss(reads_grades, rollouts)
    flat = Likelihood(weights=(lambda tokens, mask: mask[:, 0],))
    with pytest.raises(UserError, match="a token weight: @<lambda> must return shape"):
        loss(flat, rollouts)


MODULE = '''
import gin
import jax.numpy as jnp

@gin.configurable
def hindsight(problem, attempts, number, mark="|"):
    """A right row is shown nothing, a wrong one its own grade's remedy: the solution."""
    if attempts[number].is_right:
        return None
    return f"{problem.question}{mark}{problem.solution}?"

@gin.configurable
def late(tokens, mask, start=2):
    """Tokens from `start` on, of right completions twice."""
    return (tokens.positions >= start) * (1.0 + (tokens.rewards >= 0.5))

@gin.configurable
def bounded_gap(tokens, mask, scale=0.5):
    """The advantage, moved by a bounded log-ratio that fades where the student is sure."""
    return tokens.advantages + scale * jnp.tanh(tokens.gap) * tokens.student_entropy
'''
OWN = """
import own_method
train.objective = @Mix()
Mix.terms = (@PolicyGradient(), @Distillation())
PolicyGradient.shape = @bounded_gap
contexts.teacher = @hindsight
Distillation.rows = "context"
Distillation.weights = (@late,)
late.start = 1
train.group_size = 4
"""


@pytest.mark.slow
def test_a_method_of_the_users_own_runs(tmp_path):
    """A module and a gin file: a context, a token weight that reads grades, an advantage."""
    assert len(MODULE.splitlines()) <= 30
    (tmp_path / "own_method.py").write_text(MODULE)
    (tmp_path / "own.gin").write_text(f'include "{QUICKSTART}"\n{OWN}')
    flags = [f"--gin_bindings={line}" for line in (*TINY, "train.num_steps = 2")]
    run = ["train", f"--gin_file={tmp_path}/own.gin", f"--workdir={tmp_path}/run", *flags]
    try:
        assert main(run) == 0
    finally:
        sys.modules.pop("own_method", None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    parts = lines[2]["loss/policy_gradient"] + lines[2]["loss/distillation"]
    np.testing.assert_allclose(parts, lines[2]["loss/objective"], rtol=1e-5)
    assert "late.start = 1" in (tmp_path / "run" / "config.gin").read_text()
