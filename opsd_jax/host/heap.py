# SPDX-License-Identifier: Apache-2.0
"""Memory that XLA's compilers have freed, given back to the system before the program runs."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import jax

from opsd_jax.host.chips import COMPILED


@contextlib.contextmanager
def compilers_memory_returned(least_s: float = 0.5) -> Iterator[None]:
    """Until the context ends, whatever takes `least_s` seconds to compile leaves no free memory.

    A compiler allocates in small pieces, which glibc keeps for the process once they are free:
    100 to 300 MB for a step, at the moment that the step asks for its own. Other C libraries
    are left alone.
    """
    trim = _trim()

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs >= least_s:
            trim()

    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)


def _trim() -> Callable[[], object]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc; Windows takes no None
        return lambda: None
    return lambda: trim(0)
