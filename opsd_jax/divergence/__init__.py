# SPDX-License-Identifier: Apache-2.0
"""The loss of a token: divergences between student and teacher, from logits or hidden states.

In reading order: config.py (`DivergenceConfig`), losses.py (the public functions, dense), terms.py
(the divergences entry by entry, and the clips), support.py (top-k supports), rows.py (rows of
logits to numbers and closed-form gradients), vocabulary.py (sums over a vocabulary split over
devices), fused.py (the same without logits in memory), likelihood.py (log-probabilities of given
tokens), token_weights.py and targets.py (functions to plug in).
"""

from opsd_jax.divergence.losses import (
    DivergenceConfig,
    TokenDivergence,
    forward_kl,
    fused,
    jensen_shannon,
    logit_divergence,
    reverse_kl,
    sampled_token,
    token_divergence,
)

__all__ = [
    "DivergenceConfig",
    "TokenDivergence",
    "forward_kl",
    "fused",
    "jensen_shannon",
    "logit_divergence",
    "reverse_kl",
    "sampled_token",
    "token_divergence",
]
