# SPDX-License-Identifier: Apache-2.0
"""Random keys of a run: every use of randomness has its own number, so that no two share a key."""

from __future__ import annotations

import enum

import jax


class Use(enum.IntEnum):
    """What a draw decides. The numbers are part of a run's results: add, and never reuse one.

    They are larger than any step, row or position, which are folded into keys as well.
    """

    PARAMETERS = 2**31
    ADAPTERS = 2**31 + 1
    COMPLETIONS = 2**31 + 2
    ANALYSES = 2**31 + 3
    DROPOUT = 2**31 + 4
    EVALUATION = 2**31 + 5
    SHOWN = 2**31 + 6  # by `opsd generate` and `opsd tokens`


def key_for(use: Use, key: jax.Array, *numbers: int | jax.Array) -> jax.Array:
    """fold_in(… fold_in(fold_in(key, use), numbers[0]) …), the key of one use of a run.

    Args:
      use: what is drawn.
      key: typed PRNG key of the run, `jax.random.key(seed)`.
      *numbers: further scalars such as the step.
    """
    key = jax.random.fold_in(key, int(use))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
