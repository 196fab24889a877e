# SPDX-License-Identifier: Apache-2.0
"""Folders are read downwards, stay small, and the core runs on a bare accelerator image."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opsd_jax"

# What a folder may import besides itself, errors.py and fields.py; none imports a later one.
MAY_IMPORT = {
    "model": (),
    "sampling": ("model",),
    "divergence": ("model",),
    "method": ("model", "sampling", "divergence"),
    "host": ("model",),
    "data": ("host",),
    "pretrained": ("model", "host", "data"),
    "testbed": ("model", "sampling", "host", "data"),
    "evaluation": ("sampling", "host", "data"),
    "run": (
        *("model", "sampling", "divergence", "method"),
        *("host", "data", "pretrained", "testbed", "evaluation"),
    ),
    "plan": ("model", "sampling", "method", "host", "pretrained", "run"),
}
CORE = ("model", "sampling", "divergence", "method")
CORE_MAY_USE = {"jax", "flax", "optax", "numpy"}
# A folder that outgrows this wants another room, or less in it. Not a target to fill.
MOST_LINES = {"model": 2880, "sampling": 1420, "divergence": 1735, "method": 2430}
FACADE = {"__init__", "__main__", "main"}  # public names and the command line: nobody imports them


def files(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).glob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, lazy ones included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own(path: Path) -> set[str]:
    """The parts of opsd_jax that a file imports, as "folder.module"."""
    names = {name.removeprefix("opsd_jax.") for name in imports(path) if "opsd_jax." in name}
    modules = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in all_files()}
    return names & (modules | set(MAY_IMPORT))


def all_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_file_has_a_room():
    assert {path.stem for path in files(".")} == FACADE | {"errors", "fields"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == set(
        MAY_IMPORT
    )
    assert not [p for p in all_files() if len(p.relative_to(PACKAGE).parts) > 2]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_stands_above_it(folder):
    allowed = {folder, "errors", "fields", *MAY_IMPORT[folder]}
    for path in files(folder):
        wrong = {name for name in own(path) if name.split(".")[0] not in allowed}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


@pytest.mark.parametrize("folder", CORE)
def test_the_core_needs_jax_flax_and_optax_alone(folder):
    for path in files(folder):
        outside = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
        extra = outside - CORE_MAY_USE - {"opsd_jax"}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {extra}"


@pytest.mark.parametrize("folder", MOST_LINES)
def test_a_folder_stays_readable(folder):
    lines = sum(len(path.read_text().splitlines()) for path in files(folder))
    assert lines <= MOST_LINES[folder], f"{folder}: {lines} lines"


def test_no_file_imports_in_a_circle():
    graph = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): own(p) for p in all_files()}
    graph = {name: needs & set(graph) - {name} for name, needs in graph.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_only_config_knows_gin():
    assert [p.stem for p in all_files() if "gin" in imports(p)] == ["config", "unused_bindings"]


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, opsd_jax; print(sorted({'jax', 'transformers', 'gin'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_the_core_runs_where_nothing_else_is_installed():
    """As on a bare image: whatever the core's four packages do not bring cannot be imported."""
    code = """
import sys
BLOCKED = {"transformers", "tokenizers", "gin", "grain", "tensorflow_datasets", "orbax_export",
    "safetensors", "jinja2", "cloudpickle", "gguf", "torch", "pyarrow", "tqdm", "matplotlib"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib, pathlib, opsd_jax
for folder in ("model", "sampling", "divergence", "method"):
    for path in sorted((pathlib.Path(opsd_jax.__file__).parent / folder).glob("*.py")):
        importlib.import_module(f"opsd_jax.{folder}.{path.stem}".removesuffix(".__init__"))
print(opsd_jax.train_step.__name__, opsd_jax.method.train_step.train_step is opsd_jax.train_step)
"""
    assert run(code) == "train_step True"


def test_the_testbed_can_be_removed():
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("opsd_jax.testbed") or name == "opsd_jax.run.testbed_base":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import opsd_jax, opsd_jax.run.notebook
lines = ["train.model = @RandomModel()", "RandomModel.config = @ModelConfig()",
    "RandomModel.tokenizer = 'nowhere'", "train.problems = @JsonlProblems()",
    "JsonlProblems.path = 'x'", "ModelConfig.vocab_size = 8", "ModelConfig.num_layers = 1",
    "ModelConfig.embed_dim = 8", "ModelConfig.num_heads = 1", "ModelConfig.num_kv_heads = 1",
    "ModelConfig.head_dim = 8", "ModelConfig.mlp_dim = 8"]
found, _ = opsd_jax.load_experiment(["{PACKAGE.parent}/experiments/base.gin"], lines)
print(found.train.model.config.embed_dim)
"""
    assert run(code) == "8"
