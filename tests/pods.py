# SPDX-License-Identifier: Apache-2.0
"""A pod of two or more local processes, as hosts with `--distributed` are."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What --distributed calls finds the other host through the pod's own environment; here it is told.
JOIN = """
import functools, sys, jax
index, number = int(sys.argv[2]), int(sys.argv[3])
join = functools.partial(jax.distributed.initialize, sys.argv[1], number, index)
jax.distributed.initialize = functools.cache(join)  # several commands of one process join once
from jax.experimental.multihost_utils import sync_global_devices
from opsd_jax.main import main
arguments = sys.argv[4:]
"""


def start_pod(
    script: str, *arguments: object, num_devices: int = 1, num_processes: int = 2
) -> list[subprocess.Popen]:
    """Starts a script in processes, which finds `index`, `main` and `arguments`.

    Args:
      num_devices: of each process.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    # The last of two values counts.
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": devices}
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                JOIN + script,
                *map(str, (address, index, num_processes, *arguments)),
            ],
            env=environment | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(num_processes)
    ]


def ended_pod(pod: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """(stdout, stderr) of each, once all have ended, however."""
    try:
        return [child.communicate(timeout=300) for child in pod]
    finally:
        for child in pod:
            child.kill()


def run_pod(script: str, *arguments: object, **numbers: int) -> list[tuple[str, str]]:
    """Runs a script in all processes: (stdout, stderr) of each; all have ended with status 0."""
    pod = start_pod(script, *arguments, **numbers)
    said = ended_pod(pod)
    for child, (_, errors) in zip(pod, said, strict=True):
        assert child.returncode == 0, errors[-3000:]
    return said
