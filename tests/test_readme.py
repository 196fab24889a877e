# SPDX-License-Identifier: Apache-2.0
"""What the documents say can be done, is done here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """The bash commands between the markers `ci:name`."""
    inside = re.search(rf"<!-- ci:{name} -->\n```bash\n(.*?)```\n<!-- /ci:{name} -->", README, re.S)
    assert inside, f"README.md has no block {name}"
    return inside.group(1)


def test_files_that_are_named_exist():
    named = re.findall(r"`((?:experiments|tests|notebooks)/[\w/.-]+\.\w+)`", README)
    named += re.findall(r"--gin_file=([\w/.-]+\.gin)", README)
    missing = {name for name in named if "*" not in name and not (ROOT / name).exists()}
    assert len(named) > 3 and not missing


def minimal_step() -> str:
    """The step function of experiments/minimal.py, between its markers."""
    text = (ROOT / "experiments" / "minimal.py").read_text()
    inside = re.search(r"^# minimal: begin\n(def .*?)^ *# minimal: end\n", text, re.S | re.M)
    assert inside, "experiments/minimal.py has no markers"
    return inside.group(1)


def test_the_method_on_one_screen_is_that_of_the_file():
    step = minimal_step()
    assert step.count("\n") <= 30 and "optax.apply_updates" in step
    quoted = re.search(r"<!-- minimal -->\n```python\n(.*?)```\n<!-- /minimal -->", README, re.S)
    assert ("<!-- minimal" in README) == bool(quoted)
    assert not quoted or quoted.group(1) == step


def test_ci_runs_the_readmes_test_command():
    assert "pytest" in block("test") and "pip install" in block("test")
    assert "ci:test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run_and_carry_no_output(path):
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell.get("outputs") for cell in cells)
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert "nats per token" in run.stdout


@pytest.mark.slow
def test_use_your_own_model(smollm2_file, tmp_path):
    """The section's commands, in a copy of the experiments, one after the other."""
    pytest.importorskip("reasoning_gym", reason="the extra reasoning is not installed")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": bin_folder + os.pathsep + os.environ["PATH"], "XLA_FLAGS": ""}
    commands = block("model").replace("opsd ", "python -m opsd_jax ")
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Paris" in run.stdout
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "mine_hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "runs" / "mine_hf")
    with torch.no_grad():
        logits = exported(**tokenizer("Two and two make", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    assert (tmp_path / "runs" / "mine_adapter" / "adapter_model.safetensors").exists()
