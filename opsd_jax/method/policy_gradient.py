# SPDX-License-Identifier: Apache-2.0
"""Learning from rewards: GRPO and its relatives, and mixtures with distillation.

    A      = r − mean of the group        (/ (its standard deviation + 1e-4))
    ratio  = exp(log pS(y) − log p_old(y))
    ℓ      = −min(ratio · A, clip(ratio, 1 − low, 1 + high) · A) + kl_weight · k3
    k3     = exp(d) − d − 1  with  d = log p_initial(y) − log pS(y)

k3 is the non-negative one-sample estimate of KL(student || initial) of GRPO (arXiv 2402.03300).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from opsd_jax.fields import NotNegative, Positive, require
from opsd_jax.method.batch import Batch
from opsd_jax.method.objective import (
    Distillation,
    Loss,
    Reader,
    masked_sums,
    mean_weights,
    student_sums,
    weighted_sum,
)
from opsd_jax.sampling.prompts import Completion

STD_EPSILON = 1e-4  # TRL's; a group whose rewards are all equal has advantage 0 either way.


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """GRPO (arXiv 2402.03300); the switches of Dr. GRPO (2503.20783) and DAPO (2503.14476).

    Log-probabilities are at temperature 1, so rollouts must be sampled there, unfiltered.

    Args:
      clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high]. p_old is what the
        sampler computed: with one update per rollout the ratio is 1 up to rounding where rollouts
        are computed as the loss is (rollout/logp_gap), and corrects for the sampler, clip and all,
        where they are in bfloat16 or 8 bits.
      baseline: subtracted from the rewards: the mean of the "group" of a problem's rollouts
        (`train.group_size`) or of the "batch".
      normalize_std: divide by the standard deviation over the same rollouts (GRPO); Dr. GRPO
        does not.
      mean: "sequence" (GRPO), "token" (DAPO) or "constant" (Dr. GRPO).
      kl_weight: of the k3 estimate of KL(student || initial policy); needs
        `teacher.weights = "initial"`.
      drop_zero_variance: leave rows out whose group has equal rewards, from both sides of the
        mean (DAPO without its resampling: such a step has fewer rows).
      drop_truncated: leave rows out that ran into the length limit.
    """

    clip_low: Annotated[float, "> 0", "<= 1"] = 0.2
    clip_high: Positive = 0.2
    baseline: Annotated[str, ("group", "batch")] = "group"
    normalize_std: bool = True
    mean: Annotated[str, ("sequence", "token", "constant")] = "sequence"
    kl_weight: NotNegative = 0.0
    drop_zero_variance: bool = False
    drop_truncated: bool = False

    needs_rewards = True

    def __post_init__(self):
        require("PolicyGradient", self)

    def plan(
        self, batch: Batch, completion: Completion, rewards: jax.Array, group_size: int
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Advantages and weights of the rows, and how many groups teach nothing."""
        size = rewards.shape[0] if self.baseline == "batch" else group_size
        advantages, flat = group_advantages(rewards, size, self.normalize_std)
        keep = ~flat if self.drop_zero_variance else jnp.ones_like(flat)
        if self.drop_truncated:
            keep &= completion.stopped
        weights = mean_weights(completion.mask & keep[:, None], self.mean)
        metrics = {
            "reward/std": jnp.std(rewards),
            "reward/zero_variance_fraction": jnp.mean(flat, dtype=jnp.float32),
        }
        return {"weights": weights, "advantages": advantages}, metrics

    def __call__(self, reader: Reader, plan: dict[str, jax.Array]) -> Loss:
        completion = reader.completion
        logps, entropy = reader.student_logps
        values, clipped = clipped_surrogate(
            logps, completion.logps, plan["advantages"][:, None], self.clip_low, self.clip_high
        )
        per_token = {"policy/clip_fraction": clipped}
        if self.kl_weight:
            kl = k3(logps, reader.initial_logps)
            values += self.kl_weight * kl
            per_token["policy/kl_initial"] = jax.lax.stop_gradient(kl)
        sums = masked_sums(per_token, completion.mask)
        sums |= student_sums(logps, entropy, completion.logps, completion.mask)
        return Loss(weighted_sum(values, plan["weights"]), sums)


@dataclasses.dataclass(frozen=True)
class RewardMix:
    """distillation_weight · divergence + reward_weight · policy gradient, row by row.

    Both terms are means over the whole batch, also where rows are routed: a batch of mostly
    right rollouts is mostly reinforced.

    Args:
      distillation_weight, reward_weight: a and b.
      route: "all" gives every row both terms; "by_reward" distils wrong rollouts (reward below
        1/2) and reinforces right ones (SRPO's routing, arXiv 2604.02288).
      policy_gradient: settings of the second term.
    """

    distillation_weight: NotNegative = 1.0
    reward_weight: NotNegative = 1.0
    route: Annotated[str, ("all", "by_reward")] = "all"
    policy_gradient: PolicyGradient = PolicyGradient()

    needs_rewards = True

    def __post_init__(self):
        require("RewardMix", self)

    def plan(
        self, batch: Batch, completion: Completion, rewards: jax.Array, group_size: int
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The plan of the policy gradient, and the weights of the divergence."""
        rows, metrics = self.policy_gradient.plan(batch, completion, rewards, group_size)
        right = rewards >= 0.5
        distil = self.distillation_weight * mean_weights(batch.in_context(completion.mask), "token")
        reward = self.reward_weight * rows["weights"]
        if self.route == "by_reward":
            distil = jnp.where(right[:, None], 0.0, distil)
            reward = jnp.where(right[:, None], reward, 0.0)
        return rows | {"weights": reward, "distillation_weights": distil}, metrics

    def __call__(self, reader: Reader, plan: dict[str, jax.Array]) -> Loss:
        reward = self.policy_gradient(reader, plan)
        distilled = Distillation()(reader, {"weights": plan["distillation_weights"]})
        return Loss(
            reward.value + distilled.value, reward.sums, distilled.rows, distilled.context_sums
        )


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


def k3(logps: jax.Array, initial_logps: jax.Array) -> jax.Array:
    """exp(d) − d − 1 with d = log p_initial − log pS: estimates KL(student || initial)."""
    difference = initial_logps - logps
    return jnp.exp(difference) - difference - 1.0
