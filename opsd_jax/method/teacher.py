# SPDX-License-Identifier: Apache-2.0
"""Whose weights teach. Every choice is three pure functions over the same two trees.

`trainable` and `frozen` are dicts of flax collections, together the student's variables:
full fine-tuning has `trainable = {"params"}, frozen = {}`; LoRA has `trainable = {"lora"},
frozen = {"params"}`. A teacher may keep a `store` shaped like `trainable`; its variables are
always `frozen | something`. So the initial policy exists in both cases: with LoRA by leaving the
adapters out, with full fine-tuning as a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from opsd_jax.fields import Count, Share, require
from opsd_jax.method.reason_first import ReasonFirst

Tree = dict[str, Any]


class Teacher(NamedTuple):
    """A rule for the teacher's weights.

    init(trainable, frozen) -> store; variables(trainable, frozen, store) -> variables of the
    teacher; update(store, trainable, step) -> store, called after the optimiser with the number
    of finished steps.
    """

    init: Callable[[Tree, Tree], Tree]
    variables: Callable[[Tree, Tree, Tree], Tree]
    update: Callable[[Tree, Tree, jax.Array], Tree]


def copy(tree: Tree) -> Tree:
    """A copy in its own buffers: the state is donated, and no buffer may be donated twice."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def initial() -> Teacher:
    """The policy that training started from (the official recipe's fixed teacher)."""
    return Teacher(
        init=lambda trainable, frozen: {} if "params" in frozen else copy(trainable),
        variables=lambda trainable, frozen, store: frozen | store,
        update=lambda store, trainable, step: store,
    )


def live() -> Teacher:
    """The student's current weights. On long runs this collapses; see the ablations."""
    return Teacher(
        init=lambda trainable, frozen: {},
        variables=lambda trainable, frozen, store: frozen | trainable,
        update=lambda store, trainable, step: store,
    )


def ema(decay: float) -> Teacher:
    """An exponential moving average of the student: store = decay · store + (1 - decay) · new."""
    return Teacher(
        init=lambda trainable, frozen: copy(trainable),
        variables=lambda trainable, frozen, store: frozen | store,
        update=lambda store, trainable, step: jax.tree.map(
            lambda old, new: old + (1.0 - decay) * (new - old), store, trainable
        ),
    )


def snapshot(every_steps: int) -> Teacher:
    """A copy of the student, renewed every `every_steps` steps."""
    return Teacher(
        init=lambda trainable, frozen: copy(trainable),
        variables=lambda trainable, frozen, store: frozen | store,
        update=lambda store, trainable, step: jax.tree.map(
            lambda old, new: jnp.where(step % every_steps == 0, new, old), store, trainable
        ),
    )


class LoadsModel(Protocol):
    """A source of a model (`experiment.BaseSource`)."""

    def load(self, mesh: Any, rules: Any, cache_dir: str, say: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Which weights teach.

    Args:
      weights: "initial", "live", "ema", "snapshot", or a function returning a `Teacher`.
      ema_decay: of "ema"; a large value follows the student slowly.
      snapshot_every_steps: of "snapshot".
      model: another model that teaches in its place, frozen: a source such as
        @PretrainedModel() or @FinishedRun(), with the student's tokenizer.
      reasons: @ReasonFirst() has it write an analysis before it scores; None scores at once.
    """

    weights: Annotated[str, ("initial", "live", "ema", "snapshot")] | Callable[[], Teacher] = (
        "initial"
    )
    ema_decay: Share = 0.999
    snapshot_every_steps: Count = 50
    model: LoadsModel | None = None
    reasons: ReasonFirst | None = None

    def __post_init__(self):
        require("teacher", self)

    def build(self) -> Teacher:
        if self.model is not None:
            return live()  # Keeps nothing; the external model stands in the state by itself.
        if callable(self.weights):
            return self.weights()
        return {
            "initial": initial,
            "live": live,
            "ema": lambda: ema(self.ema_decay),
            "snapshot": lambda: snapshot(self.snapshot_every_steps),
        }[self.weights]()
