# SPDX-License-Identifier: Apache-2.0
"""The notebooks: what is kept of their full runs, and each of them run small."""

import importlib.util
import json
import os
import re
import time
from pathlib import Path

import pytest

import opsd_jax
from opsd_jax.evaluation.inline import TokenView
from tests.browser import Page
from tests.evaluation.test_report import EVIL, token, write_run
from tests.run.test_train import TINY

nbformat = pytest.importorskip("nbformat", reason="the extra notebooks is not installed")
pytest.importorskip("nbclient", reason="the extra notebooks is not installed")

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("notebooks_run", ROOT / "notebooks" / "run.py")
runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runner)

NOTEBOOKS = runner.notebooks()
ONE_STEP = [*TINY, "evaluate.greedy = False", "train.num_steps = 1"]
# What stands in the place of the cell tagged `parameters`.
SMALL = {
    "01_one_step": "ROWS, TOKENS = 2, 5",
    "02_quickstart": f"RUN, SETTINGS = 'runs/quickstart', {ONE_STEP}",
    "03_your_model": "MODEL, RUN, SETTINGS = 'smollm2', 'runs/brief', "
    + repr(
        "train.num_steps = 1, heldout/ReasoningGym.num_problems = 2, train.batch_size = 1, "
        "train/ReasoningGym.num_problems = 8, rollout.max_new_tokens = 4, evaluate.batch_size = 2, "
        "evaluate.num_problems = 2".split(", ")
    ),
    "04_an_ablation": f"RUNS, SETTINGS = 'runs/ablation', {ONE_STEP}",
    "05_read_a_run": f"RUN, SETTINGS = 'runs/teacher_live', {ONE_STEP}",
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(SMALL)[1:]]


def outputs(notebook) -> list:
    return [out for cell in notebook.cells for out in cell.get("outputs", ())]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_kept_is_a_full_run_of_this_code(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for out in outputs(notebook) if out.output_type == "error"]
    assert [out for out in outputs(notebook) if "image/png" in out.get("data", {})]
    assert notebook.metadata.opsd_jax.code == runner.code_digest(notebook)
    assert re.search(r"^\*Outputs: .* \d+ min \d+ s on 2 CPU cores", notebook.cells[0].source, re.M)
    text = path.read_text()
    assert not re.search(r"(?<![\w./~])/(?:home|root|tmp|work|usr|var|content|mnt)/", text)
    assert len(text) < 400_000
    before = json.dumps(notebook)
    assert json.dumps(runner.addressed(notebook, path.stem)) == before


def test_a_public_address_fills_badge_and_installation(monkeypatch):
    monkeypatch.setattr(runner, "REPOSITORY", "https://github.com/someone/opsd_jax.git")
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    for _ in range(2):
        notebook = runner.addressed(notebook, "01_one_step")
        title, badge, *_ = notebook.cells[0].source.split("\n\n")
        assert title.startswith("# ") and notebook.cells[0].source.count("colab-badge") == 1
        assert "/github/someone/opsd_jax/blob/main/notebooks/01_one_step.ipynb)" in badge
        assert 'REPOSITORY = "https://github.com/someone/opsd_jax.git"' in notebook.cells[1].source


def test_paths_of_the_folder_become_relative_and_others_are_refused(tmp_path):
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)

    def cleaned(text):
        notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text=text)]
        return runner.cleaned(notebook, tmp_path).cells[2].outputs[0].text

    assert cleaned(f"wrote {tmp_path}/runs/x\n") == "wrote runs/x\n"
    with pytest.raises(ValueError, match="an output names"):
        cleaned(f"wrote {ROOT}/x\n")


@pytest.mark.parametrize("name", ["01_one_step", *SLOW])
def test_a_notebook_runs(name, tmp_path, request, monkeypatch):
    # On one device, as on the machine of a reader. The last of two flags counts; flags that are
    # only blanks would be taken for a file's name, and XLA aborts.
    one = "--xla_force_host_platform_device_count=1"
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {one}")
    if name == "03_your_model":
        pytest.importorskip("reasoning_gym", reason="the extra reasoning is not installed")
        request.getfixturevalue("smollm2_file")
    path = ROOT / "notebooks" / f"{name}.ipynb"
    found = runner.execute(path, tmp_path, SMALL[name])
    assert [out for out in outputs(found) if "image/png" in out.get("data", {})]
    shown = "".join(out.get("data", {}).get("text/html", "") for out in outputs(found))
    assert ("<progress" in shown) == (name != "01_one_step")
    assert ("<iframe" in shown) == (name[:2] in ("04", "05"))
    assert ('title="divergence' in shown) == (name[:2] in ("02", "05"))


@pytest.mark.slow
def test_the_stop_button_saves_and_the_cell_goes_on(tmp_path):
    """A real kernel, interrupted as Jupyter does, in the middle of a run."""
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path), env=runner.kernel_environment())
    client = manager.blocking_client()
    client.start_channels()
    gin = ROOT / "experiments" / "quickstart.gin"
    settings = [*TINY, "train.num_steps = 400", "train.heldout = None"]
    cell = f"import opsd_jax\nrun = opsd_jax.train({str(gin)!r}, 'run', {settings})\nrun.last_step"
    try:
        client.wait_for_ready(timeout=120)
        client.execute(cell)
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text().count("\n"):
            time.sleep(0.05)
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=120)["content"]["status"] == "ok"
        steps = [int(folder.name) for folder in (tmp_path / "run" / "checkpoints").glob("[0-9]*")]
        assert 0 < max(steps) < 400
        client.execute(cell)
        assert client.get_shell_msg(timeout=300)["content"]["status"] == "ok"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(401))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_in_a_browser(tmp_path):
    """A notebook as a page: its figure is there and not blank, and so are tokens and report."""
    exporter = pytest.importorskip("nbconvert").HTMLExporter()
    exporter.mathjax_url = exporter.require_js_url = exporter.mermaid_js_url = ""
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    for shown in (opsd_jax.report(write_run(tmp_path / "run", 0, 0.01)), TokenView([SAMPLE])):
        data = {"text/html": shown._repr_html_(), "text/plain": repr(shown)}
        outputs = [nbformat.v4.new_output("display_data", data)]
        notebook.cells.append(nbformat.v4.new_code_cell("shown", outputs=outputs))
    (tmp_path / "page.html").write_text(exporter.from_notebook_node(notebook)[0])
    page = Page((tmp_path / "page.html").as_uri(), tmp_path / "profile")
    try:
        colours = page.evaluate(COLOURS)
        assert colours and all(found > 20 for found in colours), colours
        assert page.evaluate("document.querySelectorAll('span[title^=divergence]').length") == 2
        assert page.colours("iframe", 21) > 20
        assert page.colours("span[title^=divergence]", 3) > 2
        assert page.evaluate("typeof window.broken") == "undefined"
        assert not [url for url in page.requests if url.startswith("http")]
    finally:
        page.close()


SAMPLE = {"step": 3, "question": EVIL, "teacher_prompt": EVIL, "answer": EVIL, "reward": 1.0} | {
    "tokens": [token(EVIL, 0.5, 7), token(" two", 0.0, 3)]
}
# Of every picture of a notebook's outputs, how many colours it has.
COLOURS = """[...document.querySelectorAll('.jp-OutputArea img')].map(image => {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  const data = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return new Set(data).size;
})"""
