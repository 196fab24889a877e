# SPDX-License-Identifier: Apache-2.0
"""experiments/forecast.py: cases differ in the teacher alone, ranks by scipy, tables by hand."""

import dataclasses
import importlib
import math
from pathlib import Path

import gin
import numpy as np
import pytest
from scipy.stats import spearmanr

from opsd_jax.data.record import Problem
from opsd_jax.run.config import load_experiment

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield importlib.import_module("forecast")


def test_cases_differ_in_the_teacher_alone(script, tmp_path):
    """But for those that the probe cannot foresee, whose weights or loss are other ones."""

    def loaded(case):
        lines = script.lines(case, tmp_path)
        return load_experiment([str(EXPERIMENTS / case.gin_file)], lines)[0]

    def recipe(found):
        """All that a step is made of but base, problems and answers to each."""
        special = {"model", "problems", "group_size", "num_steps"}
        names = {field.name for field in dataclasses.fields(found.train)} - special
        train = {name: getattr(found.train, name) for name in names}
        return train, found.divergence, found.optimizer, found.rollout, found.teacher

    whole = loaded(script.CASES["quickstart"])
    for name, case in script.CASES.items():
        found = loaded(case)
        if case.ended is not None:  # A study with a recipe of its own.
            continue
        assert (recipe(found) == recipe(whole)) == (not case.same_as), name
        same = found.contexts == whole.contexts and found.train.model == whole.train.model
        same &= found.train.problems == whole.train.problems
        assert same == ("quickstart" in (name, case.same_as)), name
        assert found.contexts.student == whole.contexts.student
        assert found.train.heldout == whole.train.heldout


def test_hints_by_hand():
    with pytest.MonkeyPatch.context() as patch, gin.unlock_config():
        patch.syspath_prepend(str(EXPERIMENTS / "ablations"))
        hints = importlib.import_module("hints")
    problem = Problem("p", "7+4*0+9", "#9 0+9=9 1*0=0 7+4=1", "9")
    assert hints.first_lemmas(problem, 0) == "7+4*0+9|#9?"
    assert hints.first_lemmas(problem, 2) == "7+4*0+9|#9 0+9=9 1*0=0?"
    assert hints.wrong_lemmas(problem, 0.0) == "7+4*0+9|#9 0+9=9 1*0=0 7+4=1?"
    wrong = hints.wrong_lemmas(problem, 1.0).split("|")[1][:-1].split()
    assert [w[:4] for w in wrong[1:]] == ["0+9=", "1*0=", "7+4="] and wrong[0] == "#9"
    assert all(w[-1] != r for w, r in zip(wrong[1:], "901", strict=True))
    first, second, last = hints.irrelevant_lemmas(problem, 2).split("|#9 ")[1][:-1].split()
    assert last == "7+4=1" and not {first[:3], second[:3]} & {"0+9", "1*0", "7+4"}
    for left, op, right, _, result in (first, second):
        value = int(left) + int(right) if op == "+" else int(left) * int(right)
        assert value % 10 == int(result)


def row(name, gain, advice="ahead", same_as="", **numbers):
    row = dict.fromkeys(("accuracy", "from_wrong", "right_answer", "gap", "gap_right"), 0.5)
    row |= dict.fromkeys(("gap_wrong", "gap_wrong_more", "first_8"), 0.25)
    ends = [0.5 + gain - 0.01, 0.5 + gain + 0.01]
    row |= {"before": [0.5, 0.5], "best": [0.9, 0.9], "last": ends, "error": 0.03}
    about = {"case": name, "about": name, "same_as": same_as, "advice": advice}
    return about | row | numbers


ROWS = [
    row("a", 0.05, accuracy=0.1, gap=math.nan),
    row("b", 0.4, accuracy=0.5, gap=0.1),
    row("c", -0.3, advice="no better", accuracy=-0.4, gap=0.3),
    row("d", 0.3, accuracy=0.45, gap=0.1),
    row("e", -0.1, same_as="a", accuracy=0.5, gap=0.1),
]


def test_the_rank_correlation_is_scipys(script):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 12).astype(float), rng.normal(size=12)  # with ties
    value, low, high = script.rank_correlation(x, y)
    assert value == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert -1 <= low < value < high <= 1
    draws = rng.integers(12, size=(2000, 12))
    slow = [spearmanr(x[d], y[d]).statistic for d in draws]
    np.testing.assert_allclose([low, high], np.percentile(slow, [2.5, 97.5]), atol=0.05)


def test_tables_by_hand(script):
    # By accuracy a, b, c, d rank as by gain; e is a to the probe. Of the known gaps two are tied.
    accuracy, _, _, gap, *_ = script.rank_table(ROWS)[2:]
    assert accuracy.startswith("| accuracy | 4 | +1.00 [")
    assert gap.startswith("| divergence | 3 | ")
    assert f"| {spearmanr([0.1, 0.3, 0.1], [0.4, -0.3, 0.3]).statistic:+.2f} [" in gap
    assert script.confusion(ROWS)[2:] == ["| ahead | 2 | 1 | 1 |", "| no better | 0 | 0 | 1 |"]
    table = script.case_table(ROWS)[2:]
    assert [line[2] for line in table] == ["b", "d", "a", "e", "c"]
    assert table[0].endswith("| ahead | 0.500 | +0.400 ± 0.014 | +0.000 |")
    assert table[2].split(" | ")[4] == "–" and table[4].endswith("| -0.300 ± 0.014 | -0.700 |")


def test_the_rows_come_back_from_their_file(script, tmp_path):
    script.write_csv(ROWS, tmp_path / "rows.csv")
    again = script.read_csv(tmp_path / "rows.csv")
    assert script.case_table(again) == script.case_table(ROWS)
    assert script.rank_table(again) == script.rank_table(ROWS)
    assert script.confusion(again) == script.confusion(ROWS)


def test_the_page_has_what_the_kept_rows_say(script):
    rows = script.read_csv(EXPERIMENTS / "forecast.csv")
    assert {row["case"] for row in rows} <= set(script.CASES)
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    tables = [*script.case_table(rows), *script.rank_table(rows), *script.confusion(rows)]
    assert [line for line in tables if line not in page] == []
