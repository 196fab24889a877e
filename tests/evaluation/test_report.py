# SPDX-License-Identifier: Apache-2.0
"""The page: its tables as text, and the whole of it in a real browser."""

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opsd_jax.divergence.config import DIVERGENCES, USE_BETA
from opsd_jax.evaluation import runs
from opsd_jax.evaluation.report import chart, curve_charts, page
from opsd_jax.evaluation.runs import NATS, Group, group_runs, read_run
from opsd_jax.main import main
from tests.browser import Page

ROOT = Path(__file__).parents[2]
EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


def write_run(workdir: Path, seed: int, slope: float, **others) -> Path:
    """A workdir of 30 steps with evaluations every 10, 1,000 tokens a step, hostile texts."""
    workdir.mkdir(parents=True)
    config = f"train.seed = {seed}\ntrain.learning_rate = {slope}\n"
    (workdir / "config.gin").write_text(config)
    lines = []
    for step in range(31):
        line = {"step": step, "wall_s": 2.0 * step, "rollout/tokens_total": 1000 * step}
        line["rollout/reward_mean"] = 0.5
        if step % 10 == 0:
            accuracy = 0.5 + slope * step + 0.01 * seed * (step > 0)
            line |= {"eval/student/accuracy": accuracy, "eval/student/accuracy_se": 0.02}
        lines.append(line | {name.replace("__", "/"): f(step) for name, f in others.items()})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 31, "rollo')
    sample = {"role": "student", "question": EVIL, "completion": EVIL, "answer": 1, "reward": 0}
    (workdir / "samples").mkdir()
    (workdir / "samples" / "step_000030.jsonl").write_text(json.dumps(sample) + "\n")
    return workdir


