# SPDX-License-Identifier: Apache-2.0
"""`opsd data` on prepared rows: what it shows, and that each mistake is told with its cure."""

import json
import re
import subprocess
import sys

import pytest

from opsd_jax.errors import UserError
from opsd_jax.main import main
from opsd_jax.run.data import data_command, shown_ids
from tests.data.test_tokenizer import TEMPLATE, byte_tokenizer
from tests.host.test_hub import hub  # noqa: F401

GIN = """
train.model = @PretrainedModel()
PretrainedModel.path = "model"
train.problems = @JsonlProblems()
JsonlProblems.path = "rows.jsonl"
train.num_steps = 1
train.batch_size = 2
train.learning_rate = 1e-3
train.grader_workers = 0
rollout.max_new_tokens = 64
"""
NO_SYSTEM = TEMPLATE.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)
NO_END = TEMPLATE.replace("<|im_end|>", "\n")
HELDOUT = [
    "train.heldout = @heldout/JsonlProblems()",
    "heldout/JsonlProblems.path = 'rows.jsonl'",
]


def rows(**columns):
    """Eight rows; a value may be a function of the row's number."""
    fine = {
        "question": lambda i: f"What is {i} + 1?",
        "solution": lambda i: f"One more than {i}: \\boxed{{{i + 1}}}.",
        "answer": lambda i: i + 1,
    } | columns
    filled = [{k: v(i) if callable(v) else v for k, v in fine.items()} for i in range(8)]
    return [{k: v for k, v in row.items() if v is not None} for row in filled]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path / "model")  # a tokenizer, and nothing else
    (tmp_path / "a.gin").write_text(GIN)
    return tmp_path


def as_line(row):
    return json.dumps(row) + "\n"


def write(folder, found):
    (folder / "rows.jsonl").write_text("".join(map(as_line, found)))


def test_rows_as_every_role_sees_them(folder, capsys):
    asked = {"question": lambda i: f"What is <|im_end|>\x1b[31m {i} + 1?", "hint": "\x1b[31mred"}
    write(folder, rows(**asked))
    found = data_command(["a.gin"], [], num=1)
    said = capsys.readouterr().out
    assert "train.problems = @JsonlProblems(): 8 problems, 8 looked at" in said
    assert "-- student: 1" in said and "tokens of 1,024" in said and "-- teacher: " in said
    # A token of the template, and text of the data that only looks like it; no escape is sent.
    assert "| «<|im_start|>»user" in said and "What is <|im_end|>\\x1b[31m 0 + 1?" in said
    assert "\x1b" not in said and "=== Reference Solution Begin ===" in said
    assert "-- answer: '1'" in said and "states '1': grade 1" in said
    assert "-- further columns: hint" in said and "left out: 0 of 8" in said
    assert any("special tokens of the tokenizer stand in 8 texts" in f.text for f in found)


def test_nothing_is_found_where_nothing_is_wrong(folder, capsys):
    write(folder, rows())
    assert data_command(["a.gin"], []) == []
    assert "nothing to change was found" in capsys.readouterr().out


