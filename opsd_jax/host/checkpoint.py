# SPDX-License-Identifier: Apache-2.0
"""Save and restore a run: state, data position and a json record, with a checksum per leaf.

One step on disk (Orbax names the folder after the step and commits it by a rename, so that a
run killed at any moment leaves whole steps only):

    DIR/30/state/          the array tree, sharded over the processes
    DIR/30/data/           the position of the Grain iterator of each process
    DIR/30/meta/metadata   the record: dtype, shape and checksum of every leaf, the metrics of
                           the step, the caller's own meta; sealed by its own sha256

Orbax notices a truncated file but restores many a flipped byte without a word, so nothing is
believed here before the checksums of the record agree with the arrays as they lie on the
devices. A step that fails is passed over with a warning and its predecessor is taken; the next
save renames the failed folder to `30.bad` and deletes nothing of it.
"""

import contextlib
import errno
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from opsd_jax.errors import UserError
from opsd_jax.host.bucket import BucketPath
from opsd_jax.host.checkpoint_record import (
    Damaged,
    finite_metric,
    make_record,
    one_line,
    read_record,
    read_step,
    seal,
)

_log = logging.getLogger(__name__)
_NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")  # tensorstore


class Restored(NamedTuple):
    """What a restore found: the step, the state on its devices, and the caller's meta."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the latest `max_to_keep` steps, and the best one.

    Nothing is written, not even the folder, before the first `save`; a reader (evaluation,
    export) may therefore look at the folder of a run that is still training. Every process of a
    multi-process run makes the same calls in the same order.

        with Checkpoints(workdir / "checkpoints", 3, "eval/student/accuracy") as checkpoints:
            if checkpoints.steps():
                step, state, meta = checkpoints.restore(abstract_state, data_iterator)
            ...
            checkpoints.save(step, state, data_iterator, {"config": text}, metrics)

    Args:
      directory: the folder of the run's checkpoints (in a bucket: `bucket_checkpoint.py`).
      max_to_keep: how many of the latest steps survive; None keeps all.
      best_metric: name in the `metrics` given to `save`; the step with the highest finite value
        survives too (the later of two equals).
      warn: where a damaged step is told, once, on process 0.
    """

    def __init__(
        self,
        directory: epath.PathLike | BucketPath,
        max_to_keep: int | None = None,
        best_metric: str | None = None,
        warn: Callable[[str], None] = _log.warning,
    ):
        if max_to_keep is not None and max_to_keep < 1:
            raise UserError(f"max_to_keep must be at least 1 or None, not {max_to_keep}")
        in_bucket = isinstance(directory, BucketPath)
        self._directory: Any = directory if in_bucket else epath.Path(directory).absolute()
        self._max_to_keep = max_to_keep
        self._best_metric = best_metric
        self._warn = warn
        self._manager: ocp.CheckpointManager | None = None  # made by the first save
        self._scores: dict[int, float | None] = {}
        self._bad: list[int] = []  # steps that failed to restore, still in their place

    def steps(self) -> list[int]:
        """The committed steps, in increasing order, damaged ones included."""
        if not self._directory.is_dir():
            return []
        names = ocp.path.step.standard_name_format()
        return sorted(found.step for found in names.find_all(self._directory))

    def meta(self) -> dict[str, Any]:
        """The caller's meta of the latest step whose record is whole; {} where there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                return read_record(self._directory / str(step))["meta"]
        return {}

    def best_step(self) -> int | None:
        """The step with the highest `best_metric`; None if no step has a finite one."""
        return self._best_of(self.steps())

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any = None,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Copies the state off the devices and returns; threads write it to disk.

        `state` may be donated and the iterator advanced at once. An error of the previous
        save is raised here, or by `wait` or `close`, at the latest.

        Args:
          step: the number of updates behind `state`.
          state: a tree of arrays (sharded ones too, typed keys too).
          data_iterator: a Grain iterator, or None.
          meta: anything json can hold; `restore` gives it back.
          metrics: the metrics of the step; `best_metric` is looked up here.

        Returns:
          False if this step was saved before (it is not written again).

        Raises:
          UserError: the disk is full or not writable; or the folder holds a later step.
        """
        self.wait()
        if self._bad:
            self._set_aside_bad_steps()
        known = self._known()
        if step in known:
            return False
        if known and max(known) > step:
            raise UserError(
                f"cannot save step {step}: {self._directory} already holds step {max(known)}; "
                "remove the later steps or train into another workdir"
            )
        record = make_record(state, data_iterator, meta or {}, metrics or {})
        self._scores[step] = finite_metric(record, self._best_metric)
        return self._write(step, state, record, data_iterator)

    def _known(self) -> Sequence[int]:
        return self._open_manager().all_steps()

    def _write(self, step: int, state: Any, record: Mapping[str, Any], data_iterator: Any) -> bool:
        """Begins to write a step; copies of the arrays are made before it returns."""
        items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(seal(record))}
        if data_iterator is not None:
            import grain  # late: who only reads weights needs no data pipeline

            items["data"] = grain.checkpoint.CheckpointSave(data_iterator)
        with self._disk_trouble_told():
            return self._open_manager().save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self, abstract_state: Any, data_iterator: Any = None, step: int | None = None
    ) -> Restored:
        """The latest whole step (or `step`), its arrays laid out as `abstract_state` says.

        Args:
          abstract_state: the tree of `save`, of arrays or jax.ShapeDtypeStruct; the sharding of
            each leaf may be another than at the save (none: the first local device).
          data_iterator: set to the saved position; None leaves the position alone.
          step: exactly this step, without falling back.

        Raises:
          UserError: no checkpoint, none whole, the asked one missing or damaged, or
            the first leaf in which the state differs from the saved one.
        """
        return self._restore(abstract_state, data_iterator, step, partial=False)

    def restore_only(self, abstract_parts: Mapping[str, Any], step: int | None = None) -> Restored:
        """`restore` for some top-level fields of the state alone: {"params": abstract_params}.

        The rest (the optimiser, say) is neither read nor verified; `.state` is a dict.
        """
        return self._restore(dict(abstract_parts), None, step, partial=True)

    def wait(self) -> None:
        """Returns when the last save is on disk; raises its error if it failed."""
        if self._manager is not None:
            with self._disk_trouble_told():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and stops the writing threads."""
        manager = self._manager
        if manager is not None:
            with self._disk_trouble_told():
                self._manager = None
                manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        try:
            self.close()
        except Exception as error:
            if error_type is None:
                raise
            self._warn(one_line(error))  # the error on its way out matters more

    def _open_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_LatestAndBest(self._max_to_keep, self._best_of),
                cleanup_tmp_directories=True,
            )
            logging.getLogger("absl").addFilter(_no_orbax_traceback)
            with self._disk_trouble_told():
                self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self._manager

    def _set_aside_bad_steps(self) -> None:
        """Renames `30` to `30.bad`, so that step 30 can be saved again and is never read."""
        self.close()
        if jax.process_index() == 0:
            for step in self._bad:
                source = self._directory / str(step)
                targets = (self._directory / f"{step}.bad{n or ''}" for n in itertools.count())
                with self._disk_trouble_told():
                    source.rename(next(path for path in targets if not path.exists()))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("opsd_jax:set_aside_bad_steps")
        self._bad.clear()

    @contextlib.contextmanager
    def _disk_trouble_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = _disk_trouble(error)
            if reason is None:
                raise
            raise UserError(
                f"cannot write a checkpoint to {self._directory}: {reason}; "
                "the checkpoints before it are untouched"
            ) from error

    def _best_of(self, steps: Sequence[int]) -> int | None:
        if self._best_metric is None:
            return None
        for step in steps:
            if step not in self._scores:
                with contextlib.suppress(Damaged):  # a damaged record has no score
                    record = read_record(self._directory / str(step))
                    self._scores[step] = finite_metric(record, self._best_metric)
        scored = [(self._scores[s], s) for s in steps if self._scores.get(s) is not None]
        return max(scored)[1] if scored else None

    def _restore(
        self, abstract: Any, data_iterator: Any, step: int | None, partial: bool
    ) -> Restored:
        self.wait()
        steps = self.steps()
        if not steps:
            raise UserError(f"there is no checkpoint in {self._directory}")
        if step is not None and step not in steps:
            raise UserError(f"{self._directory} has no step {step}, only {steps}")
        damages = []
        for candidate in steps[::-1] if step is None else [step]:
            folder = self._directory / str(candidate)
            try:
                state, meta = read_step(folder, abstract, data_iterator, partial)
                return Restored(candidate, state, meta)
            except Damaged as damage:
                damages.append(f"{folder} is damaged ({damage})")
            if step is None and candidate not in self._bad:
                self._bad.append(candidate)
                if jax.process_index() == 0:
                    self._warn(f"{damages[-1]}: falling back to the step before it")
        raise UserError("no whole checkpoint to restore: " + "; ".join(damages))


class _LatestAndBest:
    """Orbax's preservation policy: keep the `latest` highest steps and the best one."""

    def __init__(self, latest: int | None, best_of: Callable[[Sequence[int]], int | None]) -> None:
        self._latest = latest
        self._best_of = best_of

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = steps_to_keep(steps, self._latest, self._best_of)
        return [step in kept for step in steps]


def steps_to_keep(
    steps: Sequence[int], latest: int | None, best_of: Callable[[Sequence[int]], int | None]
) -> set[int]:
    """The `latest` highest steps (None: all) and the best one."""
    steps = sorted(steps)
    kept = {*(steps if latest is None else steps[-latest:])}
    best = best_of(steps)
    return kept if best is None else kept | {best}


def _disk_trouble(error: BaseException | None) -> str | None:
    """Why the disk refused, if that is what the error is about; threads hide it in a chain."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.strerror or errno.errorcode.get(error.errno, "")
        for words in _NO_ROOM:
            if words in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


def _no_orbax_traceback(record: logging.LogRecord) -> bool:
    """Orbax logs a traceback per thread for an error that it also raises; once is enough."""
    return not (record.exc_info and "orbax" in record.pathname)
