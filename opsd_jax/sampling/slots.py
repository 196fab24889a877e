# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: many prompts through few rows, of which finished ones make room.

    unique prompts -> prefill into a store -> place into free slots -> segment -> place -> …

A long completion then holds up its own slot and no other. The cache has as many slots as the
longest row needs for its next segment, in a few sizes, and is in two parts: a quarter of the rows
may be long without the others paying for it. When no prompt waits and a quarter of the slots
would do, the rows that go on move to so many. Prompts that are asked several times are read once.
The segments are those of `rollout.rollout`, and a completion depends on its own prompt and key (up
to the rounding of sums over windows of another width).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from opsd_jax.errors import UserError
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.kv_cache import capacity, parts
from opsd_jax.model.sharding import Rules, axis_size, rows_axis, rows_axis_in_words, shard_batch
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import pad
from opsd_jax.sampling.rollout import Rows, Tokens
from opsd_jax.sampling.slot_programs import Programs


class Sampled(NamedTuple):
    """A finished completion.

    prompt: its prompt's number; ids: the stop token included; stopped: False if it ran into the
    length limit; logps: log-probability of each id under the model itself.
    """

    prompt: int
    ids: list[int]
    stopped: bool
    logps: list[float]


@dataclasses.dataclass
class Work:
    """What one row has said so far for one prompt, of so many tokens."""

    prompt: int
    prompt_len: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)


class Slots:
    """The host's view of the rows: what each works on, None where it is free."""

    def __init__(self, num_slots: int, config: RolloutConfig):
        self.config = config
        self.work: list[Work | None] = [None] * num_slots

    def free(self) -> list[int]:
        return [slot for slot, work in enumerate(self.work) if work is None]

    def idle(self) -> bool:
        return not any(self.work)

    def in_cache(self) -> list[int]:
        """Tokens in the cache of every row that goes on; 0 of a free one."""
        return [work.prompt_len + len(work.ids) - 1 if work else 0 for work in self.work]

    def narrow(self, num_slots: int) -> np.ndarray | None:
        """Keeps so many slots, the busy ones first: their old numbers, or None if it cannot."""
        free = self.free()
        if not len(self.work) - len(free) <= num_slots < len(self.work):
            return None
        busy = [slot for slot, work in enumerate(self.work) if work]
        kept = [*busy, *free][:num_slots]
        self.work = [self.work[slot] for slot in kept]
        return np.asarray(kept, np.int32)

    def gather_long(self, first: int, longest: int) -> list[tuple[int, int]] | None:
        """Exchanges rows so that all with more tokens than `longest` are among the first.

        Args:
          first: how many slots these are.
          longest: tokens in the cache.

        Returns:
          The pairs of slots, of the first and of the others; None if there are too many long rows.
        """
        long = [slot for slot, tokens in enumerate(self.in_cache()) if tokens > longest]
        if len(long) > first:
            return None
        room = (slot for slot in range(first) if slot not in long)
        pairs = list(zip(room, (slot for slot in long if slot >= first), strict=False))
        for x, y in pairs:
            self.work[x], self.work[y] = self.work[y], self.work[x]
        return pairs

    def take(self, tokens: Tokens) -> Iterator[Sampled]:
        """Adds [K, B] tokens, and frees and yields the rows that they finish."""
        ids, mask, logps, _ = (np.asarray(x) for x in tokens)
        for slot in np.flatnonzero(mask[0]):
            work, said = self.work[slot], mask[:, slot]
            assert work is not None, "a row without a prompt has spoken"
            work.ids += ids[said, slot].tolist()
            work.logps += logps[said, slot].tolist()
            stopped = work.ids[-1] in self.config.stop_ids
            if stopped or len(work.ids) == self.config.max_new_tokens:
                self.work[slot] = None
                yield Sampled(work.prompt, work.ids, stopped, work.logps)


class Sampler:
    """Jitted rollouts over lists of prompts.

    A run compiles, per settings and prompt width, one prefill, and a placement and a segment for at
    most four sizes of the cache, again for those with a small second part, and a segment for a
    quarter of the slots. Widths are multiples of 16.

    Args:
      model: the decoder.
      pad_id: of the tokenizer.
      mesh, rules: where arrays live.
      batch_size: the largest number of slots, a multiple of the mesh's `data`.
    """

    def __init__(self, model: Decoder, pad_id: int, mesh: Mesh, rules: Rules, batch_size: int):
        self.data = axis_size(mesh, rows_axis(mesh))
        if batch_size % self.data:
            names, numbers = rows_axis_in_words(mesh)
            raise UserError(
                f"evaluate.batch_size = {batch_size} must be a multiple of {names} = {numbers}"
            )
        self.model, self.pad_id, self.mesh, self.rules = model, pad_id, mesh, rules
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
            programs = Programs(self.model, config, width, self.mesh, self.rules)
            self._programs[config, width] = programs
        run = self._programs[config, width]
        variables, key_data = run.prepare(variables), np.asarray(jax.random.key_data(keys))
        size = self._num_slots(len(prompts))
        slots, rows, few = Slots(size, config), None, run.few(size)
        chunks, ready = self._chunks(prompts, size), deque[tuple[int, int]]()
        while True:
            while (free := slots.free()) and (ready or chunks):
                if not ready:
                    chunk = chunks.popleft()
                    unique = [prompts[i[0]] for i in chunk]
                    store = run.read(variables, *self._padded(unique, size, width))
                    ready.extend((row, i) for row, samples in enumerate(chunk) for i in samples)
                    rows = run.idle(store) if rows is None else rows
                source, target = np.zeros(few, np.int32), np.full(few, size, np.int32)
                now = np.zeros((few, *key_data.shape[1:]), key_data.dtype)
                for f, slot in enumerate(free[: min(few, len(ready))]):
                    source[f], sample = ready.popleft()
                    target[f], now[f] = slot, key_data[sample]
                    slots.work[slot] = Work(sample, len(prompts[sample]))
                rows, first = run.place(variables, rows, store, source, target, now)
                yield from slots.take(first)
            if rows is None or slots.idle():
                return
            if not (ready or chunks) and (kept := slots.narrow(few)) is not None:
                rows = run.pick(rows, kept)
            rows = self._fitted(run, rows, slots)
            rows, tokens = run.segment(variables, rows)
            yield from slots.take(tokens)

    @staticmethod
    def _fitted(run: Programs, rows: Rows, slots: Slots) -> Rows:
        """The rows with room in their cache for a segment, and not much more.

        The second part of a cache is of the smallest size as long as the first has a place for
        every row that needs more.
        """
        have = [capacity(part) for part, _ in parts(rows.cache)]
        longest = max(slots.in_cache()) + run.length
        want = [next(size for size in run.sizes if size >= longest)] * len(have)
        if len(have) > 1:
            first = parts(rows.cache)[0][1].stop
            pairs = slots.gather_long(first, run.sizes[0] - run.length)
            want[1] = want[0] if pairs is None else run.sizes[0]
            if pairs:
                padded = np.full((2, first), len(slots.work), np.int32)
                padded[:, : len(pairs)] = np.transpose(pairs)
                rows = run.exchange(rows, *padded)
        return rows if have == want else run.resized_to(tuple(want))(rows)

    def _num_slots(self, num_prompts: int) -> int:
        """No more than `batch_size`, and for fewer prompts the next power of two of them."""
        size = self.data
        while size < min(num_prompts, self.batch_size):
            size *= 2
        return min(size, self.batch_size)

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
        return shard_batch(pad(filled, width, self.pad_id), self.mesh)
