# SPDX-License-Identifier: Apache-2.0
"""`opsd report`: many runs on one self-contained page, accuracy against what it cost.

Tables and warnings are in the template report_page.html, which escapes every text; charts and the
token view are drawn by report_page.js from the data embedded in the page. The page names no
address, and its content security policy forbids the browser to ask for any and to run any script
but ours: completions are hostile text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from opsd_jax.errors import UserError
from opsd_jax.evaluation.runs import (
    ACCURACY,
    TOKENS,
    Group,
    Run,
    band,
    differing_settings,
    group_runs,
    in_nats,
    newest,
    parse_workdir,
    reach,
    read_run,
    read_token_samples,
    thinned,
    token_ratio,
    unit_of,
)
from opsd_jax.host.files import read_json_lines, write_whole
from opsd_jax.host.guard import Alarm, alarms, is_watched

# x axis -> its metric, and what its numbers are multiplied by.
COSTS = {
    "generated tokens": (TOKENS, 1.0),
    "steps": ("step", 1.0),
    "wall time, minutes": ("wall_s", 1 / 60),
}
# metric -> title of its chart against steps; a metric that no run has is left out.
CURVES = {
    "loss/divergence": "divergence of student and teacher, unclipped",
    "loss/divergence_right": "divergence on completions graded right",
    "loss/divergence_wrong": "divergence on completions graded wrong",
    "loss/clip_fraction": "share of tokens whose divergence was clipped",
    "policy/clip_fraction": "share of tokens whose probability ratio was clipped",
    "policy/kl_initial": "KL(student || initial policy), estimator k3, nats per token",
    "rollout/reward_mean": "mean grade of the completions",
    "reward/zero_variance_fraction": "share of groups whose grades are all equal",
    "student/entropy": "student's entropy on the completions, nats",
    "teacher/entropy": "teacher's entropy on them, nats",
    "student/nll_of_rollout": "student's negative log-likelihood of them, nats per token",
    "rollout/length_mean": "mean length of the completions, tokens",
    "rollout/truncated_fraction": "share of completions cut by the limit",
    "analysis/length_mean": "mean length of what the teacher writes before it scores, tokens",
    "analysis/truncated_fraction": "share of those cut by their limit",
    "eval/student/greedy_accuracy": "held-out accuracy, greedy",
    "eval/teacher/accuracy": "held-out accuracy of the teacher",
    "optim/grad_norm": "gradient norm",
}
MAX_TEXT = 4000  # characters of a sample that are shown
NUM_SAMPLES = 4  # of each group


def report_command(workdirs: Sequence[str], out: str, name: str, levels: Sequence[float]) -> None:
    """Reads the workdirs and writes the page.

    Args:
      workdirs: DIR or LABEL=DIR.
      out: the html file.
      name: title of the page.
      levels: accuracies whose cost in tokens is tabulated.
    """
    parsed = [parse_workdir(text) for text in workdirs]
    groups = group_runs([read_run(folder, label) for label, folder in parsed])
    text = page(groups, name, levels)
    write_whole(Path(out), text)
    print(f"opsd report: {len(parsed)} {'run' if len(parsed) == 1 else 'runs'} on {out}")


def page(groups: Sequence[Group], name: str, levels: Sequence[float]) -> str:
    """The whole page as text, from the template report_page.html.

    Args:
      groups: what is compared.
      name: title; "" is all labels.
      levels: accuracies whose cost in tokens is tabulated.

    Raises:
      UserError: a level that is no accuracy.
    """
    for level in levels:
        if not 0 < level <= 1:
            raise UserError(f"levels: an accuracy lies in (0, 1], not {level}")
    here = Path(__file__).parent
    template, style, script = (
        (here / f"report_page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    return (
        environment()
        .from_string(template)
        .render(
            name=name or " / ".join(group.label for group in groups),
            style=style,
            script=script,
            total_runs=(total := sum(len(group.runs) for group in groups)),
            num_runs=counted(total, "run"),
            num_methods=counted(len(groups), "method"),
            first=groups[0].label,
            alarms=list(all_alarms(groups)),
            unmeasured=list(unmeasured(groups)),
            level_names=["", *(f"{level:g}" for level in levels)],
            levels=[level_row(groups, group, levels) for group in groups],
            summary=[summary_row(group) for group in groups],
            settings_header=["", *(group.label for group in groups)],
            settings=list(setting_rows(groups)),
            samples=list(samples(groups)),
            data={
                "groups": [group.label for group in groups],
                "charts": [*accuracy_charts(groups), *curve_charts(groups)],
                "views": [
                    v for group in groups for run in group.runs for v in token_view(group, run)
                ],
            },
        )
    )


def environment() -> jinja2.Environment:
    """jinja2 that escapes every text and knows the two filters of the page."""
    found = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    found.filters |= {"digest": digest, "clipped": clipped}
    dense = {"separators": (",", ":"), "allow_nan": False, "sort_keys": False}
    found.policies["json.dumps_kwargs"] = dense
    return found


def digest(text: str) -> str:
    """The content security policy's name of an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def rounded(points: np.ndarray) -> list[list[float]]:
    """Rows with five significant digits, which no pixel can tell apart."""
    return [[float(f"{value:.5g}") for value in row] for row in points]


