# SPDX-License-Identifier: Apache-2.0
"""How busy the chips are (tokens per second, MFU, bandwidth), and where the seconds went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from opsd_jax.host.chips import CompileClock, memory_peak_gib, peak_of
from opsd_jax.host.goodput import Goodput
from opsd_jax.model.sharding import axis_size, rows_axis
from opsd_jax.run.assembly import Assembly
from opsd_jax.run.flops import Lengths, decoding_bytes, repeated, step_flops


class Throughput:
    """What a step's lengths and seconds say of the chips.

    Rates are per device of the mesh; from TPU v4 on a device is a chip. What cannot be known (the
    peak of an unknown kind of chip, the rollout's seconds before it was timed) is left out.
    """

    def __init__(self, parts: Assembly) -> None:
        self._method = parts.method
        self._mesh = parts.mesh
        self._num_devices = parts.mesh.size
        self._peak = peak_of(parts.mesh.devices.flat[0])
        params = jax.tree.leaves(parts.abstract.student["params"])
        self._weight_bytes = max(leaf.dtype.itemsize for leaf in params)

    def metrics(
        self, lengths: Lengths, tokens: int, rollout_s: float, step_s: float
    ) -> dict[str, float]:
        """The metrics time/*_per_chip and chip/* of one step.

        Args:
          lengths: of its rows.
          tokens: that were sampled for it.
          rollout_s: of its rollout; NaN where that was never timed.
          step_s: of the whole step.
        """
        found: dict[str, float] = {}
        generates = self._method.completions.generates
        update_s = step_s - rollout_s if generates else step_s
        if generates and rollout_s > 0:
            found["time/rollout_tokens_per_s_per_chip"] = tokens / rollout_s / self._num_devices
            found |= self._bandwidth(lengths, rollout_s)
        if update_s > 0:
            read = np.sum(lengths.student + lengths.completion)
            read -= np.sum(repeated(self._method, lengths.student))
            read_per_s = int(read) * self._method.num_updates / update_s
            found["time/update_tokens_per_s_per_chip"] = read_per_s / self._num_devices
        found |= self._flops(lengths, step_s, update_s)
        memory = memory_peak_gib()
        return found if memory is None else found | {"chip/memory_peak_gib": memory}

    def _flops(self, lengths: Lengths, step_s: float, update_s: float) -> dict[str, float]:
        flops = step_flops(self._method, lengths)
        if flops is None:
            return {}
        found = {"chip/model_tflops": sum(flops) / 1e12 / self._num_devices}
        if self._peak is not None:
            able = self._peak.flops * self._num_devices
            found["chip/mfu"] = sum(flops) / step_s / able
            if update_s > 0:
                found["chip/update_mfu"] = flops[1] / update_s / able
        return found

    def _bandwidth(self, lengths: Lengths, rollout_s: float) -> dict[str, float]:
        if self._peak is None:
            return {}
        axes = (axis_size(self._mesh, rows_axis(self._mesh)), self._mesh.shape["model"])
        read = decoding_bytes(self._method, lengths, self._weight_bytes, *axes)
        if read is None:
            return {}
        return {"chip/decode_bandwidth": read / rollout_s / self._peak.bandwidth}


class Meter:
    """Seconds of steps, and what of them was compiling or waiting, for the lines of metrics.

    Args:
      throughput: of the run.
      compiling: runs since the process started.
      kept_s: seconds of the steps before this start, without compiling.
      goodput: of process 0, None on the others.
    """

    def __init__(
        self,
        throughput: Throughput,
        compiling: CompileClock,
        kept_s: float = 0.0,
        goodput: Goodput | None = None,
    ) -> None:
        self.kept_s = kept_s
        self._throughput = throughput
        self._compiling = compiling
        self._goodput = goodput
        self._waited = {"data": 0.0, "grading": 0.0}  # since the last line
        self._told = (0.0, 0, 0)  # what the last line said of compiling
        self._ended: tuple[float, float] | None = None
        self.begin()

    def begin(self) -> None:
        """The next step begins now."""
        self._began = self._now()
        self._ended = None

    def end(self) -> None:
        """The step that is to be read is done; evaluating comes before its numbers are read."""
        self._ended = self._now()

    def read(self) -> float:
        """Seconds from the last reading to the end of this step; the next step begins now."""
        (end, compiled), (start, before) = self._ended or self._now(), self._began
        self.kept_s += max(0.0, end - start - (compiled - before))
        self.begin()
        return end - start

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Counts the seconds spent inside as waiting for "data" or "grading"."""
        start = time.monotonic()
        yield
        self._waited[what] += time.monotonic() - start

    def timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are waited for."""

        def call(*arguments: Any) -> Any:
            with self.waiting(what):
                return function(*arguments)

        return call

    def line(
        self, number: int, lengths: Lengths, tokens: int, rollout_s: float, step_s: float
    ) -> dict[str, float]:
        """What the line of step `number` says, of all that was spent since the line before it."""
        clock = self._compiling
        now = (clock.seconds, clock.programs, clock.read)
        names = ("time/compile_s", "time/compile_programs", "time/compile_from_disk")
        spent = {name: a - b for name, a, b in zip(names, now, self._told, strict=True)}
        self._told = now
        spent |= {f"time/{what}_s": seconds for what, seconds in self._waited.items()}
        self._waited = dict.fromkeys(self._waited, 0.0)
        found = self._throughput.metrics(lengths, tokens, rollout_s, step_s) | spent
        if self._goodput is not None:
            found |= self._goodput.metrics(number, self.kept_s)
        return found

    def _now(self) -> tuple[float, float]:
        return time.monotonic(), self._compiling.seconds
