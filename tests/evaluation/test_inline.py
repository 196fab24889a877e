# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows of finished things; texts of models are hostile."""

import html
import json
import re

import pytest

from opsd_jax.errors import UserError
from opsd_jax.evaluation.inline import compare_evaluations, report, run_html, token_view
from opsd_jax.evaluation.plot import plot
from opsd_jax.evaluation.runs import read_run
from tests.evaluation.test_compare import write
from tests.evaluation.test_report import EVIL, token, write_run


def tags(text: str) -> set[str]:
    return set(re.findall(r"<([a-z]+)", text))


def test_a_run_is_its_summary_and_its_curve(tmp_path, monkeypatch):
    run = read_run(write_run(tmp_path / EVIL.replace("/", "∕"), 0, 0.01))
    text = run_html(run)
    assert "student: accuracy, sampled" in text and "0.800" in text
    assert tags(text) == {"pre", "img"} and "data:image/png;base64,iVBOR" in text
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    assert tags(run_html(run)) == {"pre"}


def test_tokens_are_shaded_by_their_divergence(tmp_path):
    rows = [token(EVIL, 0.5, 7), token(" two\n", 0.0, 3), token("", 2.0, 3)]
    sample = {"step": 30, "question": EVIL, "teacher_prompt": EVIL, "answer": EVIL, "reward": None}
    path = tmp_path / "step_000030.jsonl"
    path.write_text(json.dumps(sample | {"tokens": rows}) + "\n")
    view = token_view(path)
    text = view._repr_html_()
    assert tags(text) == {"div", "p", "span", "small"} and repr(view).endswith("3 tokens)")
    spans = re.findall(r"<span style=\"([^\"]*)\" title=\"([^\"]*)\">(.*?)</span>", text, re.S)
    # 98 % of three are the two smallest: .5 is the top.
    assert [style.split(", ")[-1][:5] for style, _, _ in spans] == ["0.85)", "0.00)", "0.85)"]
    assert ["underline" in style for style, _, _ in spans] == [True, False, False]
    assert [html.unescape(shown) for _, _, shown in spans] == [EVIL, " two⏎\n", "·"]
    told = html.unescape(spans[0][1])
    assert told.startswith("divergence 0.5 nats\nteacher: ") and "0.75" in told


@pytest.mark.parametrize("name, unit", [("reverse_kl", " nats"), ("mine", "")])
def test_a_divergence_of_the_users_own_has_no_unit(name, unit, tmp_path):
    sample = {"step": 3, "divergence": name, "question": "q", "teacher_prompt": "", "answer": ""}
    path = tmp_path / "step_000003.jsonl"
    path.write_text(json.dumps(sample | {"tokens": [token("a", 0.5, 7)]}) + "\n")
    text = token_view(path)._repr_html_()
    assert f"divergence 0.5{unit}\n" in text and f"up to 0.5{unit} and more" in text


def test_a_view_of_nothing(tmp_path):
    (tmp_path / "step_000030.jsonl").write_text("")
    assert "Step –" in token_view(tmp_path / "step_000030.jsonl")._repr_html_()


def test_a_comparison_says_what_differs(tmp_path):
    right, wrong = {f"p{i}": [1.0] for i in range(20)}, {f"p{i}": [0.0] for i in range(20)}
    a, b = write(tmp_path / "a", wrong, role="<b>"), write(tmp_path / "b", right, role="<b>")
    text = compare_evaluations(a, b)._repr_html_()
    assert "<b>+1.000</b>" in text and "&lt;b&gt;/accuracy" in text
    assert "<b>" not in compare_evaluations(a, a)._repr_html_()


@pytest.mark.parametrize("runs", [[], {}, {"ours": []}], ids=str)
@pytest.mark.parametrize("shown", [report, plot])
def test_of_no_run_nothing_is_shown(shown, runs):
    with pytest.raises(UserError, match="give at least one run"):
        shown(runs)


def test_the_report_stands_in_a_frame_of_its_own(tmp_path):
    run = write_run(tmp_path / "run", 0, 0.01)
    found = report({EVIL: run})
    text = found._repr_html_()
    assert tags(text) == {"iframe"} and 'sandbox="allow-scripts"' in text
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', text).group(1)) == found.html
    found.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == found.html
    with pytest.raises(UserError, match="lies in"):
        report(run, levels=[80])
