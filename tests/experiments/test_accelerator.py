# SPDX-License-Identifier: Apache-2.0
"""experiments/benchmarks/accelerator.py, a dry run: it cannot be tried first where it is needed."""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.core import meta

from opsd_jax.model.decoder import Decoder, init_variables

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks" / "accelerator.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_accelerator", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(script):
    """One layer: every program is compiled."""
    model = dataclasses.replace(script.TINY.model, num_layers=1)
    return dataclasses.replace(script.TINY, model=model, micro_batches=1)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "accelerator.jsonl").read_text().splitlines()]


def run_section(script, tiny, folder, function, *first):
    lines = script.Lines(folder / "accelerator.jsonl", "here")
    function(*first, tiny, lines)
    rows = rows_of(folder)
    assert not [row for row in rows if "error" in row], rows
    return rows


def test_card_kernels_and_loss(script, tiny, tmp_path):
    for section in (script.card, script.kernels, script.loss):
        rows = run_section(script, tiny, tmp_path, section)
    assert rows[0]["versions"]["jax"] == jax.__version__ and rows[0]["device"] == "cpu"
    assert rows[1]["matmul_tflops"] > 0 and rows[1]["copy_gb_s"] > 0
    assert rows[2]["case"] == "attention_xla" and rows[2]["largest_error"] < 0.02
    values = {row["case"]: row["loss"] for row in rows[3:]}
    assert set(values) == {"fused", "dense", "optax"}  # one number, three ways
    np.testing.assert_allclose(list(values.values()), values["optax"], rtol=5e-3)


@pytest.mark.slow
def test_decoding(script, tiny, tmp_path):
    tiny = dataclasses.replace(tiny, decode_new=2)
    rows = run_section(script, tiny, tmp_path, script.decode, 200)
    assert [row["case"] for row in rows] == ["bare", "adapters"]
    for row in rows:
        assert row["tokens_per_s"] > 0 and 0 < row["share_of_floor"] < 1
        assert row["compiled_temp_gib"] > 0 and row["new"] == tiny.decode_new


def test_the_update_and_its_profile(script, tiny, tmp_path):
    update, profile = run_section(script, tiny, tmp_path, script.update_of, False)
    assert update["mfu"] > 0 and update["attention"] == "xla" and update["seconds"] > 0
    assert 0 < len(profile["costliest"]) <= 3 and sum(profile["costliest"].values()) <= 1


@pytest.mark.parametrize("full", [True, False])
def test_operations_are_those_of_every_matrix(script, full):
    """Against the sizes of the model's own parameters, at the shape that is measured."""
    sizes = script.Sizes()
    training = sys.modules["on_card.training"]
    lora = training.with_adapters(sizes)
    model = Decoder(sizes.model if full else lora)
    shapes = meta.unbox(jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))
    matrices = {
        kind: sum(x.size for x in jax.tree.leaves(shapes.get(kind, {}).get("layers", {})))
        for kind in ("params", "lora")
    }
    norms = sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(shapes["params"]["layers"])
        if "norm" in jax.tree_util.keystr(path)
    )
    trunk, head = matrices["params"] - norms, shapes["params"]["embed"].size
    S, Q, C = sizes.student + sizes.completion, sizes.teacher + sizes.completion, sizes.completion

    def attention(tokens):  # scores and values, each token sees half of the others
        return 2 * 2 * sizes.model.num_layers * 16 * 128 * tokens * tokens / 2

    teacher = 2 * trunk * Q + attention(Q) + 2 * head * C
    if full:
        student = 3 * (2 * trunk * S + attention(S) + 2 * head * C)
    else:
        student = 2 * (2 * trunk * S + 2 * head * C) + 3 * attention(S)
        student += 3 * 2 * matrices["lora"] * S
    want = 32 * (teacher + student)
    assert training.needed(sizes, model.config) == pytest.approx(want, rel=1e-12)


def test_a_section_that_fails_costs_itself_alone(script, tmp_path, monkeypatch):
    """A crash, a long section and an error in a case; what is measured is on the disk at once."""
    lines = script.Lines(tmp_path / "accelerator.jsonl", "loss")
    seen = []

    def no_memory():
        lines(case="fused", seconds=1.0)
        seen.extend(rows_of(tmp_path))
        raise MemoryError("out of memory\nand more")

    assert lines.guarded("dense", no_memory) is None and seen[0]["seconds"] == 1.0
    assert rows_of(tmp_path)[1]["error"].startswith("MemoryError: out of memory")

    def process(command, env, timeout):
        assert timeout <= 60 and env["OUT"] == str(tmp_path) and "--tiny" in command
        if "--section=step" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return argparse.Namespace(returncode=-11 if "--section=kernels" in command else 0)

    monkeypatch.setattr(script.subprocess, "run", process)
    script.run_all(argparse.Namespace(seconds=60, only="", tiny=True), tmp_path)
    rows = rows_of(tmp_path)[2:]
    assert {row["section"] for row in rows if "section_s" in row} == set(script.SECTIONS)
    told = {row["section"]: row["error"] for row in rows if "error" in row}
    assert set(told) == {"kernels", "step"} and "-11" in told["kernels"]
    script.run_all(argparse.Namespace(seconds=5, only="card", tiny=True), tmp_path)
    assert rows_of(tmp_path)[-1] == {"section": "card", "error": "no time left"}


@pytest.mark.slow
def test_one_command_measures_everything(tmp_path):
    """From another folder, without gin, grain, TFDS and transformers."""
    blocked = "import sys\nfor name in ('gin', 'grain', 'tensorflow_datasets', 'transformers'):\n"
    (tmp_path / "sitecustomize.py").write_text(blocked + "    sys.modules[name] = None\n")
    command = [sys.executable, str(SCRIPT), "--tiny", "--seconds=1200"]
    flags = "--xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "out")}
    subprocess.run(command, env=environment | {"XLA_FLAGS": flags}, cwd=tmp_path, check=True)
    rows = rows_of(tmp_path / "out")
    assert not [row for row in rows if "error" in row]
    assert {row.get("case") for row in rows} >= {"update", "step", "bare", "adapters", "fused"}
    assert sum("section_s" in row for row in rows) == 8
