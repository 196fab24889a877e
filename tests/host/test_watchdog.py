# SPDX-License-Identifier: Apache-2.0
"""A process that dies or hangs ends the run of its pod soon, told, and nothing is lost."""

import json
import os
import shutil
import time

import jax
import pytest

from opsd_jax.host import watchdog
from opsd_jax.host.watchdog import AGAIN, Watchdog, other_process_lost
from opsd_jax.main import main
from tests.run.test_other_hosts import assert_same_run
from tests.run.test_train import command, lines_of
from tests.two_processes import ended_pair, run_pair, start_pair


def test_a_step_that_takes_too_long_ends_the_process_but_a_pause_may(monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog, "leave", ended.append)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with Watchdog(0.1) as dog:
        time.sleep(0.3)  # nothing was done yet: compiling takes its time
        dog.beat()
        with dog.paused():
            time.sleep(0.3)
        assert ended == []
        dog._beat_at -= 1.0
        time.sleep(0.3)
    assert ended and "no training step for 0.00166667 minutes (train.hang_minutes)" in ended[0]
    assert "process 0 of 2" in ended[0]


def test_a_process_alone_and_a_limit_of_0_are_not_watched(monkeypatch):
    with Watchdog(0.01) as dog:
        assert not dog._thread.is_alive()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with Watchdog(0) as dog:
        assert not dog._thread.is_alive()


def test_only_what_another_process_did_is_blamed_on_it(monkeypatch):
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
    assert other_process_lost(gone) is None  # alone
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "process 0 of 2 has lost another one (UNKNOWN: Gloo" in other_process_lost(gone)
    assert other_process_lost(full) is other_process_lost(RuntimeError("Gloo")) is None


# The second process is killed or sleeps when it would report its fifth step.
FAILING = """
import json, os, time
from opsd_jax.run.loop import Loop
how, flags = arguments
report = Loop.report
def failing(self, step, evaluated=None):
    if index == 1 and step.number == 5:
        os.kill(os.getpid(), 9) if how == "dies" else time.sleep(1000)
    report(self, step, evaluated)
if how != "runs":
    Loop.report = failing
sys.exit(main([*json.loads(flags), "--distributed"]))
"""


def flags(workdir, *bindings) -> str:
    steps = ["train.num_steps = 7", "train.eval_every_steps = 0"]
    return json.dumps(command(workdir, *steps, *bindings))


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("OPSD_POD_FAULTS") != "1", reason="set OPSD_POD_FAULTS=1: minutes"
)
def test_a_run_whose_process_dies_or_hangs_goes_on_bit_for_bit(tmp_path):
    run_pair(FAILING, "runs", flags(tmp_path / "whole"))
    pair = start_pair(FAILING, "dies", flags(tmp_path / "died"))
    (_, told), _ = ended_pair(pair)
    assert pair[0].returncode in (AGAIN, -6), told
    if pair[0].returncode == AGAIN:
        assert "opsd: process 0 of 2 has lost another one (" in told
    pair = start_pair(FAILING, "hangs", flags(tmp_path / "hung", "train.hang_minutes = 0.2"))
    started = time.monotonic()
    said = ended_pair(pair)
    assert AGAIN in {child.returncode for child in pair} <= {AGAIN, -6}, said[0][1]
    assert "no training step for 0.2 minutes" in said[0][1] + said[1][1]
    assert time.monotonic() - started < 280
    shutil.copytree(tmp_path / "died", tmp_path / "died alone")
    for folder in ("died", "hung"):
        run_pair(FAILING, "runs", flags(tmp_path / folder))
        assert lines_of(tmp_path / folder) == lines_of(tmp_path / "whole")
    # One process goes on, too, where two have begun; other sums of the same numbers.
    assert main(json.loads(flags(tmp_path / "died alone"))) == 0
    assert_same_run(lines_of(tmp_path / "died alone"), lines_of(tmp_path / "whole"))
