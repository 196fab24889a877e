# SPDX-License-Identifier: Apache-2.0
"""Teacher weights: initial, live, EMA, snapshot, each three pure functions over the same trees.

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

from opsd_jax.errors import UserError
from opsd_jax.fields import Count, Share, require
from opsd_jax.method.reason_first import ReasonFirst
from opsd_jax.model.compute_dtype import narrowed
from opsd_jax.model.config import DTYPES

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


def stored(update: Callable[[Tree, Tree, jax.Array], Tree], dtype: str = "float32") -> Teacher:
    """A teacher that keeps a copy of all that is trained, `narrowed` to a dtype."""

    def copy(trainable: Tree, frozen: Tree) -> Tree:
        # In its own buffers: the state is donated, and no buffer may be donated twice.
        return jax.tree.map(lambda x: jnp.array(x, copy=True), narrowed(trainable, dtype))

    return Teacher(copy, lambda trainable, frozen, store: frozen | store, update)


def initial(dtype: str = "float32") -> Teacher:
    """The policy that training started from (the official recipe's fixed teacher)."""
    kept = stored(lambda store, trainable, step: store, dtype)
    return kept._replace(
        init=lambda trainable, frozen: {} if "params" in frozen else kept.init(trainable, frozen)
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
    return stored(
        lambda store, trainable, step: jax.tree.map(
            lambda old, new: old + (1.0 - decay) * (new - old), store, trainable
        )
    )


def snapshot(every_steps: int, dtype: str = "float32") -> Teacher:
    """A copy of the student, renewed every `every_steps` steps and not touched in between."""

    def copied(store, trainable):
        return jax.tree.map(lambda old, new: new.astype(old.dtype), store, trainable)

    def kept(store, trainable):
        return store

    return stored(
        lambda store, trainable, step: jax.lax.cond(
            step % every_steps == 0, copied, kept, store, trainable
        ),
        dtype,
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
      dtype: of the copy that "initial" (all parameters trained) and "snapshot" keep. Where
        train.dtype is "bfloat16" or the base was loaded so, "bfloat16" gives the same bits for
        half the memory: the gains of norms, which alone are read in float32, stay float32.
      model: another model that teaches in its place, frozen: a source such as
        @PretrainedModel() or @FinishedRun(), with the student's tokenizer.
      reasons: @ReasonFirst() has it write an analysis before it scores; None scores at once.
    """

    weights: Annotated[str, ("initial", "live", "ema", "snapshot")] | Callable[[], Teacher] = (
        "initial"
    )
    ema_decay: Share = 0.999
    snapshot_every_steps: Count = 50
    dtype: Annotated[str, DTYPES] = "float32"
    model: LoadsModel | None = None
    reasons: ReasonFirst | None = None

    def __post_init__(self):
        require("teacher", self)
        if self.weights == "ema" and self.dtype != "float32":
            raise UserError(
                f"teacher.dtype = {self.dtype!r} rounds away what a step adds to an average: with "
                "teacher.weights = 'ema' it must be 'float32'"
            )

    def build(self) -> Teacher:
        if self.model is not None:
            return live()  # Keeps nothing; the external model stands in the state by itself.
        if callable(self.weights):
            return self.weights()
        return {
            "initial": lambda: initial(self.dtype),
            "live": live,
            "ema": lambda: ema(self.ema_decay),
            "snapshot": lambda: snapshot(self.snapshot_every_steps, self.dtype),
        }[self.weights]()
