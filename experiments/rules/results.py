# SPDX-License-Identifier: Apache-2.0
"""What is kept of the runs of experiments/rules.py: a CSV file, and its tables and figures."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opsd_jax.evaluation.compare import Difference, paired_bootstrap
from opsd_jax.evaluation.report import spread
from opsd_jax.evaluation.runs import ACCURACY, TOKENS

KEPT, SE = ACCURACY, f"{ACCURACY}_se"
SHOWN = {  # metric of the last evaluation -> its column
    "eval/student/length_mean": ("tokens per answer", ".1f"),
    "probe/text_nats": ("nats per token of a text", ".3f"),
    "probe/facts": ("facts", ".3f"),
    "probe/kl_initial": ("KL(initial ‖ student)", ".3f"),
}
METRICS = ("step", KEPT, SE, *SHOWN, TOKENS)
SPLITS = {  # of questions -> column of the table
    "heldout": "at the end",
    "requests": "requests",
    "puzzles": "puzzles",
}
BEFORE = "before"  # the held-out questions under the rule that was learned before
BUDGET = 1_000  # generated tokens at which the methods are compared
BARE, PROMPTED = "not trained", "prompted"  # the model as it is, in the place of a method


class Result(NamedTuple):
    """A run, or the model as it is.

    evaluations: METRICS of each, in order; asked: of a split, the share of each question's answers
    that keep the rule, in the order of the questions' names; before: the rule learned earlier.
    """

    rule: str
    method: str
    seed: int
    learning_rate: float
    evaluations: list[dict[str, float]]
    asked: dict[str, list[float]]
    before: str = ""

    def last(self, metric: str) -> float:
        return self.evaluations[-1][metric]

    def share(self, split: str) -> float:
        return float(np.mean(self.asked[split]))

    def at(self, tokens: int) -> float | None:
        """Rule kept after so many tokens, linear in between; None if the run was shorter."""
        x, y = ([line[metric] for line in self.evaluations] for metric in (TOKENS, KEPT))
        return float(np.interp(tokens, x, y)) if tokens <= x[-1] else None


KEY = ("rule", "before", "method", "seed", "learning_rate")


def write(results: Iterable[Result], path: Path) -> None:
    """A line for every evaluation; the last one of a run has what was asked in the end."""
    splits = [*SPLITS, BEFORE]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEY, *METRICS, *(f"asked/{split}" for split in splits)])
        for found in results:
            key = [getattr(found, name) for name in KEY]
            for line in found.evaluations:
                cells = [f"{line[m]:.6g}" if m in line else "" for m in METRICS]
                if line is found.evaluations[-1]:
                    asked = (found.asked.get(split, ()) for split in splits)
                    cells += [" ".join(f"{share:g}" for share in shares) for shares in asked]
                writer.writerow([*key, *cells] + [""] * (len(METRICS) + len(splits) - len(cells)))


def read(path: Path) -> list[Result]:
    """The results that `write` wrote, in its order."""
    found: dict[tuple[str, ...], Result] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            rule, before, method, seed, rate = key = tuple(line[name] for name in KEY)
            new = Result(rule, method, int(seed), float(rate), [], {}, before)
            result = found.setdefault(key, new)
            result.evaluations.append({m: float(line[m]) for m in METRICS if line[m]})
            for split in (*SPLITS, BEFORE):
                if line[f"asked/{split}"]:
                    result.asked[split] = [float(v) for v in line[f"asked/{split}"].split()]
    return list(found.values())


def by_method(results: Sequence[Result], **same: Any) -> dict[str, list[Result]]:
    """method -> its runs of other seeds than 0, which tunes; of 0 where there is no other."""
    chosen = [r for r in results if all(getattr(r, name) == v for name, v in same.items())]
    seeds = {r.seed for r in chosen if r.method not in (BARE, PROMPTED)}
    found: dict[str, list[Result]] = {}
    for result in chosen:
        if result.method in (BARE, PROMPTED) or result.seed or seeds == {0}:
            found.setdefault(result.method, []).append(result)
    return found


def minus(first: Sequence[Result], other: Sequence[Result], split: str) -> Difference:
    """Shares of the first minus those of the other: paired over questions, means over seeds."""

    def mean(runs: Sequence[Result]) -> np.ndarray:
        return np.mean([each.asked[split] for each in runs], axis=0)

    return paired_bootstrap(mean(other), mean(first))


def interval(found: Difference) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def heading(columns: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def rule_table(results: Sequence[Result], rule: str) -> list[str]:
    """A line per method, then the bare and the prompted model; differences to the first line."""
    groups = by_method(results, rule=rule, before="")
    first, *_ = groups.values()
    columns = [rule, f"kept at {BUDGET:,} tokens", *SPLITS.values(), "of tokens"]
    columns += [column for column, _ in SHOWN.values()]
    lines = heading([*columns, f"{next(iter(groups))} minus this, held out"])
    for name, group in groups.items():
        trained = name not in (BARE, PROMPTED)
        at = [value for each in group if (value := each.at(BUDGET)) is not None]
        cells = [name, spread(at, ".3f") if trained else ""]
        cells += [spread([each.share(split) for each in group], ".3f") for split in SPLITS]
        cells += [f"{statistics.mean(each.last(TOKENS) for each in group):,.0f}"]
        for metric, (_, form) in SHOWN.items():
            values = [r.last(metric) for r in group if metric in r.evaluations[-1]]
            cells.append(spread(values, form) if values else "")
        cells += [interval(minus(first, group, "heldout")) if trained and group != first else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def forgetting_table(results: Sequence[Result], first: str, second: str) -> list[str]:
    """Two rules one after the other: a line per method, what is kept of each."""
    one = by_method(results, rule=first, before="")
    two = by_method(results, rule=second, before=first)
    reference, *_ = two.values()
    columns = ["method", f"{first}, learned", f"{second}, then learned", f"{first}, then left"]
    lines = heading([*columns, f"{next(iter(two))} minus this, left"])
    for name, group in two.items():
        seeds = {each.seed for each in group}
        kept = [[r.share("heldout") for r in one[name] if r.seed in seeds]]
        kept += [[r.share(split) for r in group] for split in ("heldout", BEFORE)]
        cells = [name, *(spread(values, ".3f") for values in kept)]
        cells += [interval(minus(reference, group, BEFORE)) if group != reference else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(results: Sequence[Result], path: Path) -> None:
    """A row per rule: kept against tokens, and what a text costs more against kept."""
    from compare import panels

    rules = list(dict.fromkeys(each.rule for each in results))
    size = (8.4, 3.0 * len(rules))
    figure, axes = panels(len(rules), 2, font_size=9, figsize=size, squeeze=False)
    for rule, (left, right) in zip(rules, axes, strict=True):
        groups = by_method(results, rule=rule, before="")
        ends = {name: groups.pop(name)[0].share("heldout") for name in (BARE, PROMPTED)}
        left.axhline(ends[PROMPTED], color="0.5", ls="--", lw=1, label=PROMPTED)
        for number, (name, group) in enumerate(groups.items()):
            for seed, each in enumerate(group):
                tokens, kept, nats = (
                    np.array([line[metric] for line in each.evaluations])
                    for metric in (TOKENS, KEPT, "probe/text_nats")
                )
                label = name if seed == 0 else None
                left.plot(tokens, kept, color=f"C{number}", label=label, lw=1)
                right.plot(kept, nats - nats[0], "o-", color=f"C{number}", lw=0.7, ms=3)
        left.set(xlabel="generated tokens", ylabel=f"{rule}: rule kept", ylim=(-0.02, 1.02))
        right.set(xlabel="rule kept", ylabel="nats per token of a text, more", xlim=(-0.02, 1.02))
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
    drawn = axes[0, 0].get_legend_handles_labels()
    figure.legend(*drawn, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
