# SPDX-License-Identifier: Apache-2.0
"""How a run ends when another process of its pod dies, hangs or falls behind: soon, and told.

Exit status 75 (EX_TEMPFAIL of sysexits.h) asks a scheduler to start the job again; the same command
then goes on from the last checkpoint.

  a process dies    on CPU the next collective fails at once; else JAX misses its heartbeats for 100
                    seconds. 75, or 134 (SIGABRT) where JAX itself ends the process
  a host freezes    likewise, by its heartbeats
  a process hangs   or falls behind, and still has a heartbeat: the others wait in a collective
                    without end, and `Watchdog` ends each after train.hang_minutes without a step
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

AGAIN = 75  # exit status: the same command, started again, goes on
# What XLA says where the fault is with another process or the network, and not with this program.
_LOST = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "NCCL"),
    *("heartbeat", "coordination service", "Connection closed", "Connection reset"),
)


def other_process_lost(error: BaseException) -> str | None:
    """A sentence if the error comes from another process of the pod that is gone, else None."""
    if not isinstance(error, jax.errors.JaxRuntimeError) or not jax.distributed.is_initialized():
        return None
    reason = str(error).split("\n")[0]
    if jax.process_count() == 1 or not any(word in str(error) for word in _LOST):
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()} has lost another one ({reason}); "
        "start the same command on every host again: it goes on from the last checkpoint"
    )


def leave(why: str) -> None:
    """Says why and ends this process with status `AGAIN`, without waiting for the others."""
    sys.stdout.flush()
    os.write(2, f"\nopsd: {why}\n".encode(errors="backslashreplace"))
    os._exit(AGAIN)  # the ordinary way out meets the others, who will not come


class Watchdog:
    """Ends this process of a pod if a training step takes longer than a limit.

    It watches from the first step that is done, and not while paused; alone, it watches nothing.

        with Watchdog(60 * minutes) as watchdog:
            for ...:
                ...
                watchdog.beat()  # a step is done

    Args:
      limit_s: seconds from one step to the next; 0 = never.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s if jax.process_count() > 1 else 0.0
        self._beat_at: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self) -> None:
        """A step is done, or something else has been got over."""
        self._beat_at = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While something goes on that may take any time."""
        watching, self._beat_at = self._beat_at is not None, None
        yield
        if watching:
            self.beat()

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self._limit_s / 4)):
            beat_at = self._beat_at
            if beat_at is not None and time.monotonic() - beat_at > self._limit_s:
                leave(
                    f"no training step for {self._limit_s / 60:g} minutes (train.hang_minutes) on "
                    f"process {jax.process_index()} of {jax.process_count()}: this or another one "
                    "hangs; start the same command on every host again: it goes on from the last "
                    "checkpoint"
                )

    def __enter__(self) -> Watchdog:
        if self._limit_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
