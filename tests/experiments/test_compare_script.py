# SPDX-License-Identifier: Apache-2.0
"""experiments/compare.py on curves whose tables are computed by hand."""

import importlib
from pathlib import Path

import pytest

from opsd_jax.errors import UserError
from opsd_jax.evaluation.runs import ACCURACY, TOKENS, Group, Run
from opsd_jax.run.config import load_experiment

PATH = Path(__file__).parents[2] / "experiments" / "compare.py"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PATH.parent))
        yield importlib.import_module("compare")


def run(*points):
    history = [
        {"step": i, TOKENS: tokens, ACCURACY: accuracy}
        for i, (tokens, accuracy) in enumerate(points)
    ]
    return Run(Path("somewhere"), None, "", history)


FAST = Group("OPSD", [run((0, 0.5), (1000, 0.9)), run((0, 0.4), (1000, 0.8))])
SLOW = Group("GRPO", [run((0, 0.5), (4000, 0.7)), run((0, 0.4), (4000, 0.4))])


def test_accuracies_and_tokens_by_hand(script):
    rates = {"OPSD": 1e-3, "GRPO": 3e-4}
    assert script.accuracy_table([FAST, SLOW], rates, [500, 2000])[2:] == [
        "| OPSD | 0.001 | 0.450 ± 0.071 | 0.650 ± 0.071 |  | 0.850 ± 0.071 | 1,000 |",
        "| GRPO | 0.0003 | 0.450 ± 0.071 | 0.463 ± 0.088 | 0.500 ± 0.141 | 0.550 ± 0.212 | 4,000 |",
    ]
    # To .6: 250 and 500 tokens; 2,000, and one that never gets there in 4,000.
    assert script.reach_table([FAST, SLOW], [0.6])[2:] == [
        "| OPSD | 375 ± 177 | 1.0 |",
        "| GRPO | 2,000 (1 of 2 never) | ≥ 8.0 |",
    ]
    assert script.reach_table([SLOW, FAST], [0.6])[2] == "| GRPO | 2,000 (1 of 2 never) |  |"
    unseen = Group("SFT", [Run(Path("somewhere"), None, "", [{"step": 1, TOKENS: 100}])])
    assert script.reach_table([FAST, unseen], [0.6])[3] == "| SFT | not measured |  |"


def test_the_rate_with_the_best_curve_wins(script):
    assert script.mean_accuracy(run((0, 0.0), (10, 1.0), (30, 1.0))) == pytest.approx(25 / 30)


@pytest.mark.parametrize("study", ["quickstart", "smollm2"])
def test_every_run_of_a_study_is_an_experiment(script, study, tmp_path):
    chosen = script.STUDIES[study]
    for method in chosen.methods.values():
        bindings = chosen.seed_bindings(1, tmp_path)
        load_experiment([str(PATH.parent / method.gin_file)], bindings)


def test_the_figure_is_the_same_twice(script, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        script.draw([FAST, SLOW], tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"GRPO" in (tmp_path / "a.svg").read_bytes()


def test_the_study_of_all_methods_takes_every_file_or_names_it(monkeypatch):
    """experiments/methods.py: titles are those of the headers, and what is left out is told."""
    monkeypatch.syspath_prepend(str(PATH.parent))
    study = importlib.import_module("methods")
    found, left_out = study.methods([])
    files = {path.stem for path in (PATH.parent / "methods").glob("*.gin")}
    assert {Path(m.gin_file).stem for m in found.values()} == (files - set(left_out)) | {
        "quickstart"
    }
    assert len(found) == len(files) - len(left_out) + 1, "two files have one title"
    assert {"Dr. GRPO", "DemoPSD", "SFT", study.FIRST} <= set(found)
    assert set(study.methods(["grpo"])[0]) == {study.FIRST, "GRPO"}
    for name, rows in (("SDPO from feedback", (24, 24)), ("GRPO", (24, 0))):
        file = str(PATH.parent / found[name].gin_file)
        experiment, _ = load_experiment([file], study.bindings(1, PATH.parent))
        base = experiment.train.model.warm_start
        assert (base.answer_rows, base.feedback_rows) == rows and base.seed == 1
    with pytest.raises(UserError, match="no grppo"):
        study.methods(["grppo"])


def test_the_teachers_accuracy_is_shown_of_runs_that_have_it(script):
    line = {"step": 0, TOKENS: 0, ACCURACY: 0.5, script.TEACHER: 0.75}
    group = Group("SDFT", [Run(Path("somewhere"), None, "", [line, line | {TOKENS: 9}])])
    rates = {"SDFT": 1e-3, "OPSD": 1e-3}
    table = script.accuracy_table([group, FAST], rates, [])
    assert table[0].endswith("| teacher at the end |") and table[2].endswith("| 0.750 |")
    assert table[3].endswith("| 1,000 |  |")
    assert "teacher" not in script.accuracy_table([FAST], rates, [])[0]
