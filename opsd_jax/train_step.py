# SPDX-License-Identifier: Apache-2.0
"""One step of on-policy self-distillation, on one screen: `train_step`.

The step has two pure halves, `sample_completion` (context -> completion) and `update`
(completion -> new state, metrics). Training jits their composition, so nothing leaves the device
in between; a method that must grade a completion before it learns from it jits each half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from opsd_jax.divergence import DivergenceConfig
from opsd_jax.model import Decoder
from opsd_jax.objective import Batch, compare, token_sums
from opsd_jax.rollouts import Completion, RolloutConfig, rollout
from opsd_jax.sharding import Rules, batch_sharding, optimizer_shardings, replicated
from opsd_jax.teacher import Teacher

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on, besides the position in the data.

    step: [] int32, finished steps; trainable, frozen: dicts of flax collections, together the
    student's variables (`teacher.py`); teacher: the teacher's own store; opt_state: optax;
    key: typed PRNG key of the run, never advanced (step n draws from fold_in(key, n)).
    """

    step: jax.Array
    trainable: dict
    frozen: dict
    teacher: dict
    opt_state: Any
    key: jax.Array

    @property
    def student(self) -> dict:
        return self.frozen | self.trainable


@dataclasses.dataclass(frozen=True)
class Method:
    """The choices a step is built from; see method names in each module."""

    model: Decoder
    rollout: RolloutConfig
    divergence: DivergenceConfig
    teacher: Teacher
    optimizer: optax.GradientTransformation
    num_micro_batches: int = 1


def train_step(
    method: Method, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics, Completion]:
    """Samples as the student, then moves the student towards itself with privileged context."""
    completion = sample_completion(method, state, batch)
    state, metrics = update(method, state, batch, completion)
    return state, metrics, completion


def sample_completion(method: Method, state: TrainState, batch: Batch) -> Completion:
    """The student answers from its own context; no gradient."""
    key = jax.random.fold_in(state.key, state.step)
    prompts = batch.student
    return rollout(method.model, state.student, prompts.ids, prompts.lengths, key, method.rollout)


def update(
    method: Method, state: TrainState, batch: Batch, completion: Completion
) -> tuple[TrainState, Metrics]:
    """One optimiser step on the mean divergence over all sampled tokens of the global batch.

    L = Σ_{b,t} mask · ℓ_{b,t} / Σ_{b,t} mask, with the denominator of the whole batch in every
    micro-batch, so that their gradients simply add up.
    """
    num_tokens = jnp.maximum(jnp.sum(completion.mask), 1)

    lora = method.model.config.lora
    dropout = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)

    def loss(trainable, batch, completion, row_numbers):
        key = jax.random.fold_in(dropout, row_numbers[0]) if lora and lora.dropout else None
        teacher = method.teacher.variables(trainable, state.frozen, state.teacher)
        student = state.frozen | trainable
        terms = compare(method.model, method.divergence, student, teacher, batch, completion, key)
        sums = token_sums(terms, completion)
        objective = jnp.where(completion.mask, terms.objective, 0.0)
        return jnp.sum(objective) / num_tokens, sums

    gradient, sums = accumulate(
        jax.grad(loss, has_aux=True),
        state.trainable,
        (batch, completion, jnp.arange(completion.mask.shape[0])),
        method.num_micro_batches,
    )
    updates, opt_state = method.optimizer.update(gradient, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    step = state.step + 1
    metrics = {name: total / num_tokens for name, total in sums.items()}
    metrics |= rollout_metrics(completion)
    metrics["optim/grad_norm"] = optax.tree.norm(gradient)
    metrics["optim/update_norm"] = optax.tree.norm(updates)
    metrics["optim/param_norm"] = optax.tree.norm(trainable)
    return dataclasses.replace(
        state,
        step=step,
        trainable=trainable,
        teacher=method.teacher.update(state.teacher, trainable, step),
        opt_state=opt_state,
    ), metrics


def accumulate(
    function: Callable, trainable: Any, rows: Any, num_micro_batches: int
) -> tuple[Any, Any]:
    """Sums `function(trainable, rows of one micro-batch)` over micro-batches, one at a time.

    Micro-batch i holds rows i, i + A, i + 2A, …: a strided split keeps every device's rows on
    that device when the batch is sharded in contiguous blocks.
    """
    if num_micro_batches == 1:
        return function(trainable, *rows)

    def split(x):
        return x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, function(trainable, *micro)), None

    micros = jax.tree.map(split, rows)
    shapes = jax.eval_shape(function, trainable, *jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, micros)[0]


def rollout_metrics(completion: Completion) -> Metrics:
    """Lengths in tokens, the share of rows cut by the limit, the share of padded slots."""
    lengths = jnp.sum(completion.mask, axis=1)
    return {
        "rollout/tokens": jnp.sum(lengths),
        "rollout/length_mean": jnp.mean(lengths.astype(jnp.float32)),
        "rollout/length_max": jnp.max(lengths),
        "rollout/truncated_fraction": jnp.mean(~completion.stopped, dtype=jnp.float32),
        "rollout/padded_fraction": jnp.mean(~completion.mask, dtype=jnp.float32),
    }


def init_state(
    method: Method, trainable: dict, frozen: dict, key: jax.Array, step: int = 0
) -> TrainState:
    """The state before the first step. `trainable` and `frozen` are not copied."""
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        trainable=trainable,
        frozen=frozen,
        teacher=method.teacher.init(trainable, frozen),
        opt_state=method.optimizer.init(trainable),
        key=key,
    )


def state_shardings(method: Method, state: Any, variables: dict, mesh: Mesh) -> TrainState:
    """Shardings of a (possibly abstract) state, given those of the student's variables.

    Args:
      method: supplies the optimiser whose state is laid out.
      state: a `TrainState` or its `jax.eval_shape`.
      variables: collection name -> tree of `NamedSharding`.
      mesh: the mesh.
    """
    trainable = {name: variables[name] for name in state.trainable}
    fields: dict[str, Any] = dict(
        step=replicated(mesh),
        trainable=trainable,
        frozen={name: variables[name] for name in state.frozen},
        teacher={name: variables[name] for name in state.teacher},
        opt_state=optimizer_shardings(method.optimizer, state.opt_state, trainable, mesh),
        key=replicated(mesh),
    )
    return TrainState(**fields)


def jit_step(
    method: Method,
    shardings: TrainState,
    mesh: Mesh,
    rules: Rules,
    function: Callable = train_step,
) -> Callable:
    """Compiles `train_step(state, batch)` for the mesh; the old state is donated.

    Donation matters: without it two copies of parameters and moments are alive at once.
    """
    rows = batch_sharding(mesh)
    compiled = jax.jit(
        partial(function, method),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, replicated(mesh), rows),
        donate_argnums=0,
    )

    def step(state: TrainState, batch: Batch):
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            return compiled(state, batch)

    return step
