# SPDX-License-Identifier: Apache-2.0
"""A process that dies or hangs ends the run of its pod soon, told, and nothing is lost."""

import json
import os
import shutil
import time

import jax
import pytest

from opsd_jax.host import watchdog
from opsd_jax.host.checkpoint_record import read_record
from opsd_jax.host.watchdog import AGAIN, Watchdog, other_process_lost
from opsd_jax.main import main
from tests.pods import ended_pod, run_pod, start_pod
from tests.run.test_other_hosts import assert_same_run
from tests.run.test_train import command, lines_of


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


# A process is killed or sleeps when it would report its fifth step.
FAILING = """
import json, os, time
from opsd_jax.run.loop import Loop
how, who, flags = arguments
report = Loop.report
def failing(self, step, evaluated=None):
    if index == int(who) and step.number == 5:
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
    run_pod(FAILING, "runs", 1, flags(tmp_path / "whole"))
    pair = start_pod(FAILING, "dies", 1, flags(tmp_path / "died"))
    (_, told), _ = ended_pod(pair)
    assert pair[0].returncode in (AGAIN, -6), told
    if pair[0].returncode == AGAIN:
        assert "opsd: process 0 of 2 has lost another one (" in told
    pair = start_pod(FAILING, "hangs", 1, flags(tmp_path / "hung", "train.hang_minutes = 0.2"))
    started = time.monotonic()
    said = ended_pod(pair)
    assert AGAIN in {child.returncode for child in pair} <= {AGAIN, -6}, said[0][1]
    assert "no training step for 0.2 minutes" in said[0][1] + said[1][1]
    assert time.monotonic() - started < 280
    shutil.copytree(tmp_path / "died", tmp_path / "died alone")
    for folder in ("died", "hung"):
        run_pod(FAILING, "runs", 1, flags(tmp_path / folder))
        assert lines_of(tmp_path / folder) == lines_of(tmp_path / "whole")
    # One process goes on, too, where two have begun; other sums of the same numbers.
    assert main(json.loads(flags(tmp_path / "died alone"))) == 0
    assert_same_run(lines_of(tmp_path / "died alone"), lines_of(tmp_path / "whole"))


FOUR = {"num_processes": 4, "num_devices": 2}


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("OPSD_POD_FAULTS") != "1", reason="set OPSD_POD_FAULTS=1: minutes"
)
@pytest.mark.parametrize("who", [0, 3])
def test_of_four_processes_three_stop_when_one_is_killed_and_all_go_on(who, tmp_path):
    """Two replicas of FSDP over two hosts each; whichever is killed, the one that all know too."""
    whole, died = (flags(tmp_path / name, "mesh.replica = 2") for name in ("whole", "died"))
    run_pod(FAILING, "runs", who, whole, **FOUR)
    pod = start_pod(FAILING, "dies", who, died, **FOUR)
    assert pod[who].wait(timeout=600) == -9
    killed = time.monotonic()
    said = ended_pod(pod)
    assert time.monotonic() - killed < 150  # a heartbeat is missed for 100
    for child, (_, told) in zip(pod, said, strict=True):
        assert child.returncode in ((-9,) if child is pod[who] else (AGAIN, -6)), told
    run_pod(FAILING, "runs", who, died, **FOUR)
    assert lines_of(tmp_path / "died") == lines_of(tmp_path / "whole")
    one, other = (read_record(tmp_path / n / "checkpoints" / "7") for n in ("whole", "died"))
    assert one["leaves"] == other["leaves"] and one["data"] == other["data"]
