# SPDX-License-Identifier: Apache-2.0
"""A workdir restored: student and teacher as a run left them, and `@FinishedRun()` as a model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError, as_named
from opsd_jax.evaluation.runs import ACCURACY
from opsd_jax.host.bucket_checkpoint import checkpoints_of
from opsd_jax.host.checkpoint import Checkpoints
from opsd_jax.host.config_text import first_difference
from opsd_jax.host.files import read_text
from opsd_jax.host.guard import restored_step
from opsd_jax.host.identity import Identity, identity_of, own_code_parts
from opsd_jax.host.stage import local
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.projection import merge_lora
from opsd_jax.model.sharding import Rules
from opsd_jax.run.assembly import (
    Assembly,
    external_variables,
    frozen_variables,
    initial_state,
    layout,
    load_model,
    load_models,
    split_trainable,
    teacher_variables,
)
from opsd_jax.run.experiment import Base, Experiment, tokenizer_of

# The experiment of a config.gin; `config.load_run`, as only config.py knows gin.
ReadConfig = Callable[[str], Experiment]


class Restored(NamedTuple):
    """A student as a run left it, and the teacher it had."""

    experiment: Experiment
    parts: Assembly
    tokenizer: Tokenizer
    student: dict
    teacher: dict | None
    step: int
    identity: Identity


def restore_run(
    workdir: str | Path, step: int | str | None, read: ReadConfig, with_teacher: bool = True
) -> Restored:
    """Student and teacher of a training workdir, without the optimiser.

    Args:
      workdir: of `opsd train`.
      step: a checkpoint; 0 is what the run started from, loaded from its source again; "best" the
        best by held-out accuracy; None the one that the guard chose, or else the latest.
      read: gives the experiment of the run's config.gin.
      with_teacher: False leaves it out; an external one is then not even looked for.

    Raises:
      UserError: it is no training workdir, or has no such checkpoint.
    """
    if isinstance(step, str) and step != "best":
        raise UserError(f"step must be a number, 'best' or None, not {step!r}")
    workdir = local(workdir)
    own = workdir / "config.gin"
    if not own.exists():
        raise UserError(f"{workdir}: no config.gin there; is it a training workdir?")
    experiment = read(str(own))
    identity = recorded_identity(workdir, say)
    identity.tell_code(own_code_parts(experiment.imports), say)
    base, external, parts = load_models(experiment, workdir, say, identity, with_teacher)
    teacher_params = external and external.params
    if step == 0:
        state = initial_state(parts, base.params, experiment.train.seed, teacher_params)
    else:
        wanted = {"trainable": parts.abstract.trainable}
        if with_teacher:
            wanted["teacher"] = parts.abstract.teacher
        step, found = read_state(workdir, wanted, step, say)
        state = dataclasses.replace(
            parts.abstract,
            frozen=frozen_variables(parts, base.params),
            external=external_variables(parts, teacher_params),
            **found,
        )
    teacher = teacher_variables(parts, state) if with_teacher else None
    return Restored(experiment, parts, base.tokenizer, state.student, teacher, step, identity)


def recorded_identity(workdir: Path, say: Callable[[str], None]) -> Identity:
    """What a run began with.

    Raises:
      UserError: its config.gin was edited since, which is read for its settings.
    """
    meta = _checkpoints(workdir, say).meta()
    path = workdir / "config.gin"
    if meta and (difference := first_difference(meta.get("config", ""), read_text(path))):
        raise UserError(f"{path} is not the run's own: {difference}; change it back")
    return identity_of(workdir, meta)


def read_state(
    workdir: Path, wanted: dict[str, Any], step: int | str | None, say: Callable[[str], None]
) -> tuple[int, dict[str, Any]]:
    """Some fields of the state of a run, and the step that they are of.

    Args:
      workdir: of the run.
      wanted: field -> its arrays as shapes with shardings.
      step: a checkpoint; "best" the best by held-out accuracy; None the one that the guard chose,
        or else the latest.
      say: told if the guard chose, or if a checkpoint is damaged.
    """
    if step is None and (step := restored_step(workdir)) is not None:
        say(f"step {step} is taken: the guard ended the run (see {workdir}/guard.json)")
    with _checkpoints(workdir, say) as checkpoints:
        if isinstance(step, str) and (step := checkpoints.best_step()) is None:
            raise UserError(f"no checkpoint of {workdir} was evaluated: it has no best step")
        found = checkpoints.restore_only(wanted, step)
    return found.step, found.state


def _checkpoints(workdir: Path, say: Callable[[str], None]) -> Checkpoints:
    return checkpoints_of(workdir, None, ACCURACY, say)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """The student that a training workdir ends with, adapters merged, as a model source.

    To teach another run, or to go on from it.

    Args:
      workdir: of `opsd train`; its config.gin names shape, tokenizer and adapters.
      read: gives the experiment of a config.gin.
      step: a checkpoint; None takes the one that the guard chose, or else the latest.
    """

    workdir: str
    read: ReadConfig
    step: int | None = None

    def load_tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.read(str(local(self.workdir) / "config.gin")).train.model)

    def load(self, mesh: Mesh, rules: Rules, cache_dir: str, say: Callable[[str], None]) -> Base:
        workdir = local(self.workdir)
        if not (workdir / "config.gin").exists():
            raise UserError(f"FinishedRun.workdir = {self.workdir!r}: no config.gin there")
        if not _checkpoints(workdir, say).steps():
            raise UserError(f"FinishedRun.workdir = {self.workdir!r}: no checkpoints there")
        train = self.read(str(workdir / "config.gin")).train
        identity = recorded_identity(workdir, say)
        place = (mesh, rules, str(workdir / "base"))
        base = load_model("train.model", train.model, place, say, identity)
        config = dataclasses.replace(base.config, lora=train.lora)
        shapes, shardings = layout(Decoder(config), mesh, rules)
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            split_trainable(shapes)[0],
            split_trainable(shardings)[0],
        )
        step, found = read_state(workdir, {"trainable": wanted}, self.step, say)
        variables = {"params": base.params} | found["trainable"]
        say(f"model: the student of {self.workdir} after step {step}")
        return Base(base.config, merge_lora(config, variables), base.tokenizer, step)


def say(text: str) -> None:
    """To the terminal's error stream, once on a pod."""
    if jax.process_index() == 0:
        print(as_named(text), file=sys.stderr)
