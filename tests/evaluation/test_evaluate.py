# SPDX-License-Identifier: Apache-2.0

import dataclasses

import jax
import numpy as np
import pytest

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.grader_pool import GraderPool
from opsd_jax.data.grading import find_grader
from opsd_jax.data.problems import AnswerGrader, LoadedProblems, Problem
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import EvaluateConfig, Evaluator
from opsd_jax.evaluation.generations import GenerationLog
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import FULLY_SHARDED, MeshConfig, make_mesh
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.slots import Sampler
from tests.tiny import WordTokenizer, tiny_config, tiny_variables

CONTEXTS = ContextConfig("{question}", "{question} {solution}", "{question}")
PROBLEMS = LoadedProblems(
    tuple(Problem(str(i), f"what is {i}", f"it is {i}", "a") for i in range(11)), lambda p, t: 0.0
)


class SmallTokenizer(WordTokenizer):
    """Ids below the tiny model's vocabulary."""

    vocab_size = 24

    def encode(self, text):
        return [3 + sum(map(ord, word)) % 21 for word in text.split()]


def parts(**changes):
    config = EvaluateConfig(**(dict(num_problems=0, batch_size=8, num_samples=2) | changes))
    mesh = make_mesh(MeshConfig())
    sampler = Sampler(Decoder(tiny_config()), 0, mesh, FULLY_SHARDED, config.batch_size)
    settings = RolloutConfig(max_new_tokens=4, stop_ids=SmallTokenizer.stop_ids)
    return config, CONTEXTS, settings, sampler, SmallTokenizer(), PROBLEMS


def digits(problem, completion):
    """1.0 if the problem's number stands in the completion."""
    return float(problem.id in completion.split())


@pytest.fixture(scope="module")
def pool():
    with GraderPool(digits, num_workers=0) as pool:
        yield pool


def test_every_problem_is_sampled_as_often_as_asked_and_again_the_same(pool):
    """11 problems x 2 samples in batches of 8: the filled rows of the last batch do not count."""
    variables = tiny_variables(tiny_config())
    run = Evaluator(*parts(), pool)
    found = run(variables, variables)
    for generations in found.generations.values():
        assert [(g.problem.id, g.sample) for g in generations] == [
            (str(i), s) for i in range(11) for s in range(2)
        ]
        for g in generations:
            assert g.reward == digits(g.problem, g.text)
    student = found.generations["student"]
    assert found.metrics["eval/student/accuracy"] == np.mean([g.reward for g in student])
    assert all(1 <= g.num_tokens <= 4 for g in student)
    stopped = [g for g in student if g.stopped]
    assert found.metrics["eval/student/truncated_fraction"] == pytest.approx(1 - len(stopped) / 22)
    assert [row["role"] for row in found.by_problem] == ["student"] * 11 + ["teacher"] * 11
    # A function that only grades cannot make answers vote.
    assert not [name for name in found.metrics if "maj_at" in name or "formatted" in name]
    again = run(variables, variables)
    assert (again.metrics, again.by_problem) == (found.metrics, found.by_problem)


class Ends:
    """Answers are last words; two are equal if they have one parity."""

    def __call__(self, problem, completion):
        return float(self.same("4", self.extract(completion) or "5"))

    def extract(self, completion):
        return completion.split()[-1] if completion else None

    def same(self, answer, other):
        return int(answer) % 2 == int(other) % 2


def test_answers_vote_by_equivalence():
    variables = tiny_variables(tiny_config())
    with GraderPool(Ends(), num_workers=2) as pool:
        found = Evaluator(*parts(num_samples=5, roles=("student",), greedy=False), pool)(variables)
    assert set(found.generations) == {"student"}
    expected = []
    for i in range(11):
        votes = [g for g in found.generations["student"] if g.problem.id == str(i)]
        even = sum(g.answer is not None and int(g.answer) % 2 == 0 for g in votes)
        odd = sum(g.answer is not None and int(g.answer) % 2 == 1 for g in votes)
        expected.append(0.5 * (even >= odd) + 0.5 * (even > odd) if even else 0.0)
    assert 0 < sum(expected) < 11
    assert found.metrics["eval/student/maj_at_5"] == pytest.approx(np.mean(expected))
    texts = [g.text for g in found.generations["student"]]
    assert found.metrics["eval/student/formatted_fraction"] == np.mean([t != "" for t in texts])
    assert [row["majority"] for row in found.by_problem] == pytest.approx(expected)


class Counting:
    """A sampler that notes how many prompts it is given."""

    def __init__(self, sampler, asked):
        self.sampler, self.asked = sampler, asked

    def __call__(self, variables, prompts, config, keys):
        self.asked.append(len(prompts))
        return self.sampler(variables, prompts, config, keys)


class SwitchTokenizer(SmallTokenizer):
    """Shows the thinking switch in the prompt."""

    def render(self, prompt, **switches):
        return self.encode(prompt + f" {switches.get('enable_thinking')}")


