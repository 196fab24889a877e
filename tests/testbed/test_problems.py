# SPDX-License-Identifier: Apache-2.0
"""The testbed's source: same problems from disk as from memory, disjoint splits."""

import subprocess
import sys

import pytest

from opsd_jax.data.problems import Problem
from opsd_jax.errors import UserError
from opsd_jax.testbed.problems import ChainArithmetic
from opsd_jax.testbed.world import own_notation


def test_problems_come_back_from_disk_as_generated(tmp_path):
    source = ChainArithmetic(split="heldout", num_problems=20)
    fresh = source.load(None)
    first, second = source.load(str(tmp_path)), source.load(str(tmp_path))
    assert list(fresh) == list(first) == list(second)
    assert len({problem.id for problem in fresh}) == 20
    for problem in fresh:
        assert fresh.grade(problem, own_notation(problem.question)) == 1.0
        assert fresh.grade(problem, problem.solution) == 1.0
        assert fresh.grade(problem, own_notation(problem.question) + ";") == 0.0


@pytest.mark.parametrize(
    "answer, said",
    [
        ("8+6=5;5*5=5;#5", "8+6=4"),
        ("8+6=4;4*5=3;#3", "4*5=0"),
        ("8*6=8;8*5=0;#1", "8+6=4"),  # the line has another key
        ("8+6=4;5*5=5;#5", "4*5=0"),
        ("8+6=4;4*5=0;#1", ""),  # no line is wrong
        ("8+6=5;5*5=5;", ""),  # cut
        ("#1 8+6=5 5*5=5", ""),  # another notation
        (";;", ""),
        ("", ""),
    ],
)
def test_feedback_is_what_the_first_wrong_line_should_have_been(answer, said):
    quiet, telling = ChainArithmetic(num_problems=2), ChainArithmetic(num_problems=2, feedback=True)
    problem = Problem("p", "8+6*5", "", "0")
    assert telling.load(None).grade(problem, answer) == (0.0, said)
    assert quiet.load(None).grade(problem, answer) == 0.0
    for right in ("8+6=4;4*5=0;#0", "8+6=5;5*5=5;#0", "#0 8+6=4 4*5=0"):
        assert telling.load(None).grade(problem, right) == 1.0


def test_feedback_changes_no_problem(tmp_path):
    quiet, telling = ChainArithmetic(num_problems=5), ChainArithmetic(num_problems=5, feedback=True)
    problems = list(quiet.load(str(tmp_path)))
    assert list(telling.load(None)) == list(telling.load(str(tmp_path))) == problems
    assert len(list(tmp_path.rglob("dataset_info.json"))) == 1
    grader = telling.load(None).grade
    assert grader.extract("8+6=4;#4") == "4"  # answers can vote


@pytest.mark.parametrize("victim", ["*.array_record*", "dataset_info.json"])
def test_a_damaged_file_is_made_again(victim, tmp_path, caplog):
    source = ChainArithmetic(num_problems=5)
    first = source.load(str(tmp_path))
    (path,) = tmp_path.rglob(victim)
    path.write_bytes(path.read_bytes()[:50])
    assert source.load(str(tmp_path)) == first == source.load(str(tmp_path))
    assert caplog.text.count("cannot be read") == 1


def test_splits_are_disjoint_and_seeds_differ():
    train = {p.id for p in ChainArithmetic("train", 400).load(None)}
    heldout = {p.id for p in ChainArithmetic("heldout", 400).load(None)}
    other = {p.id for p in ChainArithmetic("train", 400, seed=1).load(None)}
    assert not train & heldout
    assert len(train & other) < 20


def test_a_smaller_draw_is_the_start_of_a_larger_one():
    small, large = ChainArithmetic("train", 10).load(None), ChainArithmetic("train", 30).load(None)
    assert list(small) == list(large)[:10]


def test_no_tensorflow():
    code = (
        "import sys; from opsd_jax.testbed.problems import ChainArithmetic;"
        "ChainArithmetic('train', 3).load(None); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"split": "test"}, "split"),
        ({"num_problems": 0}, "num_problems"),
        ({"split": "heldout", "num_problems": 9000}, "num_problems"),
    ],
)
def test_bad_sources_are_refused(fields, word):
    with pytest.raises(UserError, match=f"ChainArithmetic.{word}"):
        ChainArithmetic(**fields)
