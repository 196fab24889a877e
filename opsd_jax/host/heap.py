# SPDX-License-Identifier: Apache-2.0
"""Memory that XLA's compilers and programs have freed, given back to the system."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import jax

from opsd_jax.host.chips import COMPILED

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGE, _KEPT = 16 << 20, 32 << 20  # bytes


@contextlib.contextmanager
def compilers_memory_returned(least_s: float = 0.5) -> Iterator[None]:
    """Until the context ends, whatever takes `least_s` seconds to compile leaves no free memory.

    A compiler allocates in small pieces, which glibc keeps for the process once they are free:
    100 to 300 MB for a step, at the moment that the step asks for its own. From then on to the end
    of the process, blocks of 16 MiB and more go back as soon as they are free: glibc takes them for
    the heap once it has seen some, and then holds what lies below the last. Of the heap's end it
    keeps 32 MiB, or every smaller block would be fetched again. Other C libraries are left alone.
    """
    trim = _glibc("malloc_trim", 0)
    _glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)()
    _glibc("mallopt", _M_TRIM_THRESHOLD, _KEPT)()

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs >= least_s:
            trim()

    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)


def _glibc(name: str, *arguments: int) -> Callable[[], object]:
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # no glibc; Windows takes no None
        return lambda: None
    return lambda: function(*arguments)
