# SPDX-License-Identifier: Apache-2.0
"""`import opsd_jax` gives the same objects whichever name is touched first."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import opsd_jax

ROOT = Path(__file__).parents[1]
# Reads names in the order given, each twice and from a star import, after importing some modules.
READ = """
import importlib, json, sys
before, names = json.loads(sys.argv[1])
for module in before:
    importlib.import_module(module)
import opsd_jax
first = {name: getattr(opsd_jax, name) for name in names}
second = {name: getattr(opsd_jax, name) for name in reversed(names)}
assert all(first[name] is second[name] for name in names)
exec("from opsd_jax import *")
assert all(globals()[name] is first[name] for name in names)
def place(of):
    return of.__name__ if type(of) is type(sys) else f"{of.__module__}:{of.__qualname__}"
print(json.dumps({name: place(of) for name, of in first.items()}))
"""
PACKAGE = ROOT / "opsd_jax"
MODULES = [f"opsd_jax.{path.parent.name}.{path.stem}" for path in PACKAGE.glob("*/*.py")]
EQUAL = [m for m in MODULES if m.rpartition(".")[2] in opsd_jax.__all__]


def read(before, names):
    run = subprocess.run(
        [sys.executable, "-c", READ, json.dumps([before, names])],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_name_means_the_same_in_every_order():
    names = list(opsd_jax.__all__)
    assert len(set(names)) == len(names)
    shuffled = random.Random(0).sample(names, len(names))
    orders = [([], names), (EQUAL, names[::-1]), (["opsd_jax.main", *EQUAL[::-1]], shuffled)]
    assert len(EQUAL) >= 4  # such as opsd_jax.run.train
    found = [read(*order) for order in orders]
    assert found[0] == found[1] == found[2]
    assert found[0]["train"] == "opsd_jax.run.notebook:train"
    assert found[0]["divergence"] == "opsd_jax.divergence"


def test_no_name_is_that_of_a_submodule():
    """The import of opsd_jax.NAME would put the module in the place of the function."""
    submodules = {path.stem for path in PACKAGE.iterdir()}
    assert submodules & set(opsd_jax.__all__) == set(opsd_jax._MODULES)


def test_the_docstring_names_every_public_name():
    missing = [name for name in opsd_jax.__all__ if name not in opsd_jax.__doc__]
    assert not missing


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        opsd_jax.trian  # noqa: B018
    assert not set(opsd_jax.__all__) - set(dir(opsd_jax))
