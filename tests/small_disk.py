# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up."""

import contextlib
import resource
import signal


@contextlib.contextmanager
def small_disk(num_bytes: int):
    """No file may grow larger: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
