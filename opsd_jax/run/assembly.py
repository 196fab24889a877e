# SPDX-License-Identifier: Apache-2.0
"""From an `Experiment` to the parts of a run: model, method, the state and its shardings.

`assemble` touches no weight; `load_models` reads them, `initial_state` makes the first state.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.divergence.terms import entry_terms
from opsd_jax.errors import UserError
from opsd_jax.host.identity import Identity, model_parts
from opsd_jax.host.pod import connected_mesh
from opsd_jax.method.optimizer import make_optimizer
from opsd_jax.method.train_step import Method, TrainState, init_state, policies, state_shardings
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import (
    Rules,
    axis_size,
    rows_axis,
    rows_axis_in_words,
    variable_shardings,
)
from opsd_jax.model.text_attention import fastest
from opsd_jax.run.experiment import Base, BaseSource, Experiment, TrainConfig
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.random_keys import Use, key_for


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


def model_of(train: TrainConfig, config: ModelConfig, mesh: Mesh) -> Decoder:
    """The decoder of a run: the base's shape with the run's numerics and adapters."""
    names = ("dtype", "remat", "lora")
    config = dataclasses.replace(config, **{name: getattr(train, name) for name in names})
    attention = train.attention or fastest(config, platform_of(mesh))
    return Decoder(dataclasses.replace(config, attention=attention))


def platform_of(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def check_devices(model: ModelConfig, rollout: RolloutConfig, mesh: Mesh) -> None:
    """Raises a UserError where a setting names a kernel or a memory that is not there."""
    here, sequence = platform_of(mesh), dict(mesh.shape).get("sequence", 1)
    if sequence > 1 and model.num_heads % (sequence * mesh.shape["model"]):
        raise UserError(
            f"mesh.sequence = {sequence} times mesh.model = {mesh.shape['model']} must divide the "
            f"{model.num_heads} heads of the model: of a text that is split each device attends "
            "with some heads"
        )
    if model.remat == "offload_projections" and here == "cpu":
        raise UserError(
            "train.remat = 'offload_projections' needs an accelerator: a CPU has no other memory "
            "than the host's; 'keep_projections' recomputes as little"
        )
    for key, value in (
        ("train.attention", model.attention),
        ("rollout.attention", rollout.attention),
    ):
        wanted = {"splash": ("tpu",), "pallas": ("tpu", "gpu"), "cudnn": ("gpu",)}.get(value)
        refusal = None
        if wanted and here not in wanted:
            kinds = " or a ".join(kind.upper() for kind in wanted)
            refusal = f"needs a {kinds}, and the devices here are of kind {here!r}"
        elif value == "pallas" and here == "gpu" and model.head_dim not in (32, 64, 128, 256):
            refusal = f"needs heads of 32, 64, 128 or 256 numbers on a GPU, not {model.head_dim}"
        elif value == "cudnn" and model.dtype != "bfloat16":
            refusal = "computes in bfloat16 only: set train.dtype = 'bfloat16' besides"
        elif value == "cudnn" and model.attention_softcap is not None:
            refusal = "cannot cap attention scores, as this model does"
        if refusal:
            raise UserError(f"{key} = {value!r} {refusal}; 'xla' runs anywhere")


def check_batch(batch_size: int, num_micro_batches: int, mesh: Mesh) -> None:
    """Raises a UserError unless the batch splits evenly over devices, and micro-batches do over
    those that do not share the texts of one."""
    rows = axis_size(mesh, rows_axis(mesh))
    sequence = dict(mesh.shape).get("sequence", 1)
    names, numbers = rows_axis_in_words(mesh)
    if sequence > 1 and batch_size % rows:
        raise UserError(
            f"train.batch_size = {batch_size} must be a multiple of {names} = {numbers}"
        )
    if batch_size % (num_micro_batches * rows // sequence):
        names, numbers = rows_axis_in_words(mesh, "sequence")
        raise UserError(
            f"train.batch_size = {batch_size} must be a multiple of train.num_micro_batches x "
            f"{names} = {num_micro_batches} x {numbers}"
        )


def load_model(
    field: str,
    source: BaseSource,
    place: tuple[Mesh, Rules, str],
    say: Callable[[str], None],
    identity: Identity,
) -> Base:
    """A model from its source, as it was when the run began.

    Args:
      field: what the user calls it: "train.model" or "teacher.model".
      source: where it comes from; a finished run's student is taken at the recorded step.
      place: mesh, rules and cache directory.
      say: told what was loaded.
      identity: of the run that it is a part of.

    Raises:
      UserError: it is another model than the run began with.
    """
    step, advice = identity.part(field, "step"), ""
    if step is not None and getattr(source, "step", step) is None:
        source = dataclasses.replace(source, step=step)  # type: ignore[type-var]
        advice = f"{field}: the run in {identity.workdir} began with step {step} of its base run: "
    try:
        base = source.load(*place, say)
    except UserError as error:
        raise UserError(f"{advice}{error}") from None
    if hasattr(base.tokenizer, "now"):
        base.tokenizer.now = datetime.datetime.fromisoformat(identity.clock)
    origin = {} if base.step is None else {"step": base.step}
    identity.check(field, origin | model_parts(base.config, base.params, base.tokenizer))
    return base


def load_teacher(
    experiment: Experiment,
    tokenizer: Tokenizer,
    place: tuple[Mesh, Rules, str],
    say: Callable[[str], None],
    identity: Identity,
) -> Base | None:
    """The external teacher, None where one's own weights teach.

    Raises:
      UserError: its tokenizer is not the student's.
    """
    if experiment.teacher.model is None:
        return None
    found = load_model("teacher.model", experiment.teacher.model, place, say, identity)
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


class Models(NamedTuple):
    """What a run is made of before anything is restored.

    base: with its parameters; external: a teacher that is another model, else None; parts: what
    holds no weights.
    """

    base: Base
    external: Base | None
    parts: Assembly


def load_models(
    experiment: Experiment,
    workdir: str | Path,
    say: Callable[[str], None],
    identity: Identity,
    with_teacher: bool = True,
) -> Models:
    """Loads the base and the external teacher of an experiment onto its mesh.

    Args:
      experiment: whose models.
      workdir: a base that is trained on first use is kept below it.
      say: told what was loaded.
      identity: of the run, which is refused other models.
      with_teacher: False leaves out an external teacher; it is not even looked for.
    """
    mesh = connected_mesh(experiment.mesh)
    place = (mesh, experiment.mesh.rules, str(Path(workdir) / "base"))
    base = load_model("train.model", experiment.train.model, place, say, identity)
    external = None
    if with_teacher:
        external = load_teacher(experiment, base.tokenizer, place, say, identity)
    shape = external and external.config
    return Models(base, external, assemble(experiment, base.config, base.tokenizer, mesh, shape))


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
      UserError: a kernel that cannot run there, or a tokenizer larger than the embedding.
    """
    if tokenizer.vocab_size > base.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {base.vocab_size} "
            "embedding rows; use the tokenizer that belongs to the model"
        )
    model, external_model = model_of(experiment.train, base, mesh), None
    check_devices(model.config, experiment.rollout, mesh)
    if external is not None:
        external_model = model_of(dataclasses.replace(experiment.train, lora=None), external, mesh)
        check_devices(external_model.config, experiment.rollout, mesh)
    method = method_of(experiment, model, tokenizer, external_model)
    rules = experiment.mesh.rules
    shapes, variables = layout(model, mesh, rules)
    trainable, frozen = split_trainable(shapes)
    teacher: dict = {}
    teacher_shardings: dict = {}
    if external_model is not None:
        teacher, teacher_shardings = layout(external_model, mesh, rules)
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
    return Assembly(model, method, mesh, rules, variables, abstract)


