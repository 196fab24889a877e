# SPDX-License-Identifier: Apache-2.0
"""Finished and running workdirs, read back: metrics, groups of seeds, tokens to an accuracy.

Plain Python and NumPy. A run that is being written, was killed in the middle of a line, or has
only just begun is read as far as it goes.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opsd_jax.errors import UserError
from opsd_jax.host.config_text import bindings, is_free
from opsd_jax.host.files import (
    is_bucket,
    is_count,
    is_number,
    read_json_lines,
    read_metrics,
    read_text,
)
from opsd_jax.host.guard import GuardConfig, number
from opsd_jax.host.stage import local

ACCURACY = "eval/student/accuracy"
TOKENS = "rollout/tokens_total"
# Divergences in nats, as a user's function need not be, and those that have a beta.
NATS = ("forward_kl", "reverse_kl", "mixed_kl", "jensen_shannon", "sampled_token")
USE_BETA = ("mixed_kl", "jensen_shannon")
Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir.

    Args:
      workdir: where it lies.
      label: the group its user put it in; None groups by config.
      config: text of config.gin.
      history: the lines of metrics.jsonl, steps increasing.
    """

    workdir: Path
    label: str | None
    config: str
    history: Sequence[Line]

    @cached_property
    def settings(self) -> dict[str, str]:
        """The bindings of its config, macros filled in."""
        found = bindings(self.config)

        def filled(value: str) -> str:
            return re.sub(r"%([\w./]+)", lambda m: found.get(m.group(1), m.group()), value)

        return {name: filled(value) for name, value in found.items()}

    @property
    def divergence(self) -> str:
        """Which divergence it logs, by its name in the config; "" where there is none."""
        name = self.settings.get("divergence.name", "").strip("'\"")
        if name == "sampled_token":  # one sample of KL(student || teacher), which is logged whole
            return "reverse_kl"
        beta = self.settings.get("divergence.beta")
        return f"{name}, beta {beta}" if name in USE_BETA and beta else name

    @property
    def guard(self) -> GuardConfig:
        """The thresholds of the run's own guard, the defaults where its config has none.

        Raises:
          UserError: the config was cut short or edited to something else.
        """
        names = {field.name for field in dataclasses.fields(GuardConfig)}
        found = {k.removeprefix("guard."): v for k, v in self.settings.items()}
        try:
            return GuardConfig(**{k: ast.literal_eval(v) for k, v in found.items() if k in names})
        except (UserError, SyntaxError, ValueError, TypeError) as error:
            file = self.workdir / "config.gin"
            raise UserError(f"{file} is damaged where it binds guard: {error}") from None

    @property
    def generates(self) -> bool:
        """Whether its tokens are sampled; where the data's references teach, they are only read."""
        return not self.settings.get("train.completions", "").endswith("References()")

    @property
    def last_step(self) -> int:
        return max((int(line["step"]) for line in self.history), default=0)

    @property
    def num_tokens(self) -> float:
        """All tokens that the run has been trained on so far, generated unless it says not."""
        return max((number(line, TOKENS) or 0.0 for line in self.history), default=0.0)

    def series(self, y: str, x: str = "step") -> np.ndarray:
        """[N, 2] of (x, y) wherever the run has both."""
        points = ((number(line, x), number(line, y)) for line in self.history)
        kept = [p for p in points if None not in p]
        return np.array(kept, np.float64).reshape(-1, 2)


class Columns(dict[str, np.ndarray]):
    """Metrics by name; one that no step has is told with the nearest names."""

    def __missing__(self, name: str) -> np.ndarray:
        near = difflib.get_close_matches(str(name), self, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"no step has a metric {name!r}{hint}")


def columns(run: Run) -> Columns:
    """Every metric of a run as [N] float64 over its lines, NaN where a line has none."""
    names = dict.fromkeys(name for line in run.history for name in line)
    values = {name: [number(line, name) for line in run.history] for name in names}
    return Columns({name: np.array(row, np.float64) for name, row in values.items()})


class Group(NamedTuple):
    """Runs of one method: they differ by their seeds alone, or carry one label."""

    label: str
    runs: list[Run]


