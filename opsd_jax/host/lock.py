# SPDX-License-Identifier: Apache-2.0
"""A lock on a folder, so that two runs cannot destroy what each other has written.

On disk it is a flock; in a bucket, whose `Stage` the folder is, a `Lease`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

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

    lease = Lease(stage.path_of(folder / ".lock"))
    lease.take(say)
    stage.lease = lease
    try:
        with kept(lease, stage.upload, say):
            yield
    finally:
        stage.lease = None


@contextlib.contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    path = folder / ".lock"
    file, new = _locked_file(path, say)
    while not _is_same(file.fileno(), path):
        file.close()  # who ended meanwhile has removed it
        file, new = _locked_file(path, say)
    with file:
        try:
            yield
        finally:
            if path in new:
                _remove_unused(path, new)


def _locked_file(path: Path, say: Callable[[str], None]) -> tuple[IO[str], list[Path]]:
    """The file, locked, and what of it and the folders around it was made for it, innermost first.

    Raises:
      UserError: it is another's, or cannot be made.
    """
    folder = path.parent
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and must be a folder")
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise UserError(f"{path} must be a file; remove it")
    around = (folder, *folder.parents)
    if broken := [place for place in around if place.is_symlink() and not place.exists()]:
        raise UserError(f"cannot write to {folder}: {broken[-1]} is a link to what is not there")
    new = [place for place in (path, *around) if not os.path.lexists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        _remove_unused(path, new)
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another command is writing to {folder}; wait for its end, or name another folder"
        ) from None
    except OSError as error:
        say(
            f"{path} cannot be locked ({error.strerror}): make sure that no second command "
            f"writes to {folder}"
        )
    return file, new


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one there."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(path: Path, new: Sequence[Path]) -> None:
    """Removes the file and the folders that are new, as far as nothing else is there by now."""
    with contextlib.suppress(OSError):
        if os.listdir(path.parent) in ([], [path.name]):
            path.unlink(missing_ok=True)
            for folder in new[1:]:
                folder.rmdir()
