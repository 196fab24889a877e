# SPDX-License-Identifier: Apache-2.0
"""Signals end the loop at a step boundary; a second one kills."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from opsd_jax.host.preemption import Preemption

LOOP = """
import os, sys, time, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if len(sys.argv) > 1:
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from opsd_jax.host.preemption import Preemption
with Preemption() as preemption:
    for step in range(201, 2201):
        print(step, flush=True)
        time.sleep(float(os.environ["STEP_S"]))
        if preemption.requested():
            break
print("saved", step, flush=True)
"""


def start(*args, step_s="0.02"):
    return subprocess.Popen(
        [sys.executable, "-c", LOOP, *map(str, args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "STEP_S": step_s},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.requested()
        os.kill(os.getpid(), number)
        assert preemption.requested() and preemption.requested()
        assert signal.getsignal(number) is signal.SIG_DFL  # the next one kills
    assert signal.getsignal(number) is before


def test_the_second_stop_of_a_notebook_leaves_the_kernel_alive(monkeypatch):
    monkeypatch.setattr("opsd_jax.host.preemption.in_notebook", lambda: True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested()
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_the_second_ctrl_c_kills_even_within_a_step():
    child = start(step_s="60")
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    while "stopping after this step" not in (line := child.stderr.readline()):
        assert line
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    "number, step_s", [(signal.SIGTERM, "0.02"), (signal.SIGINT, "0.02"), (signal.SIGTERM, "2")]
)
def test_two_processes_agree_on_the_step(number, step_s):
    """Of a run that goes on from step 200, also where the signal comes before its first is done."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    pair = [start(address, index, step_s=step_s) for index in (0, 1)]
    for child in pair:
        child.stdout.readline()
    pair[1].send_signal(number)
    ends = []
    for child in pair:
        output, errors = child.communicate(timeout=180)
        assert child.returncode == 0, errors[-1000:]
        ends.append(output.splitlines()[-1])
    assert ends[0].startswith("saved") and ends[0] == ends[1]