def parse_workdir(text: str) -> tuple[str | None, Path]:
    """`DIR` or `LABEL=DIR` of a --workdir flag; an existing folder is never taken apart."""
    label, equals, folder = text.partition("=")
    if is_bucket(text) or Path(text).is_dir() or not equals:
        return None, local(text)
    if not label:
        raise UserError(f"--workdir={text}: the label before '=' is empty")
    return label, local(folder)


def read_run(workdir: Path, label: str | None = None) -> Run:
    """Reads a workdir of `opsd train`, whole or not.

    Raises:
      UserError: no such folder, or one that no run has written to.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder")
    config, metrics = workdir / "config.gin", workdir / "metrics.jsonl"
    if not config.exists() and not metrics.exists():
        raise UserError(
            f"{workdir}: neither config.gin nor metrics.jsonl there; is it a workdir of opsd train?"
        )
    text = read_text(config) if config.exists() else ""
    return Run(workdir, label, text, read_metrics(metrics))


def newest(folder: Path) -> Path | None:
    """The step_XXXXXX.jsonl of the highest step in a folder; None if there is none."""
    found = folder.glob("step_*.jsonl")
    return max(found, key=lambda path: (len(path.name), path.name), default=None)


def read_token_samples(path: Path) -> list[dict[str, Any]]:
    """What the page draws of a file of `opsd tokens`; samples that it cannot draw are left out."""
    drawn = "step divergence question answer teacher_prompt analysis reward tokens".split()
    return [
        {name: row.get(name) for name in drawn} for row in read_json_lines(path) if _is_sample(row)
    ]


def in_nats(divergence: Any) -> bool:
    """Whether a divergence, by its name, is measured in nats; of a user's function nobody knows."""
    return isinstance(divergence, str) and divergence.partition(",")[0] in NATS


def unit_of(samples: Sequence[Line]) -> str:
    """What follows a divergence of `read_token_samples`; the files name theirs."""
    name = samples[0].get("divergence") if samples else None
    return " nats" if name is None or in_nats(name) else ""


def _is_sample(row: Line) -> bool:
    texts = (row.get(name) for name in ("question", "answer", "teacher_prompt"))
    maybe = isinstance(row.get("analysis"), str | None) and _is_number_or_none(row.get("reward"))
    tokens = row.get("tokens")
    return (
        is_count(row.get("step"))
        and all(isinstance(text, str) for text in texts)
        and maybe
        and isinstance(tokens, list)
        and bool(tokens)
        and all(isinstance(token, dict) and _is_token(token) for token in tokens)
    )


def _is_token(token: Line) -> bool:
    numbers = "divergence student_logps teacher_logps student_entropy teacher_entropy".split()
    return (
        is_count(token.get("id"))
        and isinstance(token.get("text"), str)
        and isinstance(token.get("stop"), bool)
        and all(_is_number_or_none(token.get(name, "")) for name in numbers)
        and all(_are_alternatives(token.get(f"{role}_top")) for role in ("student", "teacher"))
    )


def _are_alternatives(rows: Any) -> bool:
    """Whether these are [token id, its text, its probability] of at least one token."""
    return (
        isinstance(rows, list)
        and bool(rows)
        and all(isinstance(row, list) and len(row) == 3 for row in rows)
        and all(is_count(row[0]) and isinstance(row[1], str) for row in rows)
        and all(_is_number_or_none(row[2]) for row in rows)
    )


def _is_number_or_none(value: Any) -> bool:
    return value is None or is_number(value)


# What seeds of one method may differ in, besides all that a resumed run may change.
_SEEDS = re.compile(r"(train\.seed|(.*/)?WarmStart\.seed|.*\.cache_dir)$")


