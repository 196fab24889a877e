# SPDX-License-Identifier: Apache-2.0
"""`Context` and `Completion`: the prompts of a batch and what was said to them."""

from __future__ import annotations

import flax
import jax
import numpy as np


def pad(rows: list[list[int]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, width] int32 and lengths [B] int32."""
    ids = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, np.array([len(row) for row in rows], np.int32)


def one_of_each(x: jax.Array, copies: int) -> jax.Array:
    """[B / copies, ...], of each group of adjacent rows the first.

    By a reshape, which leaves every device its own groups, as strided slices would not.
    """
    return x.reshape(-1, copies, *x.shape[1:])[:, 0]


@flax.struct.dataclass
class Context:
    """Prompts of a batch, padded on the right.

    ids: [B, P] int32; lengths: [B] int32, >= 1; copies: G, where each G rows in a row are one
    prompt, which a rollout then reads once.
    """

    ids: jax.Array
    lengths: jax.Array
    copies: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class Completion:
    """What was sampled.

    ids: [B, C] int32, padded after the stop token; mask: [B, C] bool, True for every sampled
    token including the stop token; logps: [B, C] float32, log-probability of each id under the
    model itself (temperature 1, nothing truncated), 0 where masked; sampled_logps: [B, C]
    float32, the same under the distribution that was sampled from (0 when greedy); stopped: [B]
    bool, False for a row that ran into the length limit; analysis: what the teacher has written
    before it reads this, where it does (`reason_first.py`).
    """

    ids: jax.Array
    mask: jax.Array
    logps: jax.Array
    stopped: jax.Array
    sampled_logps: jax.Array | None = None
    analysis: Completion | None = None
