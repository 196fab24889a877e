# SPDX-License-Identifier: Apache-2.0
"""Whole runs in two processes: the numbers, samples and generations of one process."""

import json

import pytest
from test_train import command, lines_of
from two_processes import run_pair

from opsd_jax.main import main


def commands(workdir, method: str, *num_steps: int) -> list[list[str]]:
    flags = [flag.replace("quickstart.gin", f"{method}.gin") for flag in command(workdir)]
    return [[*flags, f"--gin_bindings=train.num_steps = {n}"] for n in num_steps]


SCRIPT = """
import json
for command in map(json.loads, arguments):
    assert main([*command, "--distributed"]) == 0
    sync_global_devices(str(command))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method, steps", [("quickstart", (1, 3)), ("baselines/opsd_reward", (2,))])
def test_two_processes_say_what_one_says(method, steps, tmp_path):
    """Resumed and evaluated where a step is one program; graded between its halves where not."""
    for folder in ("one", "two"):
        run = commands(tmp_path / folder, method, *steps)
        if len(steps) > 1:
            run.append(["eval", f"--workdir={tmp_path / folder}"])
        if folder == "one":
            assert all(main(each) == 0 for each in run)
        else:
            (said, _), (nothing, _) = run_pair(SCRIPT, *map(json.dumps, run))
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
