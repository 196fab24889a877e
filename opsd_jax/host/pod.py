# SPDX-License-Identifier: Apache-2.0
"""Barriers, broadcasts and rows of a pod's processes (multi-host), while they work on the host.

On CPU the first collective of a group of devices fails when one process comes to it 30 seconds
after another, which compiling on a busy machine is enough for; later ones wait half an hour. So
processes wait through JAX's coordination service, and connect all groups before long work.
"""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opsd_jax.errors import UserError
from opsd_jax.host.compilation_cache import keep_no_programs
from opsd_jax.model.sharding import MeshConfig, make_mesh

Made = TypeVar("Made")

# Longer than any work: the coordination service ends the wait for a process that has died.
_ONE_DAY_MS = 24 * 3600 * 1000
_count = itertools.count()


def wait_for_all() -> None:
    """Returns once every process has called this, as often as the others."""
    # The key is counted and not named: names can hold paths, and processes that were given other
    # paths would wait for each other for ever instead of being refused.
    barrier(f"opsd_jax:{next(_count)}")


def barrier(key: str) -> None:
    """Returns once every process has called this with the same key; a key serves once."""
    from orbax.checkpoint import multihost  # half a second that `opsd generate` need not wait

    multihost.get_barrier_sync_fn()(key=key, timeout_ms=_ONE_DAY_MS)


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects this process with the others of its pod, before anything touches a device.

    Args:
      coordinator: HOST:PORT of process 0, at which it listens; None: JAX finds all three by itself.
      num_processes, process_id: how many there are, and which this is.

    Raises:
      UserError: JAX finds nothing, or the others did not come within five minutes.
    """
    try:
        if coordinator is None:
            jax.distributed.initialize()
        else:
            # Under SLURM detection would leave each process one GPU.
            jax.distributed.initialize(
                coordinator, num_processes, process_id, cluster_detection_method="deactivate"
            )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if coordinator is not None:
            raise UserError(
                f"--coordinator={coordinator}: {reason} (every process must be started within five "
                "minutes, and reach that port of the host of process 0)"
            ) from None
        raise UserError(
            f"--distributed: {reason} (JAX finds the other processes under SLURM, Open MPI, "
            "Kubernetes and on Cloud TPU; on plain hosts name them by --coordinator, "
            "--num_processes and --process_id; a single process needs none of these)"
        ) from None
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # There each process has keys of its own and the first alone writes (jax 0.10), so that a
        # later start runs a stored program beside freshly compiled ones: they wait without end.
        keep_no_programs()


def require_32_bits() -> None:
    """Raises a UserError where JAX makes 64-bit arrays by default: parameters, moments and counters
    would have other types than checkpoints have, and no result would be comparable."""
    if jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        raise UserError("JAX_ENABLE_X64 must be unset or 0, not 1: everything here is of 32 bits")


def connected_mesh(config: MeshConfig) -> Mesh:
    """`make_mesh`, whose groups of devices have found each other over all axes."""
    require_32_bits()
    mesh = make_mesh(config)
    if jax.process_count() > 1:
        wait_for_all()
        for axes in (mesh.axis_names, *mesh.axis_names):
            _sum_over(mesh, axes)
    return mesh


class FirstProcessSays:
    """Process 0's yes or no, for all to act on alike, and none waits for it.

    `ask` before a step is dispatched; once the step before it is done, `said` is known. (A
    broadcast would hold every step until the one before it is done.)
    """

    def __init__(self, mesh: Mesh) -> None:
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        whole = NamedSharding(mesh, PartitionSpec())
        self._sum = jax.jit(lambda x: x.sum(), out_shardings=whole)
        self._said: bool | jax.Array = False

    def ask(self, yes: bool) -> None:
        """Every process calls; what the others say does not count."""
        if jax.process_count() == 1:
            self._said = yes
            return
        word = np.full(self._size, yes and jax.process_index() == 0, np.int32)
        # Every device has a share, and those of process 0 alone hold a yes.
        shares = jax.make_array_from_callback(word.shape, self._split, lambda index: word[index])
        self._said = self._sum(shares)

    def said(self) -> bool:
        """The last answer, the same on every process."""
        return bool(self._said)


def _sum_over(mesh: Mesh, axes: str | tuple[str, ...]) -> None:
    split, zeros = PartitionSpec(mesh.axis_names), np.zeros(mesh.size, np.float32)
    # Not made inside the program: the sum of a constant would be one, without a collective.
    x = jax.make_array_from_callback(
        zeros.shape, NamedSharding(mesh, split), lambda index: zeros[index]
    )
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=split, out_specs=split
    )
    jax.block_until_ready(jax.jit(total)(x))


def time_of_first_process() -> datetime.datetime:
    """The present in UTC and whole seconds, the same on every process."""
    seconds = np.uint32(time.time())
    if jax.process_count() > 1:
        seconds = multihost_utils.broadcast_one_to_all(seconds)
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).replace(tzinfo=None)


def text_of_first_process(text: str) -> str:
    """The text that process 0 has, on every process."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.uint32(len(data))))
    filled = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        filled[:] = data
    return multihost_utils.broadcast_one_to_all(filled).tobytes().decode()


def refuse_together(refusal: UserError | None, what: str) -> None:
    """Waits for process 0 and raises what it refuses, on the others as well.

    Args:
      refusal: of process 0; the others' is not looked at.
      what: cannot be had if process 0 refuses.
    """
    wait_for_all()
    if jax.process_count() > 1:
        fine = multihost_utils.broadcast_one_to_all(np.asarray(refusal is None))
        if jax.process_index() > 0:
            told = UserError(f"{what} cannot be used; process 0 tells why")
            refusal = None if fine else told
    if refusal is not None:
        raise refusal


def first_process_first(make: Callable[[], Made], what: str) -> Made:
    """`make()`, on the other processes only after process 0 has made it and left it on disk.

    Raises:
      UserError: that of process 0, on all processes.
    """
    made, refusal = None, None
    if jax.process_index() == 0:
        try:
            made = make()
        except UserError as error:
            refusal = error
    refuse_together(refusal, what)
    if jax.process_index() > 0:
        made = make()
    wait_for_all()
    assert made is not None
    return made


def local_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, values) of the rows of a batch that this process's devices hold, ascending."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    starts = sorted(shards)
    numbers = [np.arange(start, start + len(shards[start])) for start in starts]
    return np.concatenate(numbers), np.concatenate([np.asarray(shards[s]) for s in starts])


def gathered_rows(numbers: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """[size] float32 on every process of what each knows of some rows; NaN where none does.

    Where two processes hold a row, the value of the first stands on both.
    """
    rows = np.full(size, np.nan, np.float32)
    rows[numbers] = values
    if jax.process_count() == 1:
        return rows
    found = multihost_utils.process_allgather(rows)
    first = np.argmin(np.isnan(found), axis=0)
    return found[first, np.arange(size)]
