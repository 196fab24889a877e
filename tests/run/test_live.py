# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows while a run trains, followed through a display of our own."""

import base64
import itertools
import json
import sys
from pathlib import Path

import pytest

from opsd_jax.run.live import LivePanel

EVIL = "</pre><script>window.broken = 1</script>"


class Notebook:
    """Takes the place of IPython's display: what stands in the notebook, and every change of it."""

    def __init__(self):
        self.outputs: list[dict] = []
        self.changes: list[tuple[str, int]] = []

    def display(self, data, raw, display_id):
        assert raw and display_id
        self.outputs.append({})
        number = len(self.outputs) - 1

        class Handle:
            def update(handle, data, raw):
                self.outputs[number] = data
                self.changes.append((next(iter(data)), number))

        Handle().update(data, raw)
        return Handle()

    def drawn(self, kind):
        return sum(kind == changed for changed, _ in self.changes)


@pytest.fixture
def workdir(tmp_path) -> Path:
    (tmp_path / "config.gin").write_text("")
    return tmp_path


def follow(workdir, steps, seconds_per_step, total=60, clock=None):
    """Steps whose lines are in metrics.jsonl before they are shown, as the loop has it."""
    notebook, now = Notebook(), [100.0]
    panel = LivePanel(total, workdir, notebook.display, clock or (lambda: now[0]))
    with panel, (workdir / "metrics.jsonl").open("a") as file:
        panel.note("\rwarm start: step 1/9")
        panel.note(f"model: {EVIL}")
        for step in steps:
            now[0] += seconds_per_step
            line = {"step": step, "loss/divergence": 1 / (1 + step)}
            print(json.dumps(line), file=file, flush=True)
            panel.update(step, line)
    return notebook


def test_one_bar_and_one_figure_that_are_drawn_in_place(workdir):
    pytest.importorskip("matplotlib")
    notebook = follow(workdir, range(31), seconds_per_step=0.25)
    bar, figure = notebook.outputs
    assert 'max="60" value="30"' in bar["text/html"]
    assert "step 30/60" in bar["text/plain"] and "warm start" not in bar["text/plain"]
    assert base64.b64decode(figure["image/png"]).startswith(b"\x89PNG")
    assert figure["text/plain"] == "loss/divergence"
    # 7.5 s: the bar every second, the figure every two, and both once more in the end.
    assert 8 <= notebook.drawn("text/html") <= 11 and 3 <= notebook.drawn("image/png") <= 5


def test_a_text_is_never_markup(workdir):
    (bar, *_) = follow(workdir, range(3), 1.0).outputs
    assert "<script" not in bar["text/html"] and "&lt;script&gt;" in bar["text/html"]


def test_drawing_takes_a_small_part_of_the_time(workdir):
    """Each look at the clock costs a second here: a figure that took long waits long."""
    pytest.importorskip("matplotlib")
    clock = itertools.count(0.0, 1.0).__next__
    notebook = follow(workdir, range(200), 0.0, total=1000, clock=clock)
    assert 5 <= notebook.drawn("image/png") <= 12 and notebook.drawn("text/html") > 150


def test_without_matplotlib_there_is_text_alone(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert len(follow(workdir, range(31), 1.0).outputs) == 1


def test_other_processes_show_nothing(workdir, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert follow(workdir, range(31), 1.0).outputs == []
