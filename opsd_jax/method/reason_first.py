# SPDX-License-Identifier: Apache-2.0
"""The teacher writes an analysis before it scores, and reads it as a part of its context.

    [prompt | analysis | transition | completion]

The prompt asks for the analysis (`contexts.analysis`), the transition leads over to the solution
(`contexts.transition`). All stands in one turn of the teacher's, so the token that would end the
analysis is left out. Tokens are constants: no gradient passes through them.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from opsd_jax.fields import Count, Natural, NotNegative, require
from opsd_jax.method.batch import Batch, Policy
from opsd_jax.method.scoring import join
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion, Context
from opsd_jax.sampling.rollout import rollout


@dataclasses.dataclass(frozen=True)
class ReasonFirst:
    """How the analysis is sampled; filters that are not named here are off.

    Args:
      max_new_tokens: the longest analysis, its stop token included; a longer one is cut, and
        counted in analysis/truncated_fraction.
      temperature: 0 is greedy.
      top_k: entries kept, 0 = all.
      top_p: probability mass kept, 1 = all.
    """

    max_new_tokens: Count = 512
    temperature: NotNegative = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0

    def __post_init__(self):
        require("ReasonFirst", self)

    def build(self, rollout: RolloutConfig, transition_ids: list[int]) -> Reasoner:
        """With the stop ids and the numerics of the run's rollouts."""
        return Reasoner(rollout.sampling(**dataclasses.asdict(self)), tuple(transition_ids))


@dataclasses.dataclass(frozen=True)
class Reasoner:
    """Writes analyses and joins them to the teacher's prompts.

    Args:
      settings: how they are sampled, C of which is the longest.
      transition_ids: what stands behind every one, [T].
    """

    settings: RolloutConfig
    transition_ids: tuple[int, ...]

    def write(self, teacher: Policy, prompts: Context, key: jax.Array) -> Completion:
        """One analysis per row, whose draws depend on the key and the row alone."""
        ids, lengths = prompts.ids, prompts.lengths
        return rollout(*teacher, ids, lengths, key, self.settings, prompts.copies)

    def join(self, batch: Batch, analysis: Completion | None) -> Batch:
        """The batch with all that the teacher reads before it scores, [B, Q + C + T] ids."""
        if analysis is None:
            raise ValueError("a completion without analysis: it was sampled by another method")
        prompts = batch.teacher
        # The last token of a row that stopped is its stop token.
        lengths = prompts.lengths + jnp.sum(analysis.mask, axis=1) - analysis.stopped
        read = Context(join(prompts, analysis.ids), lengths)
        bridge = jnp.array(self.transition_ids, jnp.int32)
        ids = join(read, jnp.broadcast_to(bridge, (len(lengths), len(bridge))))
        lengths = lengths + len(bridge)
        inside = jnp.arange(ids.shape[1]) < lengths[:, None]
        ids = jnp.where(inside, ids, self.settings.pad_id)
        return dataclasses.replace(batch, teacher=Context(ids, lengths))


def analysis_metrics(analysis: Completion) -> dict[str, jax.Array]:
    """Tokens written, stop tokens included, and the share of analyses cut by the limit."""
    lengths = jnp.sum(analysis.mask, axis=1)
    return {
        "analysis/tokens": jnp.sum(lengths),
        "analysis/length_mean": jnp.mean(lengths.astype(jnp.float32)),
        "analysis/truncated_fraction": jnp.mean(~analysis.stopped, dtype=jnp.float32),
    }
