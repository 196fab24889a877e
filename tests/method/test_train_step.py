# SPDX-License-Identifier: Apache-2.0
"""The invariants of the step, on 1 and on 8 virtual devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.method.batch import Batch
from opsd_jax.method.objective import compare
from opsd_jax.method.optimizer import OptimizerConfig, make_optimizer
from opsd_jax.method.teacher import TeacherConfig
from opsd_jax.method.train_step import (
    Method,
    init_state,
    jit_step,
    rollout_metrics,
    sample_completion,
    state_shardings,
    update,
)
from opsd_jax.model.config import LoraConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import (
    MeshConfig,
    make_mesh,
    shard_batch,
    variable_shardings,
)
from opsd_jax.run.assembly import split_trainable
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion
from tests.representatives import representatives
from tests.tiny import tiny_batch, tiny_config, tiny_variables


def method_of(config, teacher="initial", **changes) -> Method:
    fields = dict(
        model=Decoder(config),
        rollout=RolloutConfig(max_new_tokens=6, stop_ids=(3, 5)),
        divergence=DivergenceConfig(),
        teacher=TeacherConfig(teacher).build(),
        optimizer=make_optimizer(OptimizerConfig(), 1e-2),
    )
    return Method(**(fields | changes))


def state_of(method: Method, seed: int = 0):
    return init_state(
        method, *split_trainable(tiny_variables(method.model.config)), jax.random.key(seed)
    )


@partial(jax.jit, static_argnums=0)
def loss_gradient(method, trainable, state, batch, completion):
    """Gradient of the mean objective, as `update` defines it, without the optimiser."""

    def loss(trainable):
        teacher = method.teacher.variables(trainable, state.frozen, state.teacher)
        student = state.frozen | trainable
        terms = compare(method.model, method.divergence, student, teacher, batch, completion)
        return jnp.sum(terms.objective) / jnp.sum(completion.mask)

    return jax.value_and_grad(loss)(trainable)


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))))


@pytest.mark.parametrize("any_config", representatives(["full", "lora"], "full"), indirect=True)
def test_same_context_and_weights_give_no_divergence_and_no_gradient(any_config):
    """Invariant 2; and with another context both are there."""
    method = method_of(any_config, "live")
    state, batch = state_of(method), tiny_batch(8)
    completion = jax.jit(partial(sample_completion, method))(state, batch)
    plain = Batch(student=batch.student, teacher=batch.student)
    loss, gradient = loss_gradient(method, state.trainable, state, plain, completion)
    assert abs(loss) < 1e-6 and norm(gradient) < 1e-5
    loss, gradient = loss_gradient(method, state.trainable, state, batch, completion)
    assert loss > 0.05 and norm(gradient) > 0.05


@pytest.mark.parametrize("any_config", representatives(["full", "lora"], "lora"), indirect=True)
def test_no_gradient_reaches_the_teacher(any_config):
    """Invariant 3: the live teacher's gradient equals that with a literal copy of the weights."""
    live, copied = method_of(any_config, "live"), method_of(any_config, "snapshot")
    batch = tiny_batch(8)
    completion = jax.jit(partial(sample_completion, live))(state_of(live), batch)
    _, one = loss_gradient(live, state_of(live).trainable, state_of(live), batch, completion)
    _, two = loss_gradient(copied, state_of(live).trainable, state_of(copied), batch, completion)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, two)


def test_metrics_are_means_over_the_sampled_tokens():
    """The loss and the diagnostics against float64 sums over the rows of `compare`."""
    method = method_of(tiny_config(), "snapshot", divergence=DivergenceConfig(clip="entry"))
    state, batch = state_of(method), tiny_batch(8)
    completion = jax.jit(partial(sample_completion, method))(state, batch)
    _, metrics = jax.jit(partial(update, method))(state, batch, completion)
    terms = jax.jit(partial(compare, method.model, method.divergence))(
        state.student, {"params": state.teacher["params"]}, batch, completion
    )
    mask = np.asarray(completion.mask)
    for name, field in (
        ("loss/objective", terms.objective),
        ("loss/divergence", terms.divergence),
        ("loss/clip_fraction", terms.clipped),
        ("student/entropy", terms.student_entropy),
        ("teacher/nll_of_rollout", -terms.teacher_logps),
    ):
        expected = np.asarray(field, np.float64)[mask].mean()
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5)
    assert metrics["rollout/tokens"] == mask.sum()
    assert metrics["rollout/truncated_fraction"] == np.mean(~np.asarray(completion.stopped))
    assert metrics["rollout/logp_gap"] < 1e-5


