# SPDX-License-Identifier: Apache-2.0
"""From the numbers of an experiment to the parts of a run, ready to place on a mesh.

`Experiment` is what a gin file says; `assemble` turns it into a model, a method and the
shardings of a state, without touching a weight; `initial_state` fills that state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.problems import ProblemSource
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import EvaluateConfig
from opsd_jax.fields import Count, Natural, Positive, Seed, require
from opsd_jax.host.guard import GuardConfig
from opsd_jax.method.completions import CompletionSource, StudentRollouts
from opsd_jax.method.objective import Distillation, Likelihood, Objective
from opsd_jax.method.optimizer import OptimizerConfig, make_optimizer
from opsd_jax.method.policy_gradient import PolicyGradient, RewardMix
from opsd_jax.method.teacher import TeacherConfig
from opsd_jax.method.train_step import Method, TrainState, init_state, policies, state_shardings
from opsd_jax.model.config import DTYPES, TEXT_ATTENTION, LoraConfig, ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import MeshConfig, Rules, check_batch, variable_shardings
from opsd_jax.sampling.config import RolloutConfig


class Base(NamedTuple):
    """The model a run starts from: its shape, its parameters and its tokenizer."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer


class BaseSource(Protocol):
    """Anything that config can name as the base model."""

    def load(self, mesh: Mesh, rules: Rules, cache_dir: str, say: Callable[[str], None]) -> Base:
        """Parameters on the mesh; `cache_dir` may keep what was costly to make."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run.

    Args:
      model: where the base model comes from.
      problems: what is trained on.
      heldout: what is evaluated on; None evaluates nothing.
      num_steps: optimiser steps.
      batch_size: B, completions per step over all devices.
      group_size: G, completions of each problem, B / G problems a step.
      completions: where they come from: @StudentRollouts(), @TeacherRollouts(),
        @MixedRollouts() or @References().
      objective: what is learned from them: @Distillation(), @PolicyGradient(), @RewardMix() or
        @Likelihood().
      num_updates: optimiser passes over each batch of completions.
      learning_rate: peak of the schedule.
      seed: of rollouts, data order and adapter initialisation.
      num_micro_batches: A, the loss is computed on B / A rows at a time.
      lora: train adapters only; None trains all parameters.
      dtype: compute dtype; trained parameters and moments are float32 whatever it is.
      attention: how whole texts are attended to: "xla", "splash" (TPU) or "cudnn" (NVIDIA GPU,
        bfloat16); see `attention.py`.
      remat: recompute layers in the backward pass.
      log_every_steps, eval_every_steps, checkpoint_every_steps: periods; 0 = never (a
        checkpoint is always written at the end).
      keep_checkpoints: the latest so many, and the best by eval/student/accuracy.
      num_samples_logged: graded completions kept in samples/ at each evaluation.
      probes: functions (model, student, teacher variables, tokenizer) -> metrics, called at
        each evaluation.
      grader_workers: processes that grade completions, each under a hard time limit; 0 grades in
        the training process, for graders that cannot hang.
      tensorboard, wandb: further writers, behind the extras of the same names.
    """

    model: BaseSource
    problems: ProblemSource
    num_steps: Count
    batch_size: Count
    learning_rate: Positive
    heldout: ProblemSource | None = None
    group_size: Count = 1
    completions: CompletionSource = StudentRollouts()
    objective: Objective = Distillation()
    num_updates: Count = 1
    seed: Seed = 0
    num_micro_batches: Count = 1
    lora: LoraConfig | None = None
    dtype: Annotated[str, DTYPES] = "float32"
    attention: Annotated[str, TEXT_ATTENTION] = "xla"
    remat: bool = True
    log_every_steps: Count = 1
    eval_every_steps: Natural = 20
    checkpoint_every_steps: Natural = 20
    keep_checkpoints: Count = 2
    num_samples_logged: Natural = 16
    probes: tuple[Callable[..., dict[str, float]], ...] = ()
    grader_workers: Natural = 2
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self):
        require("train", self)
        if self.batch_size % self.group_size:
            raise UserError(
                f"train.batch_size = {self.batch_size} must be a multiple of train.group_size = "
                f"{self.group_size}"
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a gin file says, one validated value per area."""

    train: TrainConfig
    contexts: ContextConfig
    rollout: RolloutConfig
    divergence: DivergenceConfig
    teacher: TeacherConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    evaluate: EvaluateConfig
    guard: GuardConfig = GuardConfig()

    @property
    def training_contexts(self) -> ContextConfig:
        """What student and teacher are asked in training."""
        return self.contexts.reasoning_first() if self.teacher.reasons else self.contexts

    def __post_init__(self):
        objective = self.train.objective
        if self.teacher.reasons and isinstance(objective, (PolicyGradient, Likelihood)):
            if self.train.completions.on_policy or not self.train.completions.generates:
                raise UserError(
                    "teacher.reasons is of no use: neither train.objective nor train.completions "
                    "looks at the teacher's context; set it to None"
                )
        if isinstance(objective, RewardMix):
            objective = objective.policy_gradient
        if isinstance(objective, PolicyGradient):
            self._check_policy_gradient(objective)

    def _check_policy_gradient(self, objective: PolicyGradient) -> None:
        """What a policy gradient needs of the other areas."""
        rollout = self.rollout
        if objective.baseline == "group" and self.train.group_size == 1:
            raise UserError(
                "PolicyGradient compares the completions of a problem: set train.group_size to 2 "
                "or more, or PolicyGradient.baseline = 'batch'"
            )
        if not self.train.completions.generates:
            raise UserError(
                "PolicyGradient needs completions that were sampled: set train.completions to "
                "@StudentRollouts()"
            )
        if not rollout.is_plain:
            raise UserError(
                "PolicyGradient takes log-probabilities of the model itself: set "
                "rollout.temperature = 1.0 and no filter, penalty or rollout.min_new_tokens"
            )
        if objective.kl_weight and (self.teacher.weights != "initial" or self.teacher.model):
            raise UserError(
                "PolicyGradient.kl_weight is of the KL to the initial policy: set teacher.weights "
                "= 'initial' and teacher.model = None"
            )


class Assembly(NamedTuple):
    """The parts of a run that do not hold weights.

    model: the decoder with the run's dtype and adapters; method: what the step is made of;
    variables: shardings of {"params"[, "lora"]}; abstract: the state as shapes with shardings.
    """

    model: Decoder
    method: Method
    mesh: Mesh
    rules: Rules
    variables: dict
    abstract: TrainState

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def model_of(train: TrainConfig, config: ModelConfig) -> Decoder:
    """The decoder of a run: the base's shape with the run's numerics and adapters."""
    names = ("dtype", "attention", "remat", "lora")
    return Decoder(dataclasses.replace(config, **{name: getattr(train, name) for name in names}))


def check_attention(model: ModelConfig, rollout: RolloutConfig, mesh: Mesh) -> None:
    """Raises a UserError where a setting names a kernel that cannot run there."""
    here = mesh.devices.flat[0].platform
    for key, value in (
        ("train.attention", model.attention),
        ("rollout.attention", rollout.attention),
    ):
        wanted = {"splash": "tpu", "pallas": "tpu", "cudnn": "gpu"}.get(value, here)
        refusal = None
        if wanted != here:
            refusal = f"needs a {wanted.upper()}, and the devices here are of kind {here!r}"
        elif value == "cudnn" and model.dtype != "bfloat16":
            refusal = "computes in bfloat16 only: set train.dtype = 'bfloat16' besides"
        elif value == "cudnn" and model.attention_softcap is not None:
            refusal = "cannot cap attention scores, as this model does"
        if refusal:
            raise UserError(f"{key} = {value!r} {refusal}; 'xla' runs anywhere")


def load_teacher(
    experiment: Experiment,
    tokenizer: Tokenizer,
    mesh: Mesh,
    cache_dir: str,
    say: Callable[[str], None],
) -> Base | None:
    """The external teacher, None where one's own weights teach.

    Raises:
      UserError: its tokenizer is not the student's.
    """
    if experiment.teacher.model is None:
        return None
    found = experiment.teacher.model.load(mesh, experiment.mesh.rules, cache_dir, say)
    if not same_tokens(tokenizer, found.tokenizer):
        raise UserError(
            "teacher.model has another tokenizer than train.model: token ids would mean other "
            "words to it; choose a teacher of the same family"
        )
    return found


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id means the same to both, as text and as a stop."""
    if one.vocab_size != other.vocab_size or set(one.stop_ids) != set(other.stop_ids):
        return False
    return all(one.decode([i]) == other.decode([i]) for i in range(one.vocab_size))


def assemble(
    experiment: Experiment,
    base: ModelConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    external: ModelConfig | None = None,
) -> Assembly:
    """Model, method and state layout for a base of this shape; no weight is read.

    `external` is the shape of a teacher that is another model.

    Raises:
      UserError: a batch that does not divide, or a tokenizer larger than the embedding.
    """
    train = experiment.train
    check_batch(train.batch_size, train.num_micro_batches, mesh)
    if tokenizer.vocab_size > base.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {base.vocab_size} "
            "embedding rows; use the tokenizer that belongs to the model"
        )
    model = model_of(train, base)
    check_attention(model.config, experiment.rollout, mesh)
    external_model = None
    if external is not None:
        external_model = model_of(dataclasses.replace(train, lora=None), external)
        check_attention(external_model.config, experiment.rollout, mesh)
    rollout = experiment.rollout.for_tokenizer(tokenizer.stop_ids, tokenizer.pad_id)
    reasoner = None
    if experiment.teacher.reasons:
        transition_ids = tokenizer.encode(experiment.contexts.transition)
        reasoner = experiment.teacher.reasons.build(rollout, transition_ids)
    method = Method(
        model=model,
        rollout=rollout,
        divergence=experiment.divergence,
        teacher=experiment.teacher.build(),
        optimizer=make_optimizer(experiment.optimizer, train.learning_rate, train.num_updates),
        num_micro_batches=train.num_micro_batches,
        completions=train.completions,
        objective=train.objective,
        external=external_model,
        num_updates=train.num_updates,
        group_size=train.group_size,
        reasoner=reasoner,
    )
    shapes, variables = layout(model, mesh, experiment.mesh.rules)
    trainable, frozen = split(shapes)
    teacher: dict = {}
    teacher_shardings: dict = {}
    if method.external is not None:
        teacher, teacher_shardings = layout(method.external, mesh, experiment.mesh.rules)
    state = jax.eval_shape(
        lambda t, f, key: init_state(method, t, f, key, external=teacher),
        trainable,
        frozen,
        jax.random.key(0),
    )
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(method, state, variables, mesh, teacher_shardings),
    )
    return Assembly(model, method, mesh, experiment.mesh.rules, variables, abstract)


