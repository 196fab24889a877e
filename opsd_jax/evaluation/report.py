# SPDX-License-Identifier: Apache-2.0
"""`opsd report`: many runs on one self-contained page, accuracy against what it cost.

Tables and warnings are written here; charts and the token view are drawn by report_page.js from
the data embedded in the page. The page names no address, and its content security policy
forbids the browser to ask for any and to run any script but ours: completions are hostile text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
    newest,
    parse_workdir,
    reach,
    read_run,
    thinned,
    token_ratio,
)
from opsd_jax.host.files import read_json_lines, write_whole
from opsd_jax.host.guard import alarms

# x axis -> its metric, and what its numbers are multiplied by.
COSTS = {
    "generated tokens": (TOKENS, 1.0),
    "steps": ("step", 1.0),
    "wall time, minutes": ("wall_s", 1 / 60),
}
# metric -> title of its chart against steps; a metric that no run has is left out.
CURVES = {
    "loss/divergence": "divergence of student and teacher, unclipped, nats per token",
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


def report_command(
    workdirs: Sequence[str], out: str, name: str = "", levels: Sequence[float] = (0.7, 0.8, 0.9)
) -> None:
    """Reads the workdirs and writes the page.

    Args:
      workdirs: DIR or LABEL=DIR.
      out: the html file.
      name: title of the page.
      levels: accuracies whose cost in tokens is tabulated.
    """
    for level in levels:
        if not 0 < level <= 1:
            raise UserError(f"--levels: an accuracy lies in (0, 1], not {level}")
    parsed = [parse_workdir(text) for text in workdirs]
    groups = group_runs([read_run(folder, label) for label, folder in parsed])
    text = page(groups, name or " / ".join(group.label for group in groups), levels)
    write_whole(Path(out), text)


def page(groups: Sequence[Group], name: str, levels: Sequence[float]) -> str:
    """The whole page as text."""
    here = Path(__file__).parent
    style = (here / "report_page.css").read_text(encoding="utf-8")
    script = (here / "report_page.js").read_text(encoding="utf-8")
    views = [view for group in groups for run in group.runs for view in token_view(group, run)]
    data = {
        "groups": [group.label for group in groups],
        "charts": [*accuracy_charts(groups), *curve_charts(groups)],
        "views": views,
    }
    policy = f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'"
    runs = counted(sum(len(group.runs) for group in groups), "run")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{html.escape(name)}</title>
<style>{style}</style></head><body>
<h1>{html.escape(name)}</h1>
<p>{runs} of {counted(len(groups), "method")}. A thin line is one seed, a thick line their mean, a
band their standard deviation; bars on a single run are standard errors over problems.</p>
{alarm_list(groups)}
<div class="legend" id="legend"></div>
<h2>Held-out accuracy against what it cost</h2>
<div class="charts" id="accuracy"></div>
<h2>Generated tokens to reach an accuracy</h2>
{level_table(groups, levels)}
<h2>Runs</h2>
{summary_table(groups)}
{settings_table(groups)}
<h2>Training curves, against steps</h2>
<div class="charts" id="curves"></div>
<h2{"" if views else " hidden"}>Where the privileged model disagrees</h2>
<p{"" if views else " hidden"}>The student's own rollouts, each token shaded by its divergence;
dotted where the two sides prefer different tokens. Point at a token for both sides' alternatives;
■ is the end, · a part of a character.</p>
<div id="views"></div>
<h2>Held-out samples</h2>
{sample_list(groups)}
<div id="tip" hidden></div>
<noscript><p>The charts need JavaScript.</p></noscript>
<script type="application/json" id="data">{embedded(data)}</script>
<script>{script}</script>
</body></html>
"""


def digest(text: str) -> str:
    """The content security policy's name of an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(data: Any) -> str:
    """json that no text in it can end: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(points: np.ndarray) -> list[list[float]]:
    """Rows with five significant digits, which no pixel can tell apart."""
    return [[float(f"{value:.5g}") for value in row] for row in points]


