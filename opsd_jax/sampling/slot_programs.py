# SPDX-License-Identifier: Apache-2.0
"""Continuous batching, its compiled functions: prompts are read, placed, sampled from, moved.

`slots.py` decides which row does what; these are the functions of arrays that do it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from opsd_jax.model.decoder import Decoder
from opsd_jax.model.kv_cache import (
    LayersKV,
    Parts,
    capacity,
    empty,
    joined,
    parts,
    pick_rows,
    put_rows,
    resized,
    take_rows,
)
from opsd_jax.model.sharding import (
    Rules,
    axis_size,
    on_mesh,
    replicated,
    rows_axis,
    variable_shardings,
)
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.decoding_form import changes_weights, decoding_form
from opsd_jax.sampling.prompts import Context
from opsd_jax.sampling.rollout import (
    Rows,
    Tokens,
    begin_rows,
    even_segments,
    first_token,
    least_stage,
    num_slots,
    prefill,
    segment,
    worthwhile,
)


@flax.struct.dataclass
class Store:
    """R prompts that have been read. cache: keys and values of P slots; hidden: [R, D]."""

    cache: LayersKV
    hidden: jax.Array
    prompts: Context


def read_prompts(model: Decoder, variables: dict, ids: jax.Array, lengths: jax.Array) -> Store:
    """Prefills R prompts."""
    cache, hidden = prefill(model, variables, ids, lengths)
    return Store(cache, hidden, Context(ids, lengths))


def idle_rows(
    store: Store, num_rows: Sequence[int], num_slots: int, vocab_size: int | None
) -> Rows:
    """Rows that have nothing to do; their caches are laid out like the store's.

    Args:
      store: any.
      num_rows: of every part of the cache, B together.
      num_slots: of the cache of each row.
      vocab_size: V where occurrences are counted, else None.
    """
    caches, B = [empty(store.cache, rows, num_slots) for rows in num_rows], sum(num_rows)
    seen = None if vocab_size is None else jnp.zeros((B, vocab_size), jnp.int32)
    keys = jax.random.split(jax.random.key(0), B)
    rows = begin_rows(joined(caches), jnp.zeros(B, jnp.int32), keys, seen)
    return dataclasses.replace(rows, done=jnp.ones(B, bool), stopped=jnp.ones(B, bool))


def place(
    model: Decoder,
    config: RolloutConfig,
    variables: dict,
    rows: Rows,
    store: Store,
    source_F: jax.Array,
    slots_F: jax.Array,
    key_data: jax.Array,
) -> tuple[Rows, Tokens]:
    """Gives free rows a prompt of the store and their first token.

    Args:
      model, config, variables: those of the segments.
      rows: B rows.
      store: R prompts.
      source_F: [F] int32, prompts in the store.
      slots_F: [F] int32, the rows that they go to; B: nowhere.
      key_data: [F, …], data of the keys of those rows.

    Returns:
      The rows after it and `Tokens` [1, B], masked where nothing was placed.
    """
    picked = jax.tree.map(lambda x: x[source_F], store.prompts)
    keys, hidden_FD = jax.random.wrap_key_data(key_data), store.hidden[source_F]
    new, tokens = first_token(model, variables, None, hidden_FD, picked, keys, config)

    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[slots_F].set(y, mode="drop")

    rest = jax.tree.map(put, dataclasses.replace(rows, cache=None), new)
    cache = put_rows(rows.cache, take_rows(store.cache, source_F), slots_F)
    B = len(rows.ids)
    tokens = Tokens(*(put(jnp.zeros(B, x.dtype), x)[None] for x in tokens))
    return dataclasses.replace(rest, cache=cache), tokens


def pick(rows: Rows, source_B: jax.Array) -> Rows:
    """Rows source_B[b] in place of rows b; source_B: [B'] int32."""
    rest = jax.tree.map(lambda x: x[source_B], dataclasses.replace(rows, cache=None))
    return dataclasses.replace(rest, cache=pick_rows(rows.cache, source_B))


def moving(cache: Parts, first_N: jax.Array, second_N: jax.Array) -> tuple[LayersKV, LayersKV]:
    """Rows of the two parts of a cache, with as many slots as the second part has."""
    (first, own), (second, _) = parts(cache)
    from_first = resized(take_rows(first, first_N), capacity(second))
    return from_first, take_rows(second, second_N - own.stop)


def exchange(
    rows: Rows, moved: tuple[LayersKV, LayersKV], first_N: jax.Array, second_N: jax.Array
) -> Rows:
    """Rows of the cache's first part against rows of its second.

    Args:
      rows: B of them, their cache in two parts.
      moved: those rows of it. In one program with this they would be read and written at once,
        for which XLA copies the whole cache first.
      first_N, second_N: [N] int32, rows of the batch; B: nothing moves.
    """
    from_first, from_second = moved
    order_B = jnp.arange(len(rows.ids))
    order_B = order_B.at[first_N].set(second_N, mode="drop")
    order_B = order_B.at[second_N].set(first_N, mode="drop")
    rest = jax.tree.map(lambda x: x[order_B], dataclasses.replace(rows, cache=None))
    cache = put_rows(put_rows(rows.cache, from_second, first_N), from_first, second_N)
    return dataclasses.replace(rest, cache=cache)


def laid_out(mesh: Mesh, rules: Rules, rows: Rows) -> Rows:
    """The rows over `data`, heads of their caches and vocabulary over `model`.

    Left alone, XLA would hold a cache that is made of nothing whole on every device.
    """

    def boxed(x: jax.Array, *names: str | None) -> nn.Partitioned:
        return nn.Partitioned(x, names=(*names, *[None] * (x.ndim - len(names))))

    def of_cache(x: jax.Array) -> nn.Partitioned:
        return boxed(x, *[None] * (x.ndim - 4), "batch", "kv_heads")

    boxes = jax.tree.map(lambda x: boxed(x, *("batch", "vocab")[: x.ndim]), rows)
    boxes = dataclasses.replace(boxes, cache=jax.tree.map(of_cache, rows.cache))
    return jax.lax.with_sharding_constraint(rows, variable_shardings(boxes, mesh, rules))


def resize(sizes: tuple[int, ...], rows: Rows) -> Rows:
    """The rows with so many slots in each part of their cache."""
    stores = [resized(part, size) for (part, _), size in zip(parts(rows.cache), sizes, strict=True)]
    return dataclasses.replace(rows, cache=joined(stores))


class Programs:
    """What is compiled for one kind of sampling and one width of prompts.

    sizes: of caches, in slots, ascending; length: tokens of a segment.

    Args:
      decoder, config: what samples, and how.
      width: P of the prompts.
      mesh, rules: where arrays live.
    """

    def __init__(
        self, decoder: Decoder, config: RolloutConfig, width: int, mesh: Mesh, rules: Rules
    ):
        model, _ = on_mesh(decoding_form, mesh, rules)(decoder, {}, config)
        number, length = even_segments(config)
        # Equal steps, where a rollout's stages double: the longest of many rows of all ages is
        # seldom the longest that there can be.
        step = least_stage(number, length)
        ends = worthwhile([*range(step, number, step), number], config)
        self.sizes = [num_slots(width + end * length, config) for end in ends]
        self.length, self.data = length, axis_size(mesh, rows_axis(mesh))
        vocab_size = model.config.vocab_size if config.penalises else None
        whole = replicated(mesh)

        def jitted(function: Callable, donate: int | None = None, out: Any = None) -> Callable:
            donated = () if donate is None else donate
            return on_mesh(
                jax.jit(function, donate_argnums=donated, out_shardings=out), mesh, rules
            )

        self.resized_to = functools.cache(lambda sizes: jitted(partial(resize, sizes)))
        self._moving, self._exchange = jitted(moving), jitted(exchange, 0)
        self.prepare: Callable = lambda variables: variables
        if on_mesh(changes_weights, mesh, rules)(decoder, config):
            self.prepare = jitted(lambda v: decoding_form(decoder, v, config)[1])
        self.read = jitted(partial(read_prompts, model))
        placed = partial(laid_out, mesh, rules)

        def idle(store: Store) -> Rows:
            num_rows = self.in_parts(len(store.hidden))
            return placed(idle_rows(store, num_rows, self.sizes[0], vocab_size))

        self.idle = jitted(idle)
        self.segment = jitted(
            lambda variables, rows: segment(model, variables, rows, length, config),
            1,
            (None, whole),
        )
        self.place = jitted(partial(place, model, config), 1, (None, whole))
        self.pick = jitted(lambda rows, source_B: placed(pick(rows, source_B)))

    def exchange(self, rows: Rows, first_N: np.ndarray, second_N: np.ndarray) -> Rows:
        """`exchange`, in two programs."""
        moved = self._moving(rows.cache, first_N, second_N)
        return self._exchange(rows, moved, first_N, second_N)

    def few(self, num_rows: int) -> int:
        """A quarter of so many rows; all of them where devices forbid it."""
        return num_rows // 4 if num_rows >= 4 and num_rows // 4 % self.data == 0 else num_rows

    def in_parts(self, num_rows: int) -> list[int]:
        """Rows of every part of the cache. Rows that are split over devices stay together."""
        few = self.few(num_rows)
        whole = few == num_rows or len(self.sizes) == 1 or self.data > 1
        return [num_rows] if whole else [few, num_rows - few]
