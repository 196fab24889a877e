# SPDX-License-Identifier: Apache-2.0
"""What is named as text exists, and a command imports what it needs alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opsd_jax.run.registry import FUNCTIONS, PLACES, TYPE_WORDS, resolve

ROOT = Path(__file__).parents[2]
HEAVY = ["numpy", "jax", "flax", "optax", "orbax", "grain", "gin", "tensorflow_datasets"]
HEAVY += ["transformers", "safetensors", "pyarrow"]  # jax itself imports cloudpickle


@pytest.mark.parametrize("name", PLACES)
def test_every_name_stands_for_something(name):
    of = resolve(name)
    assert callable(of) and isinstance(of, type) == (name not in (*FUNCTIONS, "FinishedRun"))
    assert name not in FUNCTIONS or of.__name__ == name.removeprefix("target_")


@pytest.mark.parametrize("place", [p for p in TYPE_WORDS if p not in PLACES.values()])
def test_words_for_a_type_are_found_by_the_type_itself(place):
    module, _, name = place.partition(":")
    __import__(module)
    assert TYPE_WORDS.get(getattr(sys.modules[module], name)) == TYPE_WORDS[place]
    assert TYPE_WORDS.get(int) is None and TYPE_WORDS.get(None) is None


def imported(*commands: list[str]) -> list[set[str]]:
    """What of `HEAVY` a process has imported after each of some commands, whatever they return."""
    code = f"""
import contextlib, io, sys
from opsd_jax.main import main
for command in {list(commands)!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(command)
    print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return [set(ast.literal_eval(line)) for line in run.stdout.splitlines()]


def test_a_command_imports_what_it_needs_alone(tmp_path):
    """In one process, so that each command adds to what those before it have imported."""
    (tmp_path / "mine.gin").write_text(
        f'include "{ROOT}/experiments/base.gin"\n'
        "train.model = @PretrainedModel()\nPretrainedModel.path = 'nowhere'\n"
        "train.problems = @JsonlProblems()\nJsonlProblems.path = 'nowhere.jsonl'\n"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.gin").write_text((tmp_path / "mine.gin").read_text())
    found = imported(
        ["--help"],
        ["generate", "--model=nowhere", "--prompt=x", "--top_p=2"],
        ["report", "--workdir=nowhere", f"--out={tmp_path}/r.html"],
        ["eval", "--compare", "nowhere", "nowhere"],
        ["generate", "--model=nowhere", "--prompt=x"],
        ["generate", f"--workdir={tmp_path}/run", "--prompt=x"],
        ["eval", "--model=nowhere", f"--gin_file={tmp_path}/mine.gin"],
        ["train", f"--gin_file={tmp_path}/mine.gin", f"--workdir={tmp_path}/new"],
    )
    nothing, refused, report, compare, model, run, evaluate, train = found
    assert nothing == set()
    assert refused <= {"numpy"} and report == compare == {"numpy"}
    assert model == {"numpy", "jax", "flax"}
    assert run == model | {"optax", "gin", "orbax"}
    assert evaluate == train == run | {"grain"}
