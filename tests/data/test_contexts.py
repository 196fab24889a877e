# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.problems import LoadedProblems, Problem
from opsd_jax.data.rendering import chat_of, render
from opsd_jax.data.templates import TEMPLATES
from opsd_jax.data.training_prompts import TrainingPrompts
from opsd_jax.errors import UserError
from opsd_jax.sampling.prompts import pad


def text_of(config, problem, role):
    return chat_of(config, problem, role).text


PROBLEM = Problem("7", "What is 2+2?", "Two and two make four.", "4")


class CharacterTokenizer:
    """One id per character; records the switches it was rendered with."""

    vocab_size, pad_id, stop_ids = 200, 0, (1,)

    def __init__(self):
        self.switches = []

    def encode(self, text):
        return [min(ord(c), 199) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def render(self, prompt, **switches):
        self.switches.append(switches)
        return self.encode(prompt)


def test_every_template_shows_what_its_name_says():
    shown = {
        name: text_of(ContextConfig(teacher=name, instruction="Be brief."), PROBLEM, "teacher")
        for name in TEMPLATES
    }
    for name, text in shown.items():
        assert PROBLEM.question in text
        assert (PROBLEM.solution in text) == ("solution" in name)
        assert (" 4" in text) == ("answer" in name)
        assert ("Be brief." in text) == (name == "instruction")
        assert ("\\boxed{}" in text) == ("boxed" in name)
        assert "{question}" not in text and "{solution}" not in text


def test_the_teacher_sees_the_students_prompt_and_more():
    config = ContextConfig()
    student, teacher = (text_of(config, PROBLEM, role) for role in ("student", "teacher"))
    assert teacher.startswith("Problem: What is 2+2?") and student.startswith(teacher[:21])
    assert PROBLEM.solution in teacher and PROBLEM.solution not in student


def test_a_problem_that_names_a_placeholder_leaks_nothing():
    tricky = Problem("1", "Repeat {solution} and {answer}", "secret", "42")
    assert text_of(ContextConfig(), tricky, "student").startswith("Problem: Repeat {solution} and")


def test_each_role_has_its_own_switches():
    config = ContextConfig(student_thinking=False, teacher_thinking=True)
    tokenizer = CharacterTokenizer()
    for role in ("student", "teacher", "evaluation"):
        render(config, tokenizer, PROBLEM, role)
    assert tokenizer.switches == [{"enable_thinking": False}, {"enable_thinking": True}, {}]


def test_a_long_prompt_is_dropped_or_refused_and_never_cut():
    """Invariant 5."""
    tokenizer = CharacterTokenizer()
    fits = len(text_of(ContextConfig(), PROBLEM, "teacher"))
    exact = ContextConfig(teacher_max_tokens=fits)
    assert len(render(exact, tokenizer, PROBLEM, "teacher")) == fits
    assert render(ContextConfig(teacher_max_tokens=fits - 1), tokenizer, PROBLEM, "teacher") is None
    strict = ContextConfig(teacher_max_tokens=fits - 1, too_long="error")
    with pytest.raises(UserError, match=f"'7'.*{fits} tokens.*teacher_max_tokens = {fits - 1}"):
        render(strict, tokenizer, PROBLEM, "teacher")


def test_training_prompts_have_one_shape_where_they_are_short_and_drop_whole_problems():
    problems = LoadedProblems(
        tuple(Problem(str(n), "q" * n, "s", "a") for n in (1, 9, 30)), lambda p, t: 0.0
    )
    config = ContextConfig("{question}", "{question}!{solution}", student_max_tokens=10)
    prompts = TrainingPrompts(config, CharacterTokenizer(), problems)
    assert prompts.levels == [(16, 16)]
    assert prompts(problems[2]) is None
    row = prompts(problems[1])
    assert row["student_ids"].tolist() == [ord("q")] * 9 + [0] * 7
    assert row["student_length"] == 9 and row["teacher_length"] == 11


def test_a_batch_is_as_wide_as_its_longest_prompt_needs_in_three_widths():
    lengths = (3, 20, 40, 41, 79, 90, 160)
    problems = [Problem(str(n), "q" * n, "s", "a") for n in lengths]
    config = ContextConfig("{question}", "{question}!!{solution}")
    loaded = LoadedProblems(tuple(problems), lambda p, t: 0.0)
    prompts = TrainingPrompts(config, CharacterTokenizer(), loaded)
    assert prompts.levels == [(40, 48), (80, 88), (160, 168)]
    for batch, width in ((2,), (40, 48)), ((3,), (80, 88)), ((0, 4, 5), (160, 168)):
        rendered = [prompts(problems[i]) for i in (1, *batch)]
        rows = prompts.narrow({name: np.stack([r[name] for r in rendered]) for name in rendered[0]})
        assert (rows["student_ids"].shape[1], rows["teacher_ids"].shape[1]) == width
        assert rows["student_ids"][0, :20].tolist() == [ord("q")] * 20
        assert not rows["student_ids"][0, 20:].any()
    one = TrainingPrompts(dataclasses.replace(config, num_widths=1), CharacterTokenizer(), loaded)
    assert one.levels == [(160, 168)]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"student": "no placeholder"}, "contexts.student"),
        ({"teacher": "instruction"}, "contexts.instruction"),
        ({"teacher": "{question} {Solution}"}, "contexts.teacher must say {solution}, not {Sol"),
        ({"student": "{question} { answer }"}, "contexts.student must say {answer}, not { ans"),
        ({"special_tokens": "keep"}, "contexts.special_tokens"),
        ({"too_long": "cut"}, "contexts.too_long"),
        ({"num_widths": 0}, "contexts.num_widths"),
    ],
)
def test_bad_settings_name_themselves(fields, words):
    with pytest.raises(UserError, match=words):
        ContextConfig(**fields)


def test_the_names_of_placeholders_in_latex_are_left_alone():
    config = ContextConfig(student=r"{question} \text{Answer} x_{Solution}")
    assert text_of(config, PROBLEM, "student") == r"What is 2+2? \text{Answer} x_{Solution}"


def test_a_problem_without_what_the_template_shows_is_named():
    with pytest.raises(UserError, match="'9' has no solution"):
        text_of(ContextConfig(), Problem("9", "q", "", "a"), "teacher")


@pytest.mark.parametrize("field", ["question", "solution", "answer"])
@pytest.mark.parametrize("value", [None, 5, True, ["x"]])
def test_a_problem_whose_texts_are_none_is_named(field, value):
    """A source of the user's own may put anything there."""
    problem = dataclasses.replace(PROBLEM, **{field: value})
    with pytest.raises(UserError, match=f"problem '7': its {field} must be text, not "):
        render(ContextConfig(), CharacterTokenizer(), problem, "student")


def test_pad():
    ids, lengths = pad([[5], [6, 7]], 3, 9)
    np.testing.assert_array_equal(ids, [[5, 9, 9], [6, 7, 9]])
    assert lengths.tolist() == [1, 2]
