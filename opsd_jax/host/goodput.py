# SPDX-License-Identifier: Apache-2.0
"""Goodput: the share of the time since a run first started that went into steps it has kept.

`goodput.json` in the workdir survives kill -9: {"first_start": seconds since 1970, "starts": n,
"lost_steps": n}. It is written at every start, before the lines of metrics.jsonl that are taken
back are dropped. The seconds of the steps that are kept stand in the checkpoints, so that what is
lost with a host is no longer counted.

  goodput/fraction        seconds of kept steps / seconds since the first start. Compiling,
                          evaluating, loading, waiting in a queue, steps done twice: all is loss
  goodput/steps_per_hour  kept steps / hours since the first start
  goodput/restarts        starts after the first
  goodput/lost_steps      logged steps that had to be done again, over all restarts
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from opsd_jax.host.files import is_count, is_number, parsed_lines, read_metrics, write_whole


class Goodput:
    """Counts for one start of a run. Only process 0 makes one.

    Args:
      workdir: of the run.
      start: the step that this start goes on from.
      kept_s: the seconds of the steps up to it; without a record they are all that is known.
      clock: seconds since 1970.
    """

    def __init__(
        self, workdir: Path, start: int, kept_s: float = 0.0, clock: Callable[[], float] = time.time
    ):
        self._clock = clock
        now, path = clock(), workdir / "goodput.json"
        before = _read(path)
        first_start = before.get("first_start", now - kept_s)
        self._first_start = min(first_start, now)  # hosts' clocks may differ
        self._starts = int(before.get("starts", 0)) + 1
        lines = read_metrics(workdir / "metrics.jsonl") if before else []
        lost = max(0, lines[-1]["step"] - start) if lines else 0
        self._lost_steps = int(before.get("lost_steps", 0)) + lost
        found = {
            "first_start": round(self._first_start, 3),
            "starts": self._starts,
            "lost_steps": self._lost_steps,
        }
        write_whole(path, json.dumps(found) + "\n")

    def metrics(self, number: int, kept_s: float) -> dict[str, float]:
        """After step `number`; `kept_s` are the seconds of all steps so far, over all starts."""
        elapsed = max(self._clock() - self._first_start, 1e-6)
        return {
            "goodput/fraction": kept_s / elapsed,
            "goodput/steps_per_hour": number * 3600 / elapsed,
            "goodput/restarts": self._starts - 1,
            "goodput/lost_steps": self._lost_steps,
        }


def _read(path: Path) -> dict[str, float]:
    """What an earlier start wrote; {} where there is none or it was tampered with."""
    found = next((line for _, line in parsed_lines(path)), None) or {}
    whole = is_number(found.get("first_start")) and found["first_start"] >= 0
    counts = all(is_count(found.get(name)) for name in ("starts", "lost_steps"))
    return found if whole and counts else {}
