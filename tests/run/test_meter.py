# SPDX-License-Identifier: Apache-2.0
"""What the chips did and where the seconds went: by hand, and in the lines of whole runs."""

import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from opsd_jax.host.chips import Peak
from opsd_jax.main import main
from opsd_jax.method.completions import References
from opsd_jax.run import meter as meter_module
from opsd_jax.run.flops import decoding_bytes, step_flops
from opsd_jax.run.meter import Meter, Throughput
from tests.host.test_profile_window import traced_steps
from tests.run.test_flops import LENGTHS, method
from tests.run.test_train import command, lines_of


def throughput(monkeypatch, built, peak):
    monkeypatch.setattr(meter_module, "peak_of", lambda device: peak)
    devices = np.array([[None, None]] * 2)
    mesh = SimpleNamespace(shape={"data": 2, "model": 2}, size=4, devices=devices)
    student = {"params": {"embed": jax.ShapeDtypeStruct((2,), np.float32)}}
    abstract = SimpleNamespace(student=student)
    return Throughput(SimpleNamespace(method=built, mesh=mesh, abstract=abstract))


def test_rates_are_per_chip_and_of_the_peak(monkeypatch):
    built = method()
    found = throughput(monkeypatch, built, Peak(1e6, 1e5)).metrics(LENGTHS, 7, 0.5, 2.5)
    rollout, update = step_flops(built, LENGTHS)
    assert found == pytest.approx(
        {
            "time/rollout_tokens_per_s_per_chip": 7 / 0.5 / 4,
            "time/update_tokens_per_s_per_chip": (3 + 4 + 5 + 2) / 2.0 / 4,
            "chip/model_tflops": (rollout + update) / 1e12 / 4,
            "chip/mfu": (rollout + update) / 2.5 / 4e6,
            "chip/update_mfu": update / 2.0 / 4e6,
            "chip/decode_bandwidth": decoding_bytes(built, LENGTHS, 4, 2, 2) / 0.5 / 1e5,
        }
    )


def test_a_groups_prompt_is_read_once(monkeypatch):
    found = throughput(monkeypatch, method(group_size=2), None).metrics(LENGTHS, 7, 0.5, 2.5)
    assert found["time/update_tokens_per_s_per_chip"] == (3 + 5 + 2) / 2.0 / 4


def test_what_is_not_known_is_left_out(monkeypatch):
    untimed = throughput(monkeypatch, method(), None).metrics(LENGTHS, 7, float("nan"), 2.5)
    assert set(untimed) == {"chip/model_tflops"}
    read = throughput(monkeypatch, method(completions=References()), Peak(1e6, 1e5))
    found = read.metrics(LENGTHS, 0, float("nan"), 2.0)
    assert found["time/update_tokens_per_s_per_chip"] == 14 / 2.0 / 4
    assert found["chip/mfu"] == found["chip/update_mfu"] and "chip/decode_bandwidth" not in found


def test_kept_seconds_leave_out_compiling_and_what_comes_between_steps(monkeypatch):
    now, clock = [10.0], SimpleNamespace(seconds=0.0, programs=0, read=0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rates = SimpleNamespace(metrics=lambda *_: {})
    goodput = SimpleNamespace(metrics=lambda number, kept_s: {"kept": kept_s})
    meter = Meter(rates, clock, kept_s=100.0, goodput=goodput)
    now[0] += 5
    clock.seconds, clock.programs, clock.read = 3.0, 4, 1
    with meter.waiting("data"):
        now[0] += 2
    meter.timed("grading", lambda seconds: now.append(now.pop() + seconds))(0.5)
    now[0] -= 0.5
    assert meter.read() == 7.0 and meter.kept_s == 104.0
    now[0] += 1
    meter.end()
    now[0] += 50  # an evaluation, which compiles
    clock.seconds = 33.0
    assert meter.read() == 1.0 and meter.kept_s == 105.0
    assert meter.line(2, None, 0, 0.0, 0.0) == {
        "time/compile_s": 33.0,
        "time/compile_programs": 4,
        "time/compile_from_disk": 1,
        "time/data_s": 2.0,
        "time/grading_s": 0.5,
        "kept": 105.0,
    }
    again = meter.line(3, None, 0, 0.0, 0.0)
    assert again["time/compile_s"] == again["time/data_s"] == 0.0


@pytest.mark.slow
def test_a_resumed_run_compiles_nothing_is_traced_and_saves_by_the_clock(tmp_path, capsys):
    always = ["train.checkpoint_every_minutes = 0.00001", "train.checkpoint_every_steps = 0"]
    always += ["train.eval_every_steps = 0", f"train.compilation_cache = '{tmp_path}/programs'"]
    runs = tmp_path / "cut", tmp_path / "whole"
    for workdir, steps in ((runs[0], 3), (runs[0], 6), (runs[1], 6)):
        jax.clear_caches()
        window = [f"train.profile_steps = ({steps - 2}, {steps - 1})"]
        assert main(command(workdir, f"train.num_steps = {steps}", *always, *window)) == 0
    saved = {int(path.name) for path in (runs[0] / "checkpoints").iterdir()}
    assert saved == {5, 6}  # the latest two; no period names a 5
    assert lines_of(runs[0]) == lines_of(runs[1])
    lines = [json.loads(x) for x in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    programs, read = (
        [line[f"time/compile_{name}"] for line in lines] for name in ("programs", "from_disk")
    )
    assert read[0] < programs[0] and read[3] == programs[3] > 5
    assert [x["goodput/restarts"] for x in lines] == [0] * 3 + [1] * 3
    assert all(0 < x["goodput/fraction"] < 1 for x in lines)
    assert traced_steps(runs[1]) == [4, 5]


def test_a_window_outside_the_run_is_refused(tmp_path, capsys):
    for window in ("(5, 4)", "(3, 7)", "(1,)", "(1, 2, 3)"):
        flags = ["train.num_steps = 6", f"train.profile_steps = {window}"]
        assert main(command(tmp_path, *flags)) == 2
        assert "train.profile_steps must be (first, last)" in capsys.readouterr().err
