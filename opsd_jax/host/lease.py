# SPDX-License-Identifier: Apache-2.0
"""One writer of a workdir in a bucket: a lock that its owner renews, and that a dead one loses.

A store has no flock, but writes an object only if its version is the one that was read. The lock is
an object made so, and so replaced every quarter of `LEASE_S`. Who finds one watches it: if it
changes, its owner lives, and the newcomer is refused; if it stays the same for `LEASE_S` by the
newcomer's own clock, it is taken over. No clock of another host is asked.

A process that was frozen for so long finds the lock changed when it wakes. It is asked to `confirm`
before anything is uploaded and before a checkpoint is committed, and then gives up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from opsd_jax.errors import UserError
from opsd_jax.host.bucket import BucketError, BucketPath

LEASE_S = 60.0


class Lease:
    """The lock at `path`, once `take` has returned.

    Args:
      path: the object.
      seconds: after which a lock that nobody renews is nobody's.
    """

    def __init__(self, path: BucketPath, seconds: float = LEASE_S):
        self._path, self.seconds = path, seconds
        self._id = uuid.uuid4().hex
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "id": self._id}
        self._count = 0
        self._version = b""
        self._renewed_at = 0.0
        self._mutex = threading.Lock()

    def take(self, say: Callable[[str], None]) -> None:
        """Makes the lock, at once or after an old one has proved to be a dead process's.

        Raises:
          UserError: another process renews it.
        """
        found, version = self._path.read()
        if found is not None:
            say(f"{self._path} is there: waiting {self.seconds:g} s at most to see if it is used")
            version = self._outlived(version)
        asked_at = time.monotonic()
        new = self._path.write_if(self._text(), version)
        if new is None:
            raise self._busy()
        self._version, self._renewed_at = new, asked_at

    def _outlived(self, version: bytes) -> bytes:
        """The lock's version, once nobody can be holding it any more."""
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            time.sleep(self.seconds / 20)
            found, now = self._path.read()
            if found is None:
                return now
            if now != version:
                raise self._busy()
        return version

    def renew(self) -> None:
        """Replaces the lock by a newer one of the same owner.

        Raises:
          UserError: another process has it.
        """
        with self._mutex:
            asked_at = time.monotonic()  # the store may write at once and answer late
            version = self._version
            while (new := self._path.write_if(self._text(), version)) is None:
                # Also if the answer to a write that succeeded was lost.
                found, version = self._path.read()
                if found is None or self._id.encode() not in found:
                    raise UserError(
                        f"another process has taken over {self._path}, which this one had not "
                        f"renewed for {time.monotonic() - self._renewed_at:.0f} s; it stops here"
                    )
            self._version, self._renewed_at = new, asked_at

    def confirm(self) -> None:
        """Returns if nobody else can have the lock; asks the store where that is not certain."""
        if time.monotonic() - self._renewed_at > self.seconds / 2:
            self.renew()

    def release(self) -> None:
        """Deletes the lock, if it still is this process's."""
        with self._mutex:
            self._path.write_if(None, self._version)

    def _text(self) -> bytes:
        self._count += 1  # S3 versions an object by its content
        return json.dumps(self._owner | {"count": self._count}).encode()

    def _busy(self) -> UserError:
        return UserError(
            f"another command is writing to {str(self._path).removesuffix('/.lock')}; wait for its "
            "end, or name another folder"
        )


@contextlib.contextmanager
def kept(lease: Lease, upload: Callable[[], None], say: Callable[[str], None]) -> Iterator[None]:
    """Renews a lease and calls `upload` at each renewal, and once more when the context ends.

    Where the store cannot be reached, or a file not read, it is tried again; after the lease was
    lost, nothing is.
    """
    over = threading.Event()

    def keep() -> None:
        while not over.wait(lease.seconds / 4):
            try:
                lease.renew()
                upload()
            except (BucketError, OSError) as error:
                say(f"{error}; trying again")
            except UserError as error:
                say(str(error))
                return

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        over.set()
        thread.join()
        with contextlib.suppress(UserError, OSError):  # the error on its way out matters more
            upload()
            lease.release()
        raise
    over.set()
    thread.join()
    upload()
    lease.release()
