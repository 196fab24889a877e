# SPDX-License-Identifier: Apache-2.0
"""`opsd probe`: where answers part, by hand; probabilities by a slow loop; the command whole."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from opsd_jax.data.grader_pool import Grade
from opsd_jax.data.problems import Problem
from opsd_jax.main import main
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import output_head
from opsd_jax.pretrained.export import save_pretrained
from opsd_jax.run.config import load_experiment
from opsd_jax.run.probe import Asked, fork, probe, two_logps, untrained_run
from opsd_jax.run.shown_rows import shown_rows
from opsd_jax.sampling.random_keys import Use, key_for
from tests.run.test_tokens import BYTES, completion_of
from tests.tiny import text_hidden, tiny_batch, tiny_config, tiny_variables

STOP = BYTES.stop_ids[0]


def parted(text, stated, right, stop=(STOP,)):
    ids = [*BYTES.encode(text), *stop]
    return ids, fork(BYTES, ids, stated, Problem("p", "q", "", right))


@pytest.mark.parametrize(
    "text, stated, right, before",
    [
        ("so it is 12.", "12", "17", "so it is 1"),
        ("12 and 12 make 25", "25", "24", "12 and 12 make 2"),
        ("é is 5", "5", "4", "é is "),
        ("3 or 3", "3", "4", "3 or "),  # the last is the answer
        ("it is 1", "1", "12", "it is 1"),  # the right one goes on where this one stops
    ],
)
def test_answers_part_at_their_first_different_token(text, stated, right, before):
    ids, (place, right_id, wrong_id) = parted(text, stated, right)
    assert place == len(BYTES.encode(before)) and wrong_id == ids[place]
    assert right_id == BYTES.encode(right)[place - len(BYTES.encode(text[: text.rfind(stated)]))]


@pytest.mark.parametrize(
    "text, stated, right", [("1,200", "1200", "7"), ("12", "12", "1"), ("so", "", "7")]
)
def test_an_answer_that_is_not_there_or_begins_the_other_has_no_fork(text, stated, right):
    assert parted(text, stated, right)[1] is None
    assert parted("it is 1", "1", "12", stop=())[1] is None  # cut: what came next is not known


class Pieces:
    """Tokens that begin with a space, as most tokenizers have them."""

    pieces = ["it", " is", " 18", " 12", "18", "12", "."]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def encode(self, text):
        return [self.pieces.index(text)]


def test_a_token_that_begins_with_a_space_is_replaced_with_its_space():
    assert fork(Pieces(), [0, 1, 2, 6], "18", Problem("p", "q", "", "12")) == (2, 3, 2)


def test_both_answers_have_the_probability_of_a_slow_loop():
    config = tiny_config()
    variables, context = tiny_variables(config), tiny_batch(3).teacher
    completion, places = completion_of([4, 1, 6], 6), np.array([3, 0, 2])
    ids = np.array([[5, 6], [7, 8], [3, 9]])
    run = jax.jit(two_logps, static_argnums=0)
    got = run(Decoder(config), variables, context, completion, places, ids)
    kernel = np.asarray(output_head(variables["params"], config).kernel, np.float64)
    for b, place in enumerate(places):
        text = [
            *context.ids[b, : context.lengths[b]].tolist(),
            *completion.ids[b, :place].tolist(),
        ]
        logits = kernel @ np.asarray(text_hidden(config)(variables, text)[-1], np.float64)
        expected = logits[ids[b]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        np.testing.assert_allclose(got[b], expected, atol=3e-5)


# ---- whole

GIN = """
include "experiments/base.gin"
train.model = @PretrainedModel()
PretrainedModel.path = "{folder}/model"
train.problems = @JsonlProblems()
JsonlProblems.path = "{folder}/problems.jsonl"
JsonlProblems.grader = "last_number"
train.num_steps = 1
train.batch_size = 8
train.learning_rate = 1e-3
train.grader_workers = 0
contexts.student = "{{question}}"
contexts.teacher = "{{question}} {{solution}}"
rollout.max_new_tokens = 6
evaluate.batch_size = 8
"""


@pytest.fixture(scope="module")
def gin_file(tmp_path_factory):
    """A random byte model and problems; nothing of them is known but by asking."""
    folder = tmp_path_factory.mktemp("probe")
    config = tiny_config(vocab_size=264, num_layers=1)
    save_pretrained(str(folder / "model"), config, tiny_variables(config), BYTES)
    rows = ({"question": f"{i}?", "solution": f"{i}{i}", "answer": f"{i}"} for i in range(9))
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.gin").write_text(GIN.format(folder=folder))
    return folder / "run.gin"


def graded(problems, texts):
    """Right where the text has an even number of characters; the answer is its last character."""
    return [Grade(float(len(text) % 2 == 0), answer=text[-1:]) for text in texts]


@pytest.fixture(scope="module")
def looked_at(gin_file):
    experiment, _ = load_experiment([str(gin_file)])
    run = untrained_run(experiment, str(gin_file.parent))
    problems = experiment.train.problems.load(None)
    return run, problems, shown_rows(run, problems, 8, 0, graded)


def test_a_role_goes_on_from_what_was_begun_up_to_the_limit(looked_at):
    """Greedy, so that a loop of forward passes must find the same tokens."""
    run, _, shown = looked_at
    greedy = dataclasses.replace(run.parts.method.rollout, temperature=0.0)
    method = dataclasses.replace(run.parts.method, rollout=greedy)
    run = run._replace(parts=run.parts._replace(method=method))
    told = []

    def keep(problems, texts):
        told.extend(texts)
        return [Grade(0.0) for _ in texts]

    asked = Asked(run, shown, keep, jax.random.key(1))
    begun = [asked.said[b][:2] for b in (5, 2)]
    asked.grades("teacher", [5, 2], begun)
    hidden = text_hidden(run.parts.model.config)
    kernel = np.asarray(output_head(run.teacher["params"], run.parts.model.config).kernel)
    for text, b, start in zip(told, (5, 2), begun, strict=True):
        prompt = shown.batch.teacher.ids[b, : shown.batch.teacher.lengths[b]].tolist()
        ids = list(start)
        while len(ids) < 6 and (len(ids) == 2 or ids[-1] not in BYTES.stop_ids):
            ids.append(int(np.argmax(kernel @ np.asarray(hidden(run.teacher, prompt + ids)[-1]))))
        assert text == BYTES.decode(ids[:-1] if ids[-1] in BYTES.stop_ids else ids)


@pytest.mark.slow
def test_the_numbers_are_of_the_rows_that_they_name(looked_at):
    run, problems, shown = looked_at
    texts_graded = []

    def counted(problems, texts):
        texts_graded.extend(texts)
        return graded(problems, texts)

    found = probe(run, problems, 8, 0, counted)
    # The student's answer once, the teacher's, and of a wrong one what both make of its half.
    assert len(texts_graded) == 16 + 2 * found["num/wrong"]
    rewards = [float(len(text) % 2 == 0) for text in shown.texts]
    assert 0 < sum(rewards) < 8, "both kinds of answers must occur"
    assert found["student/accuracy"] == np.mean(rewards)
    assert found["num/wrong"] == found["num/from_wrong"] == 8 - sum(rewards)
    asked = Asked(run, shown, graded, key_for(Use.SHOWN, jax.random.key(0), 1))
    teacher = asked.grades("teacher", range(8), [[]] * 8)
    assert found["teacher/accuracy"] == np.mean(teacher)
    wrong = [b for b in range(8) if not rewards[b]]
    halves = [asked.said[b][: len(asked.said[b]) // 2] for b in wrong]
    assert found["student/from_wrong"] == np.mean(asked.grades("student", wrong, halves))
    assert 0 < found["num/right_answer"] <= len(wrong)
    assert 0 <= found["teacher/right_answer"] <= 1


@pytest.mark.slow
def test_the_command_prints_and_writes(gin_file, tmp_path, capsys):
    flags = [f"--gin_file={gin_file}", "--num=8", f"--out={tmp_path}/found.json"]
    assert main(["probe", *flags]) == 0
    printed = capsys.readouterr().out
    assert "8 answers of the student's" in printed and "forward_kl, nats per token" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{found['gap/all']:.3f} ±{found['gap/all_se']:.3f}" in printed
    # A teacher that is shown nothing more has nothing to teach.
    flags += ["--gin_bindings=contexts.teacher = '{question}'"]
    assert main(["probe", *flags]) == 0
    same = json.loads((tmp_path / "found.json").read_text())
    assert "Nothing to learn" in capsys.readouterr().out
    assert same["gap/all"] == pytest.approx(0, abs=1e-6) and same["agreement/all"] == 1
    assert same["student/from_wrong"] == same["teacher/from_wrong"]
