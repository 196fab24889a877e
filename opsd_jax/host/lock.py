# SPDX-License-Identifier: Apache-2.0
"""A lock on a folder, so that two runs cannot destroy what each other has written.

On disk it is a flock; in a bucket, whose `Stage` the folder is, a `Lease`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from opsd_jax.errors import UserError
from opsd_jax.host.pod import refuse_together
from opsd_jax.host.stage import Stage, stage_of


@contextlib.contextmanager
def only_writer(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps every other command from writing to a folder until the context ends.

    Process 0 holds the lock for its pod, and all processes must call. However a process ends,
    kill -9 included, the system takes its lock back; the file stays, which means nothing. Where
    nothing was and nothing was written, as by a command that is refused, nothing stays. In a
    bucket a killed process's lock is taken over a minute later, and once the lock is there the
    folder is what the bucket has.

    Args:
      folder: made if missing.
      say: told where the file system knows no locks: there, nothing is kept out.

    Raises:
      UserError: another command is writing to it, or nobody can; on all processes of a pod.
    """
    stage = stage_of(folder)
    with contextlib.ExitStack() as stack:
        refusal: UserError | None = None
        if jax.process_index() == 0:
            try:
                lock = _locked(folder, say) if stage is None else _leased(stage, folder, say)
                stack.enter_context(lock)
            except UserError as error:
                refusal = error
        refuse_together(refusal, str(folder))
        if stage is not None:
            stage.fetch()
        yield


@contextlib.contextmanager
def _leased(stage: Stage, folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    from opsd_jax.host.lease import Lease, kept  # late: most need no tensorstore

    stage.lease = Lease(stage.path_of(folder / ".lock"))
    stage.lease.take(say)
    try:
        with kept(stage.lease, stage.upload, say):
            yield
    finally:
        stage.lease = None


@contextlib.contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    path = folder / ".lock"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and must be a folder")
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise UserError(f"{path} must be a file; remove it")
    new = [place for place in (path, folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        _remove_empty(new)
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_busy = not _is_same(file.fileno(), path)
        except BlockingIOError:
            is_busy = True
        except OSError as error:
            is_busy = False
            say(
                f"{path} cannot be locked ({error.strerror}): make sure that no second command "
                f"writes to {folder}"
            )
        if is_busy:
            raise UserError(
                f"another command is writing to {folder}; wait for its end, or name another folder"
            )
        try:
            yield
        finally:
            if path in new and os.listdir(folder) == [path.name]:
                _remove_empty(new)


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one there: who ended meanwhile may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_empty(places: Iterable[Path]) -> None:
    """Removes an empty file and the folders around it, innermost first, as far as nothing else is
    there by now."""
    with contextlib.suppress(OSError):
        for place in places:
            if place.is_dir():
                place.rmdir()
            else:
                place.unlink(missing_ok=True)
