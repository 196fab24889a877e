# SPDX-License-Identifier: Apache-2.0
"""What notebooks and scripts call first: `load_model` and `forward`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opsd_jax.errors import UserError
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.pretrained.load import load_pretrained


def load_model(path: str, dtype: str = "float32", mesh: Mesh | None = None) -> tuple[Decoder, dict]:
    """Reads a model: `model, variables = load_model(path)`.

    Args:
      path: a Hugging Face directory, a GGUF file, `owner/name[@revision]` on the Hub, or "smollm2"
        (the latter two are fetched once).
      dtype: of parameters and computation, "float32" or "bfloat16".
      mesh: where the parameters are laid out; None is the default device.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    found = load_pretrained(path, dtype, mesh)
    return found.model, {"params": found.params}


def forward(
    model: Decoder, variables: dict, ids: jax.Array, lengths: jax.Array | None = None
) -> jax.Array:
    """Next-token logits of right-padded rows, [B, T, V] float32.

    Args:
      model: the decoder.
      variables: {"params"[, "lora"]}.
      ids: [B, T] int32.
      lengths: [B] int32, or None when every row is full; logits beyond a row's length are 0.

    Raises:
      UserError: ids that are no rows of one length, or that the model has not; where they are
        known, which inside jit they are not.
    """
    ids = jnp.asarray(_checked(ids, model.config.vocab_size), jnp.int32)
    if lengths is None:
        lengths = jnp.full(ids.shape[0], ids.shape[1], jnp.int32)
    return _forward(model, variables, ids, jnp.asarray(lengths))


def _checked(ids: Any, vocab_size: int) -> Any:
    """The ids, which an embedding would take whatever they are."""
    if isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True):
        return ids
    try:
        found = np.asarray(ids)
    except ValueError:  # rows of several lengths
        found = np.zeros(0)
    if found.ndim != 2 or found.dtype.kind not in "iu":
        raise UserError(
            "forward: ids must be whole numbers in rows of one length, [B, T]: pad them on the "
            "right, with any id, and give lengths"
        )
    if found.size and not 0 <= found.min() <= found.max() < vocab_size:
        wrong = found.min() if found.min() < 0 else found.max()
        raise UserError(
            f"forward: ids has {wrong}, and the model's ids are 0 to {vocab_size - 1:,}: take "
            "those of its own tokenizer"
        )
    return ids


@partial(jax.jit, static_argnums=0)
def _forward(model: Decoder, variables: dict, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = model.apply(variables, ids, positions)
    logits = head_logits(output_head(variables["params"], model.config), hidden)
    return jnp.where((positions < lengths[:, None])[..., None], logits, 0.0)
