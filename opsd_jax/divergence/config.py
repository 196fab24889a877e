# SPDX-License-Identifier: Apache-2.0
"""Which divergence the loss is: `DivergenceConfig`, frozen and validated."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax

from opsd_jax.errors import UserError
from opsd_jax.fields import Count, Positive, require

DIVERGENCES = ("forward_kl", "reverse_kl", "mixed_kl", "jensen_shannon", "sampled_token")
USE_BETA = ("mixed_kl", "jensen_shannon")
CLIPS = ("none", "entry", "token", "rescale")
SUPPORTS = ("full", "teacher_top_k", "student_top_k", "union_top_k")
COMPLETIONS = ("renormalise", "tail", "truncate")
IMPLEMENTATIONS = ("dense", "fused")

Terms = Callable[[jax.Array, jax.Array], jax.Array]
Weight = Callable[[Any, jax.Array], jax.Array]
Target = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """The per-token loss, as one value per choice.

    Args:
      name: "forward_kl" KL(teacher || student), "reverse_kl" KL(student || teacher), "mixed_kl"
        beta times the first + (1 - beta) times the second, "jensen_shannon", "sampled_token"
        (policy gradient on the sampled ids, each weighted by its importance: unbiased for
        whatever samples without a filter), or a function
        (student_logps, teacher_logps) -> per-entry terms, all [..., K], that is summed over K.
      beta: weight of the teacher in the Jensen-Shannon mixture, or of the forward KL in the mixed
        one; only read by these names.
      clip: "none"; "entry" min(term, threshold) before the sum (the official recipe);
        "token" min(sum, threshold); "rescale" the sum times min(1, threshold / sum).
      clip_threshold: nats; only read when there is a clip.
      temperature: both sides' logits are divided by it; there is no T^2 factor.
      teacher_temperature: of the teacher's logits instead, before a target is made of several;
        None is the student's.
      importance_clip: c of a weight sg[min(pS(y) / q(y), c)] on every token y, for completions
        of a filtered, 8-bit or older sampler q: q(y) is the probability under the very
        distribution that was sampled (`Completion.sampled_logps`), pS(y) at `temperature`. The
        weight of "sampled_token", which it always has, is bounded by it. None: no weight, and no
        bound on that of "sampled_token".
      support: entries that the loss sees: all, or the top k of the teacher, of the student,
        or of either.
      top_k: k of the truncated supports.
      completion: what a truncated support does with the rest: "renormalise" it away, keep it
        as one "tail" entry, or "truncate" (plain partial sum: not a divergence, can be
        negative, and its gradient at student = teacher is not zero).
      weights: functions (tokens: TokenDivergence, mask) -> [B, C] whose product multiplies the
        objective, constant for differentiation (`token_weights.py`).
      target: makes one target out of several teachers (`targets.py`): in a run, of the teacher
        in each of its views, or where it has one, there and in the student's context; None is
        the first alone.
      implementation: "dense" holds [B, C, V] logits; "fused" never does.
      token_block: rows of logits alive at a time in the fused implementation; None takes 128
        on a CPU and 1024 on an accelerator, which needs tall blocks to be busy.
      vocab_block: vocabulary rows of the head that gradients are pulled through at a time there;
        None takes 4096 on a CPU and 16384 on an accelerator.
    """

    name: Annotated[str, DIVERGENCES] | Terms = "forward_kl"
    beta: float = 0.5
    clip: Annotated[str, CLIPS] = "none"
    clip_threshold: Positive = 0.05
    temperature: Positive = 1.0
    teacher_temperature: Positive | None = None
    importance_clip: Positive | None = None
    support: Annotated[str, SUPPORTS] = "full"
    top_k: Count = 50
    completion: Annotated[str, COMPLETIONS] = "renormalise"
    weights: tuple[Weight, ...] = ()
    target: Target | None = None
    implementation: Annotated[str, IMPLEMENTATIONS] = "dense"
    token_block: Count | None = None
    vocab_block: Count | None = None

    @property
    def weighs_importance(self) -> bool:
        """Whether the loss asks with which probability a token was sampled."""
        return self.name == "sampled_token" or self.importance_clip is not None

    def rows_of_logits(self, on_cpu: bool) -> int:
        """`token_block`, or its default."""
        return self.token_block or (128 if on_cpu else 1024)

    def __post_init__(self):
        require("divergence", self)
        if not 0 < self.beta < 1:
            raise UserError(
                f"divergence.beta must be strictly between 0 and 1, not {self.beta}: the "
                "Jensen-Shannon divergence vanishes at both ends, and the two KL directions have "
                "names of their own, 'forward_kl' and 'reverse_kl'"
            )
        # A list, as gin may give it, would make the configuration unhashable.
        object.__setattr__(self, "weights", tuple(self.weights))
        if self.name == "sampled_token" and (self.clip, self.support) != ("none", "full"):
            raise UserError(
                "divergence.name 'sampled_token' is a policy gradient on one sampled entry: "
                "set divergence.clip to 'none' and divergence.support to 'full'"
            )
