# SPDX-License-Identifier: Apache-2.0
"""Sharded arrays as zarr objects in a bucket: each process writes its shards and reads its own.

A leaf is one zarr array below its path; a chunk is one object and never crosses a shard, so that no
two processes write the same object, and any mesh can read. Orbax does this for files and for gs://
through gcsfs and Google's client, and not for s3://; here both are one code, without packages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from opsd_jax.host.bucket import CONTEXT, BucketPath, told

_MOST_CHUNK_BYTES = 2**28  # S3 takes 5 GB an object; smaller ones travel side by side


class Share(NamedTuple):
    """What this process writes of one array: (place in it, values on the host) of each shard."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    shards: list[tuple[tuple[slice, ...], np.ndarray]]


def shares(leaves: Mapping[str, jax.Array]) -> dict[str, Share]:
    """Copies of the shards that this process is to write; the arrays may be donated at once.

    Of replicas, one is written. Typed PRNG keys are written as their words.
    """
    words = {
        path: jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves.items()
    }
    mine = {
        path: [s for s in array.addressable_shards if s.replica_id == 0]
        for path, array in words.items()
    }
    for shard in (s for shards in mine.values() for s in shards):
        shard.data.copy_to_host_async()
    return {
        path: Share(
            array.shape,
            np.dtype(array.dtype),
            _chunk(array.sharding.shard_shape(array.shape), array.dtype.itemsize),
            # A copy: on CPU NumPy would look at the device's own memory.
            [(shard.index, np.array(shard.data)) for shard in mine[path]],
        )
        for path, array in words.items()
    }


def _chunk(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The largest part of a shard, cut along its first axes, that is not too large."""
    chunk = [max(1, size) for size in shard]
    for axis, size in enumerate(chunk):
        for parts in (n for n in range(1, size + 1) if size % n == 0):
            chunk[axis] = size // parts
            if math.prod(chunk) * itemsize <= _MOST_CHUNK_BYTES:
                return tuple(chunk)
    return tuple(chunk)


def write(root: BucketPath, found: Mapping[str, Share]) -> None:
    """Writes the shares of this process below `root`; others may be writing theirs.

    Raises:
      BucketError: the store refused.
    """
    with told(f"write {root}"):
        opened = [
            ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": (root / path).spec(),
                    # Else a chunk of zeros would be deleted, which on S3 is not atomic.
                    "store_data_equal_to_fill_value": True,
                },
                context=CONTEXT,
                open=True,
                create=True,
                dtype=ts.dtype(share.dtype),
                shape=share.shape,
                chunk_layout=ts.ChunkLayout(chunk_shape=share.chunk),
            )
            for path, share in found.items()
        ]
        written = [
            store.result()[index].write(values)
            for store, share in zip(opened, found.values(), strict=True)
            for index, values in share.shards
        ]
        for each in written:
            each.result()


def read(root: BucketPath, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """The arrays below `root`, laid out as the shardings of `wanted` say, in its order.

    Raises:
      BucketError: the store could not be reached.
      ValueError: an array is missing, cannot be decoded or is of another shape or type.
    """
    with told(f"read {root}", data_too=False):
        plain = {path: _words(leaf) for path, leaf in wanted.items()}
        opened = {
            path: ts.open(
                {"driver": "zarr3", "kvstore": (root / path).spec()},
                context=CONTEXT,
                open=True,
                dtype=ts.dtype(np.dtype(leaf.dtype)),
                shape=leaf.shape,
            )
            for path, leaf in plain.items()
        }
        # All reads are on their way before the first is waited for.
        reads = {
            path: {_place(index): store.result()[index].read() for index in _places(plain[path])}
            for path, store in opened.items()
        }
        return [_assembled(plain[path], leaf, reads[path]) for path, leaf in wanted.items()]


def _assembled(words: jax.ShapeDtypeStruct, leaf: jax.ShapeDtypeStruct, reads: dict) -> jax.Array:
    array = jax.make_array_from_callback(
        words.shape, words.sharding, lambda index: reads[_place(index)].result(), words.dtype
    )
    if not _is_key(leaf):
        return array
    impl: list[Any] = []  # a key that is traced tells it, an abstract one does not
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(array, impl=impl[0])


def _words(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if not _is_key(leaf):
        return leaf
    kind = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=leaf.sharding)


def _places(leaf: jax.ShapeDtypeStruct) -> list[tuple[slice, ...]]:
    """Parts of the array that this process needs, each once."""
    found = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    return list({_place(index): index for index in found if index is not None}.values())


def _place(index: Any) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index)  # slices have no hash before 3.12


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
