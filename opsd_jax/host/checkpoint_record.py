# SPDX-License-Identifier: Apache-2.0
"""The record of a checkpoint: dtype, shape and checksum of every leaf, sealed by SHA-256.

The record is a json file beside the arrays. It says whether a checkpoint fits a run (same
leaves, shapes, dtypes: otherwise the user mixed up models or optimisers) and whether its bytes
are still those that were saved (otherwise the disk failed): two different things to tell.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from opsd_jax.errors import UserError
from opsd_jax.host import array_objects
from opsd_jax.host.bucket import BucketError, BucketPath

T = TypeVar("T")


class Damaged(Exception):
    """A step that cannot be believed; its predecessor may be whole."""


# ------------------------------------------------------------------------------ checksums


@jax.jit
def leaf_checksum(leaf: jax.Array) -> jax.Array:
    """Sum over the elements of hash(bits + index * odd) mod 2**32, as a uint32 scalar.

    Integer addition is exact and commutes and `index` counts in the global array, so every
    sharding gives the same number. The hash ("lowbias32", Wellons 2018) is a bijection: a
    change within one word always shows, any other with probability 1 - 2**-32.

    Args:
      leaf: any dtype, typed PRNG keys included; any sharding.
    """
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    info = jnp.finfo if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo
    width = min(info(leaf.dtype).bits, 32)  # 64-bit elements become pairs of words
    words = jax.lax.bitcast_convert_type(leaf, f"uint{width}").astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):  # not by a reshape, which would move shards
        index = index * jnp.uint32(size % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    hashed = words + index * jnp.uint32(0x9E3779B1)
    hashed = (hashed ^ (hashed >> 16)) * jnp.uint32(0x7FEB352D)
    hashed = (hashed ^ (hashed >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.sum(hashed ^ (hashed >> 16), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of every leaf by its path; the same numbers on every process."""
    jax.block_until_ready(tree)
    return {path: int(value) for path, value in jax.device_get(_checksums(leaves(tree))).items()}


@jax.jit
def _checksums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # One program: many small ones with collectives, in flight at once over virtual CPU devices,
    # can wait for each other until the runtime gives up.
    return {path: leaf_checksum(leaf) for path, leaf in flat.items()}


def leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, `params/layers/q/kernel`: dataclass fields and dict keys look alike."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}


def _kinds(tree: Any) -> dict[str, str]:
    """Type and shape of every leaf by its path, as `float32[8, 16]`."""
    flat = leaves(jax.eval_shape(lambda tree: tree, tree))
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flat.items()}


# ------------------------------------------------------------------------------- writing


def make_record(
    state: Any, data_iterator: Any, meta: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything said about one step; every process of the run must call it."""
    sums = checksums(state)
    return {
        "leaves": {p: {"kind": kind, "checksum": sums[p]} for p, kind in _kinds(state).items()},
        "data": None if data_iterator is None else _position_checksums(data_iterator),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "meta": dict(meta),
    }


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the sha256 of the record, so that a flipped byte in the json itself shows."""
    plain = json.loads(json.dumps(record))  # tuples become lists now, as they will on reading
    return {"sha256": _digest(plain), "record": plain}


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def position_text(data_iterator: Any) -> str:
    """Where an iterator of this process stands, as it is written beside the arrays."""
    position = data_iterator.get_state()
    return (
        position.decode() if isinstance(position, bytes) else json.dumps(position, sort_keys=True)
    )


def _position_checksums(data_iterator: Any) -> list[int]:
    """One CRC-32 of the iterator's position per process."""
    mine = np.asarray(zlib.crc32(position_text(data_iterator).encode()), np.uint32)
    return [int(crc) for crc in np.atleast_1d(multihost_utils.process_allgather(mine))]


# ------------------------------------------------------------------------------- reading


def read_record(folder: epath.Path | BucketPath) -> dict[str, Any]:
    """The record of the step in `folder`; raises Damaged if it is not the one written."""
    try:
        path = folder / "meta" / "metadata"
        if not path.is_file():
            raise OSError("no file meta/metadata")
        sealed = json.loads(path.read_text())
        intact = sealed["sha256"] == _digest(sealed["record"])
    except BucketError:
        raise  # the store cannot be reached: nothing is said about the record
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"its record cannot be read: {one_line(error)}") from error
    if not intact:
        raise Damaged("its record was altered")
    return sealed["record"]


