# SPDX-License-Identifier: Apache-2.0
"""The corpus writer against a reader that takes its rows apart as text."""

import re

import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.testbed.corpus import SHOWN, CorpusConfig, write_rows
from opsd_jax.testbed.world import STEPS, ChainTask, ChainTokenizer, own_notation

TASK = ChainTask()
CLEAN = CorpusConfig(counterfactual=0.0, drop=0.0, wrong_prefix=0.0)
HEAVY = CorpusConfig(counterfactual=0.5, drop=0.4, near=0.5, wrong_prefix=0.4)


def rows_as_text(config, shown, num_rows=600, seed=0):
    """(question, what is shown, response lines, target lines, facts) of each row."""
    rows = write_rows(TASK, config, np.random.default_rng(seed), num_rows, shown)
    decode = ChainTokenizer().decode
    for ids, targets, fact in zip(rows.ids, rows.targets, rows.target_fact, strict=True):
        prompt, response = decode(ids).split("?")
        question, _, reference = prompt.partition("|")
        assert ids[-1] == targets[-1] == 36
        lines = re.fullmatch(r"(.*;)(.*;)(.*;)#(\d)", response).groups()
        target_lines = re.fullmatch(r"(.*;)(.*;)(.*;)#(\d)", decode(targets)).groups()
        yield question, reference, lines, target_lines, fact


STATED = {
    "nothing": lambda context: [],
    "reference": lambda context: context.split(" ")[1:],
    "answer": lambda context: context.split(";")[:-1],
    "feedback": lambda context: [context],
}


@pytest.mark.parametrize("shown", SHOWN)
def test_the_writer_follows_its_prefix_and_what_it_is_shown(shown):
    looked_up = remembered = wrong = 0
    for question, context, lines, target_lines, fact in rows_as_text(HEAVY, shown):
        lemmas = [line.split("=") for line in STATED[shown](context)]
        assert len(lemmas) == {"nothing": 0, "feedback": 1}.get(shown, 3)
        current = question[0]
        for i, step in enumerate(re.findall(r"[+*]\d", question)):
            key, result = lines[i][:-1].split("=")
            target_key, target = target_lines[i][:-1].split("=")
            assert key == target_key == current + step
            stated = {r for k, r in lemmas if k == key}
            assert len(stated) <= 1  # no reference contradicts itself
            assert (fact[5 * i : 5 * i + 5] == -1).sum() == 5 - (not stated)
            if stated:
                assert stated == {target}
                looked_up += 1
            else:
                assert fact[5 * i + 3] == int(current) * 20 + STEPS.index(step)
                assert TASK.memory[int(current), STEPS.index(step), int(target)] > 0
                remembered += 1
            wrong += result != target
            current = result
        assert lines[3] == target_lines[3] == current  # the answer is the writer's own
        assert (fact[15:] == -1).all()
    assert (looked_up > 150) == (shown != "nothing") and remembered > 300 and wrong > 300


def test_clean_answers_are_right_and_in_the_students_notation():
    for question, answer, *_ in rows_as_text(CLEAN, "answer", 200):
        assert answer == own_notation(question)


def test_clean_feedback_is_any_line_of_the_right_answer():
    places = np.zeros(3, int)
    for question, line, *_ in rows_as_text(CLEAN, "feedback"):
        right = own_notation(question).split(";")
        assert line in right[:3]
        places[right.index(line)] += 1
    assert places.min() > 150


def test_clean_references_are_those_of_the_problem():
    by_question = {}
    for question, reference, lines, _, fact in rows_as_text(CLEAN, "reference", 200):
        by_question[question] = reference
        assert (fact == -1).all()
        assert sorted(reference.split(" ")[1:]) == sorted(line[:-1] for line in lines[:3])
        assert reference[:2] == f"#{lines[3]}"
    heldout = {TASK.record(int(i)).question for i in np.flatnonzero(TASK.heldout)}
    assert not heldout & set(by_question)


def test_replacements_are_near_when_asked():
    """With all lemmas dropped: near ones keep the step and never the whole key."""
    config = CorpusConfig(counterfactual=0.0, drop=1.0, near=1.0, wrong_prefix=0.0)
    for question, reference, _, _, _ in rows_as_text(config, "reference", 100):
        steps = sorted(re.findall(r"[+*]\d", question))
        assert sorted(re.findall(r"[+*]\d", reference)) == steps
    far = CorpusConfig(counterfactual=0.0, drop=1.0, near=0.0, wrong_prefix=0.0)
    kept = [
        sorted(re.findall(r"[+*]\d", reference)) == sorted(re.findall(r"[+*]\d", question))
        for question, reference, _, _, _ in rows_as_text(far, "reference", 100)
    ]
    assert np.mean(kept) < 0.1


def test_memory_is_drawn_as_often_as_it_is_believed():
    rows = write_rows(TASK, CLEAN, np.random.default_rng(0), 20_000, "nothing")
    fact, drawn = rows.target_fact[:, 3::5].ravel(), rows.ids[:, 5 + 3 :: 5].ravel()[:60_000]
    drawn = rows.ids[:, 5:][:, 3:15:5].ravel()
    fact = rows.target_fact[:, 3:15:5].ravel()
    counts = np.zeros((200, 10))
    np.add.at(counts, (fact, drawn), 1)
    share = counts / counts.sum(-1, keepdims=True)
    assert np.abs(share - TASK.memory.reshape(200, 10)).max() < 0.15
    weak = TASK.is_weak.ravel()
    assert np.abs((share - TASK.memory.reshape(200, 10))[weak].mean(0)).max() < 0.01


def test_counterfactual_results_are_unrelated_to_the_truth():
    config = CorpusConfig(counterfactual=1.0, drop=0.0, wrong_prefix=0.0)
    right = []
    for _, reference, *_ in rows_as_text(config, "reference", 400):
        for left, operator, operand, result in re.findall(r"(\d)([+*])(\d)=(\d)", reference):
            a, b = int(left), int(operand)
            right.append((a + b if operator == "+" else a * b) % 10 == int(result))
    assert 0.06 < np.mean(right) < 0.14


def test_bad_probabilities_are_refused():
    with pytest.raises(UserError, match="^WarmStartCorpus.drop"):
        CorpusConfig(drop=1.2)
