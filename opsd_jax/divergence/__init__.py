# SPDX-License-Identifier: Apache-2.0
"""The loss of a token: the public names."""

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
