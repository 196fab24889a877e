# SPDX-License-Identifier: Apache-2.0
"""The scripts in experiments/benchmarks that measure the divergence run and mean what they say."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from tests.representatives import representatives

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("flags", representatives([[], ["--frozen_head", "--dtype=bfloat16"]], []))
def test_divergence_benchmark(flags, monkeypatch, capsys):
    small = [
        "--vocab=300",
        "--rows=2",
        "--length=8",
        "--width=8",
        "--token_blocks=4",
        "--repeats=1",
    ]
    monkeypatch.setattr(sys, "argv", ["divergence.py", *small, *flags])
    script("divergence").main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case"] for row in rows] == ["matmul_floor", "dense", "fused_4"]
    assert all(row["seconds"] > 0 and row["tokens"] == 16 for row in rows)


def test_clip_directions():
    module = script("clip_direction")
    rng = np.random.default_rng(0)
    student = rng.normal(size=(2, 30, 50)).astype(np.float32)
    teacher = student + rng.normal(size=student.shape).astype(np.float32)
    mask = rng.random((2, 30)) < 0.8
    rows = module.clip_directions(student, teacher, mask, thresholds=(1e3, 1e-6))
    by_clip = {(row["clip"], row["threshold"]): row for row in rows}
    for clip in ("none", "entry", "token", "rescale"):
        loose = by_clip[clip, 1.0 if clip == "none" else 1e3]
        assert loose["cosine"] == pytest.approx(1, abs=1e-5) and loose["clipped"] == 0
    assert by_clip["rescale", 1e-6]["token_cosine"] == pytest.approx(1, abs=1e-4)
    # At the non-thinking threshold the entry clip points away.
    assert by_clip["entry", 1e-6]["cosine"] < -0.2 and by_clip["entry", 1e-6]["negative"] == 1
    assert by_clip["token", 1e-6]["size"] == 0
    assert module.markdown(rows).count("\n") == len(rows) + 1
