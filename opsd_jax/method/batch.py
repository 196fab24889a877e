# SPDX-License-Identifier: Apache-2.0
"""What both roles are shown, and who they are."""

from __future__ import annotations

from typing import NamedTuple

import flax

from opsd_jax.model.decoder import Decoder
from opsd_jax.sampling.prompts import Context


@flax.struct.dataclass
class Batch:
    """One batch of problems as the two roles see them: [B, P] and [B, Q] prompts.

    reference: [B, C] the data's own completions, stop token included, where a method reads them.
    """

    student: Context
    teacher: Context
    reference: Context | None = None


class Policy(NamedTuple):
    """A decoder with its variables."""

    model: Decoder
    variables: dict