def test_fully_masked_rows_count_for_nothing():
    method = method_of(tiny_config())
    state, batch = state_of(method), tiny_batch(8)
    completion = jax.jit(partial(sample_completion, method))(state, batch)
    run = jax.jit(partial(update, method))
    half = completion.replace(mask=completion.mask.at[4:].set(False))
    _, metrics = run(state, batch, half)
    first = jax.tree.map(lambda x: jnp.concatenate([x[:4], x[:4]]), (batch, completion))
    _, expected = run(state, *first)
    np.testing.assert_allclose(metrics["loss/objective"], expected["loss/objective"], rtol=1e-5)
    nothing = completion.replace(mask=jnp.zeros_like(completion.mask))
    new, metrics = run(state, batch, nothing)
    assert metrics["loss/objective"] == 0 and metrics["optim/grad_norm"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.trainable))


def run_steps(method, mesh_config, devices, num_steps=3):
    """[(metrics, tokens)] of each step, and how far the parameters have gone."""
    mesh = make_mesh(mesh_config, devices)
    boxed = jax.eval_shape(lambda k: init_variables(method.model, k), jax.random.key(0))
    variables = variable_shardings(boxed, mesh, mesh_config.rules)
    state = jax.tree.map(jnp.copy, state_of(method))
    shardings = state_shardings(method, state, variables, mesh)
    state = jax.device_put(state, shardings)
    step = jit_step(method, shardings, mesh, mesh_config.rules)
    found = []
    for seed in range(num_steps):
        batch = shard_batch(tiny_batch(16, seed=seed), mesh)
        state, metrics, completion = step(state, batch)
        found.append((jax.device_get(metrics), completion.ids.tolist()))
    return found, moved(state, state_of(method))


def moved(state, start) -> dict:
    """What some steps have added to the parameters."""
    return jax.tree.map(jnp.subtract, *jax.device_get((state.trainable, start.trainable)))


MESHES = {
    "data 8": MeshConfig(),
    "data 2 x model 4": MeshConfig(model=4),
    "replicated": MeshConfig(data=4, model=2, fully_sharded=False),
    "replica 2 x data 2 x model 2": MeshConfig(model=2, replica=2),
    "data 4 x sequence 2": MeshConfig(sequence=2),
    "replica 2 x sequence 2 x model 2": MeshConfig(replica=2, sequence=2, model=2),
}


MODELS = {
    "full": dict(),
    "lora": dict(lora=LoraConfig(rank=4, alpha=8.0)),
    "experts": dict(num_experts=4, experts_per_token=2),
}


@pytest.fixture(scope="module", params=representatives(MODELS, "full"))
def alone(request):
    """Three steps on one device, without micro-batches."""
    method = method_of(tiny_config(**MODELS[request.param], remat=True), "ema")
    return method, run_steps(method, MeshConfig(), jax.devices()[:1])


def assert_same_run(one, other):
    (steps, moved_1), (steps_2, moved_2) = one, other
    for (metrics, ids), (metrics_2, ids_2) in zip(steps, steps_2, strict=True):
        assert ids == ids_2
        for name, value in metrics.items():
            np.testing.assert_allclose(metrics_2[name], value, rtol=2e-4, atol=2e-6, err_msg=name)
    # Adam divides a gradient near 0 by itself, whatever its sign: numbers one by one may differ.
    assert norm(jax.tree.map(jnp.subtract, moved_2, moved_1)) < 1e-3 * norm(moved_1)


@pytest.mark.parametrize("mesh", representatives(MESHES, "data 2 x model 4", "data 4 x sequence 2"))
def test_the_run_is_the_same_on_eight_devices(alone, mesh, caplog):
    """Invariant 7, devices: same tokens, same metrics; and 8: three steps, one compilation."""
    method, found = alone
    with jax.log_compiles():
        sharded = run_steps(method, MESHES[mesh], jax.devices())
    assert_same_run(found, sharded)
    assert sum("Compiling jit(train_step)" in record.message for record in caplog.records) == 1


