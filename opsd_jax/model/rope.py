# SPDX-License-Identifier: Apache-2.0
"""Rotary position frequencies and the published ways of stretching them to longer contexts."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import numpy as np

from opsd_jax.errors import UserError
from opsd_jax.fields import Natural, Positive, require


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotation slows down so that a model reads further than it was trained.

    Args:
      kind: "linear" (all frequencies / factor), "llama3" (only wavelengths beyond the trained
        length, with a smooth step between `low_freq_factor` and `high_freq_factor`) or "yarn"
        (arXiv 2309.00071; a ramp between `beta_fast` and `beta_slow` rotations).
      factor: how much longer the context becomes.
      original_length: context length of the pretraining; llama3 and yarn.
      attention_factor: yarn's multiplier on rotated queries and keys; None is its default,
        0.1 ln(factor) + 1.
      truncate: yarn rounds the ends of its ramp to whole dimensions.
    """

    kind: Annotated[str, ("linear", "llama3", "yarn")]
    factor: Positive
    original_length: Natural = 0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    truncate: bool = True

    def __post_init__(self):
        require("rope_scaling", self)
        if self.kind != "linear" and self.original_length < 1:
            raise UserError(f"rope scaling {self.kind!r} needs original_max_position_embeddings")


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
    """theta^(-2i/H) for i < H/2, stretched as `scaling` says.

    In float32 and in this order of operations, because the references do so and a relative
    error of 1e-7 is already visible at position 10,000.

    Args:
      head_dim: H.
      theta: base of the frequencies.
      scaling: None leaves them as trained.

    Returns:
      frequencies [H/2] float32, and the factor on rotated queries and keys.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1.0) / np.float32(theta) ** exponents
    if scaling is None:
        return frequency, 1.0
    slow = frequency / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow, 1.0
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = np.float32(scaling.original_length) * frequency / np.float32(2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
        return (1 - keep) * slow + keep * frequency, 1.0

    def dimension(rotations: float) -> float:
        wavelength = scaling.original_length / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    span = (last - first) or 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - first) / span, 0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return (slow * ramp + frequency * (1 - ramp)).astype(np.float32), factor
