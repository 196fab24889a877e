# SPDX-License-Identifier: Apache-2.0
"""A finished run's student as a model source: to teach another run, or to go on from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from opsd_jax.errors import UserError
from opsd_jax.host.checkpoint import Checkpoints
from opsd_jax.host.guard import restored_step
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import Rules
from opsd_jax.pretrained.export import merge_lora
from opsd_jax.run.experiment import Base, Experiment, layout, split


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """The student that a training workdir ends with, adapters merged.

    Args:
      workdir: of `opsd train`; its config.gin names shape, tokenizer and adapters.
      read: gives the experiment of a config.gin (`config.load_run`; only config.py knows gin).
      step: a checkpoint; None takes the one that the guard chose, or else the latest.
    """

    workdir: str
    read: Callable[[str], Experiment]
    step: int | None = None

    def load(self, mesh: Mesh, rules: Rules, cache_dir: str, say: Callable[[str], None]) -> Base:
        workdir = Path(self.workdir)
        for name in ("config.gin", "checkpoints"):
            if not (workdir / name).exists():
                raise UserError(f"FinishedRun.workdir = {self.workdir!r}: no {name} there")
        train = self.read(str(workdir / "config.gin")).train
        base = train.model.load(mesh, rules, str(workdir / "base"), say)
        config = dataclasses.replace(base.config, lora=train.lora)
        shapes, shardings = layout(Decoder(config), mesh, rules)
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            split(shapes)[0],
            split(shardings)[0],
        )
        step = restored_step(workdir) if self.step is None else self.step
        with Checkpoints(workdir / "checkpoints", warn=say) as checkpoints:
            found = checkpoints.restore_only({"trainable": wanted}, step)
        variables = {"params": base.params} | found.state["trainable"]
        say(f"model: the student of {self.workdir} after step {found.step}")
        return Base(base.config, merge_lora(config, variables), base.tokenizer)
