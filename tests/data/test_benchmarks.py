# SPDX-License-Identifier: Apache-2.0
"""Rows in the published columns, made here; nothing is downloaded."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from opsd_jax.data.benchmarks import BENCHMARKS, Benchmark
from opsd_jax.errors import UserError
from opsd_jax.run.config import load_experiment
from tests.host.test_hub import hub  # noqa: F401

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# name -> (a file of the published layout, one row, question, answer, solution, id)
ROWS = {
    "aime24": (
        "data/train-00000-of-00001.parquet",
        dict(id=60, problem="Q", solution="S", answer="204", url="u", year="2024"),
        ("Q", "204", "S", "60"),
    ),
    "aime25": (
        "data/train-00000-of-00001-243207c6c994e1bd.parquet",
        dict(id=0, problem="Q", answer="70", year="2025"),
        ("Q", "70", "", "0"),
    ),
    "hmmt25": (
        "data/train-00000-of-00001.parquet",
        dict(problem_idx=1, problem="Q", answer=r"\frac{1}{21}", problem_type=["Algebra"]),
        ("Q", r"\frac{1}{21}", "", "1"),
    ),
    "math500": (
        "test.jsonl",
        dict(problem="Q", solution="S", answer=r"\left( 3, \frac{\pi}{2} \right)", subject="P")
        | dict(level=2, unique_id="test/precalculus/807.json"),
        ("Q", r"\left( 3, \frac{\pi}{2} \right)", "S", "test/precalculus/807.json"),
    ),
    "gsm8k": (
        "main/test-00000-of-00001.parquet",
        dict(question="Q", answer="2 * 900 = <<2*900=1800>>1800\n#### 1,800"),
        ("Q", "1800", "2 * 900 = <<2*900=1800>>1800\n#### 1,800", None),
    ),
    "amc23": (
        "test-00000-of-00001.parquet",
        dict(id=0, question="Q", answer=27.0, url="u"),
        ("Q", "27", "", "0"),
    ),
}


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_rows_become_problems(name, tmp_path):
    file, row, (question, answer, solution, id) = ROWS[name]
    write(tmp_path / file, row)
    # Another split beside it, which is not evaluated.
    write(tmp_path / "socratic" / f"train-0{Path(file).suffix}", row, row)
    problems = Benchmark(name, str(tmp_path), grader="boxed").load()
    (problem,) = problems.problems
    assert (problem.question, problem.answer, problem.solution) == (question, answer, solution)
    assert id is None or problem.id == id
    assert problems.grade(problem, f"so \\boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_alone_will_do(suffix, tmp_path):
    write(tmp_path / f"mine{suffix}", ROWS["aime24"][1])
    for other in (".jsonl", ".parquet"):  # what a notebook leaves beside them
        write(tmp_path / ".ipynb_checkpoints" / f"mine{other}", ROWS["aime24"][1] | {"id": 61})
    for path in (tmp_path, tmp_path / f"mine{suffix}"):
        assert len(Benchmark("aime24", str(path), grader="boxed").load()) == 1


def test_from_the_hub_by_its_id(tmp_path, hub):  # noqa: F811
    file, row = ROWS["gsm8k"][:2]
    write(tmp_path / file, row)
    files = {file: (tmp_path / file).read_bytes(), "main/train-0.parquet": b"another split"}
    first = hub.commit("dataset", "openai/gsm8k", files)
    assert len(Benchmark("gsm8k", grader="boxed").load()) == 1
    assert not [path for _, path in hub.requests if "train" in path]
    hub.commit("dataset", "openai/gsm8k", {"main/other.parquet": b""})
    assert len(Benchmark("gsm8k", f"openai/gsm8k@{first}", grader="boxed").load()) == 1
    with pytest.raises(UserError, match="gsm8k has no main/test-.*; set Benchmark.path"):
        Benchmark("gsm8k").load()
    with pytest.raises(UserError, match="aime_2024: no such local path, and the Hub answers 401"):
        Benchmark("aime24").load()


def test_what_is_wrong_is_told(tmp_path):
    write(tmp_path / "rows.jsonl", {"question": "Q", "answer": "no hashes"})
    with pytest.raises(UserError, match=r"rows.jsonl:1: no answer .*read with @JsonlProblems\(\)"):
        Benchmark("gsm8k", str(tmp_path / "rows.jsonl"), grader="boxed").load()
    with pytest.raises(UserError, match="Benchmark.name must be 'aime24', .*not 'aime23'"):
        Benchmark("aime23")
    with pytest.raises(UserError, match="^Benchmark.path: .*is no file"):
        Benchmark("aime24", str(tmp_path / "nowhere"), grader="boxed").load()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_protocol_of_the_paper_over_any_run(name):
    """The protocol of the published evaluation."""
    path = EXPERIMENTS / "eval" / f"{name}.gin"
    assert f"opsd eval --workdir=runs/X --gin_file=experiments/eval/{name}.gin" in path.read_text()
    experiment, _ = load_experiment([str(EXPERIMENTS / "quickstart.gin"), str(path)])
    evaluate = experiment.evaluate
    assert experiment.train.heldout == Benchmark(name)
    assert (evaluate.num_samples, evaluate.temperature, evaluate.top_p) == (12, 1.0, 0.95)
    assert (evaluate.max_new_tokens, evaluate.top_k, evaluate.num_problems) == (38912, 0, 0)
    assert evaluate.roles == ("student_thinking",)
    assert experiment.contexts.evaluation == "boxed"
