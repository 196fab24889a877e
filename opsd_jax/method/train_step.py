# SPDX-License-Identifier: Apache-2.0
"""One step of on-policy self-distillation: `train_step`.

The step has two pure halves, `sample_completion` (context -> completion) and `update`
(completion -> new state, metrics). Training jits their composition, so nothing leaves the device
in between; a method that must grade a completion before it learns from it jits each half. Methods
differ in where the completion comes from (`completions.py`) and in the objective of its tokens
(`mix.py`, `policy_gradient.py`), and in nothing else.
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
from jax.sharding import Mesh

from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.method.batch import Batch, Policy
from opsd_jax.method.completions import CompletionSource, StudentRollouts
from opsd_jax.method.micro_batches import MicroBatch, accumulate
from opsd_jax.method.mix import Distillation
from opsd_jax.method.objective import Loss, Objective, Reader
from opsd_jax.method.optimizer import optimizer_shardings
from opsd_jax.method.reason_first import Reasoner, analysis_metrics
from opsd_jax.method.rows import GradedBatch
from opsd_jax.method.teacher import Teacher
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import Rules, batch_sharding, on_mesh, replicated
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion
from opsd_jax.sampling.random_keys import Use, key_for
from opsd_jax.sampling.rollout import even_segments

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on, besides the position in the data.

    step: [] int32, finished steps; trainable, frozen: dicts of flax collections, together the
    student's variables (`teacher.py`); teacher: the teacher's own store; opt_state: optax;
    key: typed PRNG key of the run, never advanced (`random_keys.py`);
    external: {"params"} of a teacher that is another model, else {}.
    """

    step: jax.Array
    trainable: dict
    frozen: dict
    teacher: dict
    opt_state: Any
    key: jax.Array
    external: dict = dataclasses.field(default_factory=dict)

    @property
    def student(self) -> dict:
        return self.frozen | self.trainable


@dataclasses.dataclass(frozen=True)
class Method:
    """The choices a step is built from; see method names in each module.

    num_micro_batches, num_widths: see `accumulate`;
    external: the decoder of a teacher that is another model, None for one's own weights;
    num_updates: optimiser passes over each batch of completions; group_size: adjacent rows that
    answer the same problem; reasoner: lets the teacher write an analysis before it scores.
    """

    model: Decoder
    rollout: RolloutConfig
    divergence: DivergenceConfig
    teacher: Teacher
    optimizer: optax.GradientTransformation
    num_micro_batches: int = 1
    num_widths: int = 1
    completions: CompletionSource = StudentRollouts()
    objective: Objective = Distillation()
    external: Decoder | None = None
    num_updates: int = 1
    group_size: int = 1
    reasoner: Reasoner | None = None


def train_step(
    method: Method, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics, Completion]:
    """Samples as the student, then moves the student towards itself with privileged context."""
    completion = sample_completion(method, state, batch)
    state, metrics = update(method, state, batch, completion)
    return state, metrics, completion


@partial(jax.named_call, name="rollout")  # as profiles and compiled programs have it
def sample_completion(method: Method, state: TrainState, batch: Batch) -> Completion:
    """The student answers from its own context (or who else `method.completions` names)."""
    student, teacher = policies(method, state, state.trainable)
    analysis = None
    if method.reasoner:
        key = key_for(Use.ANALYSES, state.key, state.step)
        analysis = method.reasoner.write(teacher, batch.teacher, key)
        batch = method.reasoner.join(batch, analysis)
    key = key_for(Use.COMPLETIONS, state.key, state.step)
    completion = method.completions(student, teacher, batch, key, method.rollout)
    return dataclasses.replace(completion, analysis=analysis)


