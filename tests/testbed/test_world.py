# SPDX-License-Identifier: Apache-2.0
"""The testbed's language against plain Python arithmetic and an independent reader of its text."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.errors import UserError
from opsd_jax.testbed.world import EOS, PAD, ChainTask, ChainTokenizer, grade, own_notation

TASK = ChainTask()
TOKENIZER = ChainTokenizer()
indices = st.integers(0, TASK.num_problems - 1)


def calculate(question: str) -> list[tuple[str, int]]:
    """[(key, result)] of a question, by Python integers."""
    value, chain = int(question[0]), []
    for operator, operand in re.findall(r"([+*])(\d)", question):
        key = f"{value}{operator}{operand}"
        value = (value + int(operand) if operator == "+" else value * int(operand)) % 10
        chain.append((key, value))
    return chain


@given(indices)
@settings(max_examples=200, deadline=None)
def test_a_record_states_the_true_chain(index):
    problem = TASK.record(index)
    chain = calculate(problem.question)
    head, *lemmas = problem.solution.split(" ")
    assert problem.answer == str(chain[-1][1])
    assert head == f"#{problem.answer}"
    assert sorted(lemmas) == sorted(f"{key}={result}" for key, result in chain)
    own = "".join(f"{key}={result};" for key, result in chain) + f"#{problem.answer}"
    assert own_notation(problem.question) == own


@given(indices)
@settings(max_examples=100, deadline=None)
def test_lengths_and_round_trip(index):
    problem = TASK.record(index)
    own = own_notation(problem.question)
    assert len(TOKENIZER.encode(problem.question)) == TASK.question_len == 4
    assert len(TOKENIZER.encode(problem.solution)) == TASK.reference_len == 14
    assert len(TOKENIZER.encode(own)) + 1 == TASK.response_len == 18
    for text in (problem.question, problem.solution, own, f"{problem.question}?{own}"):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
        assert TOKENIZER.render(text, enable_thinking=False) == TOKENIZER.encode(text)


@given(st.lists(st.integers(0, PAD - 1), max_size=20))
def test_ids_survive_their_text(ids):
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids
    assert TOKENIZER.decode([*ids, EOS, 3, 4, PAD]) == TOKENIZER.decode([PAD, *ids])


def test_vocabulary_has_37_tokens_and_unknown_text_is_refused():
    assert TOKENIZER.vocab_size == 37
    assert {TOKENIZER.pad_id, *TOKENIZER.stop_ids} == {PAD, EOS} == {35, 36}
    for text in ("8-6", "8+", "a", "8 + 6"):
        with pytest.raises(UserError, match="no token for"):
            TOKENIZER.encode(text)


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("8+6=4;4*5=0;0*2=0;#0", 1.0),
        ("#0 8+6=4 0*2=0 4*5=0", 1.0),
        ("8+6=4;4*5=0;0*2=0;#1", 0.0),
        ("#1 8+6=4 0*2=0 4*5=0", 0.0),
        ("#0;8+6=4", 0.0),  # goes on, but not with a space
        ("#0#0", 0.0),
        ("#0 #0", 0.0),
        ("#", 0.0),
        ("", 0.0),
        ("8+6=4;4*5=0;0*2=0;0", 0.0),
    ],
)
def test_grade(completion, reward):
    problem = TASK.record(0)
    problem = type(problem)(id="x", question="8+6*5*2", solution="", answer="0")
    assert grade(problem, completion) == reward


def test_lemmas_stand_in_every_order():
    """A linear hash gave only three of the six."""
    orders = set()
    for index in range(3000, 3200):
        problem = TASK.record(index)
        keys = [key for key, _ in calculate(problem.question)]
        if len(set(keys)) == 3:
            stated = [lemma.split("=")[0] for lemma in problem.solution.split(" ")[1:]]
            orders.add(tuple(keys.index(key) for key in stated))
    assert len(orders) == 6


def test_every_problem_has_its_own_number():
    questions = {TASK.record(i).question for i in range(0, TASK.num_problems, 17)}
    assert len(questions) == len(range(0, TASK.num_problems, 17))
    assert TASK.num_problems == 80_000


def test_split_is_one_in_ten_everywhere():
    heldout = TASK.heldout
    assert abs(heldout.mean() - 0.1) < 0.005
    left, steps = TASK.problem(np.arange(TASK.num_problems))
    for factor in (left, *steps.T):
        shares = [heldout[factor == value].mean() for value in np.unique(factor)]
        assert 0.08 < min(shares) and max(shares) < 0.12


def test_the_split_and_the_weak_facts_never_change():
    """Pinned: cached bases and published numbers depend on them. Never update these."""
    assert np.flatnonzero(TASK.heldout)[:5].tolist() == [11, 22, 23, 25, 27]
    assert np.flatnonzero(TASK.is_weak.ravel())[:5].tolist() == [3, 5, 7, 14, 16]


def test_memory_is_right_about_strong_facts_and_mistaken_about_weak_ones():
    memory, weak = TASK.memory, TASK.is_weak
    assert weak.sum() == 70
    np.testing.assert_allclose(memory.sum(-1), 1.0)
    for left, step in np.ndindex(10, 20):
        operand = step % 10
        right = (left + operand if step < 10 else left * operand) % 10
        belief = memory[left, step]
        if weak[left, step]:
            np.testing.assert_allclose(np.sort(belief), [0.0175] * 8 + [0.30, 0.56])
            assert belief[right] == 0.30 and belief.argmax() != right
        else:
            assert belief[right] == 1.0


def test_the_base_is_expected_to_stand_inside_its_gate():
    """Exact accuracy of a model with these beliefs, by enumeration over the held-out problems."""
    left, steps = TASK.problem(np.flatnonzero(TASK.heldout))
    answers = np.array(
        [calculate(TASK.record(int(i)).question)[-1][1] for i in np.flatnonzero(TASK.heldout)]
    )
    accuracy = []
    for memory in (TASK.memory, np.eye(10)[TASK.memory.argmax(-1)]):
        belief = np.eye(10)[left]
        for step in steps.T:
            belief = np.einsum("nd,ndr->nr", belief, memory.swapaxes(0, 1)[step])
        accuracy.append(belief[np.arange(len(answers)), answers].mean())
    assert 0.49 < accuracy[0] < 0.53  # sampled
    assert accuracy[1] < 0.42  # greedy: sharpening makes it worse


@pytest.mark.parametrize(
    "fields", [{"num_ops": 0}, {"weak_fraction": 1.5}, {"weak_right": 0.6}, {"weak_right": -0.1}]
)
def test_bad_worlds_are_refused(fields):
    with pytest.raises(UserError, match="ChainTask"):
        ChainTask(**fields)
