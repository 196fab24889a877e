# SPDX-License-Identifier: Apache-2.0
"""How completions are sampled, as numbers: `RolloutConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any

from opsd_jax.errors import UserError
from opsd_jax.fields import Count, Natural, NotNegative, Positive, Share, check, require
from opsd_jax.model.config import DECODE_ATTENTION, DTYPES


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled.

    Args:
      max_new_tokens: C.
      temperature: 0 is greedy.
      top_k: entries kept, 0 = all.
      top_p: probability mass kept, 1 = all.
      min_p: least share of the largest probability, 0 = all are kept.
      repetition_penalty: divides the logits of tokens in prompt or completion, 1 = off.
      presence_penalty: taken off the logits of tokens in the completion, 0 = off.
      min_new_tokens: so many tokens come before a stop id, as in transformers.
      stop_ids: ids that end a completion, in a run besides the tokenizer's own; they are part of
        it.
      pad_id: written after the stop token.
      segment_len: tokens between two looks at whether rows are done; also those that wait in the
        buffer of new keys and values.
      unroll_layers: models of at most so many layers decode with unrolled layers, whose matrices
        are turned (`weights_first.py`) or, on GPUs, joined (`joined.py`): faster steps, for a
        second copy of the weights and a longer compilation. None: 4, and on GPUs all.
      gather_weights: on a mesh, every device along `data` holds all weights while it samples (its
        part along `model`); False fetches them again at every token and spares the memory.
      attention: how a new token attends to what was said, "xla" or "pallas", a kernel that reads
        of each row what is there, for TPUs (`decode_attention.py`) and for GPUs
        (`token_attention.py`; compiled for them, never run on one).
      merge_adapters: add adapters to the matrices once per rollout, rounded to their dtype, for
        fewer products per token; in bfloat16 what a small adapter adds is lost in rounding, and
        rollout/logp_gap says how much.
      dtype: of weights and computation while sampling, None = the model's; "bfloat16" under a
        float32 model makes rollout/logp_gap the price of speed.
      weights: None as they are, or "int8": while sampling, prompts included, every matrix is 8-bit
        with a scale per output (`quantized.py`), for a quarter of the bytes of float32; the loss
        never sees it, and rollout/logp_gap is its price. Not for a mixture of experts.
    """

    max_new_tokens: Count
    temperature: NotNegative = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0
    min_p: Share = 0.0
    repetition_penalty: Positive = 1.0
    presence_penalty: float = 0.0
    min_new_tokens: Natural = 0
    stop_ids: tuple[Natural, ...] = ()
    pad_id: Natural = 0
    segment_len: Count = 8
    unroll_layers: Natural | None = None
    gather_weights: bool = True
    attention: Annotated[str, DECODE_ATTENTION] = "xla"
    merge_adapters: bool = False
    dtype: Annotated[str, DTYPES] | None = None
    weights: Annotated[str, ("int8",)] | None = None

    def __post_init__(self):
        require("rollout", self)
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))  # Hashed by those who compile.
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"rollout.min_new_tokens must be at most rollout.max_new_tokens = "
                f"{self.max_new_tokens}, not {self.min_new_tokens}"
            )

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the distribution that is sampled is the model's own."""
        return self == self.sampling(max_new_tokens=self.max_new_tokens)

    @property
    def covers_vocabulary(self) -> bool:
        """Whether every token has a chance at every place: nothing greedy, filtered or barred."""
        filters = (self.top_k, 1 - self.top_p, self.min_p, self.min_new_tokens)
        return self.temperature > 0 and not any(filters)

    def check_ids(self, vocab_size: int) -> None:
        """Raises a UserError for a stop or pad id that the model cannot read."""
        inside = Annotated[int, ">= 0", f"< {vocab_size}"]
        check("rollout.stop_ids", self.stop_ids, tuple[inside, ...])  # type: ignore[valid-type]
        check("rollout.pad_id", self.pad_id, inside)

    def for_tokenizer(self, stop_ids: Iterable[int], pad_id: int) -> RolloutConfig:
        """The same with a tokenizer's stop ids besides its own, and its padding."""
        both = tuple(dict.fromkeys((*stop_ids, *self.stop_ids)))
        return dataclasses.replace(self, stop_ids=both, pad_id=pad_id)

    def sampling(self, **settings: Any) -> RolloutConfig:
        """Another way to sample with the same stop ids and numerics; what is not named is off."""
        shared = "stop_ids pad_id segment_len unroll_layers gather_weights attention"
        shared += " merge_adapters dtype weights"
        return RolloutConfig(**settings, **{name: getattr(self, name) for name in shared.split()})
