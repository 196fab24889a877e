# SPDX-License-Identifier: Apache-2.0
"""Settings that do nothing, turns that do not end and texts that are too long are told."""

import pytest

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.notices import (
    beyond_positions,
    equal_prompts,
    idle_switches,
    told_answers,
    unended_turns,
)
from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.testbed.world import ChainTokenizer
from tests.data.test_tokenizer import LLAMA3, TEMPLATE, byte_tokenizer, llama3_tokenizer

GRANITE = (  # reads another name than enable_thinking
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>{% endif %}"
    "{% endif %}"
)


@pytest.mark.parametrize(
    ("inner", "own_stops", "words"),
    [
        (byte_tokenizer(), (), None),
        (byte_tokenizer(eos_token="<pad>"), (), r"'<\|im_end\|>' \(id 3\).*stop_ids = \(3,\)"),
        (byte_tokenizer(eos_token="<pad>"), (3,), None),
        (byte_tokenizer(GRANITE), (), r"'<\|endoftext\|>' \(id 4\).*rollout.stop_ids = \(4,\)"),
        (byte_tokenizer(GRANITE), (4,), None),
        (llama3_tokenizer(), (), None),
        (byte_tokenizer(LLAMA3.replace("<|eot_id|>", "")), (), "no token of its own"),
        (byte_tokenizer("{{ messages[0].content }}"), (), None),  # shows no answer: unknown
        (byte_tokenizer("{{ raise_exception('one turn only') }}"), (), None),
        (byte_tokenizer(None), (), None),
        (None, (), None),
    ],
)  # fmt: skip
def test_a_turn_that_no_stop_id_ends_is_told(inner, own_stops, words):
    tokenizer = ChainTokenizer() if inner is None else HFTokenizer(inner)
    told = unended_turns(tokenizer, {*tokenizer.stop_ids, *own_stops})
    assert len(told) == (words is not None)
    if words:
        with pytest.raises(ValueError, match=words):
            raise ValueError(told[0])


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        (TEMPLATE, True),
        (GRANITE, False),
        (LLAMA3, False),
        (None, False),
        ("{% if enable_thinking %}<think>{% endif %}{{ messages[0].content }}", True),
        ("{{ messages[0].content }}{# enable_thinking #}", False),
    ],
)
def test_a_switch_without_effect_is_told_by_role(template, reads):
    tokenizer = HFTokenizer(byte_tokenizer(template))
    assert tokenizer.reads_thinking == reads
    contexts = ContextConfig(student_thinking=False, teacher_thinking=True)
    told = idle_switches(contexts, tokenizer, ["student", "teacher", "evaluation", "analysis"])
    wanted = ["contexts.student_thinking = False", "contexts.teacher_thinking = True"]
    assert [line.split(" has no effect")[0] for line in told] == ([] if reads else wanted)
    assert idle_switches(contexts, tokenizer, ["evaluation"]) == []
    assert idle_switches(ContextConfig(), tokenizer, ["student", "analysis"]) == []
    assert len(idle_switches(contexts, ChainTokenizer(), ["student"])) == 1


def test_roles_that_are_asked_the_same_are_told():
    same, other = [[1, 2], [3]], [[1, 2], [4]]
    assert equal_prompts({"student": same, "student_thinking": other, "teacher": same}) == []
    told = equal_prompts({"student_thinking": same, "teacher": same, "student_no_thinking": same})
    assert len(told) == 1 and "'student_thinking' and 'student_no_thinking' are asked" in told[0]


def test_texts_beyond_the_positions_are_told():
    assert beyond_positions("student", 90, 10, 100, "x") == []
    told = beyond_positions("student", 1091, 10, 1100, "contexts.student_max_tokens")
    assert len(told) == 1 and "student's longest prompt has 1,091 tokens, with 10" in told[0]
    assert told[0].endswith("lower contexts.student_max_tokens")


@pytest.mark.parametrize("role", ["student", "evaluation"])
def test_a_student_that_is_told_the_answer_is_told(role):
    roles = ("student", "teacher", "analysis", "evaluation")
    assert told_answers(ContextConfig(), roles) == []
    contexts = ContextConfig(**{role: "{question} ({answer})"})
    (told,) = told_answers(contexts, roles)
    assert told.startswith(f"contexts.{role} shows {{answer}}")
    assert told_answers(contexts, ("teacher",)) == []