def test_the_run_is_the_same_with_micro_batches(alone):
    """Invariant 7, gradient accumulation, on two devices."""
    method, found = alone
    split_method = dataclasses.replace(method, num_micro_batches=4)
    assert_same_run(found, run_steps(split_method, MeshConfig(), jax.devices()[:2]))


@pytest.mark.slow
def test_masters_and_moments_stay_float32_in_bfloat16():
    """Invariant 10; and the step still learns something sensible."""
    method = method_of(tiny_config(dtype="bfloat16"), "ema")
    state, batch = state_of(method), tiny_batch(8)
    completion = jax.jit(partial(sample_completion, method))(state, batch)
    new, metrics = jax.jit(partial(update, method))(state, batch, completion)
    kept = (new.trainable, new.teacher, new.opt_state)
    dtypes = {x.dtype.name for x in jax.tree.leaves(kept)}
    assert dtypes == {"float32", "int32"}
    exact = method_of(tiny_config(), "ema")
    _, expected = jax.jit(partial(update, exact))(state, batch, completion)
    np.testing.assert_allclose(metrics["loss/divergence"], expected["loss/divergence"], rtol=0.1)
    assert metrics["loss/divergence"] != expected["loss/divergence"]
    assert metrics["rollout/logp_gap"] < 0.1


@pytest.mark.slow
def test_adapter_dropout_acts_in_the_update_and_is_reproducible():
    wet = method_of(tiny_config(lora=LoraConfig(rank=3, alpha=6.0, dropout=0.5)))
    dry = method_of(tiny_config(lora=LoraConfig(rank=3, alpha=6.0)))
    state, batch = state_of(dry), tiny_batch(8)
    completion = jax.jit(partial(sample_completion, wet))(state, batch)
    run = jax.jit(partial(update, wet))
    one, two = (run(state, batch, completion)[1] for _ in range(2))
    plain = jax.jit(partial(update, dry))(state, batch, completion)[1]
    later = run(dataclasses.replace(state, step=state.step + 1), batch, completion)[1]
    assert one["loss/objective"] == two["loss/objective"] != plain["loss/objective"]
    assert later["loss/objective"] != one["loss/objective"]
    # The rollout and the teacher stay dry.
    assert plain["rollout/logp_gap"] < 1e-5 < one["rollout/logp_gap"]
    assert one["teacher/entropy"] == plain["teacher/entropy"]


def test_the_divergence_goes_down():
    method = method_of(tiny_config(), "initial")
    state, batch = state_of(method), tiny_batch(16)
    step = jax.jit(lambda s: update(method, s, batch, sample_completion(method, s, batch)))
    found = []
    for _ in range(30):
        state, metrics = step(state)
        found.append(float(metrics["loss/divergence"]))
    assert np.mean(found[-5:]) < 0.5 * found[0]


def test_completion_is_a_tree_of_rows():
    """Every leaf has the batch leading: sharding, micro-batches and the host rely on it."""
    assert {f.name for f in dataclasses.fields(Completion)} == {
        "ids",
        "mask",
        "logps",
        "stopped",
        "sampled_logps",
        "analysis",
    }


def test_rollout_metrics_of_a_case_by_hand():
    """Lengths 1, 4 and 8 of 8; segments of 3 or 2 tokens, all of which had to be decoded."""
    lengths, stopped = np.array([1, 4, 8]), jnp.array([True, True, False])
    mask = jnp.asarray(np.arange(8) < lengths[:, None])
    completion = Completion(mask.astype(jnp.int32), mask, jnp.zeros((3, 8)), stopped)
    found = rollout_metrics(completion, RolloutConfig(8, segment_len=3))
    expected = {
        "finished_by_25": 1 / 3,
        "finished_by_50": 2 / 3,
        "finished_by_75": 2 / 3,
        "tokens": 13,
        "length_mean": 13 / 3,
        "length_p50": 4,
        "length_p90": 7.2,
        "length_max": 8,
        "truncated_fraction": 1 / 3,
        "padded_fraction": 11 / 24,
        "idle_fraction": 1 - 13 / 30,  # 1 + 3 segments of 3 tokens, 3 rows
    }
    assert {name: pytest.approx(float(v)) for name, v in found.items()} == {
        f"rollout/{name}": v for name, v in expected.items()
    }
    single = Completion(mask[:, :1] * 1, mask[:, :1], jnp.zeros((3, 1)), stopped)
    assert rollout_metrics(single, RolloutConfig(1))["rollout/idle_fraction"] == 0
