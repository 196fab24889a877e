# SPDX-License-Identifier: Apache-2.0
"""Rollout: completions by a prefill and segments of `lax.scan`, inside the jitted step.

    prefill -> sample -> [ segment -> merge ] -> [ segment -> merge ] -> … until all rows are done

A segment reads the cache as it was at its start and a small buffer of its own tokens
(`kv_cache.py`). The cache grows in a few stages, so that the first token does not pay for the
capacity of the last. Positions come from lengths, never from padding.
`slots.py` runs the same segments over rows that are refilled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

from opsd_jax.model.decode_attention import NUM_LANES
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.model.kv_cache import (
    EMPTY_POSITION,
    KVCache,
    LayersKV,
    Parts,
    Recent,
    cache_of,
    empty,
    merge,
    resized,
)
from opsd_jax.model.sharding import whole_groups
from opsd_jax.model.weights_first import weights_first
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.decoding_form import decoding_form
from opsd_jax.sampling.prompts import Completion, Context, one_of_each
from opsd_jax.sampling.tokens import filter_logits, log_prob, penalise, prompt_tokens, sample


@flax.struct.dataclass
class Rows:
    """Where the rows of a batch stand between two segments.

    cache: keys and values of prompt and all sampled tokens but the last, compact (`kv_cache.py`),
    whole or in parts, None within a segment; lengths: [B] int32, tokens in the cache, so also the
    position of the last token; ids: [B] int32, the last sampled token; counts: [B] int32, tokens
    sampled so far; done, stopped: [B] bool, finished for any reason, by a stop id; keys: [B];
    seen: None, or [B, V] int32, 1 for tokens of the prompt, 2 of the completion.
    """

    cache: LayersKV | Parts
    lengths: jax.Array
    ids: jax.Array
    counts: jax.Array
    done: jax.Array
    stopped: jax.Array
    keys: jax.Array
    seen: jax.Array | None


class Tokens(NamedTuple):
    """One sampled token per row, or, stacked, a segment of them: [B] or [K, B] each."""

    ids: jax.Array
    mask: jax.Array
    logps: jax.Array
    sampled_logps: jax.Array


def rollout(
    model: Decoder,
    variables: dict,
    prompt_ids: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    config: RolloutConfig,
    copies: int = 1,
) -> Completion:
    """Samples one completion per row; a row's tokens depend on its own prompt and key alone.

    Args:
      model: the decoder.
      variables: {"params"[, "lora"]}; no gradient flows through them.
      prompt_ids: [B, P] int32, right-padded.
      prompt_lengths: [B] int32, at least 1.
      key: typed PRNG key, row b then draws from fold_in(fold_in(key, b), t) at step t; or one
        key per row, [B], row b then draws from fold_in(key[b], t).
      config: see `RolloutConfig`.
      copies: see `Context`.
    """
    model, variables = decoding_form(model, variables, config)
    rows, first = start(model, variables, prompt_ids, prompt_lengths, key, config, copies)
    num_segments, length = even_segments(config)
    total = 1 + num_segments * length
    out = Tokens(*(jnp.zeros((total, *x.shape), x.dtype).at[0].set(x) for x in first))
    out = out._replace(ids=out.ids.at[1:].set(config.pad_id))

    def unfinished(last, carry):
        number, rows, _ = carry
        return ~jnp.all(rows.done) & (number < last)

    def one_more(carry):
        number, rows, out = carry
        rows, tokens = segment(model, variables, rows, length, config)
        put = jax.lax.dynamic_update_slice_in_dim
        out = jax.tree.map(lambda x, y: put(x, y, 1 + number * length, 0), out, tokens)
        return number + 1, rows, out

    carry = (jnp.int32(0), rows, out)
    for last in worthwhile(stages(prompt_ids.shape[1], num_segments, length), config):
        number, rows, out = carry
        cache = resized(rows.cache, num_slots(prompt_ids.shape[1] + last * length, config))
        carry = (number, dataclasses.replace(rows, cache=cache), out)
        carry = jax.lax.while_loop(partial(unfinished, last), one_more, carry)
    ids, mask, logps, sampled = (x[: config.max_new_tokens].T for x in carry[2])
    return Completion(ids, mask, logps, carry[1].stopped, sampled)


def stream(
    model: Decoder,
    variables: dict,
    prompt_ids: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    config: RolloutConfig,
) -> Iterator[int]:
    """The tokens that `rollout` gives for a batch of one, each as soon as it is sampled."""
    model, variables = decoding_form(model, variables, config)

    @jax.jit
    def begin(variables):
        rows, first = start(model, variables, prompt_ids, prompt_lengths, key, config)
        capacity = num_slots(prompt_ids.shape[1] + config.max_new_tokens, config)
        return dataclasses.replace(rows, cache=resized(rows.cache, capacity)), first.ids[0]

    @partial(jax.jit, donate_argnums=1)
    def go_on(variables, rows):
        rows, tokens = segment(model, variables, rows, 1, config)
        return rows, tokens.ids[0, 0]

    rows, token = begin(variables)
    while True:
        yield int(token)
        if bool(rows.done[0]):
            return
        rows, token = go_on(variables, rows)


def even_segments(config: RolloutConfig) -> tuple[int, int]:
    """(number of segments, tokens each) for the C - 1 tokens after the first, evenly."""
    rest = config.max_new_tokens - 1
    number = -(-rest // config.segment_len)
    return number, -(-rest // max(number, 1))


def least_stage(num_segments: int, length: int) -> int:
    """Segments of the smallest stage: at most four stages, and none of fewer than 64 slots."""
    return max(-(-num_segments // 4), -(-64 // max(length, 1)))


def stages(prompt_len: int, num_segments: int, length: int) -> list[int]:
    """Numbers of segments at which the cache is full and grows, to about twice its size.

    Every stage is compiled, so there are few (`least_stage`).
    """
    least = least_stage(num_segments, length)
    ends: list[int] = []
    while (done := ends[-1] if ends else 0) < num_segments:
        twice = -(-(prompt_len + 2 * done * length) // length)
        ends.append(min(num_segments, max(twice, done + least)))
    return ends


def worthwhile(ends: list[int], config: RolloutConfig) -> list[int]:
    """Those of growing sizes that save reading; a kernel that reads what is there needs the last.

    Args:
      ends: of a cache or of its window, ascending.
      config: names the kernel.
    """
    return ends if config.attention == "xla" else ends[-1:]


def num_slots(least: int, config: RolloutConfig) -> int:
    """Slots of a cache that has room for so many tokens."""
    return least if config.attention == "xla" else -(-least // NUM_LANES) * NUM_LANES


def start(
    model: Decoder,
    variables: dict,
    prompt_ids: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    config: RolloutConfig,
    copies: int = 1,
) -> tuple[Rows, Tokens]:
    """Reads the prompts, each of `copies` rows once, and samples every row's first token."""
    B = len(prompt_lengths)
    copies = whole_groups(B, copies)
    own = (one_of_each(x, copies) for x in (prompt_ids, prompt_lengths))
    cache, hidden_BD = prefill(model, variables, *own)
    hidden_BD = jnp.repeat(hidden_BD, copies, axis=0)
    cache = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=x.ndim - 4), cache)
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    prompts = Context(prompt_ids, prompt_lengths)
    return first_token(model, variables, cache, hidden_BD, prompts, keys, config)


