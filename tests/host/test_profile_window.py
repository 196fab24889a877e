# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps is written in the forms that XProf and Perfetto read."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from opsd_jax.host.profile_window import ProfileWindow


def run(workdir, window, numbers, said):
    f = jax.jit(lambda x: x @ x)
    x = jnp.ones((8, 8))
    with ProfileWindow(workdir, window, said.append) as profile:
        for number in numbers:
            with profile.step(number):
                x = f(x)
            profile.after(number, x)


def traced_steps(workdir) -> list[int]:
    """Numbers of the steps that the Perfetto trace names."""
    (path,) = (workdir / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train" and "args" in e]
    return sorted(int(step) for step in steps)


def test_the_window_is_traced_and_nothing_else(tmp_path):
    said = []
    run(tmp_path, (3, 4), range(1, 7), said)
    assert traced_steps(tmp_path) == [3, 4]
    (planes,) = (tmp_path / "profile").rglob("*.xplane.pb")  # XProf's own form
    assert planes.stat().st_size > 0
    assert len(said) == 1 and said[0].startswith(f"profile: {tmp_path}/profile")


@pytest.mark.parametrize("window, numbers", [(None, [1, 2]), ((3, 4), [1, 2]), ((3, 4), [5, 6])])
def test_no_window_no_trace(tmp_path, window, numbers):
    run(tmp_path, window, numbers, [])
    assert not (tmp_path / "profile").exists()


def test_what_is_left_of_a_window_is_traced_also_when_the_run_ends_in_it(tmp_path):
    run(tmp_path, (3, 9), [5, 6], said := [])
    assert traced_steps(tmp_path) == [5, 6] and len(said) == 1


def test_other_processes_trace_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(tmp_path, (1, 2), [1, 2], [])
    assert not (tmp_path / "profile").exists()
