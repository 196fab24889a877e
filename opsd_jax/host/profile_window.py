# SPDX-License-Identifier: Apache-2.0
"""A profiler trace of some training steps: train.profile_steps = (10, 12).

It lies in WORKDIR/profile/plugins/profile/TIME/: `*.xplane.pb` for XProf (`xprof --logdir
WORKDIR/profile`, or TensorBoard with its plugin) and `perfetto_trace.json.gz` for ui.perfetto.dev.
Process 0 alone writes one, of its own devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class ProfileWindow:
    """Traces from the dispatch of the first step of the window until the last one is done.

    Args:
      workdir: the trace is written below it.
      steps: (first, last) of the window, both in it; None traces nothing. A resumed run traces
        what of the window is left.
      say: told where the trace lies.
    """

    def __init__(
        self, workdir: Path, steps: tuple[int, ...] | None, say: Callable[[str], None]
    ) -> None:
        self._folder = workdir / "profile"
        self._steps = steps if jax.process_index() == 0 else None
        self._say = say
        self._tracing = False

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """To be around the dispatch of a step, which is then named in the trace."""
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            return contextlib.nullcontext()
        if not self._tracing:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, outputs: Any) -> None:
        """Ends the window behind its last step, for whose outputs it waits."""
        if self._tracing and self._steps is not None and number >= self._steps[1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being taken: also of a window that was cut short."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self._say(f"profile: {self._folder} (xprof --logdir, or ui.perfetto.dev)")

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
