# SPDX-License-Identifier: Apache-2.0
"""What the documents say can be done, is done here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import opsd_jax
from opsd_jax.main import parser
from tests.test_layering import MAY_IMPORT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "experiments").rglob("README.md")])


def block(name: str, language: str = "bash") -> str:
    """The code between the markers `name`."""
    inside = re.search(rf"<!-- {name} -->\n```{language}\n(.*?)```\n<!-- /{name} -->", README, re.S)
    assert inside, f"README.md has no block {name}"
    return inside.group(1)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [to for to in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in to]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    text = page.read_text()
    named = re.findall(r"\b((?:opsd_jax|experiments|tests|notebooks)/[\w/.-]+\.\w+)", text)
    named += re.findall(r"--gin_file=([\w/.-]+\.gin)", text)
    missing = {name for name in named if not (ROOT / name).exists()} - {"experiments/X.gin"}
    assert len(named) > 3 and not missing
    folders = [page.parent, *(f for f in (ROOT / "experiments").rglob("*") if f.is_dir())]
    bare = re.findall(r"`([\w/]+\.(?:gin|py))`", text)
    paths = [folder / name for name in bare for folder in (*folders, ROOT)]
    found = {path.name for path in paths if path.exists()}
    assert not {Path(name).name for name in bare} - found - {"mine.py"}


def test_every_experiment_stands_in_the_record():
    record = (ROOT / "experiments" / "README.md").read_text()
    patterns = re.findall(r"`([\w/*]+\.gin)`", record)
    listed = {path for p in patterns for path in (ROOT / "experiments").glob(p)}
    assert set((ROOT / "experiments").rglob("*.gin")) <= listed


def test_the_map_has_every_room_in_order():
    assert re.findall(r"^\| `opsd_jax/(\w+)/` \|", README, re.M) == list(MAY_IMPORT)


def test_the_page_stays_short():
    assert len(README.splitlines()) <= 250


def test_the_method_on_one_screen_is_the_file_that_is_tested():
    text = (ROOT / "experiments" / "minimal.py").read_text()
    (step,) = re.findall(r"^# minimal: begin\n(def .*?)^ *# minimal: end\n", text, re.S | re.M)
    assert step.count("\n") <= 30 and block("minimal", "python") == step


def test_the_names_that_python_code_uses_are_public():
    used = set(re.findall(r"\bopsd_jax\.(\w+)\(", README))
    assert len(used) >= 6 and used <= set(opsd_jax.__all__)


def test_the_whole_gin_file_is_an_experiment(tmp_path, monkeypatch):
    (text,) = re.findall(r'```\n(include "experiments/base.gin".*?)```', README, re.S)
    (tmp_path / "mine.gin").write_text(text)
    monkeypatch.chdir(ROOT)
    experiment, _ = opsd_jax.load_experiment([str(tmp_path / "mine.gin")])
    assert experiment.train.heldout.stop == experiment.train.problems.start == 100


def test_every_command_of_the_list_takes_its_flags():
    (listed,) = re.findall(r"## Command line\n\n```\n(.*?)```", README, re.S)
    for line in listed.splitlines():
        name, flags = line.split()[1], set(re.findall(r"--\w+", line))
        (command,) = [a for a in parser()._actions if isinstance(a.choices, dict)]
        assert flags <= set(command.choices[name]._option_string_actions), line


def test_ci_runs_the_readmes_test_command():
    assert "pytest" in block("ci:test") and "pip install" in block("ci:test")
    assert "ci:test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_in_python(smollm2_file, tmp_path):
    """The section's lines, beside a quickstart that is the same short run."""
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    code = block("ci:python", "python").replace("num_steps = 20", "num_steps = 2")
    code = code.replace('load_run("runs/quickstart")', 'load_run("runs/twenty")')
    run = subprocess.run(
        [sys.executable, "-c", code + "\nprint(logits.shape)"],
        cwd=tmp_path,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.endswith("(1, 5, 49152)\n")
    assert (tmp_path / "runs" / "quickstart" / "base").is_dir()


@pytest.mark.slow
def test_use_your_own_model(smollm2_file, tmp_path):
    """The section's commands, in a copy of the experiments, one after the other."""
    pytest.importorskip("reasoning_gym", reason="the extra reasoning is not installed")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": bin_folder + os.pathsep + os.environ["PATH"], "XLA_FLAGS": ""}
    commands = block("ci:model").replace("opsd ", "python -m opsd_jax ")
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
