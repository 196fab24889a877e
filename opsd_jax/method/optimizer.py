# SPDX-License-Identifier: Apache-2.0
"""The optax chain: clip by global norm, Adam(W), a schedule."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import optax
from jax.sharding import Mesh

from opsd_jax.errors import UserError
from opsd_jax.fields import Natural, NotNegative, Positive, check, require
from opsd_jax.model.config import DTYPES
from opsd_jax.model.sharding import replicated


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule (arXiv 1711.05101).

    Args:
      warmup_steps: linear from 0; the first step already moves (step 1 of `warmup_steps`).
      schedule: after the warm-up "constant", "linear" to 0 or "cosine" to 0.
      decay_steps: steps until "linear" or "cosine" reaches 0, warm-up included.
      b1, b2, eps, weight_decay: of AdamW.
      mu_dtype: of the first moment, as it is kept; "bfloat16" halves it. The second is float32: at
        b2 = .999 what a step adds to it is less than the last bit of a bfloat16.
      max_grad_norm: global norm above which gradients are scaled down; 0 = never.
    """

    warmup_steps: Natural = 0
    schedule: Annotated[str, ("constant", "linear", "cosine")] = "constant"
    decay_steps: Natural = 0
    b1: Annotated[float, ">= 0", "< 1"] = 0.9
    b2: Annotated[float, ">= 0", "< 1"] = 0.999
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    mu_dtype: Annotated[str, DTYPES] = "float32"
    max_grad_norm: NotNegative = 1.0

    def __post_init__(self):
        require("optimizer", self)
        if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"optimizer.decay_steps = {self.decay_steps} must exceed optimizer.warmup_steps "
                f"= {self.warmup_steps} when optimizer.schedule is {self.schedule!r}"
            )


def learning_rate_schedule(config: OptimizerConfig, peak: float) -> optax.Schedule:
    """Learning rate by number of finished steps."""
    rest = {
        "constant": lambda n: optax.constant_schedule(peak),
        "linear": lambda n: optax.linear_schedule(peak, 0.0, n),
        "cosine": lambda n: optax.cosine_decay_schedule(peak, n),
    }[config.schedule](config.decay_steps - config.warmup_steps)
    if not config.warmup_steps:
        return rest
    # From peak / warmup, so that no step is wasted at a learning rate of zero.
    warmup = optax.linear_schedule(
        peak / config.warmup_steps, peak, max(1, config.warmup_steps - 1)
    )
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, learning_rate: float, num_updates: int = 1
) -> optax.GradientTransformation:
    """Clip, then AdamW, whose second moment is float32 as the parameters are.

    Args:
      config: of AdamW and its schedule.
      learning_rate: peak of the schedule.
      num_updates: passes that make one step of the schedule, which optax would count one by one.
    """
    check("train.learning_rate", learning_rate, Positive)
    schedule = learning_rate_schedule(config, learning_rate)
    adamw = optax.adamw(
        lambda passes: schedule(passes // num_updates),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.mu_dtype,
    )
    if not config.max_grad_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def optimizer_shardings(
    optimizer: optax.GradientTransformation, opt_state: Any, trainable: Any, mesh: Mesh
) -> Any:
    """Moments live with their parameters; counters are replicated.

    Args:
      optimizer: the transformation that made `opt_state`.
      opt_state: its (abstract) state.
      trainable: the shardings of the trained parameters.
      mesh: the mesh.
    """
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        opt_state,
        trainable,
        transform_non_params=lambda _: replicated(mesh),
    )
