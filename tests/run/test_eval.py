# SPDX-License-Identifier: Apache-2.0
"""`opsd eval` on a file shaped like AIME: killed, continued, refused, compared."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import Evaluator
from opsd_jax.main import main
from opsd_jax.pretrained.export import save_pretrained
from opsd_jax.run.eval import plain_model
from tests.data.test_tokenizer import byte_tokenizer
from tests.pods import run_pod
from tests.tiny import tiny_config, tiny_variables

ROOT = Path(__file__).parents[2]
NUM_PROBLEMS, NUM_SAMPLES = 30, 12
GIN = """
train.heldout = @JsonlProblems()
JsonlProblems.path = "{folder}/aime.jsonl"
JsonlProblems.question_column = "problem"
JsonlProblems.grader = "last_number"
train.grader_workers = 1
evaluate.num_samples = 12
evaluate.batch_size = 8
evaluate.max_new_tokens = 6
evaluate.roles = ("student",)
evaluate.greedy = False
contexts.evaluation = "question"
"""


def test_bindings_of_a_model_from_files_are_heeded(folder):
    bindings = ['PretrainedModel.dtype = "bfloat16"']
    run = plain_model(str(folder / "model"), [str(folder / "aime.gin")], bindings)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.student)} == {"bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of 261 bytes and tokens, and 30 problems with the columns of AIME 2024."""
    folder = tmp_path_factory.mktemp("aime")
    config = tiny_config(vocab_size=264, num_layers=1)
    tokenizer = byte_tokenizer()
    variables = tiny_variables(config)
    save_pretrained(str(folder / "model"), config, variables, HFTokenizer(tokenizer))
    rows = (
        {
            "id": 60 + i,
            "problem": f"Find the remainder when ${i}^{{2024}}$ is divided by 10.",
            "solution": f"It is \\boxed{{{i**2024 % 10}}}.",
            "answer": str(i**2024 % 10),
            "url": "",
            "year": "2024",
        }
        for i in range(NUM_PROBLEMS)
    )
    (folder / "aime.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "aime.gin").write_text(GIN.replace("{folder}", str(folder)))
    return folder


def command(folder, out, *bindings) -> list[str]:
    flags = [f"--gin_bindings={b}" for b in bindings]
    return [
        "eval",
        f"--model={folder / 'model'}",
        f"--gin_file={folder / 'aime.gin'}",
        f"--out={folder / out}",
        *flags,
    ]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def key_of(line: dict) -> tuple:
    return line["role"], line["sampling"], line["id"], line["sample"]


@pytest.fixture(scope="module")
def whole(folder):
    """Without interruption."""
    assert main(command(folder, "whole")) == 0
    return folder / "whole"


@pytest.mark.slow
def test_killed_and_started_again_it_goes_on(folder, whole):
    """The bar of issue 6: 30 problems x 12 samples; SIGKILL; nothing lost, nothing repeated."""
    path = folder / "killed" / "generations.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "opsd_jax", *command(folder, "killed")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 20):
        time.sleep(0.002)
    process.kill()
    errors = process.communicate()[1]
    before = path.read_bytes() if path.exists() else b""
    assert 20 < before.count(b"\n") < NUM_PROBLEMS * NUM_SAMPLES, errors
    assert not (folder / "killed" / "summary.json").exists()
    assert main(command(folder, "killed")) == 0
    after = path.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert after.startswith(kept)
    lines, expected = lines_of(path), lines_of(whole / "generations.jsonl")
    assert len(lines) == NUM_PROBLEMS * NUM_SAMPLES == len({key_of(line) for line in lines})
    assert sorted(lines, key=key_of) == sorted(expected, key=key_of)
    for name in ("summary.json", "by_problem.jsonl"):
        assert (folder / "killed" / name).read_text() == (whole / name).read_text()


def test_what_it_leaves(whole, capsys):
    summary = json.loads((whole / "summary.json").read_text())
    lines = lines_of(whole / "generations.jsonl")
    rewards = [line["reward"] for line in lines]
    assert summary["eval/student/accuracy"] == pytest.approx(sum(rewards) / len(rewards))
    assert 0 < summary["eval/student/accuracy"] < summary["eval/student/pass_at_12"] < 1
    numbers = [line["answer"] for line in lines if line["answer"] is not None]
    assert summary["eval/student/formatted_fraction"] == pytest.approx(len(numbers) / len(lines))
    for name in ("pass_at_4_se", "maj_at_12", "length_p90"):
        assert f"eval/student/{name}" in summary
    rows = lines_of(whole / "by_problem.jsonl")
    assert [row["id"] for row in rows] == [str(60 + i) for i in range(NUM_PROBLEMS)]
    assert len({row["answer"] for row in rows}) > 3


def test_finished_it_repeats_its_numbers_without_sampling(folder, whole, capsys, monkeypatch):
    from opsd_jax.sampling.slots import Sampler

    before = (whole / "generations.jsonl").read_bytes()
    monkeypatch.setattr(Sampler, "__call__", lambda *_: pytest.fail("it sampled"))
    assert main(command(folder, "whole")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((whole / "summary.json").read_text())
    assert "going on after 360 generations" in err and "pass_at_8" in err
    assert (whole / "generations.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "binding, words",
    [
        ("evaluate.temperature = 0.5", "sampling.temperature was 1.0 and is now 0.5"),
        ("evaluate.num_samples = 3", "num_samples was 12 and is now 3"),
        ("JsonlProblems.grader = 'exact'", "grader was"),
        ("contexts.evaluation = 'boxed'", "student.prompts was"),
    ],
)
def test_another_evaluation_in_its_folder_is_refused(folder, whole, binding, words, capsys):
    before = (whole / "generations.jsonl").read_bytes()
    assert main(command(folder, "whole", binding)) == 2
    assert words in capsys.readouterr().err
    assert (whole / "generations.jsonl").read_bytes() == before


def test_grades_by_an_answer_key_that_was_corrected_are_not_taken_over(folder, whole, capsys):
    path = folder / "aime.jsonl"
    wrong = path.read_text()
    assert wrong.count('"answer": "6"') > 0
    path.write_text(wrong.replace('"answer": "6"', '"answer": "5"', 1))
    assert main(command(folder, "whole")) == 2
    path.write_text(wrong)
    assert "student.answers was" in capsys.readouterr().err


SMALL = ("evaluate.num_problems = 6", "evaluate.num_samples = 2", "evaluate.greedy = True")
ROLES = ("student_thinking", "student_no_thinking", "teacher")


@pytest.fixture(scope="module")
def alone(folder):
    """The student without thinking, by the setting of its context."""
    assert main(command(folder, "alone", *SMALL, "contexts.evaluation_thinking = False")) == 0
    return folder / "alone"


@pytest.mark.slow
def test_roles_and_thinking_modes_side_by_side(folder, alone, capsys):
    """Three roles of a chat model; the switch in a role's name is the one of `contexts`."""
    capsys.readouterr()
    assert main(command(folder, "roles", *SMALL, f"evaluate.roles = {ROLES}")) == 0
    out, err = capsys.readouterr()
    summary = json.loads((folder / "roles" / "summary.json").read_text())
    assert json.loads(out) == summary and all(role in err for role in ROLES)
    assert "asked the same" not in err and "has no effect" not in err
    assert {name.split("/")[1] for name in summary if name != "step"} == set(ROLES)
    lines = lines_of(folder / "roles" / "generations.jsonl")
    assert len(lines) == len(ROLES) * 6 * (2 + 1)
    rows = lines_of(folder / "roles" / "by_problem.jsonl")
    ids = [str(60 + i) for i in range(6)]
    assert [(r["role"], r["id"]) for r in rows] == [(role, id) for role in ROLES for id in ids]
    for role in ROLES:
        own = [line for line in lines if line["role"] == role]
        sampled = [line for line in own if line["sampling"] == "sampled"]
        greedy = {line["id"]: line["reward"] for line in own if line["sampling"] == "greedy"}
        found = {name: summary[f"eval/{role}/{name}"] for name in ("accuracy", "length_mean")}
        assert found["accuracy"] == pytest.approx(sum(li["reward"] for li in sampled) / 12)
        assert found["length_mean"] == pytest.approx(sum(li["num_tokens"] for li in sampled) / 12)
        assert summary[f"eval/{role}/greedy_accuracy"] == pytest.approx(sum(greedy.values()) / 6)
        assert greedy == {row["id"]: row["greedy"] for row in rows if row["role"] == role}
    record = json.loads((folder / "roles" / "evaluation.json").read_text())
    assert len({record[f"{role}.prompts"] for role in ROLES}) == 3
    expected = [line for line in lines if line["role"] == "student_no_thinking"]
    found = [li | {"role": "student_no_thinking"} for li in lines_of(alone / "generations.jsonl")]
    assert sorted(found, key=key_of) == sorted(expected, key=key_of)
    texts = {tuple(li["completion"] for li in lines if li["role"] == role) for role in ROLES}
    assert len(texts) == 3


def test_what_has_no_effect_or_does_not_end_is_told_before_anything_is_sampled(
    folder, tmp_path, capsys
):
    """A template without thinking, whose turns end in a token that is no stop id."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>{% endfor %}assistant:"
    (model / "chat_template.jinja").write_text(template)
    roles = f"evaluate.roles = {ROLES[:2]}"
    flags = command(folder, "told", *SMALL, roles, "contexts.evaluation_thinking = True")
    flags[1] = f"--model={model}"
    bindings = ["evaluate.max_new_tokens = 40000", "evaluate.num_problems = 1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "__call__", lambda *_: (_ for _ in ()).throw(UserError("sampled")))
        assert main([*flags, *(f"--gin_bindings={b}" for b in bindings)]) == 2
    err = capsys.readouterr().err
    told = err[: err.index("sampled")]
    assert "ends an assistant's turn with '<pad>' (id 0), none of the stop ids (3,)" in told
    assert "'student_thinking' and 'student_no_thinking' are asked the same prompts" in told
    assert "the evaluated student_thinking's longest prompt has" in told


PAIR = """
from pathlib import Path
from opsd_jax.evaluation.evaluate import of_first_process

folder, *command = arguments
path = Path(folder) / "pair" / "generations.jsonl"
assert main([*command, f"--out={folder}/pair"]) == 0
numbers = of_first_process({"a": 0.1 + index, "b": float("inf"), "c": 1e-300 / (index + 1)})
assert numbers == {"a": 0.1, "b": float("inf"), "c": 1e-300}, numbers
sync_global_devices("evaluated")
if index == 0:
    path.with_name("first.jsonl").write_bytes(path.read_bytes())
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:7]) + b'{"role": "stu')
sync_global_devices("cut")
assert main([*command, f"--out={folder}/pair"]) == 0
sync_global_devices("continued")
assert main([*command, f"--out={folder}/{'pair' if index else 'another'}"]) == 2
"""


@pytest.mark.slow
def test_two_processes_say_what_one_says(folder, alone):
    """Every generation is written once, cut short and continued too; numbers bit for bit."""
    flags = command(folder, "", *SMALL, "contexts.evaluation_thinking = False")
    flags = ["--distributed" if flag.startswith("--out") else flag for flag in flags]
    (first, errors), (second, silent) = run_pod(PAIR, folder, *flags)
    assert "going on after 7 generations" in errors and "all of them see" in errors
    assert "all of them see" in silent
    assert "eval/student/accuracy" in first and "eval/student/accuracy" not in second
    for name in ("summary.json", "by_problem.jsonl"):
        assert (folder / "pair" / name).read_text() == (alone / name).read_text()
    expected = sorted(lines_of(alone / "generations.jsonl"), key=key_of)
    for name in ("first.jsonl", "generations.jsonl"):
        assert sorted(lines_of(folder / "pair" / name), key=key_of) == expected