def read_step(
    folder: epath.Path | BucketPath, abstract: Any, data_iterator: Any, partial: bool
) -> tuple[Any, dict[str, Any]]:
    """The verified state and meta of one step; with `partial`, only what `abstract` names.

    Raises:
      Damaged: something of it is missing, unreadable or altered (on whichever process).
      UserError: it is whole as far as the record tells, but not of this run.
    """
    record = _agreed(lambda: read_record(folder))
    check_fit(folder, record, abstract, data_iterator, partial)
    state = _agreed(lambda: _read_arrays(folder, abstract))
    kinds = _kinds(state)
    for path, checksum in checksums(state).items():
        saved = record["leaves"][path]  # a flipped byte can turn a typed key into plain words
        if checksum != saved["checksum"] or kinds[path] != saved["kind"]:
            raise Damaged(f"leaf {path} differs from what was saved")
    if data_iterator is not None:
        count, positions = jax.process_count(), record["data"]
        if len(positions) != count:  # all equal, as `check_fit` has seen
            positions = positions[:1] * count
        writer = jax.process_index() if len(record["data"]) == count else 0
        file = folder / "data" / f"process_{writer}-of-{len(record['data'])}.json"
        _agreed(lambda: _set_position(data_iterator, file.read_text()))
        if _position_checksums(data_iterator) != positions:
            raise Damaged("the data position differs from what was saved")
    return state, record["meta"]


def _set_position(data_iterator: Any, text: str) -> None:
    """What Grain's handler does with the file of one process, which it takes for its own alone."""
    is_bytes = isinstance(data_iterator.get_state(), bytes)
    data_iterator.set_state(text.encode() if is_bytes else json.loads(text))


def check_fit(
    folder: epath.Path | BucketPath,
    record: Mapping[str, Any],
    abstract: Any,
    data_iterator: Any,
    partial: bool,
) -> None:
    """Raises a UserError that names the first leaf in which checkpoint and run differ."""
    saved = record["leaves"]
    wanted = _kinds(abstract)
    hint = "is this the checkpoint of another model or optimiser?"
    for path, here in wanted.items():
        if path not in saved:
            raise UserError(f"checkpoint {folder} has no leaf {path}; {hint}")
        if here != (there := saved[path]["kind"]):
            raise UserError(f"leaf {path} is {there} in {folder} and {here} here; {hint}")
    extra = None if partial else next((path for path in saved if path not in wanted), None)
    if extra is not None:
        raise UserError(f"checkpoint {folder} has a leaf {extra} that this run has not; {hint}")
    if data_iterator is None:
        return
    positions = record["data"] or []
    # Where all processes read the same batches, any number of them goes on from one position.
    if len(positions) != jax.process_count() and len(set(positions)) != 1:
        raise UserError(
            f"checkpoint {folder} holds different data positions of {len(positions)} processes and "
            f"cannot set those of {jax.process_count()}; run on as many processes as wrote it"
        )


def _read_arrays(folder: epath.Path | BucketPath, abstract: Any) -> Any:
    """Orbax's handler without its manager: no barrier to hang in when one process fails."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        kind = jax.eval_shape(lambda x: x, leaf)
        sharding = getattr(leaf, "sharding", None) or device
        return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=sharding)

    target = jax.tree.map(placed, abstract)
    if isinstance(folder, BucketPath):
        found = array_objects.read(folder / "state", leaves(target))
        return jax.tree.unflatten(jax.tree.structure(target), found)
    args = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)


def _agreed(read: Callable[[], T]) -> T:
    """Runs `read`; any failure, on this or another process, becomes Damaged on all of them."""
    result: T | None = None
    failure: Exception | None = None
    try:
        result = read()
    except (MemoryError, jax.errors.JaxRuntimeError, BucketError):
        raise  # the machine failed, not the checkpoint
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        whole = multihost_utils.process_allgather(np.asarray(failure is None))
        if failure is None and not np.all(whole):
            failure = Damaged(f"process {int(np.argmin(whole))} could not read its part")
    if failure is not None:
        raise failure if isinstance(failure, Damaged) else Damaged(one_line(failure))
    return result  # type: ignore[return-value]


def one_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's text, cut to `limit`, or its type where it has none."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def finite_metric(record: Mapping[str, Any], name: str | None) -> float | None:
    """The metric `name` of the step, None where it is missing or not finite."""
    value = record["metrics"].get(name)
    return value if value is not None and math.isfinite(value) else None
