# SPDX-License-Identifier: Apache-2.0
"""Many prompts through few rows: finished rows make room for waiting prompts.

    unique prompts -> prefill into a store -> place into free slots -> segment -> place -> …

A long completion then holds up its own slot and no other. The cache has as many slots as the
longest row needs for its next segment, in a few sizes. When no prompt waits and a quarter of
the slots would do, the rows that go on move to so many. Prompts that are asked several times are
read once. The segments are those of `rollouts.rollout`, and a completion depends on its own
prompt and key (up to the rounding of sums over windows of another width).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opsd_jax.contexts import pad
from opsd_jax.decoding_form import changes_weights, decoding_form
from opsd_jax.errors import UserError
from opsd_jax.kv_cache import LayersKV, capacity, empty, merge, pick_rows, resized
from opsd_jax.model import Decoder
from opsd_jax.rollout_config import RolloutConfig
from opsd_jax.rollouts import (
    Context,
    Rows,
    Tokens,
    begin_rows,
    first_token,
    least_stage,
    num_slots,
    prefill,
    segment,
    split,
    worthwhile,
)
from opsd_jax.sharding import Rules, on_mesh, replicated, shard_batch
from opsd_jax.tokenizer import Tokenizer


class Sampled(NamedTuple):
    """A finished completion.

    prompt: its prompt's number; ids: the stop token included; stopped: False if it ran into the
    length limit; logps: log-probability of each id under the model itself.
    """

    prompt: int
    ids: list[int]
    stopped: bool
    logps: list[float]


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


def idle_rows(store: Store, num_rows: int, num_slots: int, vocab_size: int | None) -> Rows:
    """Rows that have nothing to do; their caches are laid out like the store's.

    Args:
      store: any.
      num_rows: B.
      num_slots: of the cache of each row.
      vocab_size: V where occurrences are counted, else None.
    """
    cache = empty(pick_rows(store.cache, jnp.zeros(num_rows, jnp.int32)), num_slots)
    seen = None if vocab_size is None else jnp.zeros((num_rows, vocab_size), jnp.int32)
    keys = jax.random.split(jax.random.key(0), num_rows)
    rows = begin_rows(cache, jnp.zeros(num_rows, jnp.int32), keys, seen)
    return dataclasses.replace(rows, done=jnp.ones(num_rows, bool))


def place(
    model: Decoder,
    config: RolloutConfig,
    variables: dict,
    rows: Rows,
    store: Store,
    source_B: jax.Array,
    key_data: jax.Array,
) -> tuple[Rows, Tokens]:
    """Gives free rows a prompt of the store and their first token.

    Args:
      model, config, variables: those of the segments.
      rows: B rows.
      store: R prompts.
      source_B: [B] int32, the prompt in the store; -1 leaves the row alone.
      key_data: [B, …], data of the keys of those rows.

    Returns:
      The rows after it and `Tokens` [1, B], masked where nothing was placed.
    """
    fresh_B, source_B = source_B >= 0, jnp.maximum(source_B, 0)
    picked = jax.tree.map(lambda x: x[source_B], store.prompts)
    keys = jax.random.wrap_key_data(key_data)
    hidden_BD = store.hidden[source_B]
    new, tokens = first_token(model, variables, None, hidden_BD, picked, keys, config)

    def where_fresh(x: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(fresh_B.reshape(-1, *[1] * (x.ndim - 1)), x, old)

    kept = jax.tree.map(where_fresh, new, dataclasses.replace(rows, cache=None))
    # Behind the end nothing is written, and the caches of the other rows are not even read.
    starts_B = jnp.where(fresh_B, 0, capacity(rows.cache))
    cache = merge(rows.cache, pick_rows(store.cache, source_B), starts_B)
    tokens = tokens._replace(mask=tokens.mask & fresh_B)
    return dataclasses.replace(kept, cache=cache), Tokens(*(x[None] for x in tokens))


def pick(rows: Rows, source_B: jax.Array) -> Rows:
    """Rows source_B[b] in place of rows b; source_B: [B'] int32."""
    rest = jax.tree.map(lambda x: x[source_B], dataclasses.replace(rows, cache=None))
    return dataclasses.replace(rest, cache=pick_rows(rows.cache, source_B))


class Slots:
    """The host's view of the rows: which sample each works on and what it has said so far."""

    def __init__(self, num_slots: int, config: RolloutConfig):
        self.config = config
        self.sample: list[int | None] = [None] * num_slots
        self.prompt_len = np.zeros(num_slots, np.int64)
        self.ids: list[list[int]] = [[] for _ in range(num_slots)]
        self.logps: list[list[float]] = [[] for _ in range(num_slots)]

    def free(self) -> list[int]:
        return [slot for slot, sample in enumerate(self.sample) if sample is None]

    def idle(self) -> bool:
        return len(self.free()) == len(self.sample)

    def begin(self, slot: int, sample: int, prompt_len: int) -> None:
        self.sample[slot], self.prompt_len[slot] = sample, prompt_len
        self.ids[slot], self.logps[slot] = [], []

    def in_cache(self) -> int:
        """Tokens in the cache of the longest row that goes on; 0 if none does."""
        live = (s for s, sample in enumerate(self.sample) if sample is not None)
        return max((int(self.prompt_len[s]) + len(self.ids[s]) - 1 for s in live), default=0)

    def narrow(self, num_slots: int) -> np.ndarray | None:
        """Keeps so many slots, the busy ones first: their old numbers, or None if it cannot."""
        free = self.free()
        if not len(self.sample) - len(free) <= num_slots < len(self.sample):
            return None
        busy = [slot for slot, sample in enumerate(self.sample) if sample is not None]
        kept = [*busy, *free][:num_slots]
        self.sample = [self.sample[slot] for slot in kept]
        self.prompt_len = self.prompt_len[kept]
        self.ids = [self.ids[slot] for slot in kept]
        self.logps = [self.logps[slot] for slot in kept]
        return np.asarray(kept, np.int32)

    def take(self, tokens: Tokens) -> Iterator[Sampled]:
        """Adds [K, B] tokens, and frees and yields the rows that they finish."""
        ids, mask, logps, _ = (np.asarray(x) for x in tokens)
        for slot in np.flatnonzero(mask[0]):
            kept = mask[:, slot]
            self.ids[slot] += ids[kept, slot].tolist()
            self.logps[slot] += logps[kept, slot].tolist()
            stopped = self.ids[slot][-1] in self.config.stop_ids
            sample = self.sample[slot]
            if sample is not None and (
                stopped or len(self.ids[slot]) == self.config.max_new_tokens
            ):
                self.sample[slot] = None
                yield Sampled(sample, self.ids[slot], stopped, self.logps[slot])


class Sampler:
    """Jitted rollouts over lists of prompts.

    A run compiles one prefill and at most four sizes of the cache, each with its placement and its
    segment, for all slots and again for a quarter of them, per settings and prompt width, and
    widths are multiples of 16.

    Args:
      model: the decoder.
      tokenizer: supplies the padding id.
      mesh, rules: where arrays live.
      batch_size: the largest number of slots, a multiple of the mesh's `data`.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, mesh: Mesh, rules: Rules, batch_size: int
    ):
        if batch_size % mesh.shape["data"]:
            raise UserError(
                f"evaluate.batch_size = {batch_size} must be a multiple of mesh.data = "
                f"{mesh.shape['data']}"
            )
        self.model, self.tokenizer, self.mesh, self.rules = model, tokenizer, mesh, rules
        self.batch_size = batch_size
        self._programs: dict[tuple[RolloutConfig, int], Programs] = {}

    def __call__(
        self, variables: dict, prompts: Sequence[list[int]], config: RolloutConfig, keys: jax.Array
    ) -> Iterator[Sampled]:
        """Yields every prompt's completion once, in the order in which they finish.

        Args:
          variables: {"params"[, "lora"]}.
          prompts: token ids, N of them.
          config: how to sample.
          keys: [N]; prompt i draws from keys[i] alone, whatever is sampled beside it.
        """
        width = -(-max(map(len, prompts), default=1) // 16) * 16
        if (config, width) not in self._programs:
            self._programs[config, width] = Programs(self, config, width)
        run = self._programs[config, width]
        variables, key_data = run.prepare(variables), np.asarray(jax.random.key_data(keys))
        size = self._num_slots(len(prompts))
        slots, rows, few = Slots(size, config), None, self._quarter(size)
        chunks, ready = self._chunks(prompts, size), deque[tuple[int, int]]()
        while True:
            while (free := slots.free()) and (ready or chunks):
                if not ready:
                    chunk = chunks.popleft()
                    unique = [prompts[i[0]] for i in chunk]
                    store = run.read(variables, *self._padded(unique, size, width))
                    ready.extend((row, i) for row, samples in enumerate(chunk) for i in samples)
                    rows = run.idle(store) if rows is None else rows
                source = np.full(size, -1, np.int32)
                now = np.zeros((size, *key_data.shape[1:]), key_data.dtype)
                for slot in free[: len(ready)]:
                    source[slot], sample = ready.popleft()
                    now[slot] = key_data[sample]
                    slots.begin(slot, sample, len(prompts[sample]))
                rows, first = run.place(variables, rows, store, source, now)
                yield from slots.take(first)
            if rows is None or slots.idle():
                return
            if not (ready or chunks) and (kept := slots.narrow(few)) is not None:
                rows = run.pick(rows, kept)
            rows = run.fitted(rows, slots.in_cache())
            rows, tokens = run.segment(variables, rows)
            yield from slots.take(tokens)

    def _num_slots(self, num_prompts: int) -> int:
        """No more than `batch_size`, and for fewer prompts the next power of two of them."""
        size = self.mesh.shape["data"]
        while size < min(num_prompts, self.batch_size):
            size *= 2
        return min(size, self.batch_size)

    def _quarter(self, size: int) -> int:
        """Slots to move to when so few rows are left; all of them where devices forbid it."""
        return size // 4 if size >= 4 and size // 4 % self.mesh.shape["data"] == 0 else size

    def _chunks(self, prompts: Sequence[list[int]], size: int) -> deque[list[list[int]]]:
        """Samples by equal prompts, as many prompts together as there are slots."""
        same: dict[tuple[int, ...], list[int]] = {}
        for i, ids in enumerate(prompts):
            same.setdefault(tuple(ids), []).append(i)
        groups = list(same.values())
        return deque(groups[at : at + size] for at in range(0, len(groups), size))

    def _padded(
        self, prompts: list[list[int]], size: int, width: int
    ) -> tuple[jax.Array, jax.Array]:
        """Global ids [R, P] and lengths [R]; copies of the first prompt fill what is missing."""
        filled = prompts + prompts[:1] * (size - len(prompts))
        return shard_batch(pad(filled, width, self.tokenizer.pad_id), self.mesh)


class Programs:
    """What is compiled for one kind of sampling and one width of prompts."""

    def __init__(self, sampler: Sampler, config: RolloutConfig, width: int):
        model, _ = decoding_form(sampler.model, {}, config)
        number, length = split(config)
        # Equal steps, where a rollout's stages double: the longest of many rows of all ages is
        # seldom the longest that there can be, and all pay for its slots.
        step = least_stage(number, length)
        ends = worthwhile([*range(step, number, step), number], config)
        self.sizes = [num_slots(width + end * length, config) for end in ends]
        self.length = length
        vocab_size = model.config.vocab_size if config.penalises else None
        whole = replicated(sampler.mesh)

        def jitted(function: Callable, donate: int | None = None, out: Any = None) -> Callable:
            donated = () if donate is None else donate
            compiled = jax.jit(function, donate_argnums=donated, out_shardings=out)
            return on_mesh(compiled, sampler.mesh, sampler.rules)

        def fitted_to(size: int, rows: Rows) -> Rows:
            return dataclasses.replace(rows, cache=resized(rows.cache, size))

        self._fitted_to = functools.cache(lambda size: jitted(partial(fitted_to, size)))
        self.prepare: Callable = lambda variables: variables
        if changes_weights(sampler.model, config, sampler.mesh):
            self.prepare = jitted(lambda v: decoding_form(sampler.model, v, config)[1])
        self.read = jitted(partial(read_prompts, model))
        self.idle = jitted(
            lambda store: idle_rows(store, len(store.hidden), self.sizes[0], vocab_size)
        )
        self.segment = jitted(
            lambda variables, rows: segment(model, variables, rows, length, config),
            1,
            (None, whole),
        )
        self.place = jitted(partial(place, model, config), 1, (None, whole))
        self.pick = jitted(pick)

    def fitted(self, rows: Rows, in_cache: int) -> Rows:
        """The rows with room in their cache for a segment behind so many tokens, not much more."""
        size = next(size for size in self.sizes if size >= in_cache + self.length)
        return rows if size == capacity(rows.cache) else self._fitted_to(size)(rows)
