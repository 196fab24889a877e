# SPDX-License-Identifier: Apache-2.0
"""Whatever befalls the files of a finished run, a command ends with status 0, or one line and 2.

Files are cut, filled with noise and with JSON of other kinds, sizes and depths; the seed is fixed.
"""

import json
import os
import random
import shutil

import pytest

from opsd_jax.data.problems import Problem
from opsd_jax.errors import UserError
from opsd_jax.evaluation.generations import Generation, GenerationLog, Place
from opsd_jax.evaluation.statistics import by_problem
from opsd_jax.host.checkpoint_record import Damaged, read_record, seal
from opsd_jax.host.files import write_json_lines, write_whole
from opsd_jax.host.guard import Alarm, restored_step, write_verdict
from opsd_jax.host.metrics import MetricWriters
from opsd_jax.main import main
from tests.run.test_train import command

# JSON values that take the place of any other.
ODD = ["0.5", "", None, True, [], {}, [[1]], -1, 1e308, float("nan"), float("inf"), 10**400, 2**60]
METRICS = {
    "eval/student/accuracy": 0.5,
    "eval/student/accuracy_se": 0.1,
    "loss/divergence": 0.2,
    "student/entropy": 3.0,
    "teacher/entropy": 3.0,
    "rollout/length_mean": 4.0,
    "rollout/truncated_fraction": 0.5,
    "rollout/reward_mean": 0.1,
}
TOKEN = {
    "id": 11,
    "text": "+1",
    "stop": False,
    **dict.fromkeys("divergence student_logps teacher_logps".split(), -0.5),
    **dict.fromkeys("student_entropy teacher_entropy".split(), 3.0),
    **dict.fromkeys(("student_top", "teacher_top"), [[11, "+1", 0.5], [3, "", None]]),
}
RECORD = {"seed": 0, "roles": ["student"], "student.weights": "717f4b36"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The text files of a run that was evaluated and whose tokens were looked at."""
    run = tmp_path_factory.mktemp("finished") / "run"
    write_whole(run / "config.gin", "train.seed = 0\nguard.window = 2\n")
    sample = {"role": "student", "id": "p", "question": "1+1", "answer": "2"}
    with MetricWriters(run) as writers:
        for step in range(6):
            writers.write(step, METRICS | {"rollout/tokens_total": 32 * step})
        writers.write_samples(5, [sample | {"completion": "2", "reward": 1.0}] * 2)
    view = {"teacher_prompt": "1+1|2", "analysis": None, "reward": 1.0, "tokens": [TOKEN] * 2}
    write_json_lines(run / "tokens" / "step_000005.jsonl", [{"step": 5} | sample | view])
    write_verdict(run, [Alarm(4, "entropy", "it fell")], 4)
    found = [
        Generation(Problem(id, "", "", "2"), "2", 1, True, 1.0, sample, "2", group=0)
        for id in "pq"
        for sample in range(2)
    ]
    with GenerationLog(run / "eval" / "a", RECORD) as log:
        for one in found:
            log.append(Place("student", "sampled", one.problem.id, one.sample), one)
    rows = [{"role": "student"} | row for row in by_problem(found, found[::2], 2, True)]
    write_json_lines(run / "eval" / "a" / "by_problem.jsonl", rows)
    record = {"leaves": {"a": {"kind": "float32[2]", "checksum": 7}}, "metrics": METRICS}
    sealed = seal(record | {"data": [1], "meta": {}})
    write_whole(run / "checkpoints" / "4" / "meta" / "metadata", json.dumps(sealed))
    return run


def odd_value(rng: random.Random, text: bytes) -> bytes:
    """JSON with one of its values, at any depth, replaced or removed."""
    tree = json.loads(text)
    at = tree
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not (isinstance(at[key], dict | list) and at[key]) or rng.random() < 0.3:
            break
        at = at[key]
    if rng.random() < 0.1:
        del at[key]
    else:
        at[key] = rng.choice(ODD)
    return json.dumps(tree).encode()


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The content of a file after one accident."""
    kind = rng.choice(["value"] * 6 + ["cut", "noise", "deep", "empty", "other", "twice"])
    lines = content.splitlines()
    if kind == "value" and content.startswith(b"{"):
        if lines[0] == b"{":  # one indented object
            return odd_value(rng, content)
        at = rng.randrange(len(lines))
        lines[at] = odd_value(rng, lines[at])
        return b"\n".join([*lines, b""])
    at = rng.randrange(len(content))
    return {
        "cut": content[:at],
        "deep": b'{"step": 1, "tokens": ' + b"[" * 100_000,
        "empty": b"",
        "other": json.dumps(rng.choice(ODD)).encode(),
        "twice": content * 2,
    }.get(kind, content[:at] + rng.randbytes(4) + content[at + 4 :])


def ends_well(capsys, arguments: list[str]) -> None:
    """Runs a command that must succeed or refuse in one line."""
    capsys.readouterr()
    status = main(arguments)
    told = capsys.readouterr().err.splitlines()
    told = [line for line in told if line.startswith("opsd ") or status == 2]
    assert status in (0, 2)
    assert len(told) == (status == 2) or "model: " in told[0], told


READ_BY = {
    "report": ("config.gin", "metrics.jsonl", "samples/step_000005.jsonl"),
    "report again": ("tokens/step_000005.jsonl",),
    "eval --compare": ("eval/a/by_problem.jsonl", "eval/a/generations.jsonl"),
}


@pytest.mark.parametrize("name, reader", [(n, r) for r, names in READ_BY.items() for n in names])
def test_a_damaged_file_is_refused_or_left_out(name, reader, finished, tmp_path, capsys):
    rng = random.Random(name)
    shutil.copytree(finished, run := tmp_path / "run")
    commands = {
        "report": ["report", f"--workdir={run}", f"--out={tmp_path}/page.html"],
        "eval": ["eval", "--compare", f"{run}/eval/a", f"{run}/eval/a"],
    }
    for _ in range(40):
        (run / name).write_bytes(damaged(rng, (finished / name).read_bytes()))
        ends_well(capsys, commands[reader.split()[0]])


def what_restores(folder) -> dict:
    """File -> what the commands that load a run read it with."""
    return {
        "guard.json": lambda: restored_step(folder),
        "eval/a/evaluation.json": lambda: GenerationLog(folder / "eval" / "a", RECORD).close(),
        "eval/a/generations.jsonl": lambda: GenerationLog(folder / "eval" / "a", RECORD).close(),
        "checkpoints/4/meta/metadata": lambda: read_record(folder / "checkpoints" / "4"),
    }


@pytest.mark.parametrize("name", what_restores(None))
def test_what_restores_a_run_refuses_damage(name, finished, tmp_path):
    rng = random.Random(name)
    shutil.copytree(finished, tmp_path / "run")
    read, refused = what_restores(tmp_path / "run")[name], 0
    for _ in range(60):
        (tmp_path / "run" / name).write_bytes(damaged(rng, (finished / name).read_bytes()))
        try:
            read()
        except (UserError, Damaged) as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


@pytest.mark.parametrize("name", ["config.gin", "metrics.jsonl", "tokens/step_000005.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_named(make, name, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    make(tmp_path / "run" / name)
    assert main(["report", f"--workdir={tmp_path}/run", f"--out={tmp_path}/page.html"]) == 2
    assert f"{tmp_path}/run/{name} must be a file" in capsys.readouterr().err


def test_a_place_to_write_to_is_tried_before_the_run_is_loaded(finished, monkeypatch, capsys):
    for module in ("eval", "export", "tokens"):
        loaded = f"opsd_jax.run.{module}.restore_run"
        monkeypatch.setattr(loaded, lambda *_, **__: pytest.fail("loaded"))
    for arguments, place in (
        (["eval", f"--workdir={finished}", "--out=/proc/out"], "/proc/out"),
        (["export", f"--workdir={finished}", "--out=/proc/out"], "/proc/out"),
        (["tokens", "--workdir=/proc/run"], "/proc/run"),
    ):
        assert main(arguments) == 2
        assert f"cannot write to {place}" in capsys.readouterr().err


@pytest.mark.slow
def test_commands_that_load_a_damaged_run(tmp_path, capsys):
    """The same through every command that restores the model."""
    small = ("train.num_steps = 2", "train.eval_every_steps = 2", "teacher.weights = 'initial'")
    few = ("evaluate.num_problems = 4", "evaluate.greedy = False", "train.grader_workers = 0")
    run, rng = tmp_path / "run", random.Random(0)
    train = command(run, *small, *few)
    evaluate = ["eval", f"--workdir={run}", f"--out={run}/eval/a"]
    export = ["export", f"--workdir={run}", f"--out={tmp_path}/model"]
    tokens = ["tokens", f"--workdir={run}", "--num=1"]
    for arguments in (train, evaluate, tokens):
        assert main(arguments) == 0
    shutil.copytree(run, whole := tmp_path / "whole")
    step = "checkpoints/2"
    for name, arguments in (
        ("guard.json", export),
        ("eval/a/evaluation.json", evaluate),
        ("eval/a/generations.jsonl", evaluate),
        ("metrics.jsonl", train),
        ("config.gin", export),
        ("config.gin", tokens),
        *((f"{step}/{file}", export) for file in ("meta/metadata", "_CHECKPOINT_METADATA")),
        *((f"{step}/state/{file}", export) for file in ("_METADATA", "manifest.ocdbt")),
    ):
        for _ in range(4):
            shutil.rmtree(run)
            shutil.copytree(whole, run)
            path = whole / name
            content = path.read_bytes() if path.exists() else b'{"restore_step": 2}\n'
            (run / name).write_bytes(damaged(rng, content))
            ends_well(capsys, arguments)
