# SPDX-License-Identifier: Apache-2.0
"""Whole runs of a tiny model through the command line: resume, kill, SIGTERM, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import opsd_jax
from opsd_jax.data.problems import LoadedProblems, Problem
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import Prompt
from opsd_jax.evaluation.runs import ACCURACY
from opsd_jax.host import metrics as metrics_module
from opsd_jax.host.checkpoint import Checkpoints
from opsd_jax.host.checkpoint_record import read_record
from opsd_jax.host.files import read_metrics
from opsd_jax.host.guard import GuardConfig
from opsd_jax.host.identity import identity_of
from opsd_jax.host.stage import local
from opsd_jax.main import main
from opsd_jax.run import inputs as inputs_module
from opsd_jax.run import train as train_module
from opsd_jax.run.config import load_experiment
from opsd_jax.run.loop import Loop
from opsd_jax.testbed.world import ChainTokenizer

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "experiments" / "quickstart.gin")
TINY = [
    "train.model = @RandomModel()",
    "RandomModel.config = @ModelConfig()",
    "ModelConfig.vocab_size = 37",
    "ModelConfig.num_layers = 1",
    "ModelConfig.embed_dim = 16",
    "ModelConfig.num_heads = 2",
    "ModelConfig.num_kv_heads = 1",
    "ModelConfig.head_dim = 8",
    "ModelConfig.mlp_dim = 16",
    "train/ChainArithmetic.num_problems = 40",
    "heldout/ChainArithmetic.num_problems = 16",
    "train.batch_size = 8",
    "train.eval_every_steps = 3",
    "train.checkpoint_every_steps = 2",
    "evaluate.batch_size = 8",
    "evaluate.num_problems = 16",
    "train.probes = ()",
    "teacher.weights = 'ema'",
    "rollout.max_new_tokens = 4",
]


def command(workdir, *bindings) -> list[str]:
    flags = [f"--gin_bindings={b}" for b in [*TINY, *bindings]]
    return ["train", f"--gin_file={QUICKSTART}", f"--workdir={workdir}", *flags]


def lines_of(workdir) -> list[dict]:
    """metrics.jsonl without what is measured in seconds."""
    lines = map(json.loads, (Path(workdir) / "metrics.jsonl").read_text().splitlines())
    timed = ("wall_s", "time/", "chip/", "goodput/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def unexplained(workdir) -> set[str]:
    """Metrics of a run that the text of host/metrics.py does not name."""
    text = metrics_module.__doc__
    names = re.findall(r"\w+/[\w*]+|step|wall_s", text)
    written = set().union(*read_metrics(Path(workdir) / "metrics.jsonl"))
    terms = "loss/(policy_gradient|anchor|distillation)(_token_weight|_rows_fraction)?"  # loss/TERM
    written = {key for key in written if not re.fullmatch(terms, key)}
    return {key for key in written if not any(fnmatch(key, name) for name in names)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps without interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    assert main(command(workdir, "train.num_steps = 6")) == 0
    return workdir


def test_a_run_leaves_what_the_contract_names(whole):
    lines = lines_of(whole)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    names = """loss/objective loss/divergence loss/clip_fraction loss/negative_fraction
        student/entropy teacher/entropy teacher/nll_of_rollout rollout/length_mean
        rollout/truncated_fraction rollout/reward_mean rollout/tokens_total optim/grad_norm"""
    assert set(names.split()) <= set(lines[1])
    evaluated = "accuracy accuracy_se greedy_accuracy length_mean truncated_fraction".split()
    for step in (0, 3, 6):
        for role in ("student", "teacher"):
            assert {f"eval/{role}/{name}" for name in evaluated} <= set(lines[step])
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["time/rollout_s"] > 0 and last["time/update_s"] is not None
    assert last["chip/model_tflops"] > 0 and "chip/mfu" not in last  # nobody knows a CPU's peak
    assert 0 < last["goodput/fraction"] < 1 and last["goodput/restarts"] == 0
    waited = "time/data_s time/grading_s time/compile_s time/rollout_tokens_per_s_per_chip"
    assert set(waited.split()) <= set(last)
    assert lines[6]["rollout/tokens_total"] <= 6 * 8 * 4
    assert unexplained(whole) == set()
    assert (whole / "config.gin").exists() and (whole / "checkpoints" / "6").is_dir()
    samples = [json.loads(x) for x in (whole / "samples/step_000006.jsonl").open()]
    assert {row["role"] for row in samples} == {"student", "teacher"}


def test_resume_equals_uninterrupted_bit_for_bit(whole, tmp_path):
    """Invariant 9: two halves in one workdir give every number of the whole run."""
    assert main(command(tmp_path, "train.num_steps = 4", "train.eval_every_steps = 3")) == 0
    assert main(command(tmp_path, "train.num_steps = 6")) == 0
    first, second = lines_of(whole), lines_of(tmp_path)
    # The first half also evaluated at its own end.
    cut = {k: v for k, v in second[4].items() if not k.startswith("eval/")}
    assert second[:4] + [cut] + second[5:] == first


def test_a_run_in_a_bucket_is_the_run_on_disk(whole, bucket_run, tmp_path, capsys):
    """Trained in two halves, evaluated and looked at by every command that takes a workdir."""
    for num_steps in (4, 6):
        assert main(command(bucket_run, f"train.num_steps = {num_steps}")) == 0
    lines = lines_of(local(str(bucket_run)))
    lines[4] = {k: v for k, v in lines[4].items() if not k.startswith("eval/")}
    assert lines == lines_of(whole)
    ours, theirs = bucket_run / "checkpoints" / "6", whole / "checkpoints" / "6"
    assert read_record(ours)["leaves"] == read_record(theirs)["leaves"]
    capsys.readouterr()
    assert main(["eval", f"--workdir={bucket_run}"]) == 0
    assert (bucket_run / "eval/heldout_step_000006/summary.json").is_file()
    found = json.loads(capsys.readouterr().out)
    assert found["eval/student/accuracy"] == lines[6]["eval/student/accuracy"]
    assert main(["tokens", f"--workdir={bucket_run}", "--num=2"]) == 0
    assert capsys.readouterr().out == f"{bucket_run}/tokens/step_000006.jsonl\n"
    assert main(["export", f"--workdir={bucket_run}", f"--out={tmp_path / 'hf'}"]) == 0
    page = tmp_path / "report.html"
    assert main(["report", f"--workdir=there={bucket_run}", f"--out={page}"]) == 0
    run = opsd_jax.load_run(str(bucket_run))
    assert run.samples(6) == opsd_jax.load_run(whole).samples(6)
    assert repr(run).startswith(f"TrainingRun('{bucket_run}', step 6 of 6, ")
    written = {name.split("/")[0] for name in bucket_run.names()}
    assert {path.name for path in whole.iterdir()} - {".lock"} <= written
    assert "tokens" in written and ".lock" not in bucket_run.names()


GRPO = [
    "train.objective = @Mix()",
    "Mix.terms = (@PolicyGradient(), @Anchor())",
    "Anchor.weight = @linear",
    "train.group_size = 4",
    "train.num_updates = 2",
    "teacher.weights = 'initial'",
    "teacher.dtype = 'bfloat16'",
    "optimizer.mu_dtype = 'bfloat16'",
]


@pytest.mark.slow
def test_a_run_that_learns_from_grades_resumes_bit_for_bit(tmp_path):
    """The same for GRPO: graded between the halves, two passes, a KL to the initial policy, whose
    copy and the first moments are narrow."""
    assert main(command(tmp_path / "whole", "train.num_steps = 5", *GRPO)) == 0
    for num_steps in (2, 5):
        assert main(command(tmp_path / "cut", f"train.num_steps = {num_steps}", *GRPO)) == 0
    whole, cut = lines_of(tmp_path / "whole"), lines_of(tmp_path / "cut")
    first = {k: v for k, v in cut[2].items() if not k.startswith("eval/")}
    assert [*cut[:2], first, *cut[3:]] == whole
    names = "reward/zero_variance_fraction policy/clip_fraction policy/kl_initial"
    assert set(names.split()) <= set(whole[1]) and "loss/divergence" not in whole[1]
    assert unexplained(tmp_path / "whole") == set()
    # Warmed up over the quickstart's five steps, of two passes each, also where the run was cut.
    rates = [line["optim/learning_rate"] for line in whole[1:]]
    np.testing.assert_allclose(np.array(rates) / rates[-1], [0.2, 0.4, 0.6, 0.8, 1], rtol=1e-5)


def start(workdir, *bindings, flags=()) -> subprocess.Popen:
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": devices}
    return subprocess.Popen(
        [sys.executable, "-m", "opsd_jax", *command(workdir, *bindings), *flags],
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for_step(process, workdir, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        path = Path(workdir) / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") > step:
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"step {step} was never logged: {process.communicate()[1]}")


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_committed_and_sigterm_saves(tmp_path):
    """Killed at some step, resumed, stopped politely, resumed: as if nothing had happened."""
    long = "train.num_steps = 100000"
    process = start(tmp_path, long)
    wait_for_step(process, tmp_path, 7)
    process.kill()
    process.communicate()
    process = start(tmp_path, long, flags=["--stopped_status=75"])
    wait_for_step(process, tmp_path, 9)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 75, errors
    assert "goes on from here" in errors
    lines = lines_of(tmp_path)
    steps = [line["step"] for line in lines]
    assert steps == list(range(len(steps)))
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == steps[-1]
    straight = tmp_path / "straight"
    assert main(command(straight, f"train.num_steps = {min(9, steps[-1])}", "mesh.data = -1")) == 0
    names = ("loss/objective", "rollout/tokens_total")
    for ours, expected in zip(lines[1:9], lines_of(straight)[1:9], strict=True):
        for name in names:  # Eight devices there, one here: equal up to rounding.
            assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)


def test_a_damaged_checkpoint_falls_back_and_says_so(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    victim = tmp_path / "run" / "checkpoints" / "6" / "state"
    for path in sorted(victim.rglob("*")):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(command(tmp_path / "run", "train.num_steps = 6")) == 0
    told = capsys.readouterr().err
    assert "falling back" in told and "trained on too" not in told
    assert lines_of(tmp_path / "run") == lines_of(whole)


def test_eval_generate_export_of_a_run(whole, tmp_path, capsys, monkeypatch):
    assert main(["eval", f"--workdir={whole}"]) == 0
    found = json.loads(capsys.readouterr().out)
    logged = lines_of(whole)[-1]
    for role in ("student", "teacher"):
        assert found[f"eval/{role}/accuracy"] == logged[f"eval/{role}/accuracy"]
    folder = whole / "eval" / "heldout_step_000006"
    # 16 problems, sampled and greedy, student and teacher.
    assert (folder / "generations.jsonl").read_text().count("\n") == 64
    # The student alone is asked and exported: a teacher may be large, or gone.
    monkeypatch.setattr("opsd_jax.run.assembly.load_teacher", lambda *_: pytest.fail("loaded"))
    assert main(["generate", f"--workdir={whole}", "--prompt=1+2*3+4", "--max_tokens=5"]) == 0
    assert main(["export", f"--workdir={whole}", f"--out={tmp_path / 'hf'}"]) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert main(["export", f"--workdir={whole}", f"--out={tmp_path}/p", "--format=peft"]) == 2
    assert "no adapter" in capsys.readouterr().err
    for taken in (tmp_path / "hf", whole, whole / "base", whole / "checkpoints" / "new"):
        assert main(["export", f"--workdir={whole}", f"--out={taken}"]) == 2
        assert f"opsd export: --out={taken}: it" in capsys.readouterr().err


def test_the_base_of_a_run_is_evaluated_as_step_0(whole, capsys):
    assert main(["eval", f"--workdir={whole}", "--step=0"]) == 0
    found = json.loads(capsys.readouterr().out)
    logged = lines_of(whole)[0]
    assert "eval/teacher/accuracy" in found and found == {name: logged[name] for name in found}
    assert (whole / "eval" / "heldout_step_000000" / "summary.json").exists()


@pytest.mark.slow
def test_the_best_step_is_that_of_held_out_accuracy(whole, monkeypatch, capsys):
    for best in (4, None):  # of two equals the latest is the best, and here all are
        steps = {ACCURACY: best}
        monkeypatch.setattr(Checkpoints, "best_step", lambda self: steps[self._best_metric])  # noqa: B023
        assert main(["eval", f"--workdir={whole}", "--step=best"]) == (0 if best else 2)
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 4
    assert f"no checkpoint of {whole} was evaluated: it has no best step" in err


@pytest.mark.parametrize(
    "bindings, words",
    [
        (["train.num_stepz = 1"], "num_stepz"),
        (["train.batch_size = 7"], "multiple of"),
        (["mesh.data = 3", "train.compilation_cache = '{tmp}/deep/run/compiled'"], "mesh.data = 3"),
        (["train.wandb = True"], "needs the package wandb"),
        (["contexts.student_max_tokens = 1"], "dropped"),
        (["train.problems = @JsonlProblems()", "JsonlProblems.path = '{tmp}/bad.jsonl'"], ":2"),
        (["train.problems = @JsonlProblems()", "JsonlProblems.path = '/no/such'"], "/no/such"),
    ],
)
def test_bad_input_is_one_line_and_status_2(bindings, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    (tmp_path / "bad.jsonl").write_text(
        '{"question": "q", "solution": "s", "answer": "a"}\n{"question": "q", "answer": "a"}\n'
    )
    filled = [b.replace("{tmp}", str(tmp_path)) for b in bindings]
    assert main(command(tmp_path / "deep" / "run", "train.num_steps = 1", *filled)) == 2
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opsd train: ")]
    assert len(told) == 1 and words in told[0]
    # Nothing was claimed: the corrected command runs in the same workdir, and reads the problems
    # that were made for this one.
    left = {path.name for path in tmp_path.glob("deep/run/*")}
    if words == "dropped":
        assert left == {".lock", "problems"}
    else:
        assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("kept", ["all", "all but the checkpoints"])
def test_another_config_in_the_workdir_is_refused_and_nothing_is_touched(
    whole, kept, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    if kept != "all":
        shutil.rmtree(run / "checkpoints")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert main(command(run, "train.num_steps = 6", "train.learning_rate = 5e-4")) == 2
    assert "train.learning_rate was" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_a_guarded_run_ends_and_leaves_the_best_checkpoint(tmp_path, capsys):
    """The alarm is real: a random teacher's divergence jumps under a huge learning rate."""
    alarm = [
        "train.learning_rate = 1.0",
        "optimizer.warmup_steps = 0",
        "train.num_steps = 30",
        "teacher.weights = 'initial'",
        "guard.action = 'restore'",
        "guard.window = 1",
        "guard.divergence_rise = 1.01",
        "guard.divergence_floor = 1e-3",
        "train.eval_every_steps = 1",
    ]
    assert main(command(tmp_path, *alarm)) == 0
    told = capsys.readouterr().err
    assert "guard: divergence at step" in told and "the run ends here" in told
    steps = [line["step"] for line in lines_of(tmp_path)]
    assert steps[-1] < 30
    verdict = json.loads((tmp_path / "guard.json").read_text())
    accuracy = [line["eval/student/accuracy"] for line in lines_of(tmp_path)]
    assert accuracy[verdict["restore_step"]] == max(accuracy[1:])
    assert main(["eval", f"--workdir={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == verdict["restore_step"]
    # The same command changes nothing; another action goes on and forgets the verdict.
    assert main(command(tmp_path, *alarm)) == 0
    assert "has ended this run" in capsys.readouterr().err
    assert [line["step"] for line in lines_of(tmp_path)] == steps
    further = ["guard.action = 'warn'", f"train.num_steps = {steps[-1] + 1}"]
    assert main(command(tmp_path, *alarm[:4], *alarm[5:], *further)) == 0
    assert not (tmp_path / "guard.json").exists()
    assert lines_of(tmp_path)[-1]["step"] == steps[-1] + 1


@pytest.mark.slow
def test_a_checkpoint_is_saved_when_due_and_of_what_beats_all_before(tmp_path, monkeypatch):
    accuracies, saved = [0.1, 0.5, 0.9, 0.7, 0.2], []

    def evaluate(self, number, state):
        self.evaluated = {ACCURACY: accuracies[number]}
        return self.evaluated

    def save(self, step, *rest, _save=Checkpoints.save):
        saved.append(step)
        return _save(self, step, *rest)

    monkeypatch.setattr(Loop, "evaluate", evaluate)
    monkeypatch.setattr(Checkpoints, "save", save)
    often = ("train.num_steps = 4", "train.eval_every_steps = 1")
    assert main(command(tmp_path, *often, "train.checkpoint_every_steps = 2")) == 0
    assert saved == [1, 2, 4]  # 1 is better than all before, 2 and 4 are due; 3 is neither


def test_a_resumed_guard_has_not_seen_what_is_taken_back(tmp_path):
    """Alarms rise at steps that are trained again: every process must judge them alike."""
    leaking = {"probe/teacher/ok": 0.1, "probe/teacher/leak": 0.9}
    lines = [{"step": 1}, {"step": 2}, {"step": 3} | leaking]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment = SimpleNamespace(guard=GuardConfig())
    rung = [train_module.guard_of(experiment, tmp_path, start).alarms for start in (0, 2, 3)]
    assert [len(alarms) for alarms in rung] == [0, 0, 1]


def test_training_tells_what_is_held_out_and_trained_on(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise UserError("far enough")

    monkeypatch.setattr(train_module, "start_or_resume", stop)
    assert main(command(tmp_path, "heldout/ChainArithmetic.split = 'train'")) == 2
    assert "16 of 16 held-out problems are trained on too" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bindings, number",
    [
        ([], 0),
        (["contexts.teacher = '{question}'"], 40),
        (["contexts.teacher = '{question}'", "contexts.views = ('{question}',)"], 40),
        (["contexts.teacher = '{question}'", "contexts.views = ('{question} {answer}',)"], 0),
        (["contexts.teacher = '{question}'", "train.completions = @TeacherRollouts()"], 40),
        # Nobody asks this teacher, or it is another model.
        (["contexts.teacher = '{question}'", "train.objective = @Likelihood()"], 0),
        (["contexts.teacher = '{question}'", "teacher.model = @RandomModel()"], 0),
    ],
)
def test_a_teacher_without_privilege_is_told(bindings, number, tmp_path):
    several = ["divergence.target = @target_mean"] * any("views" in line for line in bindings)
    lines = [*TINY, "contexts.student = '{question}'", *bindings, *several]
    experiment, _ = load_experiment([QUICKSTART], lines)
    problems = experiment.train.problems.load(str(tmp_path))
    said = []
    tokenizer, identity = ChainTokenizer(), identity_of(tmp_path, {})
    inputs_module.training_batches(experiment, problems, tokenizer, said.append, identity)
    told = [text for text in said if "no privilege to distil" in text]
    assert len(told) == (number > 0) and all(f"in {number} of 40" in text for text in told)


def test_held_out_questions_that_are_trained_on_are_counted():
    def evaluator(*questions):
        asked = [Problem(f"h{i}", question, "", "a") for i, question in enumerate(questions)]
        rows = [Prompt(problem, []) for problem in asked]
        return SimpleNamespace(prompts={"student": rows, "teacher": rows[:1]})

    trained = LoadedProblems((Problem("0", "1 + 1", "", "2"), Problem("1", "2", "", "2")), None)
    said = []
    for held_out in (None, evaluator("1 + 2", "3"), evaluator("1 +  1\n", "3", "2")):
        inputs_module.tell_contamination(trained, held_out, said.append)
    assert len(said) == 1 and said[0].startswith("2 of 3 held-out problems are trained on too")


def test_a_script_of_many_runs_does_not_go_on_after_one_that_was_not_finished(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(train_module, "train", lambda *arguments: {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 2}\n')
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)  # of which not every step has a line

    def whole_of(num_steps):
        experiment = SimpleNamespace(train=SimpleNamespace(num_steps=num_steps))
        return train_module.train_whole(experiment, "", tmp_path)

    assert whole_of(3).last_step == 2
    with pytest.raises(UserError, match="was stopped after step 3; the same command"):
        whole_of(4)
    (tmp_path / "guard.json").write_text("{}")
    with pytest.raises(UserError, match="was ended by its guard after step 3: see guard.json"):
        whole_of(4)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="is trained to step 3, but has no line in metrics.jsonl"):
        whole_of(2)


def test_a_script_reads_a_finished_run_and_loads_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "load_inputs", lambda *_: pytest.fail("loaded"))
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}

    def whole_of(*bindings):
        lines = [*TINY, "train.num_steps = 6", *bindings]
        return train_module.train_whole(*load_experiment(QUICKSTART, lines), whole)

    assert whole_of().history == read_metrics(whole / "metrics.jsonl")
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    with monkeypatch.context() as patch:  # killed before its guard could conclude it
        patch.setattr(train_module.Guard, "ends_the_run", True)
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            whole_of()
    with pytest.raises(UserError, match="train.learning_rate was"):
        whole_of("train.learning_rate = 5e-4")
    module = tmp_path / "own_rate_of_a_study.py"
    module.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="own_rate_of_a_study came in"):
        (tmp_path / "own.gin").write_text(f"import {module.stem}\ninclude '{QUICKSTART}'\n")
        found = load_experiment(str(tmp_path / "own.gin"), [*TINY, "train.num_steps = 6"])
        train_module.train_whole(*found, whole)


@pytest.mark.parametrize("which", ["problems", "heldout"])
def test_missing_data_is_told_before_a_base_is_taught(which, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inputs_module, "load_models", lambda *_: pytest.fail("loaded"))
    bindings = (f"train.{which} = @JsonlProblems()", "JsonlProblems.path = 'no.jsonl'")
    assert main(command(tmp_path / "run", *bindings)) == 2
    assert "no.jsonl" in capsys.readouterr().err
