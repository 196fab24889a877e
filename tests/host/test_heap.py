# SPDX-License-Identifier: Apache-2.0
import jax

from opsd_jax.host import heap


def test_memory_goes_back_after_a_long_compilation_and_before_the_program_runs(monkeypatch):
    order = []
    monkeypatch.setattr(heap, "_trim", lambda: lambda: order.append("returned"))

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
    assert order[0] == "returned" and order[-3:] == ["ran", "ran", "ran"]


def test_the_system_takes_it():
    heap._trim()()
