# SPDX-License-Identifier: Apache-2.0
"""Whole runs in buckets of local servers: killed, stopped, resumed, on a pod, bit for bit."""

import json
import signal
import time

import pytest

from opsd_jax.host.bucket import BucketPath
from opsd_jax.host.checkpoint_record import read_record
from opsd_jax.host.stage import local
from opsd_jax.main import main
from tests.pods import run_pod
from tests.run.test_other_hosts import TRAIN, steps
from tests.run.test_train import lines_of, start


def ended(process) -> str:
    errors = process.communicate(timeout=900)[1]
    assert process.returncode == 0, errors
    return errors


def last_step(run: BucketPath) -> int:
    """The highest step of which there is a record; 0 if there is none."""
    names = (run / "checkpoints").names()
    return max((int(n.split("/")[0]) for n in names if n.endswith("meta/metadata")), default=0)


def wait_for_commit(process, run: BucketPath, after: int) -> int:
    """The first step above `after` of which there is a record."""
    deadline = time.monotonic() + 900  # on a busy machine; a minute is for the lock
    while time.monotonic() < deadline and process.poll() is None:
        if (step := last_step(run)) > after:
            return step
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no step after {after} was committed: {process.communicate()[1]}")


def leaves_of(folder) -> dict:
    """dtype, shape and checksum of every leaf of a checkpoint."""
    return read_record(folder)["leaves"]


@pytest.mark.slow
def test_killed_and_stopped_in_a_bucket_it_is_the_run_on_disk(emulated, tmp_path, capsys):
    """kill -9 at any moment, the next start a minute later, SIGTERM, the next at once."""
    url, run = f"{emulated}/a", BucketPath(f"{emulated}/a")
    long = "train.num_steps = 100000"
    process = start(url, long)
    committed = wait_for_commit(process, run, 4)
    process.kill()
    process.communicate()
    assert (run / ".lock").is_file()
    process = start(url, long, flags=["--stopped_status=75"])
    wait_for_commit(process, run, committed + 2)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 75, errors
    assert "waiting 60 s at most" in errors and "goes on from here" in errors
    assert not (run / ".lock").is_file()
    number = last_step(run)
    lines = lines_of(local(url))
    assert [line["step"] for line in lines] == list(range(number + 1))
    goodput = json.loads((local(url) / "goodput.json").read_text())
    assert goodput["starts"] == 2

    ended(start(tmp_path, f"train.num_steps = {number}"))
    straight = lines_of(tmp_path)
    cut = {k: v for k, v in straight[-1].items() if k in lines[-1]}  # its end was evaluated
    assert lines == straight[:-1] + [cut]
    ours, theirs = run / "checkpoints" / str(number), tmp_path / "checkpoints" / str(number)
    assert leaves_of(ours) == leaves_of(theirs)
    assert main(["eval", f"--workdir={url}"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == number
    assert (run / f"eval/heldout_step_{number:06d}/summary.json").is_file()


BASE = [
    "train.model = @TestbedBase()",
    "TestbedBase.warm_start = @WarmStart()",
    "WarmStart.num_steps = 2",
    "WarmStart.max_rounds = 1",
    "WarmStart.require_gate = False",
]


@pytest.mark.slow
def test_a_pod_writes_and_reads_its_parts_and_one_process_goes_on(emulated, tmp_path):
    """Two processes, each with a folder of its own; the second finds the base in the bucket."""
    url, run = f"{emulated}/pod", BucketPath(f"{emulated}/pod")
    for workdir in (url, tmp_path):
        for number in (2, 4):
            run_pod(TRAIN, json.dumps(steps(workdir, number, *BASE)), num_devices=2)
    assert lines_of(local(url)) == lines_of(tmp_path)
    ours, theirs = run / "checkpoints/4", tmp_path / "checkpoints" / "4"
    assert leaves_of(ours) == leaves_of(theirs)
    data = [name for name in ours.names() if name.startswith("data/")]
    assert data == ["data/process_0-of-2.json", "data/process_1-of-2.json"]
    assert main(steps(url, 5, *BASE)) == 0
    assert lines_of(local(url))[-1]["step"] == 5
