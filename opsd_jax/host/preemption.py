# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C ask the loop to save and stop after the current step."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from opsd_jax.host.progress import in_notebook


class Preemption:
    """Tells the training loop, at the same step on every process, that it should stop.

    Alone, a process listens to SIGTERM and SIGINT itself; the second signal kills as usual, and
    in a notebook raises KeyboardInterrupt, which leaves the kernel alive.
    After jax.distributed.initialize JAX owns SIGTERM: whichever process receives it, all agree
    on one later call of `requested`. Ctrl-C is then handed on as SIGTERM, for the same agreement.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.requested():
                    break  # save, exit 0
    """

    def __init__(self) -> None:
        self._signalled = False
        self._calls = 0
        self._distributed = jax.distributed.is_initialized()
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """True once the run should stop; ask after every step, on every process."""
        self._calls += 1
        if not self._signalled and self._distributed:
            # Not the step's number: JAX waits for the one after the last that it was told, which
            # is 1 if the signal comes before the first step, and a resumed run has no step 1.
            self._signalled = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._signalled

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            numbers = [signal.SIGINT] if self._distributed else [signal.SIGINT, signal.SIGTERM]
            self._previous = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        for each, handler in self._previous.items():
            # The default kills also when the main thread is stuck in C++.
            signal.signal(each, handler if in_notebook() else signal.SIG_DFL)
        # Not print: a handler may interrupt one.
        os.write(2, b"\nstopping after this step to save; the same signal again kills\n")
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._signalled = True
