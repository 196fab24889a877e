# SPDX-License-Identifier: Apache-2.0
"""Curves of runs with matplotlib (extra `plot`): `opsd_jax.plot([workdir, …])`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.evaluation.runs import (
    ACCURACY,
    TOKENS,
    Group,
    Run,
    band,
    columns,
    group_runs,
    read_run,
)
from opsd_jax.host.stage import local

Workdir = str | os.PathLike[str] | Run
_WORDS = {TOKENS: "generated tokens", ACCURACY: "held-out accuracy", "step": "step"}


def plot(
    runs: Workdir | Sequence[Workdir] | Mapping[str, Workdir | Sequence[Workdir]],
    y: str | Sequence[str] = ACCURACY,
    x: str = TOKENS,
) -> Any:
    """Draws metrics of runs, accuracy against generated tokens at first; returns the figure.

    Runs of one method (the same config but for seeds, or one label) are a line of their mean and
    a band of one standard deviation; a run alone is its own line.

    Args:
      runs: a workdir, several, or label -> one or several.
      y: metrics, one panel each, such as ["eval/student/accuracy", "loss/divergence"].
      x: "rollout/tokens_total", "step", "wall_s" or another metric.

    Raises:
      UserError: matplotlib is missing, or no run has a metric.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError("opsd_jax.plot needs matplotlib: pip install '.[plot]'") from error
    groups = grouped(runs)
    names = [y] if isinstance(y, str) else list(y)
    for name in (*names, x):
        if not any(name in columns(run) for group in groups for run in group.runs):
            columns(groups[0].runs[0])[name]  # tells the nearest names
    figure, panels = plt.subplots(
        1, len(names), figsize=(5.6 * len(names), 3.8), layout="constrained", squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        for group in groups:
            curves = [run.series(name, x) for run in group.runs]
            spread = band(curves)
            if spread is None:
                for curve in curves:
                    panel.plot(*curve.T, label=group.label)
                continue
            at, mean, sd = spread.T
            (line,) = panel.plot(at, mean, label=f"{group.label} ({len(curves)} runs)")
            panel.fill_between(at, mean - sd, mean + sd, color=line.get_color(), alpha=0.2)
        panel.set_xlabel(_WORDS.get(x, x))
        panel.set_ylabel(_WORDS.get(name, name))
        panel.grid(alpha=0.3)
        panel.legend()
    plt.close(figure)  # A notebook shows the figure that is returned, and would show it twice.
    return figure


def grouped(runs: Any) -> list[Group]:
    """A workdir, several, or label -> one or several, as groups of seeds."""
    labelled = runs if isinstance(runs, Mapping) else {None: runs}
    several = [(label, _several(found)) for label, found in _several(labelled.items())]
    return group_runs([_one(run, label) for label, found in several for run in found])


def _several(runs: Any) -> list[Any]:
    """One or several as a list; a UserError where there is none."""
    found = [runs] if isinstance(runs, str | os.PathLike | Run) else list(runs)
    if not found:
        raise UserError("give at least one run")
    return found


def _one(run: Workdir, label: str | None) -> Run:
    if not isinstance(run, Run):
        return read_run(local(run), label)
    return run if label is None else Run(run.workdir, label, run.config, run.history)
