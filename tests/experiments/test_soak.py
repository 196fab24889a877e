# SPDX-License-Identifier: Apache-2.0
"""experiments/benchmarks/soak.py: one signal; and what it calls equal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.test_divergence_benchmarks import FOLDER, script

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("OPSD_POD_FAULTS") != "1", reason="set OPSD_POD_FAULTS=1: minutes"
)
def test_a_run_with_one_signal_is_the_run_without(tmp_path):
    out = subprocess.run(
        [
            sys.executable,
            FOLDER / "soak.py",
            "--minutes=0.01",
            "--seconds=5",
            f"--workdir={tmp_path}",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert "with 1 signals" in out.stdout and out.stdout.endswith(": equal\n")
    soak = script("soak")
    folders = tmp_path / "soaked", tmp_path / "whole"
    metrics = folders[0] / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert soak.differences(*folders, lines[-1]["step"]) == []
    lines[-1]["loss/objective"] += 1e-7
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert soak.differences(*folders, lines[-1]["step"]) == ["numbers of the run"]
