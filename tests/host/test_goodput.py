# SPDX-License-Identifier: Apache-2.0
"""What of the time since the first start went into steps that were kept."""

import json

import pytest

from opsd_jax.host.goodput import Goodput


def log(workdir, *steps):
    lines = "".join(f'{{"step": {step}, "wall_s": 1.0}}\n' for step in steps)
    (workdir / "metrics.jsonl").write_text(lines)


def test_restarts_and_lost_steps_are_counted_since_the_first_start(tmp_path):
    now = [1000.0]
    first = Goodput(tmp_path, start=0, clock=lambda: now[0])
    now[0] += 100
    assert first.metrics(5, kept_s=40.0) == {
        "goodput/fraction": 0.4,
        "goodput/steps_per_hour": 5 * 36.0,
        "goodput/restarts": 0,
        "goodput/lost_steps": 0,
    }
    log(tmp_path, *range(8))  # killed after step 7; step 4 is the last checkpoint
    now[0] += 100  # in the queue
    Goodput(tmp_path, start=4, clock=lambda: now[0])
    log(tmp_path, *range(10))
    again = Goodput(tmp_path, start=9, clock=lambda: now[0])  # stopped politely: nothing is lost
    found = again.metrics(9, kept_s=60.0)
    assert found["goodput/fraction"] == 0.3 and found["goodput/lost_steps"] == 3
    assert found["goodput/restarts"] == 2
    kept = json.loads((tmp_path / "goodput.json").read_text())
    assert kept == {"first_start": 1000.0, "starts": 3, "lost_steps": 3}


def test_lines_of_a_run_that_never_started_here_are_not_lost(tmp_path):
    log(tmp_path, 0, 1, 2)
    assert Goodput(tmp_path, start=0).metrics(1, 0.0)["goodput/lost_steps"] == 0


@pytest.mark.parametrize(
    "text",
    ["", "x", "[1]", '{"first_start": -1, "starts": 1, "lost_steps": 0}', '{"first_start": 1}']
    + ['{"first_start": 1, "starts": "1", "lost_steps": 0}', '{"first_start": NaN}'],
)
def test_a_damaged_record_begins_anew(tmp_path, text):
    (tmp_path / "goodput.json").write_text(text)
    found = Goodput(tmp_path, start=3, clock=lambda: 50.0).metrics(3, 0.0)
    assert found["goodput/restarts"] == 0


def test_steps_of_which_no_record_is_left_took_their_seconds(tmp_path):
    again = Goodput(tmp_path, start=6, kept_s=60.0, clock=lambda: 1000.0)
    found = again.metrics(6, kept_s=60.0)
    assert found["goodput/fraction"] == 1.0 and found["goodput/steps_per_hour"] == 360.0


def test_another_hosts_slow_clock_makes_no_negative_time(tmp_path):
    Goodput(tmp_path, start=0, clock=lambda: 100.0)
    slow = Goodput(tmp_path, start=0, clock=lambda: 90.0)
    assert slow.metrics(1, kept_s=0.0)["goodput/fraction"] == 0.0