def layout(model: Decoder, mesh: Mesh, rules: Rules) -> tuple[dict, dict]:
    """Shapes and shardings of a model's variables, {"params"[, "lora"]}."""
    boxed = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    return nn.meta.unbox(boxed), variable_shardings(boxed, mesh, rules)


def split(variables: dict) -> tuple[dict, dict]:
    """(trainable, frozen): the adapters over fixed parameters, or the parameters themselves."""
    if "lora" in variables:
        return {"lora": variables["lora"]}, {"params": variables["params"]}
    return {"params": variables["params"]}, {}


def initial_variables(parts: Assembly, params: dict, seed: int) -> dict:
    """{"params"[, "lora"]} on the mesh: the base's parameters and fresh adapters.

    Parameters that are trained become float32 whatever the base was loaded as: a small update
    of a bfloat16 weight is rounded away.
    """
    if "lora" not in parts.variables:
        placed = jax.device_put(params, parts.variables["params"])
        return {"params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), placed)}

    def adapters(key):
        return nn.meta.unbox(init_variables(parts.model, key))["lora"]

    key = jax.random.fold_in(jax.random.key(seed), 1)
    with jax.set_mesh(parts.mesh):
        lora = jax.jit(adapters, out_shardings=parts.variables["lora"])(key)
    return frozen_variables(parts, params) | {"lora": lora}


def frozen_variables(parts: Assembly, params: dict) -> dict:
    """The base's parameters on the mesh where adapters are trained over them, else {}."""
    if "lora" not in parts.variables:
        return {}
    return {"params": jax.device_put(params, parts.variables["params"])}


def initial_state(
    parts: Assembly, params: dict, seed: int, teacher_params: dict | None = None
) -> TrainState:
    """The state before the first step, laid out on the mesh."""

    def build(trainable, frozen, key):
        return init_state(parts.method, trainable, frozen, key)

    trainable, frozen = split(initial_variables(parts, params, seed))
    shardings = dataclasses.replace(parts.shardings, external={})
    with jax.set_mesh(parts.mesh):
        state = jax.jit(build, out_shardings=shardings)(trainable, frozen, jax.random.key(seed))
    return dataclasses.replace(state, external=external_variables(parts, teacher_params))


def external_variables(parts: Assembly, params: dict | None) -> dict:
    """{"params"} of an external teacher on the mesh, {} without one."""
    if params is None:
        return {}
    return {"params": jax.device_put(params, parts.shardings.external["params"])}


def teacher_variables(parts: Assembly, state: TrainState) -> dict[str, Any] | None:
    """The variables that teach at this state; None if they are those of another kind of model."""
    teacher = policies(parts.method, state, state.trainable)[1]
    plain = dataclasses.replace(parts.model.config, lora=None)
    return teacher.variables if teacher.model.config in (parts.model.config, plain) else None