def method_of(
    experiment: Experiment, model: Decoder, tokenizer: Tokenizer, external: Decoder | None
) -> Method:
    """What the train step of an experiment is made of."""
    train = experiment.train
    logps = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
    try:  # A function of the user's is refused here, before anything is computed.
        jax.eval_shape(entry_terms(experiment.divergence), logps, logps)
    except UserError as error:
        raise UserError(f"{error}; it was given two of [B, C, V] = {logps.shape}") from None
    rollout = experiment.rollout.for_tokenizer(tokenizer.stop_ids, tokenizer.pad_id)
    reasoner = None
    if experiment.teacher.reasons:
        transition_ids = tokenizer.encode(experiment.contexts.transition)
        reasoner = experiment.teacher.reasons.build(rollout, transition_ids)
    return Method(
        model=model,
        rollout=rollout,
        divergence=experiment.divergence,
        teacher=experiment.teacher.build(),
        optimizer=make_optimizer(experiment.optimizer, train.learning_rate, train.num_updates),
        num_micro_batches=train.num_micro_batches,
        num_widths=train.num_widths,
        completions=train.completions,
        objective=train.objective,
        external=external,
        num_updates=train.num_updates,
        group_size=train.group_size,
        reasoner=reasoner,
    )


def layout(model: Decoder, mesh: Mesh, rules: Rules) -> tuple[dict, dict]:
    """Shapes and shardings of a model's variables, {"params"[, "lora"]}."""
    boxed = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    return nn.meta.unbox(boxed), variable_shardings(boxed, mesh, rules)


def split_trainable(variables: dict) -> tuple[dict, dict]:
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

    key = key_for(Use.ADAPTERS, jax.random.key(seed))
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

    trainable, frozen = split_trainable(initial_variables(parts, params, seed))
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
