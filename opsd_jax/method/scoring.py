# SPDX-License-Identifier: Apache-2.0
"""Scoring: the hidden states that predict each token of a completion under any context.

Layout: a row is `[prompt | completion | pad]` without a gap, so positions are an arange, causal
attention needs no padding mask, and flash kernels may skip the tail. The rows that predict the
completion start at the last prompt token, at each context's own offset `length - 1`. Rows of one
prompt are scored together, `[prompt | completion | … | completion]` (`model/branches.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opsd_jax.model.branches import Branches
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import placed, texts_split, whole_groups
from opsd_jax.sampling.prompts import Completion, Context, one_of_each


def join(context: Context, completion_ids: jax.Array) -> jax.Array:
    """Rows `[prompt | completion | pad]`, [B, P + C]; what follows the completion is arbitrary.

    Args:
      context: prompts [B, P] with lengths [B].
      completion_ids: [B, C] int32.
    """
    P, C = context.ids.shape[1], completion_ids.shape[1]
    t = jnp.arange(P + C)
    length = context.lengths[:, None]
    source = jnp.where(t < length, t, jnp.minimum(t - length + P, P + C - 1))
    both = jnp.concatenate([context.ids, completion_ids], axis=1)
    return jnp.take_along_axis(both, source, axis=1)


def scored_ids(
    context: Context, completion: Completion, vocab_size: int, multiple_of: int = 1
) -> jax.Array:
    """Rows `[prompt | completion | filling]`, [B, P + C], filled with ids that all differ.

    No token sees what follows it, so the filling changes nothing. With one id there, most updates
    of the embedding's gradient, a scatter-add, would hit one row: on NVIDIA GPUs such a
    scatter may run 450 to 2,000 times slower (openxla/xla issue 46225).

    Args:
      context: prompts [B, P].
      completion: [B, C]; its mask is True on a prefix of each row.
      vocab_size: V; the filling repeats after V positions.
      multiple_of: what P + C is made a multiple of.
    """
    ids = join(context, completion.ids)
    ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % multiple_of)))
    ends = context.lengths + jnp.sum(completion.mask, axis=1)
    return filled(ids, jnp.arange(ids.shape[1]) < ends[:, None], vocab_size)


def filled(ids: jax.Array, read: jax.Array, vocab_size: int) -> jax.Array:
    """[B, T] ids, with others where nobody reads them."""
    filling = jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape) % vocab_size
    return jnp.where(read, ids, filling)


def hidden_of_each(
    model: Decoder,
    variables: dict,
    contexts: tuple[Context, ...],
    completion: Completion,
    after: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """`completion_hidden` in each of K contexts, one after the other.

    The memory of one pass is free before the next one begins, so K contexts cost the peak of the
    widest and K [B, C, D] results.

    Args:
      model, variables, completion: of the role that reads.
      contexts: K of them, of any widths.
      after: what must be there before the first begins.
    """
    found: tuple[jax.Array, ...] = ()
    for context in contexts:
        if after is not None:
            # Nothing else keeps a compiler from running independent passes side by side.
            context, _ = jax.lax.optimization_barrier((context, after))
        after = completion_hidden(model, variables, context, completion)
        found += (after,)
    return found


def completion_hidden(
    model: Decoder,
    variables: dict,
    context: Context,
    completion: Completion,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Hidden states whose logits predict the completion: row t predicts completion.ids[:, t].

    Args:
      model: the decoder.
      variables: {"params"[, "lora"]} of the role that reads.
      context: that role's prompts; one of several copies is read once for all of them.
      completion: [B, C] ids, the same for every role.
      dropout_key: for the adapters' dropout; None turns it off.

    Returns:
      [B, C, D] in the compute dtype.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    with texts_split() as num_parts:
        copies = whole_groups(len(context.lengths), context.copies)
        if copies > 1 and num_parts == 1:
            return _of_groups(model, variables, context, copies, completion, rngs)
        ids = scored_ids(context, completion, model.config.vocab_size, num_parts)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden, _ = model.apply(variables, ids, positions, rngs=rngs)
        rows = context.lengths[:, None] - 1 + jnp.arange(completion.ids.shape[1])
        hidden = jnp.take_along_axis(hidden, rows[:, :, None], axis=1)
        return placed(hidden, "batch", "length", None) if num_parts > 1 else hidden


def _of_groups(
    model: Decoder,
    variables: dict,
    context: Context,
    copies: int,
    completion: Completion,
    rngs: dict | None,
) -> jax.Array:
    """`completion_hidden` of rows that have their prompt in common with the next `copies - 1`."""
    prompts, lengths = (one_of_each(x, copies) for x in (context.ids, context.lengths))
    B, P = prompts.shape
    C = completion.ids.shape[1]
    ids = jnp.concatenate([prompts, completion.ids.reshape(B, -1)], axis=1)
    asked = jnp.arange(P) < lengths[:, None]
    read = jnp.concatenate([asked, completion.mask.reshape(B, -1)], axis=1)
    branches = Branches(lengths, P, copies)
    hidden, _ = model.apply(
        variables,
        filled(ids, read, model.config.vocab_size),
        branches.positions(ids.shape[1]),
        branches=branches,
        rngs=rngs,
    )
    first = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    first = jnp.repeat(first, copies, axis=0)
    later = hidden[:, P:].reshape(B * copies, C, -1)[:, : C - 1]
    return jnp.concatenate([first, later], axis=1)
