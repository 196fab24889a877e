# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a workdir in a bucket; what a step holds is as in `checkpoint.py`.

    checkpoints/30/state/LEAF/…           zarr objects, each written by the process that has it
    checkpoints/30/data/process_0-of-2.json
    checkpoints/30/meta/metadata          the record, written last: a step without it is none

A store has no rename to commit by. Process 0 writes the record once all processes have met after
their last object, and deletes it first when it deletes a step. What a killed run left of a step is
removed by the next save.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from opsd_jax.errors import UserError
from opsd_jax.host import array_objects
from opsd_jax.host.checkpoint import Checkpoints, _log, steps_to_keep
from opsd_jax.host.checkpoint_record import leaves, position_text, seal
from opsd_jax.host.pod import barrier, refuse_together
from opsd_jax.host.stage import Stage, stage_of

_RECORD = "meta/metadata"
_count = itertools.count()


def checkpoints_of(
    workdir: Path,
    max_to_keep: int | None = None,
    best_metric: str | None = None,
    warn: Callable[[str], None] = _log.warning,
) -> Checkpoints:
    """The checkpoints of a workdir, on disk or in the bucket that it mirrors (`stage.local`)."""
    if stage := stage_of(workdir):
        return BucketCheckpoints(stage, max_to_keep, best_metric, warn)
    return Checkpoints(workdir / "checkpoints", max_to_keep, best_metric, warn)


class BucketCheckpoints(Checkpoints):
    """`Checkpoints` whose folder is a prefix in a bucket.

    Args:
      stage: of the workdir; what it has is uploaded before each step.
      max_to_keep, best_metric, warn: as there.
    """

    def __init__(
        self,
        stage: Stage,
        max_to_keep: int | None,
        best_metric: str | None,
        warn: Callable[[str], None],
    ):
        super().__init__(stage.source / "checkpoints", max_to_keep, best_metric, warn)
        self._stage = stage
        self._committed: list[int] | None = None  # looked for by the first save
        self._writing: Future | None = None

    def steps(self) -> list[int]:
        return sorted(_steps(self._directory.names(), _RECORD))

    def wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        self.wait()
        self._committed = None

    def _known(self) -> list[int]:
        if self._committed is None:
            self._committed = self.steps()
        return self._committed

    def _write(self, step: int, state: Any, record: Mapping[str, Any], data_iterator: Any) -> bool:
        refusal = None
        if jax.process_index() == 0:
            try:
                self._stage.upload()  # the lines that this step counts
                self._remove_leftovers()
            except UserError as error:
                refusal = error
        refuse_together(refusal, str(self._directory))
        shares = array_objects.shares(leaves(state))
        position = None if data_iterator is None else position_text(data_iterator)
        sealed = json.dumps(seal(record))
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing = thread.submit(self._upload, step, shares, position, sealed)
        thread.shutdown(wait=False)
        return True

    def _upload(self, step: int, shares: Any, position: str | None, sealed: str) -> None:
        """One step, in a thread of each process."""
        folder = self._directory / str(step)
        array_objects.write(folder / "state", shares)
        if position is not None:
            name = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
            (folder / "data" / name).write(position.encode())
        steps, number = [*self._known(), step], next(_count)
        # Before any is deleted: the best is read from the records, on every process alike.
        kept = steps_to_keep(steps, self._max_to_keep, self._best_of)
        barrier(f"opsd_jax:written:{number}")
        if jax.process_index() == 0:
            self._stage.confirm()
            (folder / _RECORD).write(sealed.encode())
            for old in sorted(set(steps) - kept):
                self._delete(old)
        self._committed = sorted(kept)
        barrier(f"opsd_jax:committed:{number}")

    def _delete(self, step: int) -> None:
        folder = self._directory / str(step)
        (folder / _RECORD).unlink()
        folder.rmtree()

    def _remove_leftovers(self) -> None:
        names = self._directory.names()
        for step in _steps(names) - _steps(names, _RECORD):
            self._delete(step)


def _steps(names: list[str], end: str = "") -> set[int]:
    """Steps of which there is an object whose name has this end."""
    found = (name.split("/", 1) for name in names)
    return {int(parts[0]) for parts in found if parts[0].isdecimal() and parts[1].endswith(end)}
