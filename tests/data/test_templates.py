# SPDX-License-Identifier: Apache-2.0
"""Placeholders are filled once, columns are placeholders, and LaTeX is text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_jax.data.templates import NothingToShow, fill, names_in, shows_data
from opsd_jax.errors import UserError

FIELDS = {"question": "Q", "answer": "A", "hint": "H", "n": "N", "extra.step 1": "E", "none": ""}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question}{hint}", "QH"),
        ("is{hint}, {extra.step 1}.", "isH, E."),
        (r"x^{n} x_{n} \frac{n}{n} \text{hint} \{n\} \sqrt[n]{n}", None),
        (r"\boxed{{answer}}", r"\boxed{A}"),  # the four fields are filled wherever they stand
        ('{"a": 1} { unknown } {1, 2} {}', None),
    ],
)
def test_columns_are_filled_and_latex_is_not(template, text):
    assert fill(template, FIELDS, "contexts.teacher") == (template if text is None else text)


@given(st.lists(st.sampled_from(["{question}", "{hint}", "{", "}", "\\", "a", "_", " "])))
def test_values_are_never_read_again(parts):
    """Filled with text that is itself a placeholder, a template stays of the same shape."""
    template = "".join(parts)
    others = dict.fromkeys(names_in(template), "<3>")  # "{a}" is a column too
    marked = fill(template, others | {"question": "<1>", "hint": "<2>"}, "f")
    braced = fill(template, others | {"question": "{hint}", "hint": "{question}"}, "f")
    assert braced == marked.replace("<1>", "{hint}").replace("<2>", "{question}")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{question} {hnt}", r"contexts.teacher shows {hnt}, .*'7' does not have: it has answer, "),
        ("{question} { hint }", r"contexts.teacher must say {hint}, not { hint }"),
    ],
)
def test_a_name_that_is_none_says_which_there_are(template, words):
    with pytest.raises(UserError, match=words):
        fill(template, FIELDS, "contexts.teacher", "7")


def test_an_empty_value_is_nothing_to_show():
    with pytest.raises(NothingToShow, match="'7' has no none"):
        fill("{none}", FIELDS, "contexts.teacher", "7")


def test_what_a_template_shows():
    assert names_in(r"{question} x_{n} {hint}") == {"question", "hint"}
    assert shows_data("{hint}") and not shows_data("{instruction} x_{n}")
