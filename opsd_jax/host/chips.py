# SPDX-License-Identifier: Apache-2.0
"""What chips can do and what they were kept busy with: peak FLOP/s, memory, time spent compiling.

Peaks are the makers' figures for dense bfloat16 products and for the memory bus, per device of JAX
(from TPU v4 on a device is a chip). A kind that is not in the table has no MFU; nothing is guessed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Peak(NamedTuple):
    """Of one device: dense bfloat16 FLOP/s and bytes/s of its memory."""

    flops: float
    bandwidth: float


# TPU: the tables of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. NVIDIA: the data sheets of each
# card; those from Hopper on give the figure with sparsity, of which this is half. Names as
# `jax.Device.device_kind` has them.
PEAKS = {
    "TPU v4": Peak(275e12, 1.228e12),
    "TPU v5 lite": Peak(197e12, 0.819e12),  # v5e
    "TPU v5e": Peak(197e12, 0.819e12),
    "TPU v5": Peak(459e12, 2.765e12),  # v5p
    "TPU v5p": Peak(459e12, 2.765e12),
    "TPU v6 lite": Peak(918e12, 1.638e12),  # v6e, Trillium
    "TPU v6e": Peak(918e12, 1.638e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 1.935e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),  # SXM
    "NVIDIA H100 PCIe": Peak(756e12, 2.0e12),
    "NVIDIA H100 NVL": Peak(835e12, 3.9e12),
    "NVIDIA H200": Peak(989e12, 4.8e12),  # SXM
    "NVIDIA L4": Peak(121e12, 0.3e12),
    "NVIDIA L40S": Peak(362e12, 0.864e12),
}


def peak_of(device: jax.Device) -> Peak | None:
    """None for a kind that is not in the table, a CPU among them."""
    return PEAKS.get(device.device_kind)


def memory_peak_gib() -> float | None:
    """The most memory that any device of this process has had in use since it started, in GiB;
    None where the backend does not say, as on CPU."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return max(peaks) / 2**30 if peaks else None


COMPILED = "/jax/core/compile/backend_compile_duration"  # or read from the cache on disk
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    COMPILED,
)


class CompileClock:
    """Counts programs and seconds of tracing, lowering and compiling in this process.

    programs: compiled or read; read: of them, those that the cache on disk held; seconds: of all.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.programs = 0
        self.read = 0
        self._lock = threading.Lock()  # JAX may compile on several threads

    def _spent(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILING:
            with self._lock:
                self.seconds += duration_secs
                self.programs += event == COMPILED

    def _happened(self, event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            with self._lock:
                self.read += 1


@contextlib.contextmanager
def compile_clock() -> Iterator[CompileClock]:
    """A clock that runs until the context ends."""
    clock = CompileClock()
    jax.monitoring.register_event_duration_secs_listener(clock._spent)
    jax.monitoring.register_event_listener(clock._happened)
    try:
        yield clock
    finally:
        jax.monitoring.unregister_event_duration_listener(clock._spent)
        jax.monitoring.unregister_event_listener(clock._happened)
