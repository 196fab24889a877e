# SPDX-License-Identifier: Apache-2.0
"""Scripts of experiments/ that are called with what they cannot use: one sentence, status 2."""

import importlib
import os
import sys
from pathlib import Path

import gin
import jax
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def called(monkeypatch, tmp_path, capsys):
    """Calls a script with flags; gives what it says and nothing else."""
    for folder in (EXPERIMENTS / "rules", EXPERIMENTS):  # rules.py adds its own but once
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    kept = jax.config.jax_compilation_cache_dir
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, os.environ[name])  # put back in the end: scripts set them

    def call(line: str) -> tuple[int, str]:
        name, *flags = line.split()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        # Another file of this worker may have read a config; scripts import some modules late.
        with gin.unlock_config(), pytest.raises(SystemExit) as end:
            script = importlib.import_module(name)
            script.command.call(script.main)
        told = capsys.readouterr()
        return end.value.code, told.out + told.err

    yield call
    jax.config.update("jax_compilation_cache_dir", kept)


@pytest.mark.parametrize(
    "line, words",
    [
        ("methods", "the following arguments are required: --out"),
        ("methods --out=a_file", "--out must be a folder, not the file 'a_file'"),
        ("methods --out=o --only=nope,grpo", "--only: there is no nope, only "),
        ("methods --out=o --seeds=-1", "--seeds must be an integer >= 0, not -1"),
        ("compare --out=o --seeds=x", "--seeds must be an integer, not 'x'"),
        ("seeds --out=o --seeds=0", "--seeds must be an integer >= 1, not 0"),
        ("seeds --out=o --gin_file=no.gin", "gin file no.gin: no such file"),
        ("rules --out=o --rules=sentence,nope", "--rules: there is no nope, only sentence, "),
        ("rules --out=o --then=nope", "--then: there is no nope, only sentence, "),
        ("rules --out=o --processes=0", "--processes must be an integer >= 1, not 0"),
        ("forecast --out=o --only=nope", "--only: there is no nope, only quickstart, "),
        ("forecast --out=a_file/o --only=quickstart", "a_file"),  # the system's words
        ("plans --out=o --only=nope", "no case; the names are "),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(called, line, words, tmp_path):
    status, told = called(line)
    assert status == 2 and words in told and told.count("\n") == 1, told
    assert not list(tmp_path.rglob("*lr*")), "something was trained"


@pytest.mark.parametrize("name", ["methods", "compare", "seeds", "rules", "forecast", "plans"])
def test_help_names_every_flag(called, name):
    status, told = called(f"{name} --help")
    assert status == 0 and "--out OUT" in told


def test_a_figure_needs_matplotlib(called, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("methods", "compare", "rules"):
        assert called(f"{name} --out=o") == (
            2,
            "the figure needs matplotlib: pip install '.[plot]'\n",
        )
