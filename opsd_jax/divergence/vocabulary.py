# SPDX-License-Identifier: Apache-2.0
"""Reductions over the vocabulary axis, whole or split over a mesh axis.

Inside `jax.shard_map` each device holds the logits of a contiguous slice of the vocabulary; a
`Vocabulary` that knows the mesh axis combines slices by sums and maxima of [...] arrays, so that
no device ever holds the logits of another. Without a mesh axis it is plain `jnp`.

Alphabet: V vocabulary, U = V / devices entries of the local slice, K chosen entries.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from opsd_jax.model.sharding import Axis, axis_size, length_axis


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The last axis of every array given to its methods.

    Args:
      size: V, over all devices; local entries beyond it are padding.
      axis_name: mesh axis that splits the vocabulary, or None.
    """

    size: int
    axis_name: str | None = None

    def sum(self, values: jax.Array) -> jax.Array:
        """[..., U] -> [...]."""
        total = jnp.sum(values, axis=-1)
        return total if self.axis_name is None else jax.lax.psum(total, self.axis_name)

    def max(self, values: jax.Array) -> jax.Array:
        """[..., U] -> [...]; not differentiable across devices."""
        top = jnp.max(values, axis=-1)
        return top if self.axis_name is None else jax.lax.pmax(top, self.axis_name)

    def without_padding(self, logits: jax.Array) -> jax.Array:
        """Gives entries beyond V probability 0."""
        if self.axis_name is None and logits.shape[-1] == self.size:
            return logits
        position = self._offset(logits) + jnp.arange(logits.shape[-1])
        return jnp.where(position < self.size, logits, -jnp.inf)

    def log_softmax(self, logits: jax.Array, temperature: float = 1.0) -> jax.Array:
        """log p of logits / temperature [..., U], at least one of which is finite.

        The maximum is subtracted first and never added back: at logits of 1e4, dividing
        before it or subtracting max + log sum would cost an absolute error of 1e-3.
        """
        top = self.max(jax.lax.stop_gradient(logits))
        shifted = logits - top[..., None]
        if temperature != 1:
            shifted = shifted / temperature
        return shifted - jnp.log(self.sum(jnp.exp(shifted)))[..., None]

    def log_sum_exp(self, logps: jax.Array) -> jax.Array:
        """log sum exp [..., U] -> [...]; -inf, with gradient 0, when every entry is -inf."""
        top = jax.lax.stop_gradient(self.max(logps))
        top = jnp.where(jnp.isfinite(top), top, 0)
        possible = logps != -jnp.inf
        shifted = jnp.where(possible, logps, 0) - top[..., None]
        total = self.sum(jnp.where(possible, jnp.exp(shifted), 0))
        return jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + top)

    def take(self, values: jax.Array, index: jax.Array) -> jax.Array:
        """Entries of values [..., U] at index [..., K]; -inf where the index is -1."""
        local = index - self._offset(values)
        mine = (local >= 0) & (local < values.shape[-1])
        found = jnp.take_along_axis(values, jnp.where(mine, local, 0), axis=-1)
        if self.axis_name is not None:
            found = jax.lax.psum(jnp.where(mine, found, 0), self.axis_name)
        return jnp.where(index >= 0, found, -jnp.inf)

    def put(self, values: jax.Array, index: jax.Array, like: jax.Array) -> jax.Array:
        """The transpose of `take`: values [..., K] at index [..., K] of zeros shaped as `like`."""
        U = like.shape[-1]
        local = index - self._offset(like)
        # Negative indices would wrap around; U is out of range and dropped.
        local = jnp.where((index >= 0) & (local >= 0), local, U)
        rows = local.reshape(-1, local.shape[-1])
        flat = jnp.zeros((rows.shape[0], U), values.dtype)
        place = (jnp.arange(rows.shape[0])[:, None], rows)
        flat = flat.at[place].add(values.reshape(rows.shape), mode="drop")
        return flat.reshape(like.shape)

    def top_k(self, values: jax.Array, k: int) -> jax.Array:
        """Indices [..., k] of the largest entries; ties go to the lower index."""
        top, index = jax.lax.top_k(values, min(k, values.shape[-1]))
        index = index + self._offset(values)
        if self.axis_name is None:
            return index
        # Slices arrive in vocabulary order, so equal values still lose to a lower index.
        gather: dict[str, Any] = dict(axis_name=self.axis_name, axis=values.ndim - 1, tiled=True)
        top, index = jax.lax.all_gather(top, **gather), jax.lax.all_gather(index, **gather)
        _, place = jax.lax.top_k(top, k)
        return jnp.take_along_axis(index, place, axis=-1)

    def _offset(self, values: jax.Array) -> jax.Array | int:
        if self.axis_name is None:
            return 0
        return jax.lax.axis_index(self.axis_name) * values.shape[-1]


@dataclasses.dataclass(frozen=True)
class VocabularyMesh:
    """Where the fused divergence runs: which mesh axes split the batch and the vocabulary.

    Args:
      mesh: a concrete or abstract mesh with Auto axes, or None for one device.
      batch_axis: axis or axes that split the rows, or None.
      vocab_axis: axis that splits the head's vocabulary, or None.
      length_axis: axis that splits the tokens of a row, or None.
    """

    mesh: Any = None
    batch_axis: tuple[str, ...] | None = None
    vocab_axis: str | None = None
    length_axis: Axis = None

    @property
    def tokens(self) -> PartitionSpec:
        """Of arrays [B, C, ...]."""
        return PartitionSpec(self.batch_axis, self.length_axis)


def vocabulary_mesh(mesh: Any, shape: Sequence[int], vocab_axis: str = "model") -> VocabularyMesh:
    """The layout of [B, C] tokens on `mesh`, or on that of `jax.set_mesh` when `mesh` is None.

    Axes that are absent, or that some outer `shard_map` already took, are left alone; rows that
    do not divide over the batch axis are computed on every device of it.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    auto = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types or (), strict=True)
        if kind == jax.sharding.AxisType.Auto and mesh.shape[name] > 1
    }
    if not auto:
        return VocabularyMesh()
    length = length_axis(mesh, shape[1]) if "sequence" in auto else None
    others = auto - {vocab_axis, length}
    batch_axis = tuple(name for name in mesh.axis_names if name in others) or None
    rows_divide = shape[0] % axis_size(mesh, batch_axis) == 0
    vocab = vocab_axis if vocab_axis in auto else None
    return VocabularyMesh(mesh, batch_axis if rows_divide else None, vocab, length)
