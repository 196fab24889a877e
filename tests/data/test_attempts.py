# SPDX-License-Identifier: Apache-2.0
"""What a template shows of a group's attempts, against a slow search."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_jax.data.attempts import Attempt, Group, without_thinking

GRADES = st.lists(st.sampled_from([None, 0.0, 0.4, 0.5, 1.0]), min_size=1, max_size=6)


@given(GRADES, st.integers(0, 7), st.data())
def test_siblings_are_others_of_their_kind_in_turn(grades, nth, data):
    number = data.draw(st.integers(0, len(grades) - 1))
    attempts = tuple(Attempt(f"a{i}", grade, f"f{i}") for i, grade in enumerate(grades))
    fields = Group(attempts, number).fields(nth, nth)
    own = grades[number]
    assert fields["attempt"] == f"a{number}" and fields["feedback"] == f"f{number}"
    assert fields["grade"] == (None if own is None else f"{own:g}")
    for name, wanted in (("sibling", lambda g: g >= 0.5), ("wrong_sibling", lambda g: g < 0.5)):
        found = []
        for step in range(1, len(grades)):
            i = (number + step) % len(grades)
            if grades[i] is not None and wanted(grades[i]):
                found.append(f"a{i}")
        assert fields[name] == (found[nth % len(found)] if found else None)


def test_an_empty_answer_is_no_sibling():
    attempts = (Attempt("x", 0.0), Attempt("", 1.0), Attempt("y", 1.0))
    assert Group(attempts, 0).fields()["sibling"] == "y"


@pytest.mark.parametrize(
    ("text", "opened", "left"),
    [
        ("<think>a</think> b", False, "b"),
        ("a</think> b", False, "b"),
        ("a</think> b", True, "b"),
        ("a", True, ""),
        ("a", False, "a"),
        ("b <think>a", False, "b"),
        ("b <think>a</think>c<think></think> d", False, "b c d"),
        ("<think>a<think>b</think>c", False, "c"),
    ],
)
def test_thoughts_are_left_out(text, opened, left):
    assert without_thinking(text, opened) == left