def first_token(
    model: Decoder,
    variables: dict,
    cache: LayersKV,
    hidden_BD: jax.Array,
    prompts: Context,
    keys: jax.Array,
    config: RolloutConfig,
) -> tuple[Rows, Tokens]:
    """Rows that have read their prompts, with the first token of each.

    Args:
      model, variables: see `decoding_form`.
      cache, hidden_BD: of the prompts, as `prefill` gives them.
      prompts: B of them.
      keys: [B].
      config: see `RolloutConfig`.
    """
    rows = begin_rows(cache, prompts.lengths, keys, None)
    if config.penalises:
        seen = prompt_tokens(prompts.ids, prompts.lengths, model.config.vocab_size)
        rows = dataclasses.replace(rows, seen=seen)
    head = output_head(variables["params"], model.config, variables.get("scales"))
    return next_token(rows, head, hidden_BD, config)


def begin_rows(
    cache: LayersKV, lengths: jax.Array, keys: jax.Array, seen: jax.Array | None
) -> Rows:
    """Rows that have read their prompts and said nothing."""
    nothing = jnp.zeros_like(lengths)
    never = jnp.zeros(lengths.shape, bool)
    # The length rises with every token that follows the first; -1 + 1 = 0 for the first.
    return Rows(cache, lengths - 1, nothing, nothing, never, never, keys, seen)