def chart(groups: Sequence[Group], metric: str, x: str, scale: float = 1.0) -> list[dict[str, Any]]:
    """The series of one metric: per group its runs [x, y(, error)] and their band [x, mean, sd]."""
    found = []
    for number, group in enumerate(groups):
        runs = [run for run in group.runs if len(run.series(metric, x))]
        if not runs:
            continue
        curves = [run.series(metric, x) * [scale, 1.0] for run in runs]
        lines = [rounded(thinned(points)) for points in curves]
        error = runs[0].series(f"{metric}_se", x)[:, 1]
        if len(lines) == 1 and len(error) == len(lines[0]):
            lines = [[[*p, float(e)] for p, e in zip(lines[0], error, strict=True)]]
        common = band(curves)
        found.append(
            {
                "group": number,
                "lines": lines,
                "band": None if common is None else rounded(common),
            }
        )
    return found


def accuracy_charts(groups: Sequence[Group]) -> Iterable[dict[str, Any]]:
    for x, (metric, scale) in COSTS.items():
        series = chart(groups, ACCURACY, metric, scale)
        if series:
            title = f"sampled accuracy against {x}"
            yield {"place": "accuracy", "large": True, "title": title, "x": x, "series": series}


def curve_charts(groups: Sequence[Group]) -> Iterable[dict[str, Any]]:
    for metric, title in CURVES.items():
        series = chart(groups, metric, "step")
        if series:
            title, note = divergence_told(groups, metric, title)
            yield {"place": "curves", "title": title, "note": note, "x": "steps", "series": series}


def divergence_told(groups: Sequence[Group], metric: str, title: str) -> tuple[str, str]:
    """(title, note below the plot): of a divergence which it is, and whether it is in nats."""
    if not metric.startswith("loss/divergence"):
        return title, ""
    runs = [run for group in groups for run in group.runs if len(run.series(metric))]
    names = list(dict.fromkeys(run.divergence for run in runs if run.divergence))
    title += f" ({'; '.join(names)})" if names else ""
    title += ", nats per token" if all(map(in_nats, names)) else ", per token"
    differ = "Curves of different divergences cannot be compared."
    return title, differ if len(names) > 1 else ""


class Cell(NamedTuple):
    """Of a table: text, and what stands below it in small print."""

    text: str
    note: str = ""


def all_alarms(groups: Sequence[Group]) -> Iterable[tuple[str, Alarm]]:
    """(run, what went wrong with it)."""
    for group in groups:
        for run in group.runs:
            yield from ((named(group, run), alarm) for alarm in alarms(run.guard, run.history))


def unmeasured(groups: Sequence[Group]) -> Iterable[tuple[str, str]]:
    """(run, what of it no alarm could tell, as it was not measured)."""
    for group in groups:
        for run in group.runs:
            if not is_watched(run.guard, run.history):
                yield named(group, run), "nothing was measured that would show a collapse"
            elif not len(run.series(ACCURACY)):
                yield named(group, run), "never evaluated, so that a fall of accuracy was not seen"