def method_of(run: Run) -> dict[str, str]:
    """The bindings that make the method: seeds and logging left out."""
    return {
        name: value
        for name, value in run.settings.items()
        if "." in name and not is_free(name) and not _SEEDS.match(name)
    }


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first run: one per label, and one per config without label."""
    found: dict[Any, list[Run]] = {}
    for run in runs:
        key = run.label if run.label is not None else frozenset(method_of(run).items())
        found.setdefault(key, []).append(run)
    groups: list[Group] = []
    for members in found.values():
        first, taken = members[0], {group.label for group in groups}
        # Seeds are numbered at the end of a name: quick_seed3, warm1_seed3.
        stem = re.sub(r"((^|[_-])(warm|seed|s)_?\d+)+$", "", first.workdir.resolve().name)
        name = first.label or stem or first.workdir.resolve().name
        names = (name if n == 1 else f"{name} ({n})" for n in range(1, len(found) + 1))
        groups.append(Group(next(n for n in names if n not in taken), members))
    return groups


def differing_settings(groups: Sequence[Group]) -> dict[str, list[str | None]]:
    """binding -> its value in the first run of each group, for bindings that are not all equal."""
    methods = [method_of(group.runs[0]) for group in groups]
    names = sorted(set().union(*methods))
    rows = {name: [method.get(name) for method in methods] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def tokens_to_reach(run: Run, level: float) -> float | None:
    """Generated tokens at which held-out accuracy first reaches `level`; None if it never does.

    Linear between the evaluation that reaches it and the one before, so that a rare evaluation
    does not round every method up to the same number.
    """
    points = run.series(ACCURACY, TOKENS)
    reached = np.flatnonzero(points[:, 1] >= level)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(points[0, 0])
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return float(x0 + (x1 - x0) * (level - y0) / (y1 - y0))


class Reach(NamedTuple):
    """What a group needs for one level.

    num_reached of num_runs, those that were ever evaluated; mean and sd (None for one run) of the
    tokens of those that reached it; at_least: mean over all num_runs, where one that did not reach
    it counts with all it generated: a lower bound of what the method needs (NaN of no run).
    """

    num_reached: int
    num_runs: int
    mean: float | None
    sd: float | None
    at_least: float

    @property
    def spread(self) -> str:
        """Tokens of those that reached it, mean ± sd."""
        return f"{self.mean:,.0f}" + ("" if self.sd is None else f" ± {self.sd:,.0f}")


def reach(group: Group, level: float) -> Reach:
    """Tokens to a level over the runs of a group that were evaluated."""
    runs = [run for run in group.runs if len(run.series(ACCURACY, TOKENS))]
    needed = [tokens_to_reach(run, level) for run in runs]
    found = np.array([n for n in needed if n is not None])
    bounds = [r.num_tokens if n is None else n for r, n in zip(runs, needed, strict=True)]
    return Reach(
        num_reached=len(found),
        num_runs=len(needed),
        mean=float(found.mean()) if len(found) else None,
        sd=float(found.std(ddof=1)) if len(found) > 1 else None,
        at_least=float(np.mean(bounds)) if bounds else float("nan"),
    )


def token_ratio(first: Reach, other: Reach) -> tuple[float, bool] | None:
    """(tokens of `other` / tokens of `first`, whether that is only a lower bound).

    None where nothing can be said: the first method does not always get there, or needs nothing,
    or the other was never evaluated.
    """
    if first.num_reached < first.num_runs or not first.mean or not other.num_runs:
        return None
    return other.at_least / first.mean, other.num_reached < other.num_runs


def band(series: Iterable[np.ndarray], num_points: int = 200) -> np.ndarray | None:
    """Rows (x, mean, sd) over several curves [N, 2], linear in between, where all are known.

    None for fewer than two curves, or where they have no x in common.
    """
    curves = [points for points in series if len(points)]
    if len(curves) < 2:
        return None
    low, high = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    x = np.unique(np.concatenate([c[:, 0] for c in curves]))
    x = x[(x >= low) & (x <= high)]
    if len(x) > num_points:
        x = np.linspace(low, high, num_points)
    values = np.array([np.interp(x, c[:, 0], c[:, 1]) for c in curves])
    rows = np.stack([x, values.mean(axis=0), values.std(axis=0, ddof=1)], axis=1)
    return rows if len(rows) else None


def thinned(points: np.ndarray, num_points: int = 200) -> np.ndarray:
    """At most `num_points` rows of [N, 2]: means of equal runs of neighbours."""
    if len(points) <= num_points:
        return points
    return np.array([part.mean(axis=0) for part in np.array_split(points, num_points)])
