# SPDX-License-Identifier: Apache-2.0
"""Functions of the user's in a gin file: their bindings belong to the run."""

import sys
from pathlib import Path

import gin
import pytest

from opsd_jax.data.grader_pool import GraderPool
from opsd_jax.data.problems import Problem
from opsd_jax.errors import UserError
from opsd_jax.evaluation.runs import Run, group_runs
from opsd_jax.host.config_text import bindings, first_difference
from opsd_jax.main import main
from opsd_jax.run.config import finished_run, load_experiment
from tests.run.test_train import TINY

QUICKSTART = str(Path(__file__).parents[2] / "experiments" / "quickstart.gin")
MODULE = """
import gin

@gin.configurable
def inner_scale(factor=1.0):
    return factor

@gin.configurable
def own_divergence(student_logps, teacher_logps, alpha=1.0):
    return alpha * inner_scale() * (teacher_logps - student_logps)

@gin.configurable
def own_weight(tokens, mask, factor):
    return factor * mask

@gin.configurable
def own_grader(answer, completion, give=0.0):
    return give
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_functions.py").write_text(MODULE)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def load(*lines):
    return load_experiment(
        [QUICKSTART],
        ["import own_functions", "a = 0.5", "divergence.name = @own_divergence", *lines],
    )


def test_bindings_of_a_function_are_part_of_the_config(folder, tmp_path):
    half, text = load("own_divergence.alpha = 0.5", "inner_scale.factor = %a")
    found = bindings(text)
    assert found["own_divergence.alpha"] == "0.5" and found["inner_scale.factor"] == "%a"
    (tmp_path / "config.gin").write_text(text)
    again, text_again = load_experiment([str(tmp_path / "config.gin")])
    assert again == half and hash(again) == hash(half) and text_again == text
    other, other_text = load("own_divergence.alpha = 0.25", "inner_scale.factor = %a")
    assert other != half
    assert "own_divergence.alpha" in first_difference(text, other_text)
    runs = [Run(Path(name), None, config, []) for name, config in (("a", text), ("b", other_text))]
    assert len(group_runs(runs)) == 2


def test_unbound_functions_are_as_they_were(folder):
    plain, text = load()
    assert plain.divergence.name is sys.modules["own_functions"].own_divergence
    assert bindings(text)["own_divergence.alpha"] == "1.0"


def test_a_wrong_shape_is_refused_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "flat.py").write_text(
        "import gin\n\n@gin.configurable\ndef flat(student_logps, teacher_logps):\n"
        "    return (teacher_logps - student_logps).sum(-1)\n"
    )
    (tmp_path / "flat.gin").write_text(
        f'include "{QUICKSTART}"\nimport flat\ndivergence.name = @flat\n'
    )
    lines = [f"--gin_bindings={line}" for line in TINY]
    run = ["train", f"--gin_file={tmp_path}/flat.gin", f"--workdir={tmp_path}/run", *lines]
    try:
        assert main(run) == 2
    finally:
        sys.modules.pop("flat", None)
    told = capsys.readouterr().err.splitlines()[-1]
    wanted = "divergence.name: @flat must return shape (2, 3, 5), not (2, 3)"
    assert told == f"opsd train: {wanted}; it was given two of [B, C, V] = (2, 3, 5)"
    assert not (tmp_path / "run" / "config.gin").exists()


def test_an_argument_without_a_default_may_be_bound(folder):
    experiment, _ = load("divergence.weights = (@own_weight,)", "own_weight.factor = 3.0")
    (weight,) = experiment.divergence.weights
    assert weight(None, 2.0) == 6.0


def test_another_config_read_meanwhile_changes_nothing(folder, tmp_path):
    experiment, _ = load("own_divergence.alpha = %a", "inner_scale.factor = 3.0")
    run = finished_run(str(tmp_path))
    run.read(QUICKSTART)
    assert experiment.divergence.name(1.0, 2.0) == 1.5
    with pytest.raises(UserError):
        run.read("nowhere.gin")
    assert experiment.divergence.name(1.0, 2.0) == 1.5


def test_a_worker_has_the_bindings_of_its_grader(folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "1+1", "solution": "2", "answer": "2"}\n')
    source = f'train.heldout = @JsonlProblems()\nJsonlProblems.path = "{tmp_path}/p.jsonl"'
    grader = "JsonlProblems.grader = @heldout/own_grader\nheldout/own_grader.give = 1.0"
    experiment, text = load(source, grader)
    assert bindings(text)["heldout/own_grader.give"] == "1.0"
    problems = experiment.train.heldout.load()
    gin.clear_config()
    for num_workers in (0, 1):
        with GraderPool(problems.grade, num_workers=num_workers) as pool:
            assert pool.grade([Problem("p", "", "", "2")], ["3"])[0].value == 1.0


def test_a_module_that_was_written_again_is_read_again(tmp_path, monkeypatch):
    """As by a cell of a notebook that is run twice; what it imports counts too."""
    monkeypatch.syspath_prepend(tmp_path)
    value, inner = tmp_path / "written_value.py", tmp_path / "written_inner.py"
    value.write_text(
        "import gin\nimport written_inner\n\n"
        "@gin.configurable\ndef written(student_logps, teacher_logps):\n"
        "    return written_inner.FACTOR\n"
    )
    inner.write_text("FACTOR = 1.0\n")
    lines = ["import written_value", "divergence.name = @written"]

    def divergence():
        return load_experiment([QUICKSTART], lines)[0].divergence.name

    first = divergence()
    assert first(0, 0) == 1.0 and divergence() is first
    inner.write_text("FACTOR = 2.0\n")  # of the same size, maybe in the same second
    assert divergence()(0, 0) == 2.0
    value.write_text(value.read_text() + "\n\n@gin.configurable\ndef more():\n    pass\n")
    assert divergence()(0, 0) == 2.0 and first(0, 0) == 1.0
