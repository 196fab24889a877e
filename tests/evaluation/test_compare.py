# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opsd_jax.data.problems import Problem
from opsd_jax.errors import UserError
from opsd_jax.evaluation.compare import compare, paired_bootstrap, table
from opsd_jax.evaluation.generations import Generation, GenerationLog, Place
from opsd_jax.evaluation.statistics import by_problem
from opsd_jax.main import main


def write(folder, rewards: dict[str, list[float]], finished=True, role="student"):
    with GenerationLog(folder, {}) as log:
        generations = []
        for id, samples in rewards.items():
            for sample, reward in enumerate(samples):
                answer = "right" if reward else "wrong"
                found = Generation(
                    Problem(id, "", "", "a"), "", 1, True, reward, sample, answer, group=reward
                )
                generations.append(found)
                log.append(Place(role, "sampled", id, sample), found)
    n = len(samples)
    rows = [{"role": role} | row for row in by_problem(generations, [], n, True)]
    if finished:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "by_problem.jsonl").write_text(text)
    return str(folder)


def test_the_interval_is_that_of_a_slow_loop():
    rng = np.random.default_rng(1)
    a, b = rng.random(20), rng.random(20) + 0.1
    found = paired_bootstrap(a, b)
    means = [np.mean((b - a)[rng.integers(0, 20, 20)]) for _ in range(20_000)]
    assert found.value == pytest.approx(np.mean(b) - np.mean(a))
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    assert paired_bootstrap(a, b) == found


def test_what_is_hard_for_both_cancels():
    a = np.array([0.0, 1.0] * 10)
    found = paired_bootstrap(a, np.clip(a + 0.1, 0, None))
    assert found.low == pytest.approx(0.1) == found.high


def test_metrics_by_hand_whatever_the_order_of_the_problems(tmp_path):
    a = write(tmp_path / "a", {"p": [1.0, 0.0, 0.0], "q": [0.0, 0.0, 0.0]})
    b = write(tmp_path / "b", {"q": [1.0, 1.0, 0.0], "p": [1.0, 0.0, 0.0]})
    found = compare(a, b)
    values = {name: (d.a, d.b) for name, d in found.items()}
    assert values == {
        "student/accuracy": pytest.approx((1 / 6, 0.5)),
        "student/pass_at_1": pytest.approx((1 / 6, 0.5)),
        "student/pass_at_2": pytest.approx((1 / 3, (2 / 3 + 1) / 2)),
        "student/pass_at_3": (0.5, 1.0),
        "student/maj_at_3": (0.0, 0.5),
    }
    assert found["student/maj_at_3"].num_problems == 2
    assert "student/maj_at_3" in table(found)


def test_through_the_command_line_without_jax(tmp_path):
    folders = []
    for name in "ab":  # As workdirs, with one evaluation each.
        (tmp_path / name / "eval").mkdir(parents=True)
        write(tmp_path / name / "eval" / "x", {"p": [1.0], "q": [float(name == "b")]})
        folders.append(str(tmp_path / name))
    code = (
        "import sys; from opsd_jax.main import main; main(sys.argv[1:]); "
        "print('jax' in sys.modules, file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "eval", "--compare", *folders], capture_output=True, text=True
    )
    assert json.loads(run.stdout)["student/accuracy"]["difference"] == 0.5
    assert run.stderr.endswith("False\n")


def test_other_problems_are_refused_by_name(tmp_path, capsys):
    a = write(tmp_path / "a", {"p": [1.0], "q": [0.0]})
    b = write(tmp_path / "b", {"p": [1.0], "r": [0.0]})
    assert main(["eval", "--compare", a, b]) == 2
    assert "1 of 2 problems are in" in (told := capsys.readouterr().err) and "(q)" in told
    path = Path(write(tmp_path / "c", {"p": [1.0], "q": [0.0]})) / "by_problem.jsonl"
    assert main(["eval", "--compare", a, str(path.parent)]) == 0
    path.write_text(path.read_text().replace('"answer": "a"', '"answer": "b"'))
    assert main(["eval", "--compare", a, str(path.parent)]) == 2
    assert "problem p has the answer 'a' in" in capsys.readouterr().err


def test_what_cannot_be_compared_is_told(tmp_path):
    a = write(tmp_path / "a", {"p": [1.0]})
    with pytest.raises(UserError, match="has no generations.jsonl"):
        compare(a, str(tmp_path))
    with pytest.raises(UserError, match="not finished"):
        compare(a, write(tmp_path / "b", {"p": [1.0]}, finished=False))
    with pytest.raises(UserError, match="no role was evaluated in both"):
        compare(a, write(tmp_path / "c", {"p": [1.0]}, role="teacher"))
    for name in "de":
        write(tmp_path / "run" / "eval" / name, {"p": [1.0]})
    with pytest.raises(UserError, match="several evaluations"):
        compare(a, str(tmp_path / "run"))


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, None) for name in ("role", "id", "accuracy", "num_samples", "num_correct")],
        *[("accuracy", wrong) for wrong in ("1.0", [1.0], 1.5, float("nan"), float("inf"), True)],
        *[("num_samples", wrong) for wrong in (0, 3, 1.0, 10**30, "1")],
        *[("num_correct", wrong) for wrong in (3, -1, [1])],
        *[("id", ["p"]), ("role", {}), ("greedy", "0.5"), ("majority", 10**400)],
    ],
)
def test_a_row_that_cannot_be_counted_is_named(name, value, tmp_path, capsys):
    a = write(tmp_path / "a", {"p": [1.0, 0.0], "q": [0.0, 0.0]})
    path = Path(a) / "by_problem.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    second = {k: v for k, v in (second | {name: value}).items() if v is not None}
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    assert main(["eval", "--compare", a, a]) == 2
    assert f"{path}:2: {name} is not what an evaluation writes" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["torn", "[]", "null", "[" * 100_000, "\xff"])
def test_a_line_that_is_no_row_is_named(line, tmp_path, capsys):
    a = write(tmp_path / "a", {"p": [1.0]})
    path = Path(a) / "by_problem.jsonl"
    path.write_bytes(path.read_bytes() + line.encode("latin-1"))
    assert main(["eval", "--compare", a, a]) == 2
    assert f"{path}:2: the line is not what" in capsys.readouterr().err
    path.write_text("")
    assert main(["eval", "--compare", a, a]) == 2
    assert "has no line" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, flag",
    [
        ("eval --compare a b --step=3", "--step"),
        ("eval --compare a b --out=c", "--out"),
        ("eval --compare a b --gin_file=c", "--gin_file"),
        ("eval --model=a --gin_file=b --step=0", "--step"),
        ("generate --model=a --prompt=b --step=3", "--step"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(arguments, flag, capsys):
    assert main(arguments.split()) == 2
    assert f"{flag} does not apply to" in capsys.readouterr().err
