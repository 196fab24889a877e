# SPDX-License-Identifier: Apache-2.0
"""What `opsd train` prints in the end: before and after, on a few lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from opsd_jax.evaluation.runs import ACCURACY, TOKENS, Line, read_run
from opsd_jax.host.guard import number
from opsd_jax.host.stage import local

_WIDTH = 16
# Shown at every role that has them; the others only where they move.
_ACCURACIES = {"accuracy": "accuracy, sampled", "greedy_accuracy": "accuracy, greedy"}
_MOVING = {
    "length_mean": "tokens per answer",
    "truncated_fraction": "cut at the limit",
    "formatted_fraction": "with an answer",
    "ungraded_fraction": "grader failed",
}


def summary(workdir: str | Path) -> str:
    """The first and the last evaluation in metrics.jsonl side by side.

    Accuracies of student and teacher, generated tokens; lengths and the like only where they
    move, and of the probes those that do.
    """
    run = read_run(local(workdir))
    found = [line for line in run.history if ACCURACY in line]
    if not run.history:
        return "metrics.jsonl has no line of this run"
    if not found:
        return "no evaluation was made (train.heldout or train.eval_every_steps is unset)"
    first, last = found[0], found[-1]
    heads = [f"step {line['step']}" for line in (first, last)]
    rows = [f"{'':30}{heads[0]:>{_WIDTH}}{heads[1]:>{_WIDTH}}"]
    roles = dict.fromkeys(name.split("/")[1] for name in first if name.startswith("eval/"))
    rows += [row for role in roles for row in _role_rows(role, first, last)]
    tokens = "generated tokens" if run.generates else "target tokens"
    spent = [number(line, TOKENS) or 0 for line in (first, last)]
    rows.append(f"{tokens:30}{spent[0]:>{_WIDTH},.0f}{spent[1]:>{_WIDTH},.0f}")
    if moved := list(_moved_probes(first, last)):
        rows.append(f"probes: {', '.join(moved)}")
    return "\n".join(rows)


def _role_rows(role: str, first: Line, last: Line) -> Iterator[str]:
    """The lines of one role, its name before each."""
    names = dict(_ACCURACIES)
    # Of several samples a problem: the vote and the best, over all of them.
    several = [name for name in first if re.match(rf"eval/{role}/(maj|pass)_at_\d+$", name)]
    for kind, words in (("maj_at_", "majority of {}"), ("pass_at_", "best of {}")):
        counts = [int(n.rpartition("_")[2]) for n in several if n.split("/")[2].startswith(kind)]
        if counts:
            names[f"{kind}{max(counts)}"] = words.format(max(counts))
    for short, words in (names | _MOVING).items():
        name = f"eval/{role}/{short}"
        if name not in first and name not in last:
            continue
        before, after = _cell(first, name), _cell(last, name)
        if short not in _MOVING or before != after:
            yield f"{f'{role}: {words}':30}{before:>{_WIDTH}}{after:>{_WIDTH}}"


def _cell(line: Line, name: str) -> str:
    """A value with its standard error over problems, a dash where there is none."""
    value, error = number(line, name), number(line, f"{name}_se")
    if value is None:
        return "-"
    text = f"{value:,.1f}" if "length" in name else f"{value:.3f}"
    return text + (f" ±{error:.3f}" if error is not None else "")


def _moved_probes(first: Line, last: Line) -> Iterator[str]:
    """`weak 0.297 -> 0.994` for the probes that moved by a hundredth or more."""
    for name in first:
        before, after = number(first, name), number(last, name)
        if name.startswith("probe/") and before is not None and after is not None:
            if abs(after - before) >= 0.01:
                yield f"{name.removeprefix('probe/')} {before:.3f} -> {after:.3f}"