def named(group: Group, run: Run) -> str:
    """A run in words: its method, and its folder where the method has several runs."""
    return f"{group.label}, {run.workdir.name}" if len(group.runs) > 1 else group.label


def level_row(groups: Sequence[Group], group: Group, levels: Sequence[float]) -> list[Cell]:
    """Tokens to each level, mean ± sd over seeds, and the ratio to the first method."""
    cells = [heading(group)]
    for level in levels:
        first, own = reach(groups[0], level), reach(group, level)
        if own.num_reached == 0:
            text, note = "not reached", f"within {own.at_least:,.0f}"
        else:
            text, short = own.spread, own.num_reached < own.num_runs
            note = f"{own.num_reached} of {own.num_runs} runs reached it" if short else ""
        if missing := len(group.runs) - own.num_runs:
            text, note = (text, note) if own.num_runs else ("not measured", "")
            note += ("; " if note else "") + f"{counted(missing, 'run')} never evaluated"
        ratio = token_ratio(first, own) if group is not groups[0] else None
        if ratio is not None:
            note += ("; " if note else "") + ("> " if ratio[1] else "") + f"{ratio[0]:.2f} ×"
        cells.append(Cell(text, note))
    return cells


def summary_row(group: Group) -> list[Cell]:
    """Runs, length, cost, accuracy at the start, the best and the end."""
    accuracy = [run.series(ACCURACY) for run in group.runs]
    accuracy = [points[:, 1] for points in accuracy if len(points)]
    last = [run.history[-1] for run in group.runs if run.history]
    row = [
        str(len(group.runs)),
        spread([line["step"] for line in last], ",.0f"),
        spread([run.num_tokens for run in group.runs], ",.0f"),
        spread([(line.get("wall_s") or 0) / 60 for line in last], ".1f"),
    ]
    for pick in (lambda a: a[0], max, lambda a: a[-1]):
        row.append(spread([pick(values) for values in accuracy], ".3f"))
    return [heading(group), *map(Cell, row)]


def heading(group: Group) -> Cell:
    """A method's name at the head of its row; says so where its tokens are not generated."""
    generates = group.runs[0].generates
    return Cell(group.label, "" if generates else "target tokens; none is generated")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def spread(values: Sequence[float], form: str) -> str:
    """mean ± sd of several values, equal ones too, or the one value; a dash without any."""
    if not values:
        return "–"
    mean = format(np.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(np.std(values, ddof=1), form)}"


def setting_rows(groups: Sequence[Group]) -> Iterable[list[Cell]]:
    """The bindings in which the methods differ."""
    for name, values in differing_settings(groups).items():
        yield [Cell(name), *(Cell("–" if value is None else value) for value in values)]


def samples(groups: Sequence[Group]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """(title, a few graded completions of the newest evaluation) of each group's first run."""
    for group in groups:
        path = newest(group.runs[0].workdir / "samples")
        rows = [] if path is None else read_json_lines(path)
        shown = [row for row in rows if row.get("role", "student") == "student"][:NUM_SAMPLES]
        if path is not None and shown:
            keys = ("question", "completion", "answer", "reward")
            step = path.stem.removeprefix("step_").lstrip("0") or "0"
            title = f"{group.label}, step {step}"
            yield title, [{key: row.get(key) for key in keys} for row in shown]


def clipped(value: Any) -> str:
    """Any value as text of at most MAX_TEXT characters; the template escapes it."""
    text = "" if value is None else str(value)
    return text[:MAX_TEXT] + (" …" if len(text) > MAX_TEXT else "")


def token_view(group: Group, run: Run) -> Iterable[dict[str, Any]]:
    """The newest file of `opsd tokens` in a workdir, if there is one."""
    path = newest(run.workdir / "tokens")
    rows = [] if path is None else read_token_samples(path)
    if rows:
        yield {
            "label": named(group, run),
            "step": rows[0]["step"],
            "unit": unit_of(rows),
            "samples": rows,
        }
