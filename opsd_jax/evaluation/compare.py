# SPDX-License-Identifier: Apache-2.0
"""`opsd eval --compare A B`: is B better than A on the same problems? NumPy alone, no model.

Both evaluations asked the same problems, so the difference is taken problem by problem and the
problems are drawn again with replacement (paired bootstrap): what is hard for both cancels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opsd_jax.errors import UserError
from opsd_jax.evaluation.generations import BY_PROBLEM_FILE, GENERATIONS_FILE
from opsd_jax.evaluation.statistics import pass_at_k, pass_ks
from opsd_jax.host.files import is_count, is_number, parsed_lines
from opsd_jax.host.stage import local

NUM_RESAMPLES = 10_000
LEVEL = 0.95


class Difference(NamedTuple):
    """B minus A of one metric: the mean over problems and its confidence interval."""

    a: float
    b: float
    low: float
    high: float
    num_problems: int

    @property
    def value(self) -> float:
        return self.b - self.a


def paired_bootstrap(a_N: np.ndarray, b_N: np.ndarray) -> Difference:
    """Mean of b - a over problems with the percentile interval of its bootstrap distribution.

    What is drawn is always the same: the result is a function of the arguments.

    Args:
      a_N, b_N: the metric of each problem, in the same order.
    """
    differences = np.asarray(b_N, np.float64) - np.asarray(a_N, np.float64)
    size = len(differences)
    # A resample is the number of times each problem is drawn: one matrix product in all.
    counts = np.random.default_rng(0).multinomial(size, [1 / size] * size, NUM_RESAMPLES)
    means = counts @ differences / size
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(np.mean(a_N)), float(np.mean(b_N)), float(low), float(high), size)


def compare(folder_a: str, folder_b: str) -> dict[str, Difference]:
    """`<role>/<metric>` of every role and metric that both evaluations have.

    Args:
      folder_a, folder_b: folders of `opsd eval`, or workdirs with one evaluation.

    Raises:
      UserError: no evaluation there, an unfinished one, or other problems.
    """
    folders = [evaluation_folder(folder) for folder in (folder_a, folder_b)]
    sides = [read_evaluation(folder) for folder in folders]
    roles = [role for role in sides[0] if role in sides[1]]
    if not roles:
        raise UserError(
            f"no role was evaluated in both: {', '.join(sides[0])} in {folders[0]}, "
            f"{', '.join(sides[1])} in {folders[1]}"
        )
    found = {}
    for role in roles:
        a, b = sides[0][role], sides[1][role]
        _check_same_problems(role, folders, a, b)
        metrics_b = dict(_metrics(b, list(a)))
        for name, values in _metrics(a, list(a)):
            if name in metrics_b:
                found[f"{role}/{name}"] = paired_bootstrap(values, metrics_b[name])
    return found


def evaluation_folder(folder: str) -> Path:
    """The folder itself, or the only evaluation of a workdir."""
    path = local(folder)
    if (path / GENERATIONS_FILE).exists():
        return path
    inside = sorted(file.parent for file in path.glob(f"eval/*/{GENERATIONS_FILE}"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise UserError(
            f"{folder} has several evaluations; name one: {', '.join(map(str, inside))}"
        )
    raise UserError(f"{folder} has no {GENERATIONS_FILE}; make it with opsd eval")


def read_evaluation(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Role -> problem id -> its row of by_problem.jsonl (`statistics.by_problem`).

    Raises:
      UserError: the evaluation was not finished, or its rows are not whole.
    """
    path = folder / BY_PROBLEM_FILE
    if not path.exists():
        raise UserError(f"{folder} is not finished; give its opsd eval command again")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for number, (_, row) in enumerate(parsed_lines(path), start=1):
        wrong = _fault(row)
        if row is not None and wrong is None:
            problems = found.setdefault(row["role"], {})
            wrong = "id" if row["id"] in problems else None
            problems[row["id"]] = row
            if row["num_samples"] != next(iter(problems.values()))["num_samples"]:
                wrong = "num_samples"
        if wrong is not None:
            raise UserError(
                f"{path}:{number}: {wrong} is not what an evaluation writes; give the folder's "
                "opsd eval command again, which counts anew without sampling"
            )
    if not found:
        raise UserError(f"{path} has no line; give the folder's opsd eval command again")
    return found


def _fault(row: dict[str, Any] | None) -> str | None:
    """The first field of a line of by_problem.jsonl that cannot be counted with, or None."""
    if row is None:
        return "the line"
    n, c = row.get("num_samples"), row.get("num_correct")
    fine = {name: isinstance(row.get(name), str) for name in ("role", "id", "answer")}
    fine["num_samples"] = is_count(n) and 0 < n < 2**16
    fine["num_correct"] = is_count(n) and is_count(c) and c <= n
    for name in ("accuracy", *(n for n in ("majority", "greedy") if n in row)):
        fine[name] = is_number(row.get(name)) and 0 <= row[name] <= 1
    return next((name for name, is_fine in fine.items() if not is_fine), None)


def table(differences: Mapping[str, Difference]) -> str:
    """One line per metric."""
    lines = [f"{'':34}{'A':>8}{'B':>8}{'B - A':>9}   {LEVEL:.0%} interval      problems"]
    for name, found in differences.items():
        sign = "" if found.low <= 0 <= found.high else "  *"
        lines.append(
            f"{name:34}{found.a:8.3f}{found.b:8.3f}{found.value:+9.3f}   "
            f"[{found.low:+.3f}, {found.high:+.3f}]{found.num_problems:10}{sign}"
        )
    return "\n".join(lines)


def _metrics(
    problems: Mapping[str, dict[str, Any]], ids: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and the values of the problems in the order of `ids`."""
    rows = [problems[id] for id in ids]
    num_samples = rows[0]["num_samples"]
    yield "accuracy", np.array([row["accuracy"] for row in rows])
    if num_samples > 1:
        for k in pass_ks(num_samples):
            values = [pass_at_k(row["num_correct"], num_samples, k) for row in rows]
            yield f"pass_at_{k}", np.array(values)
    for name, label in (("majority", f"maj_at_{num_samples}"), ("greedy", "greedy_accuracy")):
        if all(name in row for row in rows):
            yield label, np.array([row[name] for row in rows])


def _check_same_problems(role: str, folders: list[Path], a: Mapping, b: Mapping) -> None:
    for here, there, folder in ((a, b, folders[0]), (b, a, folders[1])):
        only = [id for id in here if id not in there]
        if only:
            some = ", ".join(only[:5]) + (", …" if len(only) > 5 else "")
            raise UserError(
                f"{role}: the problem sets differ: {len(only)} of {len(here)} problems are in "
                f"{folder} alone ({some})"
            )
    for id in a:
        if a[id].get("answer") != b[id].get("answer"):
            raise UserError(
                f"{role}: problem {id} has the answer {a[id].get('answer')!r} in {folders[0]} and "
                f"{b[id].get('answer')!r} in {folders[1]}: these are different problems"
            )


def summary(differences: Mapping[str, Difference]) -> str:
    """The same as JSON."""
    fields = {name: d._asdict() | {"difference": d.value} for name, d in differences.items()}
    return json.dumps(fields, indent=1)
