# SPDX-License-Identifier: Apache-2.0
"""Peaks are looked up and never guessed; the clock sees what is compiled while it runs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from opsd_jax.host.chips import PEAKS, compile_clock, memory_peak_gib, peak_of


def test_a_peak_is_known_or_there_is_none():
    assert peak_of(SimpleNamespace(device_kind="TPU v5 lite")).flops == 197e12
    assert peak_of(SimpleNamespace(device_kind="TPU v99")) is None
    assert peak_of(jax.devices()[0]) is None  # a CPU
    # Between a card of 2018 and one of 2030, in FLOP/s and bytes/s: no unit was mixed up.
    assert all(1e14 < p.flops < 1e16 and 2e11 < p.bandwidth < 2e13 for p in PEAKS.values())


def test_the_most_memory_of_any_device_is_told_where_the_backend_knows(monkeypatch):
    assert memory_peak_gib() is None  # a CPU does not
    known = [{"peak_bytes_in_use": n * 2**30} for n in (3, 5)]
    devices = [SimpleNamespace(memory_stats=lambda found=found: found) for found in [*known, None]]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_peak_gib() == 5.0


def test_the_clock_counts_programs_once_and_stops():
    def program(x):
        return x * 3 + 1

    x = jnp.ones(3)
    with compile_clock() as clock:
        run = jax.jit(program)
        run(x)
        first = (clock.programs, clock.seconds)
        assert first[0] == 1 and 0 < first[1] < 60
        run(x)
        assert (clock.programs, clock.seconds) == first
    jax.jit(lambda x: x - 7)(x)
    assert (clock.programs, clock.seconds) == first
