# SPDX-License-Identifier: Apache-2.0
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.divergence import targets
from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.method.batch import Policy
from opsd_jax.method.completions import References
from opsd_jax.method.mix import Distillation
from opsd_jax.method.objective import Reader, compare
from opsd_jax.method.scoring import completion_hidden
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.sampling.prompts import Completion
from tests.tiny import VOCAB, tiny_batch, tiny_config, tiny_variables


def test_sampled_tokens_of_the_teacher_give_the_gradient_of_the_kl():
    """Every one-token completion of one prompt, weighted by the probability that it was sampled.

    The gradient in all of the student's weights is that of KL(student || teacher) itself.
    """
    model, batch = Decoder(tiny_config()), tiny_batch(1)
    student, teacher = tiny_variables(tiny_config()), tiny_variables(tiny_config(), seed=1)
    batch = jax.tree.map(lambda x: jnp.repeat(x, VOCAB, axis=0), batch)
    q = np.random.default_rng(0).dirichlet(np.ones(VOCAB)).astype(np.float32)
    ids, mask = np.arange(VOCAB, dtype=np.int32)[:, None], np.ones((VOCAB, 1), bool)
    completion = Completion(ids, mask, 0 * q[:, None], ~mask[:, 0], np.log(q)[:, None])

    @jax.jit
    def gradients(student):
        def loss(student, name):
            policies = Policy(model, student), Policy(model, teacher)
            reader = Reader(*policies, batch, completion, DivergenceConfig(name, temperature=1.3))
            return Distillation()(reader, {"weights": q[:, None]}).value

        return [jax.grad(loss)(student, name) for name in ("sampled_token", "reverse_kl")]

    got, want = gradients(student)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    assert largest > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * largest), got, want)


def test_sampled_token_refuses_what_nobody_sampled():
    batch = tiny_batch(2)
    batch = dataclasses.replace(batch, reference=batch.student)
    policy = Policy(Decoder(tiny_config()), tiny_variables(tiny_config()))
    completion = References()(policy, policy, batch, None, None)
    reader = Reader(policy, policy, batch, completion, DivergenceConfig("sampled_token"))
    with pytest.raises(UserError, match="'sampled_token' needs completions that were sampled"):
        reader.divergence  # noqa: B018


@pytest.mark.parametrize("target", ["barycentre", "mean"])
def test_a_target_is_made_of_the_teacher_with_and_without_the_privilege(target):
    """KL(target || student) in NumPy, the two log-probabilities by a forward pass each."""
    model, batch = Decoder(tiny_config()), tiny_batch(3)
    student, teacher = tiny_variables(tiny_config()), tiny_variables(tiny_config(), seed=1)
    ids = np.random.default_rng(0).integers(1, VOCAB, (3, 4)).astype(np.int32)
    mask = np.arange(4) < np.array([4, 2, 1])[:, None]
    completion = Completion(ids, mask, np.zeros((3, 4)), mask[:, 0])

    @jax.jit
    def log_probabilities(variables, context):
        hidden = completion_hidden(model, variables, context, completion)
        head = output_head(variables["params"], model.config)
        return jax.nn.log_softmax(head_logits(head, hidden))

    with_it = np.asarray(log_probabilities(teacher, batch.teacher), np.float64)
    without = np.asarray(log_probabilities(teacher, batch.student), np.float64)
    said = np.asarray(log_probabilities(student, batch.student), np.float64)
    if target == "mean":
        wanted = (np.exp(with_it) + np.exp(without)) / 2
    else:
        wanted = np.exp(0.7 * with_it + 0.3 * without)
        wanted /= wanted.sum(-1, keepdims=True)
    function = {"mean": targets.mean, "barycentre": partial(targets.barycentre, alpha=0.3)}[target]
    config = DivergenceConfig(target=function)
    terms = jax.jit(partial(compare, model, config))(student, teacher, batch, completion)
    kl = (wanted * (np.log(wanted) - said)).sum(-1) * mask
    np.testing.assert_allclose(terms.objective, kl, atol=1e-5)
    assert kl.max() > 0.1


def test_an_importance_clip_needs_what_was_sampled():
    policy = Policy(Decoder(tiny_config()), tiny_variables(tiny_config()))
    ids, mask = jnp.array([[3], [3]]), jnp.ones((2, 1), bool)
    completion = Completion(ids, mask, jnp.zeros((2, 1)), mask[:, 0])
    config = DivergenceConfig(importance_clip=1.5)
    with pytest.raises(UserError, match="divergence.importance_clip needs completions that were"):
        Reader(policy, policy, tiny_batch(2), completion, config).divergence  # noqa: B018
