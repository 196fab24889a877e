# SPDX-License-Identifier: Apache-2.0
"""The step of an experiment, compiled for devices that need not be here, from shapes alone."""

from __future__ import annotations

import dataclasses
import os
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from opsd_jax.errors import UserError
from opsd_jax.host.files import read_json
from opsd_jax.host.hub import model_folder
from opsd_jax.method.batch import Batch
from opsd_jax.method.train_step import (
    TrainState,
    jitted_step,
    sample_completion,
    train_step,
    update,
)
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.sharding import batch_sharding, on_mesh
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.run.assembly import Assembly, assemble, check_batch
from opsd_jax.run.base_model import PretrainedModel
from opsd_jax.run.experiment import Experiment
from opsd_jax.sampling.prompts import Context


class Widths(NamedTuple):
    """Tokens that the prompts of a batch are padded to."""

    student: int
    teacher: int


# What a compiler says of what it needs, and of what there is.
_TOO_LARGE = (
    r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT])",
    r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)",
)


class TooLarge(Exception):
    """The compiler refused; the message is how much of what was needed, in its words."""


def shape_of(experiment: Experiment, model_config: str | None) -> ModelConfig:
    """The shape of the experiment's base model; no weights are read.

    Args:
      experiment: whose `train.model` is asked where `model_config` is None.
      model_config: a Hugging Face config.json, the folder that it lies in, or a name on the Hub.

    Raises:
      UserError: the shape is in no file that can be had.
    """
    source, path, field = experiment.train.model, model_config, "--model_config"
    if path is None and isinstance(source, PretrainedModel):
        path, field = source.path, "PretrainedModel.path"
    if path is None:
        raise UserError(
            f"{type(source).__name__} does not say its shape without being loaded: give "
            "--model_config, a Hugging Face config.json"
        )
    if not os.path.isfile(path):
        path = os.path.join(model_folder(path, field, weights=False), "config.json")
    if not path.endswith(".json") or not os.path.isfile(path):
        raise UserError(f"{path}: no config.json; give --model_config, a Hugging Face config.json")
    return config_from_hf(read_json(path))


def parts_of(experiment: Experiment, config: ModelConfig, devices: list[Any]) -> Assembly:
    """Everything of the run but its weights, laid out on these devices.

    The frozen base has the dtype that the run would load it as.

    Raises:
      UserError: the devices do not fill the mesh, or the batch does not divide.
    """
    sizes = experiment.mesh.sizes(len(devices))
    # In the order they are given in: the compiler's.
    grid = np.array(devices).reshape(*sizes.values())
    mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    train = experiment.train
    check_batch(train.batch_size, train.num_micro_batches, mesh)
    # Only its numbers are asked, and none of them changes the program's shape.
    tokenizer: Any = SimpleNamespace(
        vocab_size=config.vocab_size, pad_id=0, stop_ids=(0,), encode=lambda text: [0] * 16
    )
    # Of several widths the widest: the others are no more memory, and take less time.
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(train, num_widths=1))
    parts = assemble(experiment, config, tokenizer, mesh)
    dtype = getattr(train.model, "dtype", "float32")

    def loaded(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)

    frozen = jax.tree.map(loaded, parts.abstract.frozen)
    return parts._replace(abstract=dataclasses.replace(parts.abstract, frozen=frozen))


def abstract_batch(experiment: Experiment, mesh: Mesh, widths: Widths) -> Batch:
    """The shapes of a global batch; a context that shows attempts is there from the start."""
    rows, size = batch_sharding(mesh), experiment.train.batch_size

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    contexts, has_context = experiment.training_contexts, None

    def context(width: int, name: str) -> Context:
        copies = 1 if contexts.is_after(name) else experiment.train.group_size
        return Context(array(size, width), array(size), copies)

    reference = None
    if not experiment.train.completions.generates:
        reference = context(experiment.rollout.max_new_tokens, "student")
    if contexts.after_rollout:
        has_context = array(size, dtype=jnp.bool_)
    student = context(widths.student, "student")
    teacher, *views = (context(widths.teacher, name) for name in contexts.teachers)
    return Batch(student, teacher, reference, tuple(views), has_context)


def graded_step(method: Any, state: TrainState, batch: Batch) -> tuple:
    """Both halves of a step that is graded in between, with grades made up on the device."""
    completion = sample_completion(method, state, batch)
    rewards = (completion.ids[:, 0] % 2).astype(jnp.float32)
    return *update(method, state, batch, completion, rewards), completion


def compile_step(parts: Assembly, batch: Batch) -> Any:
    """The train step for the mesh of `parts`, as `jax.stages.Compiled`.

    Raises:
      TooLarge: the compiler found no way to fit it.
    """
    function = graded_step if parts.method.objective.needs_rewards else train_step
    step = jitted_step(parts.method, parts.shardings, parts.mesh, function)
    lowered = on_mesh(step.lower, parts.mesh, parts.rules)(parts.abstract, batch)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        found = [re.search(words, text) for words in _TOO_LARGE]
        sizes = next((match.groups() for match in found if match), None)
        raise TooLarge(" of ".join(sizes) if sizes else text.splitlines()[0]) from None
