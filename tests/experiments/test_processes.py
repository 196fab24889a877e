# SPDX-License-Identifier: Apache-2.0
"""experiments/processes.py: jobs side by side, one that fails, and a command that is ended."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from opsd_jax.errors import UserError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("processes")


def job(folder: Path, number: int) -> None:
    """Two of these wait for each other, so they must run at one time."""
    cores = sorted(os.sched_getaffinity(0))
    (folder / f"{number}").write_text(f"{os.getpid()} {cores}")
    print("said by", number)
    deadline = time.monotonic() + 60
    while not (folder / f"{number ^ 1}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refuse(folder: Path, number: int) -> None:
    raise UserError(f"no {number}")


def test_jobs_run_side_by_side_each_alone_on_its_cores(processes, tmp_path, capsys):
    processes.in_processes([(job, (tmp_path, n)) for n in range(4)], 2, tmp_path / "log")
    seen = [(tmp_path / f"{n}").read_text().split(" ", 1) for n in range(4)]
    assert len({pid for pid, _ in seen} | {str(os.getpid())}) == 5
    if len(os.sched_getaffinity(0)) > 1:
        assert seen[0][1] != seen[1][1]
    assert sorted((tmp_path / "log").read_text().splitlines()) == [f"said by {n}" for n in range(4)]
    assert sorted(line.split(" (")[0] for line in capsys.readouterr().out.splitlines()) == [
        f"{n + 1} of 4: {n}" for n in range(4)
    ]


def test_no_job_follows_one_that_failed(processes, tmp_path):
    todo = [(refuse, (tmp_path, 7)), *((job, (tmp_path, n)) for n in range(2))]
    with pytest.raises(UserError, match=r"^7 ended with status 1: see .*log; the same command"):
        processes.in_processes(todo, 1, tmp_path / "log")
    assert not (tmp_path / "0").exists()
    assert (tmp_path / "log").read_text() == "no 7\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_the_command_ends_its_processes(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys, time
        from pathlib import Path
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
        sys.path.append({str(EXPERIMENTS)!r})
        from processes import in_processes

        def wait(folder, number):
            (folder / f"pid{{number}}").write_text(str(os.getpid()))
            time.sleep(300)

        if __name__ == "__main__":
            folder = Path({str(tmp_path)!r})
            in_processes([(wait, (folder, n)) for n in range(3)], 2, folder / "log")
        """)
    )
    command = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    while not all(file.exists() and file.read_text() for file in files):
        assert command.poll() is None
        time.sleep(0.05)
    command.send_signal(number)
    assert command.wait(60) != 0
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    assert not (tmp_path / "pid2").exists()