def token(text: str, divergence: float, best: int) -> dict:
    top = [[best, EVIL, 0.75], [3, "\ufffd", 0.25]]
    return {
        "id": 3,
        "text": text,
        "stop": False,
        "divergence": divergence,
        "student_logps": -0.1,
        "teacher_logps": -2.0,
        "student_entropy": 0.3,
        "teacher_entropy": 0.2,
        "student_top": [[3, text, 0.9], [4, " b", 0.1]],
        "teacher_top": top,
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Two methods, the first with two seeds; a third workdir that has only just begun."""
    root = tmp_path_factory.mktemp("report")
    fast = [
        write_run(root / f"fast_seed{s}", s, 0.012, loss__divergence=lambda step: 0.1 / (1 + step))
        for s in (0, 1)
    ]
    slow = write_run(root / "slow", 0, 0.008, rollout__length_mean=lambda step: 10.0 + 2 * step)
    (root / "begun").mkdir()
    (root / "begun" / "config.gin").write_text("train.seed = 0\n")
    rows = [token(EVIL, 0.5, 7), token(" two\n", 0.0, 3), token("", 2.0, 3)]
    sample = {"step": 30, "question": EVIL, "teacher_prompt": EVIL, "answer": EVIL, "reward": None}
    (fast[0] / "tokens").mkdir()
    line = json.dumps(sample | {"tokens": rows})
    (fast[0] / "tokens" / "step_000030.jsonl").write_text(line + "\n" + line[:50])
    out = root / "page" / "report.html"
    flags = [f"--workdir={p}" for p in (*fast, slow)] + [f"--workdir={EVIL[:9]}={root / 'begun'}"]
    name = f"--name={EVIL}"
    assert main(["report", *flags, f"--out={out}", name, "--levels", "0.6", "0.8"]) == 0
    return out


def cells(text: str, heading: str) -> list[list[str]]:
    """The text of the table after a heading, small print included."""
    table = text.split(heading)[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [
        [re.sub(r"<.*?>", " ", c).strip() for c in re.findall(r"<td>(.*?)</td>", r)] for r in rows
    ]


def test_tokens_to_an_accuracy_stand_in_the_table(written):
    rows = cells(written.read_text(), "Generated tokens to reach an accuracy")[1:]
    # fast: .62, .63 after 10,000; .6 at 8,333 and 7,692. .8 between 20,000 (.74, .75) and 30,000.
    assert rows[0] == ["fast", "8,013 ± 453", "24,583 ± 589"]
    # slow: .58, .66, .74 at 10, 20, 30 thousand.
    assert rows[1][1] == "12,500 1.56 ×"
    assert rows[1][2] == "not reached within 30,000; &gt; 1.22 ×"


def test_alarms_stand_on_top(written):
    text = written.read_text()
    top = text.split('id="legend"')[0]
    assert "<b>slow: length</b> at step 11" in top  # mean of five is 32 or more, twice the 14
    assert top.count("<li><b>") == 1


def test_what_was_not_measured_is_said_so(tmp_path):
    """A run that was never evaluated has not failed to reach anything, nor shown to be sound."""
    blind = [write_run(tmp_path / f"blind_seed{seed}", seed, 0.01) for seed in (0, 1)]
    for folder in blind:
        lines = [json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines()[:31]]
        kept = [{k: v for k, v in line.items() if "eval/" not in k} for line in lines]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    seen = write_run(tmp_path / "seen", 2, 0.012)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.gin").write_text("")
    text = page(group_runs([read_run(f) for f in (*blind, seen, tmp_path / "begun")]), "", (0.6,))
    rows = cells(text, "Generated tokens to reach an accuracy")[1:]
    assert rows[0] == ["blind", "not measured 2 runs never evaluated"]
    assert rows[1][1] == "7,143"
    assert rows[2] == ["begun", "not measured 1 run never evaluated"]
    # Two seeds that agree are two seeds still.
    runs = cells(text, "<h2>Runs</h2>")[1:]
    assert runs[0][1:5] == ["2", "30 ± 0", "30,000 ± 0", "1.0 ± 0.0"] and runs[1][2] == "30"
    assert "No other run shows a sign of collapse" in text
    assert "<li>blind, blind_seed1: never evaluated, so that a fall" in text
    assert "<li>begun: nothing was measured that would" in text
    mixed = Group("mixed", [read_run(seen), read_run(blind[0])])
    text = page([mixed], "", (0.6,))
    assert "1 run never evaluated" in cells(text, "to reach an accuracy")[1][1]
    text = page([Group("blind", [read_run(blind[0])])], "", (0.6,))
    assert "shows a sign" not in text and "not reached" not in text


def test_a_plot_says_which_divergence_it_shows(tmp_path):
    """KL in either direction and a function of the user's are not on one scale."""

    def title(*names: str) -> tuple[str, str]:
        groups = []
        for number, name in enumerate(names):
            folder = tmp_path / "_".join(names) / str(number)
            run = write_run(folder, number, 0.01, loss__divergence=lambda step: 0.1)
            (run / "config.gin").write_text(f"divergence.name = {name}\ndivergence.beta = 0.3\n")
            groups.append(Group(str(number), [read_run(run)]))
        (found,) = (c for c in curve_charts(groups) if c["title"].startswith("divergence of"))
        return found["title"].removeprefix("divergence of student and teacher, "), found["note"]

    assert title("'forward_kl'") == ("unclipped (forward_kl), nats per token", "")
    assert title("@mine") == ("unclipped (@mine), per token", "")
    words = "unclipped (reverse_kl; jensen_shannon, beta 0.3), nats per token"
    differ = "Curves of different divergences cannot be compared."
    assert title("'reverse_kl'", "'jensen_shannon'", "'reverse_kl'") == (words, differ)
    same = ("unclipped (reverse_kl), nats per token", "")
    assert title("'sampled_token'", "'reverse_kl'") == same  # what is logged of both
    assert title("'forward_kl'", "@mine")[0] == "unclipped (forward_kl; @mine), per token"
    words = "unclipped (mixed_kl, beta 0.3), nats per token"
    assert title("'mixed_kl'") == (words, "")
    assert NATS == DIVERGENCES and runs.USE_BETA == USE_BETA


def test_the_only_curve_of_a_method_has_its_errors(tmp_path):
    unmeasured, run = write_run(tmp_path / "a", 0, 0.01), write_run(tmp_path / "b", 1, 0.01)
    (unmeasured / "metrics.jsonl").write_text('{"step": 0, "rollout/tokens_total": 0}\n')
    groups = group_runs([read_run(unmeasured, "one"), read_run(run, "one")])
    (series,) = chart(groups, "eval/student/accuracy", "step")
    assert [point[0] for point in series["lines"][0]] == [0, 10, 20, 30]
    assert [point[2:] for point in series["lines"][0]] == [[0.02]] * 4


def test_nothing_in_the_page_can_end_its_script_or_leave_it(written):
    text = written.read_text()
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text and "default-src 'none'" in text
    for kind in ("style", "script"):  # the browser runs what has the digest of the policy, alone
        inline = text.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in text
    data = re.search(r'id="data">(.*?)</script>', text, re.S)
    assert json.loads(data.group(1))["views"][0]["samples"][0]["question"] == EVIL


def test_hostile_text_stays_text_wherever_it_enters(tmp_path):
    """Label, folder, settings and their names, samples with any type, name of the page, alarms."""
    evil = "<script>window.broken=1</script><b>&amp;\"'"
    groups = []
    for number in (0, 1):
        folder = tmp_path / evil.replace("/", "∕") / str(number)
        length = lambda step: 10.0 + 2 * step  # noqa: E731
        run = write_run(folder, number, 0.01 + number, rollout__length_mean=length)
        (run / "config.gin").write_text(f"{evil}.{evil}{number} = '{evil}'\n")
        rows = [{key: evil for key in ("question", "completion", "answer", "reward")}]
        rows += [{evil: evil}, {"question": [evil], "completion": {evil: 1}, "answer": None}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "samples" / "step_000031<i>.jsonl").write_text(text)
        groups.append(Group(evil + str(number), [read_run(run, evil + str(number))]))
    text = page(groups, evil, (0.6,))
    assert text.count("<script") == 2 and "<b>&amp;" not in text and "<i>" not in text
    shown = re.sub(r"<script.*?</script>|<style.*?</style>", "", text, flags=re.S)
    tags = {tag for tag in re.findall(r"<[/!]?([a-z1-6]+)", shown)}
    ours = (
        "doctype html head meta title body h1 h2 p b div table tr th td small details summary pre"
    )
    assert tags <= set(f"{ours} ul li noscript".split())
    # It is all there: twice on top, then per group in alarm, two tables' rows, header, samples.
    assert html.unescape(shown).count(evil) >= 2 + 2 * (1 + 2 + 1 + 6)


def test_the_newline_that_begins_a_completion_is_shown(tmp_path):
    run = write_run(tmp_path / "run", 0, 0.01)
    line = json.dumps({"question": "q", "completion": "\n two", "answer": "", "reward": 1.0})
    (run / "samples" / "step_000031.jsonl").write_text(line + "\n")
    text = page([Group("run", [read_run(run)])], "", (0.6,))
    assert "<pre>\n\n two</pre>" in text and "step 31" in text and "graded 1.0" in text


def test_in_a_browser(written, tmp_path):
    page = Page(written.as_uri(), tmp_path / "profile")
    try:
        assert page.errors == [] and page.requests == [written.as_uri()]
        assert page.evaluate("typeof window.broken") == "undefined"
        assert page.evaluate("document.title") == EVIL
        # Accuracy three times, fast and slow; divergence of fast; reward of both; length of slow.
        assert page.evaluate("document.querySelectorAll('#accuracy svg').length") == 3
        assert page.evaluate("document.querySelectorAll('#curves svg').length") == 3
        lines = page.evaluate(
            "[...document.querySelectorAll('polyline')].map(p => p.getAttribute('points'))"
        )
        # Every chart of fast has two seeds and a mean.
        assert len(lines) == 3 * (3 + 1) + 3 + (3 + 1) + 1
        for points in lines + page.evaluate(
            "[...document.querySelectorAll('polygon')].map(p => p.getAttribute('points'))"
        ):
            numbers = [float(x) for pair in points.split() for x in pair.split(",")]
            assert len(numbers) >= 8 and all(-1 <= x <= 500 for x in numbers)
        errors = "document.querySelectorAll('#accuracy figure:first-child .error').length"
        assert page.evaluate(errors) == 4
        tip = (
            "document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText"
        )
        page.point_at("#accuracy svg", part=0.98)
        assert "0.865 ± 0.007071 sd" in page.evaluate(tip)
        assert "0.74 ± 0.02 se" in page.evaluate(tip)
        page.point_at("#accuracy svg", part=0.13)
        assert "0.5 ± 0 sd" in page.evaluate(tip)  # two seeds that agree are two seeds still
        page.point_at(".token")
        told = page.evaluate(tip)
        assert "divergence 0.5 nats" in told and "0.750" in told and "window.broken" in told
        texts = page.evaluate("[...document.querySelectorAll('.token')].map(t => t.textContent)")
        assert texts == [EVIL, " two⏎\n", "·"]
        differs = (
            "[...document.querySelectorAll('.token')].map(t => t.classList.contains('differs'))"
        )
        assert page.evaluate(differs) == [True, False, False]
        page.evaluate("document.querySelector('#legend button').click()")
        shown = "document.querySelectorAll('g[data-group=\"0\"]:not([visibility=hidden])').length"
        assert page.evaluate(shown) == 0
        assert page.requests == [written.as_uri()] and page.errors == []
        assert page.evaluate("typeof window.broken") == "undefined"
    finally:
        page.close()


def test_the_browser_shows_that_divergences_differ_and_which_has_no_unit(tmp_path):
    groups = []
    for name in ("'forward_kl'", "@mine"):
        run = write_run(tmp_path / name.strip("@'"), 0, 0.01, loss__divergence=lambda step: 0.1)
        (run / "config.gin").write_text(f"divergence.name = {name}\n")
        groups.append(Group(name, [read_run(run)]))
    sample = {"step": 30, "divergence": "mine", "question": "", "teacher_prompt": "", "answer": ""}
    (run / "tokens").mkdir()
    line = json.dumps(sample | {"tokens": [token("a", 0.5, 7)]})
    (run / "tokens" / "step_000030.jsonl").write_text(line + "\n")
    (tmp_path / "r.html").write_text(page(groups, "", (0.6,)))
    shown = Page((tmp_path / "r.html").as_uri(), tmp_path / "profile")
    try:
        notes = "[...document.querySelectorAll('#curves .note')].map(p => p.textContent)"
        told = ["Curves of different divergences cannot be compared."]
        assert shown.evaluate(notes) == told and shown.errors == []
        shown.point_at(".token")
        tip = shown.evaluate("document.getElementById('tip').innerText")
        assert "divergence 0.5\n" in tip and "nats" not in tip
        assert "0.5 and more" in shown.evaluate("document.getElementById('views').innerText")
    finally:
        shown.close()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--workdir={tmp}/none"], "no such folder"),
        (["--workdir={tmp}"], "is it a workdir"),
        (["--workdir={run}", "--levels", "80"], "--levels"),
        (["--workdir={run}", "--out={tmp}"], "--out must be a file, not the folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, words, tmp_path, written, capsys):
    filled = [f.format(tmp=tmp_path, run=written.parent.parent / "slow") for f in flags]
    assert main(["report", f"--out={tmp_path}/r.html", *filled]) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and "\n" not in told


def test_the_report_does_not_wait_for_jax(written, tmp_path):
    run = written.parent.parent / "slow"
    code = (
        "import sys; from opsd_jax.main import main; "
        f"main(['report', '--workdir={run}', '--out={tmp_path}/r.html']); "
        "print(sorted({'jax', 'gin', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.splitlines() == [f"opsd report: 1 run on {tmp_path}/r.html", "[]"]
