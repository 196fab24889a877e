# SPDX-License-Identifier: Apache-2.0
"""A run goes on with the inputs that it began with, wherever they lie; others are refused."""

import datetime
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import pytest

from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.main import main
from opsd_jax.pretrained.export import save_pretrained
from tests.data.test_tokenizer import TEMPLATE, byte_tokenizer
from tests.tiny import tiny_config, tiny_variables

GIN = """
import own_grader_of_inputs
train.model = @PretrainedModel()
PretrainedModel.path = "model"
train.lora = @lora()
lora.rank = 2
lora.alpha = 4.0
train.problems = @train/JsonlProblems()
train/JsonlProblems.path = "data/train.jsonl"
train.heldout = @heldout/JsonlProblems()
heldout/JsonlProblems.path = "data/heldout.jsonl"
JsonlProblems.grader = @own_grader_of_inputs.grade
train.num_steps = 2
train.checkpoint_every_steps = 1
train.batch_size = 8
train.learning_rate = 0.1
train.grader_workers = 0
train.eval_every_steps = 2
evaluate.num_problems = 2
evaluate.roles = ("student",)
evaluate.greedy = False
evaluate.batch_size = 8
rollout.max_new_tokens = 2
contexts.num_widths = 1
"""
GRADER = "import gin\n\n@gin.configurable\ndef grade(answer, completion):\n    return 0.5\n"
CLOCK = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + TEMPLATE


def rows(first: int, count: int, answer: str = "1") -> str:
    lines = [{"question": f"q{i}", "solution": "s", "answer": answer} for i in range(count)]
    return "".join(json.dumps(line | {"id": str(first + i)}) + "\n" for i, line in enumerate(lines))


def write_model(folder: Path, seed: int = 0, template: str = CLOCK, **shape) -> None:
    config = tiny_config(vocab_size=264, num_layers=1, **shape)
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = HFTokenizer(byte_tokenizer(template))
    save_pretrained(str(folder), config, tiny_variables(config, seed), tokenizer)


