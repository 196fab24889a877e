# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl is valid and holds each step once, whatever happened to the run."""

import json
import os
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.errors import UserError
from opsd_jax.host.metrics import MetricWriters
from tests.small_disk import small_disk


def read(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not json")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_one_valid_json_object_per_step_at_once(tmp_path):
    with MetricWriters(tmp_path / "run") as writers:
        scalars = {
            "loss/divergence": jnp.float32(0.5),
            "loss/objective": np.float64("nan"),
            "optim/grad_norm": float("inf"),
            "rollout/tokens_total": np.int64(2**40),
            "student/entropy": jnp.bfloat16(1.5),
        }
        writers.write(0, scalars)
        (line,) = read(tmp_path / "run")  # before close: flushed
        assert list(line)[:2] == ["step", "wall_s"] and line["step"] == 0
        assert line["loss/divergence"] == 0.5 and line["student/entropy"] == 1.5
        assert line["loss/objective"] is None and line["optim/grad_norm"] is None
        assert line["rollout/tokens_total"] == 2**40
        writers.write(3, {"wall_s": 7})
        with pytest.raises(ValueError, match="step 3"):
            writers.write(3, {})
    assert [line["step"] for line in read(tmp_path / "run")] == [0, 3]
    assert read(tmp_path / "run")[1]["wall_s"] == 7


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(0, 30), max_size=12, unique=True).map(sorted),
    torn=st.integers(0, 40),
    resumed=st.integers(0, 30),
)
def test_resume_drops_later_and_torn_lines(tmp_path_factory, steps, torn, resumed):
    workdir = tmp_path_factory.mktemp("run")
    text = "".join(f'{{"step": {n}, "wall_s": {n}.5, "a/b": {n}}}\n' for n in steps)
    whole = [n for n in steps if n <= resumed]
    torn_text = '{"step": 31, "wall_s": 31.5, "a/b": 1}\n'[:torn]
    (workdir / "metrics.jsonl").write_text(text + torn_text)
    with MetricWriters(workdir, resumed_step=resumed) as writers:
        assert [line["step"] for line in read(workdir)] == whole
        assert [line["a/b"] for line in read(workdir)] == whole
        writers.write(resumed + 1, {"a/b": -1})
    lines = read(workdir)
    assert [line["step"] for line in lines] == [*whole, resumed + 1]
    assert lines[-1]["wall_s"] >= (whole[-1] + 0.5 if whole else 0)
    assert os.listdir(workdir) == ["metrics.jsonl"]


def test_a_fresh_run_starts_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "wall_s": 1.0}\n')
    with MetricWriters(tmp_path) as writers:
        writers.write(0, {})
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize("resumed, kept", [(None, []), (0, [0]), (3, [0, 3]), (9, [0, 3, 6])])
def test_texts_of_steps_that_are_taken_back_are_no_longer_there(tmp_path, resumed, kept):
    for folder in ("samples", "tokens"):
        (tmp_path / folder).mkdir()
        for step in (0, 3, 6):
            (tmp_path / folder / f"step_{step:06d}.jsonl").write_text("{}\n")
        (tmp_path / folder / "step_mine.jsonl").write_text("")
    MetricWriters(tmp_path, resumed_step=resumed).close()
    for folder in ("samples", "tokens"):
        wanted = [*(f"step_{step:06d}.jsonl" for step in kept), "step_mine.jsonl"]
        assert sorted(os.listdir(tmp_path / folder)) == wanted


def test_kill_9_keeps_every_written_line(tmp_path):
    script = """
import os, sys
from opsd_jax.host.metrics import MetricWriters
writers = MetricWriters(sys.argv[1])
for step in range(5):
    writers.write(step, {"a/b": step})
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=os.environ, check=False)
    assert [line["step"] for line in read(tmp_path)] == [0, 1, 2, 3, 4]


def test_samples_are_one_json_line_each(tmp_path):
    rows = [{"id": "1", "completion": "naïve\n\u2028 \ud800", "reward": np.float32(1)}, {"id": "2"}]
    with MetricWriters(tmp_path) as writers:
        writers.write_samples(60, rows)
    text = (tmp_path / "samples" / "step_000060.jsonl").read_text(encoding="utf-8")
    first, second = (json.loads(line) for line in text.strip().split("\n"))
    assert first["completion"].startswith("naïve\n") and first["reward"] == 1.0
    assert second == {"id": "2"}
    assert os.listdir(tmp_path / "samples") == ["step_000060.jsonl"]


def test_a_full_disk_is_told_and_the_old_file_stands(tmp_path):
    old = "".join(f'{{"step": {n}, "{"x" * 100}": 1}}\n' for n in range(9))
    (tmp_path / "metrics.jsonl").write_text(old)
    told = "cannot write .*metrics.jsonl: File too large"
    with small_disk(500), pytest.raises(UserError, match=told):
        MetricWriters(tmp_path, resumed_step=8)
    assert (tmp_path / "metrics.jsonl").read_text() == old


@pytest.mark.parametrize("extra, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_extra_is_named_before_anything_is_touched(tmp_path, monkeypatch, extra, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module}: pip install '\.\[{extra}\]'"):
        MetricWriters(tmp_path, **{extra: True})
    assert os.listdir(tmp_path) == []
    MetricWriters(tmp_path).close()  # never imported where it is not asked for


def events_of(path):
    from tensorboardX.proto import event_pb2

    data = path.read_bytes()
    while data:  # TFRecord: length, its crc, payload, its crc
        length = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_gets_finite_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricWriters(tmp_path, tensorboard=True) as writers:
        writers.write(4, {"loss/divergence": 0.25, "loss/objective": float("nan")})
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = {v.tag: (e.step, v.simple_value) for e in events_of(path) for v in e.summary.value}
    assert found == {"loss/divergence": (4, 0.25)}


@pytest.mark.parametrize("resumed, first", [(None, 0), (0, 1), (4, 5)])
def test_tensorboard_hides_what_is_done_again(tmp_path, resumed, first):
    """A session that starts at a step takes back all events from there on."""
    pytest.importorskip("tensorboardX")
    MetricWriters(tmp_path, tensorboard=True, resumed_step=resumed).close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert [e.step for e in events_of(path) if e.session_log.status == 1] == [first]


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(options["id"]) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed in (None, 1, None):
        with MetricWriters(tmp_path, wandb=True, resumed_step=resumed) as writers:
            writers.write(2, {"a/b": 1, "a/nan": float("nan")})
    once = [(2, {"a/b": 1}), "finish"]
    assert calls == [None, *once, "abc", *once, None, *once]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with MetricWriters(tmp_path / "run", tensorboard=True, wandb=True) as writers:
        writers.write(1, {"a/b": 1})
        writers.write_samples(1, [{}])
    assert not (tmp_path / "run").exists()
