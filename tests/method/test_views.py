# SPDX-License-Identifier: Apache-2.0
"""Several teacher contexts a row, and rows that have none."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.divergence import targets
from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.method.batch import Policy
from opsd_jax.method.objective import Reader
from opsd_jax.method.scoring import completion_hidden, hidden_of_each
from opsd_jax.method.train_step import jit_halves, state_shardings, update
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.model.sharding import (
    FULLY_SHARDED,
    MeshConfig,
    make_mesh,
    shard_batch,
    variable_shardings,
)
from opsd_jax.sampling.prompts import Completion
from tests.method.test_train_step import method_of, state_of
from tests.representatives import representatives
from tests.tiny import VOCAB, tiny_batch, tiny_config, tiny_variables

HAS = np.array([True, False, True, True, False, True, True, True])


def batch_of(num_rows=8):
    """Three views of different widths; the second and the fifth row have no context."""
    batch = tiny_batch(num_rows)
    views = tuple(tiny_batch(num_rows, teacher_len=n, seed=n).teacher for n in (7, 13))
    return dataclasses.replace(batch, views=views, has_context=jnp.asarray(HAS[:num_rows]))


def completion_of(num_rows=8, C=4):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCAB, (num_rows, C)).astype(np.int32)
    mask = np.arange(C) < rng.integers(1, C + 1, num_rows)[:, None]
    zeros = np.zeros(mask.shape, np.float32)
    return Completion(jnp.asarray(ids), jnp.asarray(mask), zeros, mask[:, -1], zeros)


def method_with(target, **changes):
    return method_of(tiny_config(), divergence=DivergenceConfig(target=target), **changes)


@partial(jax.jit, static_argnums=0)
def read(config, student, teacher, batch, completion):
    model = Decoder(tiny_config())
    reader = Reader(Policy(model, student), Policy(model, teacher), batch, completion, config)
    return reader.divergence, reader.view_logps


@pytest.mark.parametrize("implementation", representatives(["dense", "fused"], "dense"))
def test_the_target_is_made_of_all_views(implementation):
    """KL(mean of three || student) in NumPy, the log-probabilities by a forward pass each."""
    model, batch, completion = Decoder(tiny_config()), batch_of(), completion_of()
    student, teacher = tiny_variables(tiny_config()), tiny_variables(tiny_config(), seed=1)

    @jax.jit
    def log_probabilities(variables, context):
        hidden = completion_hidden(model, variables, context, completion)
        head = output_head(variables["params"], model.config)
        return jax.nn.log_softmax(head_logits(head, hidden))

    views = [np.asarray(log_probabilities(teacher, c)) for c in (batch.teacher, *batch.views)]
    said = np.asarray(log_probabilities(student, batch.student), np.float64)
    wanted = np.mean([np.exp(np.float64(v)) for v in views], axis=0)
    mask = np.asarray(completion.mask) & HAS[:, None]
    config = DivergenceConfig(target=targets.mean, implementation=implementation)
    tokens, view_logps = read(config, student, teacher, batch, completion)
    kl = (wanted * (np.log(wanted) - said)).sum(-1) * mask
    np.testing.assert_allclose(tokens.objective, kl, atol=1e-5)
    chosen = np.take_along_axis(np.stack(views), np.asarray(completion.ids)[None, ..., None], -1)
    np.testing.assert_allclose(view_logps, chosen[..., 0] * mask, atol=1e-5)
    assert kl.max() > 0.1


def test_rows_without_context_count_for_nothing():
    """The step is that on the others alone; and one without any context teaches nothing."""
    method = method_with(targets.mean)
    state, batch, completion = state_of(method), batch_of(), completion_of()
    run = jax.jit(partial(update, method))
    state_after, metrics = run(state, batch, completion)
    keep = np.flatnonzero(HAS)
    only = jax.tree.map(lambda x: x[keep], (batch, completion))
    only = (dataclasses.replace(only[0], has_context=None), only[1])
    wanted, expected = run(state, *only)
    for name in ("loss/objective", "loss/divergence", "teacher/entropy", "student/entropy"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        state_after.opt_state,
        wanted.opt_state,
    )
    assert metrics["teacher/no_context_fraction"] == 0.25
    assert "teacher/no_context_fraction" not in expected
    nobody = dataclasses.replace(batch, has_context=jnp.zeros(8, bool))
    after, metrics = run(state, nobody, completion)
    assert metrics["loss/objective"] == 0 and metrics["optim/grad_norm"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.trainable))


@pytest.mark.slow
def test_views_on_eight_devices_and_in_micro_batches():
    method = method_with(targets.mean)
    alone = jax.jit(partial(update, method))(state_of(method), batch_of(), completion_of())[1]
    split = dataclasses.replace(method, num_micro_batches=2)
    found = [jax.jit(partial(update, split))(state_of(method), batch_of(), completion_of())[1]]
    mesh = make_mesh(MeshConfig(), jax.devices())
    boxed = jax.eval_shape(lambda k: init_variables(method.model, k), jax.random.key(0))
    variables = variable_shardings(boxed, mesh, FULLY_SHARDED)
    state = jax.tree.map(jnp.copy, state_of(method))
    shardings = state_shardings(method, state, variables, mesh)
    rows = [shard_batch(x, mesh) for x in (batch_of(), completion_of(), np.zeros(8, np.float32))]
    learn = jit_halves(method, shardings, mesh, FULLY_SHARDED)[1]
    found.append(learn(jax.device_put(state, shardings), *rows)[1])
    for metrics in found:
        for name, value in alone.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_views_are_read_one_after_the_other():
    """Eight contexts need the temporary memory of one, besides their results."""
    config = tiny_config(embed_dim=64, mlp_dim=2048)
    model, completion = Decoder(config), completion_of(C=64)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    variables = jax.tree.map(lambda x: x.value, variables, is_leaf=lambda x: hasattr(x, "value"))
    views = tuple(tiny_batch(teacher_len=64, seed=n).teacher for n in range(8))

    def temporaries(views):
        run = jax.jit(lambda v, c: hidden_of_each(model, v, c, completion))
        compiled = run.lower(variables, views).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = temporaries(views[:1])
    hidden = 8 * completion.ids.size * 64 * 4
    assert temporaries(views) < 1.5 * one + 3 * hidden