@partial(jax.named_call, name="update")
def update(
    method: Method,
    state: TrainState,
    batch: Batch,
    completion: Completion,
    rewards: jax.Array | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimiser step on the mean objective over all sampled tokens of the global batch.

    L = Σ_{b,t} weight_{b,t} · ℓ_{b,t}, where the weights (1 / Σ mask in the plain mean) are those
    of the whole batch in every micro-batch, so that their gradients simply add up.

    Args:
      method: what to do.
      state: before the step; its `trainable` of now sampled the completion.
      batch, completion: B rows.
      rewards: [B] grades, for an objective that needs them.

    Returns:
      The state after `method.num_updates` passes, and metrics: [] each, means over the passes but
      for rollout/logp_gap, which is the first's; those named rows/* are [B] sums over the tokens
      of a row.
    """
    if method.reasoner:
        batch = method.reasoner.join(batch, completion.analysis)
    step = GradedBatch(batch, completion, rewards, method.group_size, state.step)
    plan, planned = method.objective.plan(step)
    rows = MicroBatch(batch, completion, plan, jnp.arange(completion.mask.shape[0]))

    def one_pass(carry: tuple[Any, Any], number: jax.Array | int):
        trainable, opt_state = carry
        gradient, loss = accumulate(
            jax.grad(partial(micro_loss, method, state, number), has_aux=True),
            trainable,
            rows,
            method.num_micro_batches,
            method.num_widths,
        )
        updates, opt_state = method.optimizer.update(gradient, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        metrics = loss_metrics(method, loss, batch, completion)
        metrics["optim/grad_norm"] = optax.tree.norm(gradient)
        metrics["optim/update_norm"] = optax.tree.norm(updates)
        metrics["optim/param_norm"] = optax.tree.norm(trainable)
        return (trainable, opt_state), metrics

    carry = (state.trainable, state.opt_state)
    (trainable, opt_state), metrics = all_passes(one_pass, carry, method.num_updates)
    metrics |= planned | token_metrics(method, completion) | context_metrics(batch, completion)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        trainable=trainable,
        teacher=method.teacher.update(state.teacher, trainable, state.step + 1),
        opt_state=opt_state,
    ), metrics


def all_passes(one_pass: Callable, carry: Any, number: int) -> tuple[Any, Metrics]:
    """`number` passes, one after the other: the last carry, and the metrics of all."""
    if number == 1:
        return one_pass(carry, 0)
    carry, passes = jax.lax.scan(one_pass, carry, jnp.arange(number))
    metrics = jax.tree.map(lambda x: jnp.mean(x, 0), passes)
    if (gap := "rollout/logp_gap") in passes:  # later passes score another policy, as they must
        metrics[gap] = passes[gap][0]
    return carry, metrics


def micro_loss(
    method: Method, state: TrainState, number: jax.Array | int, trainable: Any, rows: MicroBatch
) -> tuple[jax.Array, Loss]:
    """The objective of some rows of pass `number`; the aux is the same with its sums."""
    batch, completion, plan, row_numbers = rows
    lora, key = method.model.config.lora, None
    if lora and lora.dropout:
        key = key_for(Use.DROPOUT, state.key, state.step, row_numbers[0], number)
    student, teacher = policies(method, state, trainable)
    # Under adapters the initial policy is there whoever teaches.
    initial = Policy(method.model, state.frozen) if "params" in state.frozen else None
    reader = Reader(
        student, teacher, batch, completion, method.divergence, key,
        rollout=method.rollout, initial=initial, step=state.step,
    )  # fmt: skip
    loss = method.objective(reader, plan)
    # Each row in its place of the whole batch, so that micro-batches add up here, too.
    zeros = jnp.zeros(row_numbers.size * method.num_micro_batches, jnp.float32)
    placed = {name: zeros.at[row_numbers].set(value) for name, value in loss.rows.items()}
    return loss.value, jax.lax.stop_gradient(dataclasses.replace(loss, rows=placed))


def policies(method: Method, state: TrainState, trainable: dict) -> tuple[Policy, Policy]:
    """(student, teacher) with these trainable variables."""
    student = Policy(method.model, state.frozen | trainable)
    if method.external is not None:
        return student, Policy(method.external, state.external)
    store = method.teacher.variables(trainable, state.frozen, state.teacher)
    return student, Policy(method.model, store)


def loss_metrics(method: Method, loss: Loss, batch: Batch, completion: Completion) -> Metrics:
    """The loss, what it says about a token on average, and about each row in sum."""
    metrics: Metrics = {}
    for sums, mask in (
        (loss.context_sums, batch.in_context(completion.mask)),
        (loss.sums, completion.mask),  # the student's are over all rows, where known
    ):
        num_tokens = jnp.maximum(jnp.sum(mask), 1)
        metrics |= {name: total / num_tokens for name, total in sums.items()}
    if not method.completions.on_policy:
        # Whoever sampled it, it was not the student: the gap would mean nothing.
        metrics.pop("rollout/logp_gap", None)
    rows = {f"rows/{name}": total for name, total in loss.rows.items()}
    parts = {f"loss/{name}": value for name, value in loss.parts.items()}
    return {"loss/objective": loss.value} | parts | metrics | rows


def token_metrics(method: Method, completion: Completion) -> Metrics:
    """What was generated for the step; rollout/tokens counts the tokens of analyses, too."""
    metrics = rollout_metrics(completion, method.rollout)
    metrics["rows/tokens"] = jnp.sum(completion.mask, axis=1)
    if not method.completions.on_policy:
        # Their rows may have come from several rollouts, or from none.
        metrics.pop("rollout/idle_fraction")
    if completion.analysis is not None:
        metrics |= analysis_metrics(completion.analysis)
        # Where completions are the data's, the count is of tokens that were read.
        if method.completions.generates:
            metrics["rollout/tokens"] += metrics["analysis/tokens"]
    return metrics


def context_metrics(batch: Batch, completion: Completion) -> Metrics:
    """The share of rows without a teacher context, and the tokens of each row that has one."""
    if batch.has_context is None:
        return {}
    return {
        "teacher/no_context_fraction": batch.without_context(),
        "rows/context_tokens": jnp.sum(batch.in_context(completion.mask), axis=1),
    }


def rollout_metrics(completion: Completion, config: RolloutConfig) -> Metrics:
    """Lengths in tokens, who finished when, and what was decoded or padded for nothing.

    rollout/finished_by_25, _50, _75: share of rows that are done after that part of the limit, in
    percent; rollout/padded_fraction: share of the completions' slots that hold no token;
    rollout/idle_fraction: share of the decoded steps of all rows in which a row was done already.
    """
    num_rows, limit = completion.mask.shape
    lengths = jnp.sum(completion.mask, axis=1)
    number, size = even_segments(config)
    segments = -(-(jnp.max(lengths) - 1) // size) if number else 0
    decoded = num_rows * (1 + jnp.maximum(segments, 0) * size)
    p50, p90 = jnp.percentile(lengths.astype(jnp.float32), jnp.array([50.0, 90.0]))
    done_by = {
        f"rollout/finished_by_{percent}": jnp.mean(
            completion.stopped & (lengths * 100 <= percent * limit), dtype=jnp.float32
        )
        for percent in (25, 50, 75)
    }
    return done_by | {
        "rollout/tokens": jnp.sum(lengths),
        "rollout/length_mean": jnp.mean(lengths.astype(jnp.float32)),
        "rollout/length_p50": p50,
        "rollout/length_p90": p90,
        "rollout/length_max": jnp.max(lengths),
        "rollout/truncated_fraction": jnp.mean(~completion.stopped, dtype=jnp.float32),
        "rollout/padded_fraction": jnp.mean(~completion.mask, dtype=jnp.float32),
        "rollout/idle_fraction": 1 - jnp.sum(lengths) / decoded,
    }


def init_state(
    method: Method,
    trainable: dict,
    frozen: dict,
    key: jax.Array,
    step: int = 0,
    external: dict | None = None,
) -> TrainState:
    """The state before the first step. `trainable`, `frozen`, `external` are not copied."""
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        trainable=trainable,
        frozen=frozen,
        teacher=method.teacher.init(trainable, frozen),
        opt_state=method.optimizer.init(trainable),
        key=key,
        external=external or {},
    )


def state_shardings(
    method: Method, state: Any, variables: dict, mesh: Mesh, external: dict | None = None
) -> TrainState:
    """Shardings of a (possibly abstract) state, given those of the student's variables.

    Args:
      method: supplies the optimiser whose state is laid out.
      state: a `TrainState` or its `jax.eval_shape`.
      variables: collection name -> tree of `NamedSharding`.
      mesh: the mesh.
      external: {"params"} of an external teacher, likewise.
    """
    trainable = {name: variables[name] for name in state.trainable}
    fields: dict[str, Any] = dict(
        step=replicated(mesh),
        trainable=trainable,
        frozen={name: variables[name] for name in state.frozen},
        teacher={name: variables[name] for name in state.teacher},
        opt_state=optimizer_shardings(method.optimizer, state.opt_state, trainable, mesh),
        key=replicated(mesh),
        external=external or {},
    )
    return TrainState(**fields)


def jit_step(
    method: Method,
    shardings: TrainState,
    mesh: Mesh,
    rules: Rules,
    function: Callable = train_step,
) -> Callable:
    """`train_step(state, batch)`, compiled for the mesh; the old state is donated."""
    return on_mesh(jitted_step(method, shardings, mesh, function), mesh, rules)


def jitted_step(
    method: Method, shardings: TrainState, mesh: Mesh, function: Callable = train_step
) -> Any:
    """The `jax.jit` of a step, to be called or lowered under the mesh and its rules.

    Donation matters: without it two copies of parameters and moments are alive at once.
    """
    rows = batch_sharding(mesh)
    return jax.jit(
        partial(function, method),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, replicated(mesh), rows),
        donate_argnums=0,
    )


def jit_halves(
    method: Method, shardings: TrainState, mesh: Mesh, rules: Rules
) -> tuple[Callable, Callable]:
    """Compiles each half: `sample(state, batch)` and `update(state, batch, completion, rewards)`.

    The second donates the old state.
    """
    rows = batch_sharding(mesh)
    learn = jax.jit(
        partial(update, method),
        in_shardings=(shardings, rows, rows, rows),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    return jit_sample(method, shardings, mesh, rules), on_mesh(learn, mesh, rules)


def jit_sample(method: Method, shardings: TrainState, mesh: Mesh, rules: Rules) -> Callable:
    """Compiles the first half alone, `sample(state, batch)`."""
    rows = batch_sharding(mesh)
    sample = jax.jit(
        partial(sample_completion, method), in_shardings=(shardings, rows), out_shardings=rows
    )
    return on_mesh(sample, mesh, rules)
