# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows while a run trains: a bar, the line of a terminal, and curves."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.evaluation.inline import figure_png, filled
from opsd_jax.evaluation.plot import plot
from opsd_jax.evaluation.runs import ACCURACY, read_run
from opsd_jax.host.progress import ProgressLine

CURVES = (ACCURACY, "loss/divergence")


class LivePanel(ProgressLine):
    """A bar and, with matplotlib, accuracy and divergence against steps, drawn anew in place.

    The notebook keeps the last state alone. Drawing takes at most a twentieth of the time.

    Args:
      total_steps: of the run.
      workdir: whose metrics.jsonl is drawn; what a run was resumed from is there, too.
      display: `IPython.display.display`.
      clock: seconds.
    """

    def __init__(
        self,
        total_steps: int,
        workdir: Path,
        display: Callable[..., Any],
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(total_steps, io.StringIO(), every_s=1.0, clock=clock)
        self._live = True
        self._workdir, self._display = workdir, display
        self._notes: list[str] = []
        self._step: int | None = None
        self._handles: dict[str, Any] = {}  # what stands in the notebook, by kind
        self._figure_due_s = 0.0

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._step = step
        super().update(step, metrics)

    def close(self) -> None:
        if self._active and (self._line or self._notes):
            self._show_bar()
            self._show_curves()
        self._line = ""

    def _say(self, text: str) -> None:
        self._notes.append(text)
        self._show_bar()

    def _draw(self, now: float) -> None:
        self._stale, self._drawn_s = False, now
        if not self._active:
            return
        self._show_bar()
        if self._step is not None and now >= self._figure_due_s:
            self._show_curves()
            spent = self._clock() - now
            self._figure_due_s = now + max(2.0, 20 * spent)

    def _show_bar(self) -> None:
        text = "\n".join([*self._notes, self._line])
        html = filled("bar", total=self._total, step=self._step, text=text)
        self._show("bar", {"text/html": html, "text/plain": text})

    def _show_curves(self) -> None:
        """Draws what metrics.jsonl has; nothing without two points or without matplotlib."""
        try:
            run = read_run(self._workdir)
            known = [name for name in CURVES if len(run.series(name)) > 1]
            if known:
                png = figure_png(plot(run, y=known, x="step"))
                self._show("curves", {"image/png": png, "text/plain": ", ".join(known)})
        except UserError:
            pass

    def _show(self, kind: str, data: dict[str, Any]) -> None:
        if kind in self._handles:
            self._handles[kind].update(data, raw=True)
        else:
            self._handles[kind] = self._display(data, raw=True, display_id=True)
