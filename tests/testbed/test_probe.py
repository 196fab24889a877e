# SPDX-License-Identifier: Apache-2.0
"""The probe against stand-in models whose behaviour is known exactly."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.testbed.probe import (
    CONTEXTS,
    after_wrong_step,
    corrected_belief,
    fact_beliefs,
    wrong_prefix_probe,
)
from opsd_jax.testbed.world import QUERY, ChainTask, ChainTokenizer, facts

TASK, TOKENIZER = ChainTask(), ChainTokenizer()
V = TOKENIZER.vocab_size


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Answers from a belief table, or, if it leaks, with the reference's lemma for the step."""

    leaks: bool = False
    config = SimpleNamespace(tie_embeddings=False, logit_softcap=None)

    def apply(self, variables, ids, positions):
        del positions
        left, step = ids[:, -3], ids[:, -2]
        probs = variables["belief"][left, step - 10]
        if self.leaks:
            in_prompt = jnp.cumsum(ids == QUERY, axis=1) == 0
            # A lemma is `left step = result`: the result stands two tokens after the step.
            after = jnp.arange(ids.shape[1]) > 4
            match = (ids == step[:, None]) & in_prompt & after
            result = jnp.take_along_axis(ids, match.argmax(1)[:, None] + 2, axis=1)[:, 0]
            probs = jnp.where(match.any(1)[:, None], jax.nn.one_hot(result, 10), probs)
        logits = jnp.log(jnp.pad(probs, ((0, 0), (0, V - 10))) + 1e-9)
        return jnp.repeat(logits[:, None], ids.shape[1], axis=1), None


def variables(belief):
    return {"params": {"lm_head": jnp.eye(V)}, "belief": jnp.asarray(belief, jnp.float32)}


def test_a_model_that_knows_the_facts_is_right_and_leaks_by_chance_only():
    truth = np.eye(10)[facts()]
    for shown in ("nothing", *CONTEXTS):
        ok, leak = after_wrong_step(StandIn(), variables(truth), TOKENIZER, TASK, shown)
        assert ok > 0.999 and 0.02 < leak < 0.25


def test_ok_is_the_belief_in_what_follows_from_the_prefix():
    ok, _ = after_wrong_step(StandIn(), variables(TASK.memory), TOKENIZER, TASK, "nothing")
    assert abs(ok - (0.65 + 0.35 * 0.30)) < 0.05  # facts of a wrong prefix are drawn at random


def test_a_teacher_that_jumps_back_to_the_reference_is_found_out():
    model, truth = StandIn(leaks=True), np.eye(10)[facts()]
    for shown in ("reference", "answer"):
        ok, leak = after_wrong_step(model, variables(truth), TOKENIZER, TASK, shown)
        assert leak > 0.85 and ok < 0.3
    ok, leak = after_wrong_step(model, variables(truth), TOKENIZER, TASK, "nothing")
    assert ok > 0.999  # without a reference there is nothing to jump back to


def test_fact_beliefs_are_read_at_their_own_place():
    belief = np.random.default_rng(0).dirichlet(np.ones(10), size=(10, 20))
    measured = fact_beliefs(StandIn(), variables(belief), TOKENIZER, TASK)
    expected = np.take_along_axis(belief, facts()[..., None], -1)[..., 0]
    np.testing.assert_allclose(measured, expected, atol=1e-5)


def test_a_corrected_belief_is_read_behind_right_lines_with_the_correction_in_view():
    memory = variables(TASK.memory)
    assert abs(corrected_belief(StandIn(), memory, TOKENIZER, TASK) - 0.30) < 1e-3
    assert corrected_belief(StandIn(leaks=True), memory, TOKENIZER, TASK) > 0.999


def test_metrics_of_both_roles():
    student, teacher = variables(TASK.memory), variables(np.eye(10)[facts()])
    metrics = wrong_prefix_probe(StandIn(), student, teacher, TOKENIZER)
    assert set(metrics) == {
        *(f"probe/{role}/{name}" for role in ("student", "teacher") for name in ("ok", "leak")),
        "probe/weak",
        "probe/strong",
    }
    assert abs(metrics["probe/weak"] - 0.30) < 1e-3 and metrics["probe/strong"] > 0.999
    assert metrics["probe/teacher/ok"] > 0.999 > metrics["probe/student/ok"]
