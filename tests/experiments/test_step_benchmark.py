# SPDX-License-Identifier: Apache-2.0
"""The script that times a step runs, and its lines say what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest

STEP = Path(__file__).parents[2] / "experiments" / "benchmarks" / "step.py"


@pytest.mark.slow
def test_a_line_per_work():
    command = [sys.executable, STEP, "--works=small", "--turns=1", "--remat=keep_projections"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    header, _, line = done.stdout.splitlines()
    cells = dict(zip(header.split("|"), line.split("|"), strict=True))
    found = {name.strip(): value.strip() for name, value in cells.items() if name.strip()}
    assert found["work"] == "B 8, C 64, V 4,096" and found["by"] == "opsd_jax"
    rollout, update = float(found["rollout"]), float(found["update"])
    assert rollout > 0 and update > 0
    assert float(found["s a step"]) == pytest.approx(rollout + update, abs=2e-3)
    assert float(found["update / floor"]) > 0.5  # no faster than its products
    assert float(found["peak MB"].replace(",", "")) > 300


def test_a_peer_is_asked_for_the_same_work(capsys, monkeypatch):
    monkeypatch.syspath_prepend(STEP.parent)
    import step

    asked = []

    def run(command):
        asked.append(command)
        return {"rollout_s": 1.0, "update_s": 2.0, "peak_mb": 3e3, "floor_s": 0.5, "compile_s": 4}

    monkeypatch.setattr(step, "run", run)
    peers = ["--trl=/trl/python", "--tunix=/tunix/python"]
    monkeypatch.setattr(sys, "argv", ["step.py", "--works=small,vocabulary", *peers])
    step.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["opsd_jax", "TRL", "tunix"] * 2
    assert all("| 3.000 | 1.000 | 2.000 | 4.00 | 3,000 | 4.0 |" in line for line in lines)
    ours, *others = asked[3:]
    assert ours[-1] == "--works=vocabulary"
    sizes = ["--batch=4", "--completion=256", "--vocabulary=151936", "--turns=5"]
    assert [other[0] for other in others] == ["/trl/python", "/tunix/python"]
    assert all(other[2:] == sizes and Path(other[1]).exists() for other in others)


def test_an_unknown_work_is_told():
    done = subprocess.run([sys.executable, STEP, "--works=big"], capture_output=True, text=True)
    assert done.returncode == 2 and "no work big; small, batch, vocabulary" in done.stderr
