# SPDX-License-Identifier: Apache-2.0
"""Whole runs in two processes: the numbers, samples and generations of one process."""

import json

import numpy as np
import pytest

from opsd_jax.main import main
from tests.pods import run_pod
from tests.run.test_train import command, lines_of


def commands(workdir, method: str, *num_steps: int) -> list[list[str]]:
    flags = [flag.replace("quickstart.gin", f"{method}.gin") for flag in command(workdir)]
    return [[*flags, f"--gin_bindings=train.num_steps = {n}"] for n in num_steps]


# A pod's devices come in the order of the hardware: here those of the second process between two
# of the first; or the two processes side by side along `model`.
ORDERED = """
import json, numpy as np
from opsd_jax.model import sharding
make, order = jax.make_mesh, json.loads(arguments.pop(0))
def make_mesh(shape, names, types, devices):
    return make(shape, names, types, devices=[devices[i] for i in order])
sharding.jax.make_mesh = make_mesh
"""
SCRIPT = (
    ORDERED
    + """
for command in map(json.loads, arguments):
    assert main([*command, "--distributed"]) == 0
    sync_global_devices(str(command))
"""
)
GRADED = (
    ORDERED
    + """
from types import SimpleNamespace
from opsd_jax.data.grader_pool import Grade
from opsd_jax.sampling.prompts import Completion
from opsd_jax.run.graded_rows import row_grader
from opsd_jax.host.pod import local_rows
jax.distributed.initialize()
mesh = sharding.make_mesh(sharding.MeshConfig(-1, int(arguments[0])))
ids = 10 * np.arange(8)[:, None] + np.arange(3)
rows = sharding.shard_batch((ids, np.ones((8, 3), bool), np.zeros(8, bool)), mesh)
problems = [SimpleNamespace(answer="a" if i != 5 else "", number=i) for i in range(8)]
tokenizer = SimpleNamespace(decode=lambda ids: ids)
grade = lambda asked, texts: [
    Grade(p.number + t[0] + t[2] / 100, "timeout" if p.number == 3 else "graded")
    for p, t in zip(asked, texts)
]
completion = Completion(*rows[:2], logps=None, stopped=rows[2])
graded = row_grader(problems, tokenizer, grade)(completion, np.arange(8)[::-1])
mine, held = local_rows(rows[0])
assert (held == ids[mine]).all()
print("found", json.dumps([mine.tolist(), [row.tolist() for row in graded[:2]]]))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("order, model", [((0, 2, 3, 1), 1), ((0, 2, 1, 3), 2), ((0, 1), 2)])
def test_every_process_grades_its_rows_and_knows_all_grades(order, model):
    said = run_pod(GRADED, json.dumps(order), model, num_devices=len(order) // 2)
    lines = [line for text, _ in said for line in text.splitlines() if line.startswith("found ")]
    (mine, grades), (theirs, same) = (json.loads(line.removeprefix("found ")) for line in lines)
    assert sorted({*mine, *theirs}) == list(range(8))
    assert (mine == list(range(8))) == (model == 2)
    wanted = [np.nan if i == 2 else 7 - i + 10 * i + (10 * i + 2) / 100 for i in range(8)]
    np.testing.assert_allclose(grades[0], wanted, rtol=1e-6)
    assert [row for row, failed in enumerate(grades[1]) if failed == 1] == [4]
    np.testing.assert_array_equal(grades, same)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, steps, order, model",
    [
        ("quickstart", (1, 3), (0, 2, 3, 1), 1),
        ("baselines/opsd_reward", (2,), (0, 2, 3, 1), 1),
        ("baselines/opsd_reward", (2,), (0, 1), 2),
    ],
)
def test_two_processes_say_what_one_says(method, steps, order, model, tmp_path):
    """Resumed and evaluated where a step is one program; graded between its halves where not."""
    for folder in ("one", "two"):
        run = commands(tmp_path / folder, method, *steps)
        if len(steps) > 1:
            run.append(["eval", f"--workdir={tmp_path / folder}"])
        if folder == "one":
            assert all(main(each) == 0 for each in run)
        else:
            run = [
                [*each, f"--gin_bindings=mesh.model = {model}"] if model > 1 else each
                for each in run
            ]
            (said, _), (nothing, _) = run_pod(
                SCRIPT, json.dumps(order), *map(json.dumps, run), num_devices=len(order) // 2
            )
    assert "generated tokens" in said and "eval/" not in nothing
    one, two = tmp_path / "one", tmp_path / "two"
    assert [line["step"] for line in lines_of(two)] == list(range(steps[-1] + 1))
    for ours, theirs in zip(lines_of(two), lines_of(one), strict=True):
        assert ours == pytest.approx(theirs, rel=3e-4, abs=5e-6, nan_ok=True)
    kept = sorted(path.relative_to(one) for path in one.rglob("*.jsonl"))
    assert kept == sorted(path.relative_to(two) for path in two.rglob("*.jsonl"))
    for path in (path for path in kept if path.name != "metrics.jsonl"):
        ours, theirs = (sorted((root / path).read_text().splitlines()) for root in (two, one))
        assert ours == theirs, path


SAID = """
import json
from opsd_jax.host.pod import FirstProcessSays, connected_mesh
from opsd_jax.model.sharding import MeshConfig
jax.distributed.initialize()
says, found = FirstProcessSays(connected_mesh(MeshConfig())), []
for first, second in ((False, True), (True, False), (True, True), (False, False)):
    says.ask((first, second)[index])
    found.append(says.said())
print("found", json.dumps(found))
"""


@pytest.mark.slow
def test_the_first_process_decides_for_all():
    for said, _ in run_pod(SAID, num_devices=2):
        assert "found [false, true, true, false]" in said
