# SPDX-License-Identifier: Apache-2.0
"""Where a gin file's includes and modules are found, whatever the current folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opsd_jax.errors import UserError
from opsd_jax.run.config import load_experiment

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "experiments" / "quickstart.gin"


def test_an_include_is_beside_the_file_that_has_it(tmp_path, monkeypatch):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "run.gin").write_text('include "deep/deeper/first.gin"\n')
    (tmp_path / "deep" / "deeper" / "first.gin").write_text('include "second.gin"\n')
    second = f'include "{QUICKSTART}"\ninclude "above.gin"\ntrain.seed = 7\n'
    (tmp_path / "deep" / "deeper" / "second.gin").write_text(second)
    (tmp_path / "deep" / "above.gin").write_text("train.num_steps = 3\n")
    (tmp_path / "base.gin").write_text("train.nonsense = 1\n")  # not the one of quickstart.gin
    monkeypatch.chdir(tmp_path)
    train = load_experiment(["run.gin"])[0].train
    assert (train.seed, train.num_steps) == (7, 3)


@pytest.mark.parametrize(
    "text, words",
    [
        (b'include "b.gin"', "a.gin.*itself"),
        (b'include "nowhere.gin"', "b.gin: include .nowhere.gin.*no such file"),
        (b"\xff\xfe", "b.gin is not a gin file"),
        (b"train.seed = 3 4", "b.gin, line 1"),
        (b"import no_such_module", "no_such_module.*beside the gin files"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, text, words):
    (tmp_path / "a.gin").write_text('include "b.gin"')
    (tmp_path / "b.gin").write_bytes(text.replace(b"b.gin", b"a.gin"))
    with pytest.raises(UserError, match=words) as caught:
        load_experiment([str(tmp_path / "a.gin")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["random", "sys", "colorsys", "yaml", "taken"])
def test_a_module_that_another_of_its_name_hides_is_refused(tmp_path, name, monkeypatch):
    """Of the standard library, built in, not imported yet, installed, or found before."""
    own = "import gin\ngin.configurable('own')(lambda s, t: t - s)\n"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "taken.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / f"{name}.py").write_text(own)
    (tmp_path / "a.gin").write_text(f"import {name}\ninclude '{QUICKSTART}'\n")
    hider = r"a module of Python itself" if name == "sys" else rf"/\S*{name}\S*\.py"
    words = rf"^import {name}: not {tmp_path}/{name}.py would be imported but {hider}, .* rename"
    with pytest.raises(UserError, match=words):
        load_experiment([str(tmp_path / "a.gin")])


def test_modules_are_beside_the_gin_file_and_found_again_from_its_config(tmp_path):
    """In processes of their own, started as the installed script is: without the cwd."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "beside_it.py").write_text("import gin\ngin.configurable('own')(lambda s, t: t - s)\n")
    (mine / "run.gin").write_text(
        f'import beside_it\ninclude "{QUICKSTART}"\ndivergence.name = @own'
    )
    code = (
        "import sys; from opsd_jax.run.config import load_experiment as load\n"
        "open(sys.argv[2], 'w').write(load([sys.argv[1]])[1])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for source, target in (
        (mine / "run.gin", "config.gin"),
        (tmp_path / "config.gin", "again.gin"),
    ):
        command = [sys.executable, "-P", "-c", code, str(source), str(tmp_path / target)]
        run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "again.gin").read_text() == (tmp_path / "config.gin").read_text()
