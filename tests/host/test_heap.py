# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from opsd_jax.host import heap


def test_memory_goes_back_after_a_long_compilation_and_before_the_program_runs(monkeypatch):
    order = []
    monkeypatch.setattr(heap, "_glibc", lambda name, *_: lambda: order.append(name))

    def program(x):
        jax.debug.callback(lambda: order.append("ran"), ordered=True)
        return x + 1

    with heap.compilers_memory_returned(least_s=0):
        jax.block_until_ready(jax.jit(program)(1.0))
        jax.effects_barrier()
    with heap.compilers_memory_returned(least_s=1e6):
        jax.block_until_ready(jax.jit(lambda x: program(x) * 2)(1.0))
        jax.effects_barrier()
    jax.block_until_ready(jax.jit(lambda x: program(x) * 3)(1.0))
    jax.effects_barrier()
    assert order[:3] == ["mallopt", "mallopt", "malloc_trim"]
    assert order[-5:] == ["ran", "mallopt", "mallopt", "ran", "ran"]


def test_the_system_takes_it():
    assert heap._glibc("malloc_trim", 0)() in (0, 1, None)
    assert heap._glibc("no_such_function", 0)() is None


FREED = """
import contextlib, ctypes, resource, sys
from opsd_jax.host.heap import compilers_memory_returned
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def block(megabytes):
    found = libc.malloc(megabytes << 20)
    libc.memset(found, 1, megabytes << 20)
    return found
with compilers_memory_returned() if sys.argv[1] == "returned" else contextlib.nullcontext():
    libc.free(block(31))  # such blocks, glibc thinks, come again
    before = resident()
    below, last = block(24), block(2)
    libc.free(below)
    kept = (resident() - before) >> 20
    libc.free(block(4))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        libc.free(block(4))
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what is resident")
def test_large_blocks_go_back_at_once_and_others_stay():
    def kept(how: str) -> tuple[int, ...]:
        command = [sys.executable, "-c", FREED, how]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return tuple(map(int, told.split()))

    megabytes, faults = kept("returned")
    assert megabytes <= 3  # of 26 MB the last 2
    assert faults < 100  # 1,024 pages of 4 MB, ten times
    assert kept("left")[0] >= 20  # or the test says nothing
