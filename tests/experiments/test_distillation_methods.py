# SPDX-License-Identifier: Apache-2.0
"""The files of experiments/methods that distil: their headers, losses and gradients."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.method.batch import Batch, Policy
from opsd_jax.method.objective import Reader
from opsd_jax.method.rows import GradedBatch
from opsd_jax.run.config import load_experiment
from opsd_jax.sampling.prompts import Completion, Context
from tests.experiments import method_oracle as oracle
from tests.representatives import representatives

FOLDER = Path(__file__).parents[2] / "experiments" / "methods"
METHODS = [FOLDER / f"{name}.gin" for name in oracle.METHODS]
CASE = oracle.make_case()
# A head that hands the hidden states through: they are the logits.
POLICY = Policy(
    SimpleNamespace(config=SimpleNamespace(tie_embeddings=True)),
    {"params": {"embed": jnp.eye(oracle.V)}},
)


def loss_of(experiment, case, logits, num_views=0):
    """The loss of the experiment's objective on a case, as a function of the student's logits."""
    context = Context(jnp.zeros((oracle.B, 1), jnp.int32), jnp.ones(oracle.B, jnp.int32))
    views = case.views[:num_views]
    assert len(experiment.contexts.views) == num_views
    batch = Batch(context, context, None, (context,) * len(views), jnp.asarray(case.has_context))
    completion = Completion(
        *map(jnp.asarray, (case.ids, case.mask, case.old_logps, case.stopped, case.sampled_logps))
    )
    rewards, objective = jnp.asarray(case.rewards), experiment.train.objective
    step = GradedBatch(
        batch, completion, rewards if objective.needs_rewards else None, oracle.B, jnp.int32(0)
    )
    plan, _ = objective.plan(step)
    reader = Reader(
        POLICY, POLICY, batch, completion, experiment.divergence, rollout=experiment.rollout
    )
    vars(reader).update(  # read already
        student_hidden=logits,
        teacher_hidden=jnp.asarray(case.teacher),
        views_hidden=tuple(map(jnp.asarray, views)),
        plain_hidden=jnp.asarray(case.plain),
    )
    return objective(reader, plan)


@pytest.mark.parametrize(
    "path",
    representatives(METHODS, *(path for path in METHODS if path.stem in ("demopsd", "contrast"))),
    ids=lambda path: path.stem,
)
def test_the_loss_and_its_gradient_are_the_formulas(path):
    experiment, _ = load_experiment([str(path)])

    def loss(logits):
        found = loss_of(experiment, CASE, logits, oracle.NUM_VIEWS.get(path.stem, 0))
        return found.value, found.context_sums

    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(CASE.student))
    want, want_gradient = oracle.loss_and_gradient(oracle.METHODS[path.stem], CASE)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    largest = np.abs(want_gradient).max()
    assert largest > 1e-3
    np.testing.assert_allclose(gradient, want_gradient, atol=1e-5 * largest)
    clip = experiment.divergence.importance_clip
    assert ("loss/importance_mean" in sums) == (clip is not None)
    if clip is not None:
        ratios = oracle.importance(CASE, np.inf)[CASE.context_mask]
        total = np.minimum(ratios, clip).sum()
        np.testing.assert_allclose(sums["loss/importance_mean"], total, rtol=1e-5)
        assert sums["loss/importance_clip_fraction"] == (ratios > clip).sum() > 0


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_file_is_short_and_says_what_it_is(path):
    text = path.read_text()
    header, bindings = text.split("\ninclude ")
    assert sum(" = " in line.split("#")[0] for line in bindings.splitlines()) <= 12
    assert re.search(r"arXiv (\d{4}\.\d{5}|id not known)", header) and "Not as there:" in header
    assert "L = " in header


def test_the_case_has_what_the_methods_tell_apart():
    assert not CASE.stopped.all() and not CASE.has_context.all() and not CASE.mask.all()
    assert np.isfinite(oracle.importance(CASE, np.inf)).all()