def chart(groups: Sequence[Group], metric: str, x: str, scale: float = 1.0) -> list[dict[str, Any]]:
    """The series of one metric: per group its runs [x, y(, error)] and their band [x, mean, sd]."""
    found = []
    for number, group in enumerate(groups):
        curves = [run.series(metric, x) * [scale, 1.0] for run in group.runs]
        curves = [points for points in curves if len(points)]
        if not curves:
            continue
        lines = [rounded(thinned(points)) for points in curves]
        error = group.runs[0].series(f"{metric}_se", x)[:, 1]
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
            yield {"place": "curves", "title": title, "x": "steps", "series": series}


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """An html table; cells are html already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{head}</tr>{body}</table>'


def alarm_list(groups: Sequence[Group]) -> str:
    """What went wrong, where and why; a sentence when nothing did."""
    rows = []
    for group in groups:
        for run in group.runs:
            for alarm in alarms(run.guard, run.history):
                where = f"{group.label}, {run.workdir.name}" if len(group.runs) > 1 else group.label
                rows.append(
                    f"<li><b>{html.escape(where)}: {alarm.name}</b> at step {alarm.step}: "
                    f"{html.escape(alarm.reason)}</li>"
                )
    if not rows:
        return "<p>No run shows a sign of collapse (thresholds: guard.* of each run).</p>"
    return f'<ul class="alarms">{"".join(rows)}</ul>'


def level_table(groups: Sequence[Group], levels: Sequence[float]) -> str:
    """Tokens to each level, mean ± sd over seeds, and the ratio to the first method."""
    rows = []
    for number, group in enumerate(groups):
        cells = [heading(group)]
        for level in levels:
            first, own = reach(groups[0], level), reach(group, level)
            if own.num_reached == 0:
                text = "not reached"
                note = f"within {own.at_least:,.0f}"
            else:
                text = own.spread
                short = own.num_reached < own.num_runs
                note = f"{own.num_reached} of {own.num_runs} runs reached it" if short else ""
            ratio = token_ratio(first, own) if number else None
            if ratio is not None:
                note += ("; " if note else "") + ("&gt; " if ratio[1] else "") + f"{ratio[0]:.2f} ×"
            cells.append(text + f"<small>{note}</small>")
        rows.append(cells)
    header = ["", *(f"{level:g}" for level in levels)]
    return table(header, rows) + (
        '<p class="note">Rollout tokens at the first crossing, linear between evaluations; mean ± '
        "sd over the runs that reached it. × is the ratio to "
        f"{html.escape(groups[0].label)}; &gt; where some run did not get there and counts with "
        "all it generated.</p>"
    )


def summary_table(groups: Sequence[Group]) -> str:
    """One row per method: runs, length, cost, accuracy at the start, the best and the end."""
    rows = []
    for group in groups:
        accuracy = [run.series(ACCURACY) for run in group.runs]
        accuracy = [points[:, 1] for points in accuracy if len(points)]
        last = [run.history[-1] for run in group.runs if run.history]
        row = [heading(group), str(len(group.runs))]
        row.append(spread([line["step"] for line in last], ",.0f"))
        row.append(spread([run.num_tokens for run in group.runs], ",.0f"))
        row.append(spread([(line.get("wall_s") or 0) / 60 for line in last], ".1f"))
        for pick in (lambda a: a[0], max, lambda a: a[-1]):
            row.append(spread([pick(values) for values in accuracy], ".3f"))
        rows.append(row)
    header = ["", "runs", "steps", "tokens", "minutes", "first accuracy", "best", "last"]
    return table(header, rows)


def heading(group: Group) -> str:
    """A method's name at the head of its row; says so where its tokens are not generated."""
    read = "" if group.runs[0].generates else "<small>target tokens; none is generated</small>"
    return html.escape(group.label) + read


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def spread(values: Sequence[float], form: str) -> str:
    """mean ± sd, or the one value; a dash without any."""
    if not values:
        return "–"
    mean = format(np.mean(values), form)
    equal = len(set(values)) == 1
    return mean if equal else f"{mean} ± {format(np.std(values, ddof=1), form)}"


def settings_table(groups: Sequence[Group]) -> str:
    """The bindings in which the methods differ, folded away."""
    found = differing_settings(groups)
    if not found:
        return ""
    rows = [
        [html.escape(name), *("–" if v is None else html.escape(v) for v in values)]
        for name, values in found.items()
    ]
    header = ["", *(html.escape(group.label) for group in groups)]
    body = table(header, rows, "settings")
    return (
        f"<details><summary>settings in which they differ ({len(rows)})</summary>{body}</details>"
    )


def sample_list(groups: Sequence[Group]) -> str:
    """A few graded completions of the newest evaluation of each group's first run."""
    parts = []
    for group in groups:
        path = newest(group.runs[0].workdir / "samples")
        rows = [] if path is None else read_json_lines(path)
        shown = [row for row in rows if row.get("role", "student") == "student"][:NUM_SAMPLES]
        if path is None or not shown:
            continue
        texts = "".join(
            f'<div class="sample"><div class="text">{clipped(row.get("question"))}</div>'
            f'<pre>{clipped(row.get("completion"))}</pre><div class="note">answer '
            f"{clipped(row.get('answer'))}; graded {clipped(row.get('reward'))}</div></div>"
            for row in shown
        )
        title = f"{html.escape(group.label)}, step {int(path.stem.removeprefix('step_'))}"
        parts.append(f"<details><summary>{title}</summary>{texts}</details>")
    return "".join(parts) or "<p>None were kept.</p>"


def clipped(value: Any) -> str:
    """Any text, escaped, at most MAX_TEXT characters."""
    text = "" if value is None else str(value)
    return html.escape(text[:MAX_TEXT] + (" …" if len(text) > MAX_TEXT else ""))


def token_view(group: Group, run: Run) -> Iterable[dict[str, Any]]:
    """The newest file of `opsd tokens` in a workdir, if there is one."""
    path = newest(run.workdir / "tokens")
    rows = [] if path is None else [r for r in read_json_lines(path) if r.get("tokens")]
    if rows:
        label = group.label if len(group.runs) == 1 else f"{group.label}, {run.workdir.name}"
        yield {"label": label, "step": rows[0].get("step"), "samples": rows}
