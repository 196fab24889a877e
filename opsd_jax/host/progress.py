# SPDX-License-Identifier: Apache-2.0
"""The live line a user watches while a run trains."""

import collections
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

import jax

from opsd_jax.errors import as_named


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process, Colab's among them.

    That `ipykernel` is imported says nothing: what starts kernels elsewhere imports it, too.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class ProgressLine:
    """`step 12/60  1,234 tok/s  divergence 0.123  accuracy 0.510  2:31 left`.

    One line that updates itself on a terminal and in a notebook; in a log file a plain line every
    `every_s` seconds and one at the end. Speed and time left come from the last 20 updates, so
    that compilation is soon forgotten.
    """

    def __init__(
        self,
        total_steps: int,
        stream: IO[str] | None = None,
        every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        # Jupyter obeys carriage returns, and keeps all that was written: seldom, then.
        notebook = stream is None and in_notebook()
        self._live = notebook or self._stream.isatty()
        self._every_s = every_s if not self._live else 1.0 if notebook else 0.1
        self._clock = clock
        self._recent: collections.deque[tuple[float, int, float]] = collections.deque(maxlen=21)
        self._shown: dict[str, float] = {}
        self._line = ""  # the latest state
        self._drawn = ""  # what of it stands on the terminal
        self._stale = False  # the reader has not seen the latest state
        self._before_steps = False  # it is that of something before the steps
        self._drawn_s = -math.inf
        self._active = jax.process_index() == 0

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the state after `step`; metrics that are not in `metrics` keep their value."""
        now = self._clock()
        for label, name in (
            ("divergence", "loss/divergence"),
            ("accuracy", "eval/student/accuracy"),
        ):
            if name in metrics:
                self._shown[label] = float(metrics[name])
        self._recent.append((now, step, float(metrics.get("rollout/tokens_total", math.nan))))
        self._line = "  ".join(self._parts(step))
        self._stale, self._before_steps = True, False
        if now - self._drawn_s >= self._every_s or (self._live and step == self._total):
            self._draw(now)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live one.

        A text that begins with a carriage return is the state of something that goes on before
        the steps, such as a warm start: it becomes the live line until a text without one.
        """
        if text.startswith("\r"):
            self._line, self._stale, self._before_steps = text[1:], True, True
            if (now := self._clock()) - self._drawn_s >= self._every_s:
                self._draw(now)
            return
        if self._before_steps:
            self._line, self._stale, self._before_steps = "", False, False
        if self._active:
            self._say(as_named(text))

    def close(self) -> None:
        """Shows the last state and ends the line."""
        if self._stale:
            self._draw(self._clock())
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
        self._line, self._drawn = "", ""

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _parts(self, step: int) -> list[str]:
        parts = [f"step {step}/{self._total}"]
        (start_s, start_step, start_tokens), (now, _, tokens) = self._recent[0], self._recent[-1]
        elapsed = now - start_s
        if elapsed > 0 and math.isfinite(tokens - start_tokens):
            parts.append(f"{(tokens - start_tokens) / elapsed:,.0f} tok/s")
        parts += [f"{label} {value:.3f}" for label, value in self._shown.items()]
        if elapsed > 0 and step > start_step:
            left = round((self._total - step) * elapsed / (step - start_step))
            hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
            clock = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
            parts.append(f"{clock}:{seconds:02d} left")
        return parts

    def _say(self, text: str) -> None:
        self._stream.write(f"{self._erase()}{text}\n")
        self._stream.flush()
        if self._live and self._line:
            self._draw(self._clock())

    def _draw(self, now: float) -> None:
        self._stale = False
        self._drawn_s = now
        if not self._active:
            return
        if self._live:
            erased = self._erase()
            self._drawn = self._line[: shutil.get_terminal_size().columns - 1]
            self._stream.write(erased + self._drawn)
        else:
            self._stream.write(self._line + "\n")
        self._stream.flush()

    def _erase(self) -> str:
        """Blanks the live line, without escape codes."""
        blank = "\r" + " " * len(self._drawn) + "\r" if self._drawn else ""
        self._drawn = ""
        return blank
