# SPDX-License-Identifier: Apache-2.0
"""A workdir in a bucket: small files in a local folder that mirrors it, checkpoints in place.

Stores cannot append, rename or lock, and list slowly. So whatever a run reads and writes as files
(config.gin, metrics.jsonl, samples, goodput.json, the testbed's base, compiled programs, …) lies in
a local folder of this process, a stage, whose changed files are uploaded whole: before each
checkpoint, every 15 seconds, and in the end. What a checkpoint counts is thus in the bucket before
the checkpoint is, and a run that is killed anywhere resumes from the bucket alone: its lines behind
the checkpoint are cut there as on a disk. Checkpoints are as large as the model and sharded over
hosts; every process writes its part right into the bucket (`bucket_checkpoint.py`).

Mirroring checkpoints, too, would have been less code; but no host of a pod has all of one.

    workdir = local("gs://bucket/run")      # a Path; of a folder that is mounted, itself
    with only_writer(workdir, say): ...     # uploads while it lasts
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from opsd_jax.errors import STAND_INS, as_named
from opsd_jax.host.files import is_bucket, require_mounted, split_bucket

if TYPE_CHECKING:
    from opsd_jax.host.bucket import BucketPath
    from opsd_jax.host.lease import Lease

_stages: dict[str, Stage] = {}  # by URL; a process has one of each


def local(workdir: str | os.PathLike[str]) -> Path:
    """Where the files of a workdir are on this machine; those of a bucket are fetched first.

    Raises:
      UserError: another scheme, no such bucket, or one that cannot be read.
    """
    if not is_bucket(workdir):
        require_mounted(workdir, "the workdir")
        return Path(workdir)
    from opsd_jax.host.bucket import BucketPath  # late: most need no tensorstore

    source = BucketPath(os.fspath(workdir))
    if str(source) not in _stages:
        _stages[str(source)] = Stage(source)
    _stages[str(source)].fetch()
    return _stages[str(source)].folder


def stage_of(path: str | os.PathLike[str]) -> Stage | None:
    """The stage that a path lies in, None for ordinary files."""
    return next((s for s in _stages.values() if Path(path).is_relative_to(s.folder)), None)


def shown(path: Path) -> str:
    """A path as its user knows it: of a file in a stage, the object's."""
    return as_named(str(path))


def remove(path: Path) -> None:
    """Deletes a file if it is there, and with the next upload its object.

    A file that is merely gone from a stage, as after a cleaning of /tmp, stays in the bucket.
    """
    path.unlink(missing_ok=True)
    if stage := stage_of(path):
        stage.removed.add(path.relative_to(stage.folder).as_posix())


def fetch(path: str | os.PathLike[str]) -> None:
    """What others have written to the bucket that a path mirrors; nothing for ordinary files."""
    if stage := stage_of(path):
        stage.fetch()


def upload(path: str | os.PathLike[str]) -> None:
    """What process 0 has changed in the stage that a path lies in; nothing for ordinary files."""
    if stage := stage_of(path):
        import jax  # late: a report needs none

        if jax.process_index() == 0:
            stage.upload()


class Stage:
    """A local folder that mirrors the objects of a workdir, checkpoints and locks left out.

    Args:
      source: the workdir in the bucket.
    """

    def __init__(self, source: BucketPath):
        self.source = source
        parent = os.path.realpath(tempfile.mkdtemp(prefix="opsd_jax_bucket_"))
        atexit.register(shutil.rmtree, parent, ignore_errors=True)
        self.folder = Path(parent).joinpath(*split_bucket(str(source)))
        self.folder.mkdir(parents=True)
        STAND_INS[str(self.folder)] = str(source)
        self.lease: Lease | None = None  # of the writer that this process is
        self.removed: set[str] = set()
        self._known: dict[str, tuple[int, int]] = {}  # size and time as the bucket has them
        self._versions: dict[str, bytes] = {}
        self._mutex = threading.Lock()  # two uploads at once could end with the older one

    def fetch(self) -> None:
        """Makes the folder what the bucket has."""
        with self._mutex:
            there = [name for name in self.source.names() if _is_mirrored(name)]
            with ThreadPoolExecutor(16) as pool:
                for name, (content, version) in zip(
                    there, pool.map(self._read, there), strict=True
                ):
                    # As before, which a store need not notice, or deleted since.
                    if content is None or version == self._versions.get(name):
                        continue
                    path = self.folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                    self._known[name], self._versions[name] = _look(path), version
            for name in self._known.keys() - set(there):
                (self.folder / name).unlink(missing_ok=True)
                self._forget(name)

    def upload(self) -> None:
        """Makes the bucket what the folder has.

        Raises:
          UserError: another process has become the writer, or the store refuses.
        """
        with self._mutex:
            self.confirm()
            for name in list(self.removed):
                if name in self._known:
                    (self.source / name).unlink()
                    self._forget(name)
                self.removed.discard(name)  # only now: a store that is away is asked again
            # Not by rglob, which in Python 3.11 raises where a folder is renamed meanwhile.
            walked = os.walk(self.folder)
            for path in sorted(Path(at, file) for at, _, files in walked for file in files):
                name = path.relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):  # renamed since
                    if not _is_mirrored(name) or not path.is_file():
                        continue
                    # Looked at before it is read: what is appended meanwhile travels next time.
                    seen = _look(path)
                    if seen != self._known.get(name):
                        self.confirm()  # the files before it may have taken minutes
                        self._versions[name] = (self.source / name).write(path.read_bytes())
                        self._known[name] = seen

    def path_of(self, path: Path) -> BucketPath:
        """Of a path in the folder, where it is in the bucket."""
        name = path.relative_to(self.folder).as_posix()
        return self.source if name == "." else self.source / name

    def confirm(self) -> None:
        """Raises a UserError if another process has become the writer."""
        if self.lease is not None:
            self.lease.confirm()

    def _read(self, name: str) -> tuple[bytes | None, bytes]:
        return (self.source / name).read(unless=self._versions.get(name))

    def _forget(self, name: str) -> None:
        del self._known[name], self._versions[name]


def _look(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _is_mirrored(name: str) -> bool:
    """Not checkpoints, nor locks and unfinished files, nor what would lie outside of the folder."""
    parts = name.split("/")
    apart = parts[0] == "checkpoints" or "\0" in name
    # TFDS prepares a data set in a folder 1.0.0.incomplete…, and others in hidden ones.
    unfinished = name.endswith(".tmp") or ".incomplete" in name
    return not (apart or unfinished or any(not part or part[0] == "." for part in parts))