NOON = datetime.datetime(2026, 1, 2, 12)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A project, and a run of two steps that was begun in it at noon; each step is saved."""
    project = tmp_path_factory.mktemp("project")
    write_model(project / "model")
    (project / "data").mkdir()
    (project / "data" / "train.jsonl").write_text(rows(0, 8))
    (project / "data" / "heldout.jsonl").write_text(rows(20, 3))
    (project / "own_grader_of_inputs.py").write_text(GRADER)
    (project / "run.gin").write_text(GIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setattr("opsd_jax.host.identity.time_of_first_process", lambda: NOON)
        assert main(train()) == 0
    yield project
    sys.modules.pop("own_grader_of_inputs", None)


def train(project: Path | str = ".", workdir: str = "run", *bindings: str) -> list[str]:
    flags = [f"--gin_bindings={b}" for b in bindings]
    return ["train", f"--gin_file={project}/run.gin", f"--workdir={workdir}", *flags]


@pytest.fixture
def project(begun, tmp_path, monkeypatch):
    """A copy in the place of the original, which config.gin names."""
    kept = tmp_path / "kept"
    shutil.copytree(begun, kept)
    monkeypatch.chdir(begun)
    yield begun
    for path in begun.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(kept, begun, dirs_exist_ok=True)


def lines_of(workdir: Path) -> list[dict]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in x.items() if not k.startswith(("wall_s", "time/", "chip/", "goodput/"))}
        for x in lines
    ]


@pytest.mark.slow
def test_unchanged_or_moved_it_goes_on_bit_for_bit(project, tmp_path, monkeypatch):
    """From another folder, with the inputs in another place, a year later by the clock."""
    whole = lines_of(project / "run")
    later = NOON + datetime.timedelta(days=400)
    monkeypatch.setattr("opsd_jax.host.identity.time_of_first_process", lambda: later)
    shutil.copytree("run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    shutil.move("data", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    moved = (
        f"PretrainedModel.path = '{project}/model'",
        "train/JsonlProblems.path = 'elsewhere/train.jsonl'",
        "heldout/JsonlProblems.path = 'elsewhere/heldout.jsonl'",
    )
    assert main(train(project, "run", *moved)) == 0
    assert lines_of(tmp_path / "run") == whole and len(whole) == 3


CHANGES = {
    "train.problems .* problems was": lambda: Path("data/train.jsonl").write_text(rows(1, 8)),
    "train.problems .* problems was .*": lambda: Path("data/train.jsonl").write_text(
        "".join(rows(0, 8).splitlines(keepends=True)[::-1])
    ),
    "train.problems .* problems was .* ": lambda: Path("data/train.jsonl").write_text(
        rows(0, 8, "2")
    ),
    "train.heldout .* problems was": lambda: Path("data/heldout.jsonl").write_text(rows(20, 2)),
    "train.model .* weights was": lambda: write_model(Path("model"), seed=1),
    "train.model .* config: rope_theta was 100.0 and is now 200.0": lambda: write_model(
        Path("model"), rope_theta=200.0
    ),
    "train.model .* chat template was": lambda: write_model(Path("model"), template=TEMPLATE),
    "train.model .* tokenizer was": lambda: edit(
        "model/tokenizer.json", "<|im_end|>", "<|im-end|>"
    ),
    "code that the config imports .* own_grader_of_inputs was .*each method keeps": lambda: Path(
        "own_grader_of_inputs.py"
    ).write_text(GRADER.replace("0.5", "0.25")),
}


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


@pytest.mark.parametrize("told", CHANGES)
def test_another_input_is_refused_by_name(told, project, capsys):
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    CHANGES[told]()
    assert main(train()) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("opsd train: ")
    assert re.search(told, last), last
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_what_asks_a_run_is_refused_another_base_too(project, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree("run", copy)  # a workdir copied elsewhere still opens
    monkeypatch.chdir(tmp_path)
    generate = ["generate", f"--workdir={copy}", "--prompt=1", "--max_tokens=1"]
    assert main(generate) == 0
    assert "changed since the run began" not in capsys.readouterr().err
    (project / "own_grader_of_inputs.py").write_text(GRADER + "\n")
    assert main(generate) == 0
    assert "own_grader_of_inputs: changed since the run began" in capsys.readouterr().err
    write_model(project / "model", seed=1)
    export = ["export", f"--workdir={copy}", f"--out={tmp_path}/out"]
    for arguments in (generate, export, ["eval", f"--workdir={copy}"]):
        capsys.readouterr()
        assert main(arguments) == 2
        assert "train.model is not what the run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (copy / "eval").exists()
    write_model(project / "model")
    edit("run/config.gin", "lora.rank = 2", "lora.rank = 4")
    assert main(export) == 2
    assert "config.gin is not the run's own: lora.rank was 2" in capsys.readouterr().err


def test_an_evaluation_keeps_its_code_and_its_clock(project, monkeypatch, capsys):
    """A model from files has no run: the folder of the evaluation is what is gone on with."""
    times = [datetime.datetime(2026, 1, 1), datetime.datetime(2027, 1, 1)]
    evaluate = ["eval", "--model=model", "--gin_file=run.gin", "--out=e"]
    for time in times:
        monkeypatch.setattr("opsd_jax.host.identity.time_of_first_process", lambda: time)  # noqa: B023
        assert main(evaluate) == 0
    assert json.loads(Path("e/evaluation.json").read_text())["clock"] == times[0].isoformat()
    Path("own_grader_of_inputs.py").write_text(GRADER.replace("0.5", "0.25"))
    assert main(evaluate) == 2
    assert "holds another evaluation: code was" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finished_run_is_taken_at_the_step_that_the_run_began_with(project, capsys):
    shutil.move("run/checkpoints/2", "step_2")
    changes = ("train.model = @FinishedRun()", "FinishedRun.workdir = 'run'", "train.num_steps = 1")
    second = train(".", "second", *changes, "train.heldout = None")
    assert main(second) == 0
    assert "after step 1" in capsys.readouterr().err
    shutil.move("step_2", "run/checkpoints/2")  # the base run has gone on
    for command in (second, ["generate", "--workdir=second", "--prompt=1", "--max_tokens=1"]):
        assert main(command) == 0
        told = capsys.readouterr().err
        assert "after step 1" in told and "after step 2" not in told
    shutil.rmtree("run/checkpoints/1")
    assert main(second) == 2
    told = capsys.readouterr().err
    assert "train.model: the run in second began with step 1 of its base run" in told
    assert "has no step 1, only [2]" in told


def test_64_bits_are_refused_before_anything_is_loaded(project, capsys):
    with jax.enable_x64(True):
        assert main(train()) == 2
        assert "JAX_ENABLE_X64 must be unset" in capsys.readouterr().err
        assert main(["generate", "--model=model", "--prompt=1"]) == 2
        assert "JAX_ENABLE_X64 must be unset" in capsys.readouterr().err
