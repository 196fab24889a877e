# SPDX-License-Identifier: Apache-2.0
"""The progress line as a reader sees it, on a terminal and in a log file."""

import io
import itertools
import sys
import types

import pytest

from opsd_jax.host.progress import ProgressLine, in_notebook


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_screen(text):
    """What a terminal shows after the carriage returns have done their work."""
    shown = []
    for line in text.split("\n"):
        cells = []
        for piece in line.split("\r"):
            cells[: len(piece)] = piece
        shown.append("".join(cells).rstrip())
    return shown


def follow(stream, steps, seconds_per_step=2.0, **options):
    now = [100.0]
    with ProgressLine(60, stream, clock=lambda: now[0], **options) as line:
        for step in steps:
            now[0] += seconds_per_step
            metrics = {"loss/divergence": 1 / step, "rollout/tokens_total": 5000 * step}
            if step == 2:
                metrics["eval/student/accuracy"] = 0.51
            line.update(step, metrics)
            if step == 3:
                line.note("warning: something")
    return stream.getvalue()


def test_a_terminal_shows_one_line_that_updates_itself():
    text = follow(Terminal(), range(1, 13))
    assert on_screen(text) == [
        "warning: something",
        "step 12/60  2,500 tok/s  divergence 0.083  accuracy 0.510  1:36 left",
        "",
    ]
    assert text.isascii() and "\x1b" not in text


def test_a_log_file_gets_a_plain_line_now_and_then_and_at_the_end():
    lines = follow(io.StringIO(), range(1, 26), every_s=30).splitlines()
    assert lines[0] == "step 1/60  divergence 1.000"
    assert lines[1] == "warning: something"
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        *("1/60", "16/60", "25/60")
    ]
    assert "accuracy 0.510" in lines[-1]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_goes_on_before_the_steps_is_live_too(stream):
    """A warm start: one line on a terminal; in a log one every 30 s, and none after its end."""
    now = [0.0]
    with ProgressLine(60, stream, clock=lambda: now[0]) as line:
        for step in range(1, 41):
            now[0] += 2.0
            line.note(f"\rwarm start: step {step}/40")
            if step == 20:
                assert on_screen(stream.getvalue())[-1 - (not line._live)].endswith(
                    f"step {20 if line._live else 16}/40"
                )
        line.note("warm start: done")
        now[0] += 2.0
        line.update(1, {})
    seen = [] if stream.isatty() else [f"warm start: step {step}/40" for step in (1, 16, 31)]
    assert on_screen(stream.getvalue()) == [*seen, "warm start: done", "step 1/60", ""]


@pytest.mark.parametrize("shell", [None, object(), types.SimpleNamespace(kernel=object())])
def test_only_a_kernel_makes_a_notebook(shell, monkeypatch):
    """Neither IPython on a terminal does, nor a package of kernels that somebody imported."""
    monkeypatch.setitem(sys.modules, "ipykernel", types)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook() == hasattr(shell, "kernel")


def test_a_notebook_gets_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr("opsd_jax.host.progress.in_notebook", lambda: True)
    with ProgressLine(60, clock=itertools.count(0.0, 0.6).__next__) as line:
        for step in range(1, 9):
            line.update(step, {})
    text = capsys.readouterr().err
    assert on_screen(text)[0].startswith("step 8/60") and text.count("step") == 5


def test_long_times_and_narrow_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert on_screen(follow(Terminal(), range(4, 9)))[0] == "step 8/60  2,500 tok/s  diver"
    monkeypatch.setenv("COLUMNS", "200")
    assert on_screen(follow(Terminal(), [4, 5], 120))[0].endswith("1:50:00 left")


def test_the_slow_first_step_is_forgotten():
    now, stream = [0.0], Terminal()
    line = ProgressLine(100, stream, clock=lambda: now[0])
    for step in range(1, 60):
        now[0] += 500.0 if step == 2 else 1.0
        line.update(step, {})
    line.close()
    assert on_screen(stream.getvalue())[0] == "step 59/100  0:41 left"


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert follow(io.StringIO(), range(1, 5)) == ""


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_nothing_to_show_shows_nothing(stream):
    ProgressLine(3, stream).close()
    assert stream.getvalue() == ""
