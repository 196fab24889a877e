# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation over micro-batches, each of the least of a few widths that holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opsd_jax.method.batch import Batch, ungrouped
from opsd_jax.model.sharding import placed, whole_groups
from opsd_jax.sampling.prompts import Completion


class MicroBatch(NamedTuple):
    """Some rows: what an objective's loss is computed on.

    plan: name -> [B, ...] or [B, C, ...], nested in any way; numbers: [B] of the rows in the batch.
    """

    batch: Batch
    completion: Completion
    plan: Any
    numbers: jax.Array


def accumulate(
    function: Callable, trainable: Any, rows: MicroBatch, num_parts: int, num_widths: int = 1
) -> Any:
    """Σ `function(trainable, part)` over `num_parts` micro-batches, one at a time.

    With one width, part i holds rows i, i + A, i + 2A, …: a strided split keeps every device's rows
    on that device when the batch is sharded in contiguous blocks. Rows of one prompt stay together
    where that is possible. With several widths rows of like length share a part, which is read at
    the smallest width that holds it; they are of many prompts.

    Args:
      function: gives arrays of the same shapes for every part and width.
      trainable: its first argument.
      rows: all of them.
      num_parts: A.
      num_widths: of C, C / 2, C / 4, …: so many; the function is compiled for each.
    """
    if num_widths > 1:
        function = partial(at_width, function, widths(rows.completion.ids.shape[1], num_widths))
    if num_parts == 1:
        return function(trainable, rows)
    parts = split_by_length(rows, num_parts) if num_widths > 1 else strided(rows, num_parts)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(trainable, part)), None

    shapes = jax.eval_shape(function, trainable, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def strided(rows: MicroBatch, num_parts: int) -> MicroBatch:
    """[A, B / A, ...] of [B, ...]: part i holds rows i, i + A, i + 2A, …, or groups of rows."""
    G = whole_groups(rows.numbers.size // num_parts, rows.batch.student.copies)
    if G == 1:
        rows = ungrouped(rows)

    def split(x):
        parts = x.reshape(-1, num_parts, G, *x.shape[1:]).swapaxes(0, 1)
        return parts.reshape(num_parts, -1, *x.shape[1:])

    return jax.tree.map(split, rows)


def split_by_length(rows: MicroBatch, num_parts: int) -> MicroBatch:
    """[A, B / A, ...] of [B, ...]: the rows with the shortest completions first.

    Only ids and numbers of tokens cross the devices.
    """
    order = jnp.argsort(jnp.sum(rows.completion.mask, axis=1), stable=True)

    def split(x):
        parts = x[order].reshape(num_parts, -1, *x.shape[1:])
        return placed(parts, None, "batch", *[None] * (parts.ndim - 2))

    return jax.tree.map(split, ungrouped(rows))


def widths(longest: int, num: int) -> list[int]:
    """At most so many, ascending: `longest` and halves of it, multiples of 8."""
    found = {longest}
    for n in range(1, num):
        found.add(min(longest, -(-longest // (8 << n)) * 8))
    return sorted(found)


def at_width(function: Callable, choices: list[int], trainable: Any, rows: MicroBatch) -> Any:
    """`function` of the rows cut to the smallest of the widths that holds their completions."""
    longest = jnp.max(jnp.sum(rows.completion.mask, axis=1))
    number = sum((longest > width).astype(jnp.int32) for width in choices[:-1])
    branches = [lambda trained, x, w=width: function(trained, cut(x, w)) for width in choices]
    return jax.lax.switch(number, branches, trainable, rows)


def cut(rows: MicroBatch, width: int) -> MicroBatch:
    """The first `width` tokens of completions, and of what a plan says of each token."""
    whole = rows.completion
    C = whole.ids.shape[1]
    if width == C:
        return rows

    def first(x: Any) -> Any:
        return x[:, :width] if x.ndim > 1 and x.shape[1] == C else x

    tokens = {
        name: getattr(whole, name)[:, :width]
        for name in ("ids", "mask", "logps", "sampled_logps")
        if getattr(whole, name) is not None
    }
    completion = dataclasses.replace(whole, **tokens)
    return rows._replace(completion=completion, plan=jax.tree.map(first, rows.plan))