def prefill(
    model: Decoder, variables: dict, prompt_ids: jax.Array, prompt_lengths: jax.Array
) -> tuple[LayersKV, jax.Array]:
    """Reads the prompts; returns keys and values of P slots and the last hidden states [B, D]."""
    positions = jnp.broadcast_to(jnp.arange(prompt_ids.shape[1]), prompt_ids.shape)
    hidden, kv = model.apply(variables, prompt_ids, positions, return_kv=True)
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)[:, 0]
    return kv, last


def segment(
    model: Decoder,
    variables: dict,
    rows: Rows,
    length: int,
    config: RolloutConfig,
) -> tuple[Rows, Tokens]:
    """Decodes K = `length` tokens for every row.

    Args:
      model, variables: see `decoding_form`.
      rows: their cache needs K free slots behind every row that is not done.
      length: K.
      config: see `RolloutConfig`.

    Returns:
      The rows after it, and `Tokens` of [K, B]; rows that are done give masked padding.
    """
    head = output_head(variables["params"], model.config, variables.get("scales"))
    starts_B, slots = rows.lengths, jnp.arange(length)
    cache = cache_of(rows.cache, starts_B)

    def step(carry, k):
        rows, kv = carry
        positions_BK = jnp.where(slots <= k, starts_B[:, None] + slots, EMPTY_POSITION)
        hidden, kv = model.apply(
            variables,
            rows.ids[:, None],
            (starts_B + k)[:, None],
            cache,
            Recent(KVCache(kv, positions_BK), k),
            return_kv=True,
        )
        rows, tokens = next_token(rows, head, hidden[:, 0], config)
        return (rows, kv), tokens

    carry = (dataclasses.replace(rows, cache=None), empty(rows.cache, len(starts_B), length))
    (after, kv), tokens = jax.lax.scan(step, carry, slots)
    return dataclasses.replace(after, cache=merge(rows.cache, kv, starts_B)), tokens


def next_token(rows: Rows, head, hidden_BD: jax.Array, config: RolloutConfig):
    """(rows, Tokens) with one more token; a row that is done stays as it is."""
    ids_B, logps_B, sampled_B = choose(head_logits(head, hidden_BD, weights_first), rows, config)
    mask_B = ~rows.done
    ids_B = jnp.where(mask_B, ids_B, config.pad_id)
    counts_B = rows.counts + mask_B
    stopped_B = rows.stopped | (mask_B & jnp.isin(ids_B, jnp.array(config.stop_ids, jnp.int32)))
    seen = rows.seen
    if seen is not None:
        now = (jnp.arange(seen.shape[1]) == ids_B[:, None]) & mask_B[:, None]
        seen = jnp.where(now, 2, seen)
    rows = dataclasses.replace(
        rows,
        ids=ids_B,
        lengths=rows.lengths + mask_B,
        counts=counts_B,
        stopped=stopped_B,
        done=stopped_B | (counts_B >= config.max_new_tokens),
        seen=seen,
    )
    return rows, Tokens(
        ids_B, mask_B, jnp.where(mask_B, logps_B, 0.0), jnp.where(mask_B, sampled_B, 0.0)
    )


def choose(logits_BV: jax.Array, rows: Rows, config: RolloutConfig) -> tuple[jax.Array, ...]:
    """Samples one id per row; its log-probability under the raw and the sampled distribution.

    Returns:
      ids [B] int32, logps [B] float32, sampled_logps [B] float32 (0 when greedy).
    """
    logits_BV = raw_BV = logits_BV.astype(jnp.float32)
    if rows.seen is not None:
        logits_BV = penalise(
            logits_BV,
            rows.seen > 0,
            rows.seen > 1,
            config.repetition_penalty,
            config.presence_penalty,
        )
    if config.min_new_tokens and config.stop_ids:
        early_B1 = (rows.counts < config.min_new_tokens)[:, None]
        stops_V = jnp.isin(jnp.arange(logits_BV.shape[1]), jnp.array(config.stop_ids))
        logits_BV = jnp.where(early_B1 & stops_V, -jnp.inf, logits_BV)
    if config.temperature == 0:
        ids_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return ids_B, log_prob(raw_BV, ids_B), jnp.zeros(ids_B.shape)
    # The largest is 0 before it is divided: in a fused loop a scaled logit and the maximum of them
    # are rounded apart, at a small temperature by more than its exponential can stand.
    logits_BV -= jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = filter_logits(
        logits_BV, config.temperature, config.top_k, config.top_p, config.min_p
    )
    draw = jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t)))
    ids_B = sample(logits_BV, draw(rows.keys, rows.counts))
    return ids_B, log_prob(raw_BV, ids_B), log_prob(logits_BV, ids_B)
