# SPDX-License-Identifier: Apache-2.0
"""Learning from rewards: GRPO and its relatives, a term of a mix or alone.

    A      = r − mean of the group        (/ (its standard deviation + 1e-4))
    ratio  = exp(log pS(y) − log p_old(y))
    ℓ      = −min(ratio · A, clip(ratio, 1 − low, 1 + high) · A)

A may be another one for each token (`advantage_shapes.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from opsd_jax.divergence.losses import per_token
from opsd_jax.fields import Positive
from opsd_jax.method.mix import Plan, Term
from opsd_jax.method.objective import Loss, Reader, masked_sums, student_sums
from opsd_jax.method.rows import MEANS, GradedBatch, weighted_sum
from opsd_jax.method.token_view import Function, Tokens, weighed

STD_EPSILON = 1e-4  # TRL's; a group whose rewards are all equal has advantage 0 either way.


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Term):
    """GRPO (arXiv 2402.03300); the switches of Dr. GRPO (2503.20783) and DAPO (2503.14476).

    Both sides of the ratio are of the distribution that was sampled, temperature and filters
    included. Where the student of now gives an id no chance any more, the ratio is 0: the token
    teaches nothing, and policy/outside_support counts it.

    Args:
      clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high]. p_old is what the
        sampler computed: with one update per rollout the ratio is 1 up to rounding where rollouts
        are computed as the loss is (rollout/logp_gap), and corrects for the sampler, clip and all,
        where they are in bfloat16 or 8 bits.
      baseline: subtracted from the rewards: the mean of the "group" of a problem's rollouts
        (`train.group_size`) or of the "batch".
      normalize_std: divide by the standard deviation over the same rollouts (GRPO); Dr. GRPO
        does not.
      shape: a function (tokens: Tokens, mask) -> [B, C] that gives each token's advantage in rows
        with a teacher context; the others keep the row's. None: the row's everywhere.
      mean: "sequence" (GRPO), "token" (DAPO) or "constant" (Dr. GRPO).
      rows: ("varied", "complete") leaves out groups whose rewards are all equal, and truncated
        rows (DAPO without its resampling: such a step has fewer rows).
    """

    clip_low: Annotated[float, "> 0", "<= 1"] = 0.2
    clip_high: Positive = 0.2
    baseline: Annotated[str, ("group", "batch")] = "group"
    normalize_std: bool = True
    shape: Function | None = None
    mean: Annotated[str, MEANS] = dataclasses.field(default="sequence", kw_only=True)

    needs_rewards = True

    @property
    def reads_teacher(self) -> bool:
        return bool(self.weights or self.shape)

    def plan(self, step: GradedBatch) -> tuple[Plan, dict[str, jax.Array]]:
        """Advantages and weights of the rows, and how many groups teach nothing."""
        rewards, mask = step.rewards, step.completion.mask
        size = rewards.shape[0] if self.baseline == "batch" else step.group_size
        advantages, flat = group_advantages(rewards, size, self.normalize_std)
        weights = self.mean_weights(step, mask, with_context=bool(self.weights))
        metrics = self.share_of_rows(step) | {
            "reward/std": jnp.std(rewards),
            "reward/zero_variance_fraction": jnp.mean(flat, dtype=jnp.float32),
        }
        if step.group_size > 1:
            groups = rewards.reshape(-1, step.group_size)
            metrics["reward/group_std"] = jnp.mean(jnp.std(groups, axis=1, ddof=1))
        return {"weights": weights, "advantages": advantages, "rewards": rewards}, metrics

    def __call__(self, reader: Reader, plan: Plan) -> Loss:
        completion, tokens = reader.completion, Tokens(reader, plan)
        advantages = plan["advantages"][:, None]
        if self.shape is not None:
            shaped = per_token("PolicyGradient.shape", self.shape, tokens, tokens.mask)
            advantages = jnp.where(tokens.mask, shaped, advantages)
        now, old = reader.sampled_logps
        values, clipped = clipped_surrogate(now, old, advantages, self.clip_low, self.clip_high)
        values, weight_sums = weighed(values, self.weights, tokens)
        per_id = {
            "policy/clip_fraction": clipped,
            "policy/outside_support": now == -jnp.inf,
            "policy/advantage_size": jnp.abs(advantages),
        }
        logps, entropy = reader.student_logps
        sums = masked_sums(per_id, completion.mask)
        sums |= student_sums(logps, entropy, completion.logps, completion.mask)
        context_sums = tokens.sums_of_teacher() | weight_sums
        return Loss(weighted_sum(values, plan["weights"]), sums, context_sums=context_sums)


def group_advantages(
    rewards: jax.Array, group_size: int, normalize_std: bool
) -> tuple[jax.Array, jax.Array]:
    """Rewards against the mean of their group.

    Args:
      rewards: [B], rows of a group adjacent.
      group_size: G.
      normalize_std: divide by the group's standard deviation (that of a sample, G - 1) + 1e-4.

    Returns:
      Advantages [B], and [B] bool: the group's rewards are all equal.
    """
    groups = rewards.astype(jnp.float32).reshape(-1, group_size)
    advantages = groups - jnp.mean(groups, axis=1, keepdims=True)
    flat = jnp.max(groups, axis=1, keepdims=True) == jnp.min(groups, axis=1, keepdims=True)
    if normalize_std:
        advantages /= jnp.std(groups, axis=1, keepdims=True, ddof=1) + STD_EPSILON
    # Exact zeros, and no NaN: a group of one has no deviation.
    advantages = jnp.where(flat, 0.0, advantages)
    return advantages.reshape(-1), jnp.broadcast_to(flat, groups.shape).reshape(-1)


def clipped_surrogate(
    logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's loss per token (arXiv 1707.06347), and where its clip stopped the gradient."""
    ratio = jnp.exp(logps - jax.lax.stop_gradient(old_logps))
    values = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantages)
    clipped = ((ratio < 1.0 - low) & (advantages < 0)) | ((ratio > 1.0 + high) & (advantages > 0))
    return values, clipped
