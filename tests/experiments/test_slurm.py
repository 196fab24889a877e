# SPDX-License-Identifier: Apache-2.0
"""experiments/launch/slurm.sbatch on a real SLURM, a cluster of this one machine."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pods import run_pod
from tests.run.test_train import QUICKSTART, TINY, lines_of

ROOT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# A step must take long enough to be interrupted.
NAP = """
import time
import gin
@gin.configurable
def nap(model, student, teacher, tokenizer):
    time.sleep(0.5)
    return {}
"""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def slurm(tmp_path):
    """Starts the daemons; yields the environment of SLURM's commands."""
    if missing := [name for name in DAEMONS if not shutil.which(name)]:
        pytest.skip(f"no {missing[0]}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons are started as root")
    folder = tmp_path / "slurm"
    for name in ("", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    text = CONFIG.format(host=host, folder=folder, ports=free_ports(2))
    (folder / "slurm.conf").write_text(text)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{n}={folder}/munge.{n.split('-')[0]}" for n in ("socket", "pid-file", "log-file")]
    munge += [f"--seed-file={folder}/seed", f"--key-file={folder}/key"]
    commands = (["munged", "-F", *munge], ["slurmctld", "-D", "-i"], ["slurmd", "-D"])
    daemons = []
    try:
        for command in commands:
            log = (folder / f"{command[0]}.out").open("w")
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()


def waited(done, log: Path, seconds: float = 280) -> None:
    """Returns once `done()`; fails with the log of the job."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            pytest.fail(log.read_text()[-3000:] if log.exists() else "the job never started")
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("OPSD_SLURM") != "1", reason="set OPSD_SLURM=1: makes a cluster")
def test_a_job_that_is_signalled_is_requeued_and_ends_bit_for_bit(slurm, tmp_path):
    gin = tmp_path / "tiny.gin"
    (tmp_path / "nap_probe.py").write_text(NAP)
    changed = [*TINY, "train.num_steps = 12", "train.eval_every_steps = 1"]
    changed += ["train.probes = (@nap,)", "evaluate.num_problems = 8"]
    gin.write_text("\n".join([f'include "{QUICKSTART}"', "import nap_probe", *changed]))
    whole, workdir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "opsd.log"
    flags = ["train", f"--gin_file={gin}", f"--workdir={whole}", "--distributed"]
    run_pod("import json\nsys.exit(main(json.loads(arguments[0])))", json.dumps(flags))

    def slurm_says(*command: object) -> str:
        found = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert found.returncode == 0, found.stderr
        return found.stdout.strip()

    environment = slurm | {
        "GIN": str(gin),
        "WORKDIR": str(workdir),
        "OPSD": f"{sys.executable} -m opsd_jax",
        "NO_VENV": "1",
        "PYTHONPATH": str(ROOT),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    page = ROOT / "experiments" / "launch" / "slurm.sbatch"
    job = slurm_says("sbatch", "--parsable", "--ntasks=2", f"--output={log}", page)
    try:
        waited(lambda: (workdir / "metrics.jsonl").exists() and len(lines_of(workdir)) > 4, log)
        slurm_says("scancel", "--signal=TERM", "--batch", job)
        waited(lambda: "start 1 ended with status 75" in log.read_text(), log)
        stopped = len(lines_of(workdir))
        assert 4 < stopped < 13
        queue = ("squeue", "--noheader", "--format=%T", f"-j{job}")
        waited(lambda: "PENDING" in slurm_says(*queue), log)
        slurm_says("scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait 2 minutes
        waited(lambda: "start 2 ended with status 0" in log.read_text(), log)
    finally:
        subprocess.run(["scancel", job], env=environment, check=False)
        waited(lambda: not slurm_says("squeue", "--noheader"), log, 60)  # no step outlives SLURM
    assert lines_of(workdir) == lines_of(whole)
    assert "of 2" not in log.read_text()  # nobody was lost
