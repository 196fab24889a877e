# SPDX-License-Identifier: Apache-2.0
"""The core runs on a bare accelerator image, and the flow has one direction."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "opsd_jax"
CORE = """errors model_config rope kv_cache decode_attention quantized weights_first projection
    attention model head sharding sampling rollout_config decoding_form rollouts scoring
    divergence_config divergence_support divergence_terms divergence_rows vocabulary
    divergence_fused divergence token_weights targets reason_first teacher likelihood objective
    policy_gradient completions optimizer train_step""".split()
ALLOWED = {"jax", "flax", "optax", "numpy", "opsd_jax"}


def imports(path: Path) -> set[str]:
    """Top-level names of all imports of a file, lazy ones included; our own in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name if name.startswith("opsd_jax") else name.split(".")[0] for name in found}


def test_the_core_needs_jax_flax_and_optax_alone():
    standard = sys.stdlib_module_names
    for name in CORE:
        outside = {n.split(".")[0] for n in imports(PACKAGE / f"{name}.py")} - standard - ALLOWED
        assert not outside, f"{name}.py imports {outside}"
        own = {n.split(".")[1] for n in imports(PACKAGE / f"{name}.py") if "opsd_jax." in n}
        assert own <= set(CORE), f"{name}.py imports {own - set(CORE)}"


def test_no_file_imports_in_a_circle():
    graph = {
        path.stem: {n.split(".")[1] for n in imports(path) if n.startswith("opsd_jax.")}
        for path in PACKAGE.glob("*.py")
    }
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_only_config_knows_gin():
    assert [p.stem for p in PACKAGE.glob("*.py") if "gin" in imports(p)] == ["config"]


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, opsd_jax; print(sorted({'jax', 'transformers', 'gin'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
