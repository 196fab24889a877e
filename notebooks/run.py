# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks in full and keeps their outputs in them, with the time it took.

    pip install '.[notebooks,reasoning]' && python notebooks/run.py [NAME …]

They run in the order of their names in one folder: what one makes, the next one finds. What a
notebook is run with stands in its cell tagged `parameters`; the tests replace those. Outputs that
name a path of this machine are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
# Where the public can clone this project, such as an address of GitHub. It fills the badges and the
# installation cells of all notebooks; without one there are no badges.
REPOSITORY = ""
INSTALL = """# Fetches a checkout where there is none, as in Colab, and installs what is missing.
import importlib.util
import os

REPOSITORY = "{repository}"  # of your copy, for git clone
if not os.path.isdir("experiments") and os.path.isdir("../experiments"):
    os.chdir("..")  # opened in notebooks/
if not os.path.isdir("experiments"):
    assert REPOSITORY, "write the address of your copy of the repository above"
    !git clone --quiet --depth=1 {{REPOSITORY}} checkout
    os.chdir("checkout")
if importlib.util.find_spec("opsd_jax") is None:
    %pip install --quiet '.[{extras}]'"""
EXTRAS = {"03_your_model": "plot,reasoning"}  # the others need matplotlib alone
TOOK = re.compile(r"^\*Outputs: .*\*$", re.MULTILINE)


def notebooks() -> list[Path]:
    return sorted(HERE.glob("*.ipynb"))


def addressed(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The notebook with a badge under its title and an installation cell, both of `REPOSITORY`."""
    title, *rest = notebook.cells[0].source.split("\n\n")
    rest = [part for part in rest if not part.startswith("[![")]
    if REPOSITORY:
        place = REPOSITORY.removeprefix("https://github.com/").removesuffix(".git")
        link = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb"
        image = "https://colab.research.google.com/assets/colab-badge.svg"
        rest = [f"[![open in Colab]({image})]({link})", *rest]
    notebook.cells[0].source = "\n\n".join([title, *rest])
    for cell in notebook.cells:
        if "install" in cell.metadata.get("tags", ()):
            extras = EXTRAS.get(name, "plot")
            cell.source = INSTALL.format(repository=REPOSITORY, extras=extras)
    return notebook


def code_digest(notebook: nbformat.NotebookNode) -> str:
    """Of the code cells but the installation: the outputs are those of this code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"][1:]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def kernel_environment() -> dict[str, str]:
    """Of a kernel that imports this checkout."""
    return os.environ | {"PYTHONPATH": str(HERE.parent)}


def execute(path: Path, folder: Path, parameters: str | None = None) -> nbformat.NotebookNode:
    """The notebook with the outputs of all its cells.

    Args:
      path: of the notebook.
      folder: the kernel's working directory; it gets a link to experiments/.
      parameters: code in the place of the cell tagged `parameters`; None keeps that.
    """
    notebook = nbformat.read(path, as_version=4)
    if not (folder / "experiments").exists():
        (folder / "experiments").symlink_to(HERE.parent / "experiments")
    for cell in notebook.cells:
        if parameters is not None and "parameters" in cell.metadata.get("tags", ()):
            cell.source = parameters
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        startup_timeout=300,  # of a machine that has much else to do
    )
    client.execute(env=kernel_environment())
    return notebook


def cleaned(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The notebook as it is kept: paths below the folder are relative, one kernel for all, and
    without XLA's alarm on a busy machine that a compilation takes long.

    Raises:
      ValueError: an output names a path of this machine.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            said = [
                out for out in cell.outputs if "slow_operation_alarm" not in out.get("text", "")
            ]
            cell.outputs = said
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "opsd_jax": {"code": code_digest(notebook)},
        }
    )
    text = nbformat.writes(notebook).replace(f"{folder}/", "")
    for place in {str(folder), str(HERE.parent), str(Path.home())}:
        if place in text:
            at = text.index(place)
            raise ValueError(f"an output names {text[max(0, at - 200) : at + 200]}")
    return nbformat.reads(text, as_version=4)


def run(path: Path, folder: Path) -> None:
    """Runs a notebook in full, in place."""
    start, load = time.monotonic(), os.getloadavg()[0]
    notebook = cleaned(execute(path, folder), folder)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    load = (load + os.getloadavg()[0]) / 2
    took = f"{minutes} min {seconds} s on {os.cpu_count()} CPU cores (load average {load:.0f})"
    line = f"*Outputs: a full run by `python notebooks/run.py`, {took}.*"
    notebook.cells[0].source = TOOK.sub(line, notebook.cells[0].source)
    nbformat.write(addressed(notebook, path.stem), path)
    print(f"{path.name}: {took}, {path.stat().st_size // 1024} KiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 02_quickstart; all without one")
    parser.add_argument("--folder", type=Path, help="to run in; a new one for this call without")
    parser.add_argument("--address", action="store_true", help="run none: only write REPOSITORY")
    arguments = parser.parse_args()
    chosen = [p for p in notebooks() if not arguments.names or p.stem in arguments.names]
    if arguments.address:
        for path in chosen:
            nbformat.write(addressed(nbformat.read(path, as_version=4), path.stem), path)
        return
    with tempfile.TemporaryDirectory() as new:
        folder = arguments.folder or Path(new)
        folder.mkdir(parents=True, exist_ok=True)
        for path in chosen:
            run(path, folder.resolve())


if __name__ == "__main__":
    main()