MISTAKES = {
    "a column that is not there": (
        rows(question=None, prompt=lambda i: f"{i} + 1?"),
        [],
        "question_column = 'prompt'",
    ),
    "another column than the question": (
        rows(question="Solve the following problem."),
        [],
        "8 rows have 1 different questions, .* is JsonlProblems.question_column the question",
    ),
    "an answer that cannot be extracted": (
        rows(answer=lambda i: f"it is {i}\n#### {i}"),
        ["JsonlProblems.answer_from = 'boxed'"],
        "no answer of the kind 'boxed' .*'hashes'",
    ),
    "a key that is another row's": (
        rows(answer=lambda i: i + 2),
        [],
        "8 of 8 references state another answer than their key, .*'1', and the key is '2'; correct",
    ),
    "prompts too long, all of them": (
        rows(),
        ["contexts.student_max_tokens = 20"],
        r"all 8 rows are over contexts.student_max_tokens = 20: .* raise it to \d+",
    ),
    "held-out prompts too long, all of them": (
        rows(),
        [*HELDOUT, "contexts.evaluation = '{question} " + "Think. " * 200 + "'"],
        "all 8 rows are over contexts.student_max_tokens = 1,024: the evaluation's prompts have up",
    ),
    "a grader that reads no box": (
        rows(),
        ["JsonlProblems.grader = 'exact'"],
        r"asks for \\boxed{}, and the grader gives a right answer in a box 0 .* choose the grader",
    ),
    "a teacher without privilege": (
        rows(),
        ["contexts.teacher = 'problem_boxed'"],
        "asked the same as the student in 8 of 8 rows.* show {solution} or {answer} in contexts.te",
    ),
    "held-out problems that are trained on": (
        rows(),
        HELDOUT,
        "8 of 8 held-out problems are trained on too .* hold out with hash_start",
    ),
    "a question that has its solution in it": (
        rows(question=lambda i: f"{i} + 1? One more than {i}: \\boxed{{{i + 1}}}."),
        [],
        "8 of 8 questions contain their solution.* correct JsonlProblems.question_column",
    ),
    "a batch of more problems than there are": (
        rows(),
        ["train.batch_size = 16"],
        "a step takes 16 problems, and 8 are left; lower train.batch_size",
    ),
    "a question that asks nothing of the answer's form": (
        rows(),
        ["contexts.student = 'question'"],
        r"note: .*reads an answer in \\boxed{} alone, which .* ask for it in contexts.student",
    ),
    "a student that is told": (
        rows(),
        ["contexts.student = 'answer_boxed'"],
        "note: contexts.student shows {answer}: .* leave it to contexts.teacher",
    ),
    "references that no answer may be as long as": (
        rows(solution=lambda i: f"{'So. ' * 50}\\boxed{{{i + 1}}}"),
        [],
        "note: .*8 of 8 references are longer than rollout.max_new_tokens = 64, up to",
    ),
    "a turn without an end": (rows(), [], "note: .*answers may run on to the length limit", NO_END),
    "a system turn that the template drops": (
        rows(question=lambda i: [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i}+1?"}
        ]),
        [],
        "the student prompt: the chat template leaves out turn 1, of 'system': .* user's turn",
        NO_SYSTEM,
    ),
    "a system text that the template drops": (
        rows(),
        ["contexts.teacher_system = 'You know {solution}.'"],
        "the teacher prompt: the chat template leaves out turn 1, of 'system': .* user's turn",
        NO_SYSTEM,
    ),
    "a placeholder that names no column": (
        rows(hint="add one"),
        ["contexts.teacher = '{question} {hnt}'"],
        "shows {hnt}, which problem .* does not have: it has answer, hint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_cure(folder, name, capsys):
    found, bindings, words, *template = MISTAKES[name]
    write(folder, found)
    if template:
        byte_tokenizer(template[0]).save_pretrained(folder / "model")
    flags = [f"--gin_bindings={binding}" for binding in bindings]
    status = main(["data", "--gin_file=a.gin", "--num=1", *flags])
    said = capsys.readouterr()
    is_note = words.startswith("note")
    assert status == 0 if is_note else 2
    assert re.search(words, said.out if is_note else said.err), said
    assert len(said.err.strip().splitlines()) <= 1 or is_note


def test_a_model_source_without_a_tokenizer_is_told(folder):
    write(folder, rows())
    (folder / "own.py").write_text(
        "import gin\n@gin.configurable\nclass Own:\n"
        "    def load(self, mesh, rules, cache_dir, say):\n        pass\n"
    )
    own = ["import own", "train.model = @Own()"]
    (folder / "run").mkdir()
    (folder / "run" / "config.gin").write_text("\n".join([GIN, *own]))
    of_its_run = ["train.model = @FinishedRun()", "FinishedRun.workdir = 'run'"]
    for bindings in (own, of_its_run):
        with pytest.raises(UserError, match="@Own.. has no method load_tokenizer"):
            data_command(["a.gin"], bindings)


def test_problems_may_be_read_from_the_cache_when_they_are_looked_at(folder, capsys):
    (folder / "lazy_rows.py").write_text(
        "import gin, pathlib\nfrom opsd_jax.data.problems import Problem\n"
        "@gin.configurable\nclass Lazy:\n"
        "    def load(self, cache_dir):\n"
        "        self.file = pathlib.Path(cache_dir) / 'questions'\n"
        "        self.file.write_text('What is 1 + 1?')\n        return self\n"
        "    def __len__(self):\n        return 2\n"
        "    def __getitem__(self, i):\n"
        "        return Problem(str(i), f'{i}: {self.file.read_text()}', f'One and {i}.', '2')\n"
        "    def grade(self, problem, completion):\n        return 1.0\n"
    )
    data_command(["a.gin"], ["import lazy_rows", "train.problems = @Lazy()"])
    assert "train.problems = @Lazy(): 2 problems, 2 looked at" in capsys.readouterr().out


def test_ids_of_a_tokenizer_without_special_tokens():
    class Plain:
        def decode(self, ids):
            return " ".join(map(str, ids))

    assert shown_ids(Plain(), [1, 2]) == "1 2"


def test_of_a_hub_model_no_weights_are_fetched(folder, hub, capsys):  # noqa: F811
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    hub.commit("model", "me/chat", files | {"model.safetensors": b"weights", "config.json": "{}"})
    hub.commit("dataset", "me/rows", {"train.jsonl": "".join(map(as_line, rows()))})
    names = ["PretrainedModel.path = 'me/chat'", "JsonlProblems.path = 'me/rows'"]
    assert data_command(["a.gin"], names) == []
    assert "8 problems" in capsys.readouterr().out
    asked = " ".join(path for _, path in hub.requests)
    assert "tokenizer.json" in asked and "safetensors" not in asked


def test_how_many_are_shown_is_checked_first(folder):
    write(folder, rows())
    command = [sys.executable, "-m", "opsd_jax", "data", "--gin_file=a.gin", "--num=0"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and "--num must be an integer >= 1" in ran.stderr