def test_roles_choose_weights_context_and_thinking(pool):
    config, contexts, settings, sampler, _, problems = parts(
        roles=("student", "student_no_thinking", "teacher_thinking"), num_problems=1
    )
    tokenizer = SwitchTokenizer()
    explored = dataclasses.replace(settings, repetition_penalty=1.5, min_p=0.2, min_new_tokens=2)
    run = Evaluator(config, contexts, settings, sampler, tokenizer, problems, pool)
    assert (
        Evaluator(config, contexts, explored, sampler, tokenizer, problems, pool).settings
        == run.settings
    )
    encode = tokenizer.encode
    assert {role: prompts[0].ids for role, prompts in run.prompts.items()} == {
        "student": encode("what is 0 None"),
        "student_no_thinking": encode("what is 0 False"),
        "teacher_thinking": encode("what is 0 it is 0 True"),
    }
    found = run(tiny_variables(tiny_config()), tiny_variables(tiny_config(), seed=1))
    assert "eval/student_no_thinking/accuracy" in found.metrics
    assert list(found.generations) == ["student", "student_no_thinking", "teacher_thinking"]


def test_what_a_role_leaves_out_is_counted_and_told(pool, caplog):
    """Three teachers' prompts of 3 + 2 i words are over 8; no student's is."""
    config, contexts, settings, sampler, tokenizer, _ = parts(num_samples=1, greedy=False)
    problems = LoadedProblems(
        tuple(Problem(str(i), f"what is {i}", "it is " * (i + 1), "a") for i in range(5)), digits
    )
    contexts = dataclasses.replace(contexts, teacher_max_tokens=8)
    run = Evaluator(config, contexts, settings, sampler, tokenizer, problems, pool)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and told[0].startswith("3 held-out problems are over the teacher budget")
    variables = tiny_variables(tiny_config())
    found = run(variables, variables).metrics
    asked = {role: found[f"eval/{role}/num_problems"] for role in config.roles}
    dropped = {role: found[f"eval/{role}/num_dropped"] for role in config.roles}
    assert asked == {"student": 5, "teacher": 2} and dropped == {"student": 0, "teacher": 3}
    strict = dataclasses.replace(contexts, too_long="error")
    with pytest.raises(UserError, match="problem '2': the teacher prompt has 9 tokens"):
        Evaluator(config, strict, settings, sampler, tokenizer, problems, pool)


def test_what_is_in_the_log_is_not_sampled_again(pool, tmp_path):
    """Half of the lines and a torn one: the rest is sampled, and every number is the same."""
    variables = tiny_variables(tiny_config())
    run = Evaluator(*parts(), pool)
    with GenerationLog(tmp_path / "a", {}) as log:
        whole = run(variables, variables, log)
    lines = (tmp_path / "a" / "generations.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 * (22 + 11)
    kept = lines[::2] + [lines[1][:-9]]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "evaluation.json").write_text("{}")
    (tmp_path / "b" / "generations.jsonl").write_bytes(b"".join(kept))
    asked = []

    rest = Evaluator(*parts(), pool)
    rest.sampler = Counting(run.sampler, asked)
    with GenerationLog(tmp_path / "b", {}) as log:
        assert len(log.found) == 33
        again = rest(variables, variables, log)
    assert sum(asked) == 33
    assert (again.metrics, again.by_problem) == (whole.metrics, whole.by_problem)
    resumed = (tmp_path / "b" / "generations.jsonl").read_bytes().splitlines(keepends=True)
    assert sorted(resumed) == sorted(lines)


def test_a_disk_that_is_full_is_told_while_sampling(pool, tmp_path):
    class Full(GenerationLog):
        def append(self, place, generation):
            raise UserError("no space")

    variables = tiny_variables(tiny_config())
    with Full(tmp_path, {}) as log, pytest.raises(UserError, match="no space"):
        Evaluator(*parts(), pool)(variables, variables, log)


def test_settings_that_cannot_work_name_themselves():
    with pytest.raises(UserError, match="evaluate.batch_size = 9"):
        parts(batch_size=9)
    with pytest.raises(
        UserError, match="evaluate.roles must be a tuple .'student', .*not .'pupil'"
    ):
        EvaluateConfig(roles=("pupil",))
    with pytest.raises(UserError, match="evaluate.roles must be a tuple"):
        EvaluateConfig(roles="student")
    with pytest.raises(UserError, match="evaluate.roles must name each role once"):
        EvaluateConfig(roles=("student", "student"))
    for setting, value in (("temperature", 0), ("top_k", -1), ("top_p", 0.0), ("top_p", None)):
        with pytest.raises(UserError, match=f"evaluate.{setting} must be"):
            EvaluateConfig(**{setting: value})
    with pytest.raises(UserError, match=r"evaluate.max_new_tokens must be an integer >= 0, not -5"):
        EvaluateConfig(max_new_tokens=-5)
    strict = ContextConfig(
        "{question}", "{question} {solution}", "{question}", student_max_tokens=1
    )
    mesh = make_mesh(MeshConfig())
    sampler = Sampler(Decoder(tiny_config()), 0, mesh, FULLY_SHARDED, 8)
    with pytest.raises(UserError, match="no held-out problem fits"):
        Evaluator(
            EvaluateConfig(), strict, RolloutConfig(1), sampler, SmallTokenizer(), PROBLEMS, None
        )
    assert jax.device_count() == 8


def test_problems_without_answers_are_refused_where_answers_are_compared(pool):
    bare = tuple(dataclasses.replace(problem, answer="") for problem in PROBLEMS.problems)
    *settings, _ = parts()
    Evaluator(*settings, LoadedProblems(bare, digits), pool)  # has no need of them
    compared = LoadedProblems(bare, AnswerGrader(find_grader("exact")))
    with pytest.raises(UserError, match="held-out problem '0' has no answer"):
        Evaluator(*settings, compared, pool)
