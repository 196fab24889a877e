# SPDX-License-Identifier: Apache-2.0
import decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.data import grading
from opsd_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{{1}", None),
        (r"\boxed 5", None),
        (r"\boxed{}", ""),
        (r"\boxed{2} and \boxed{-3}", "2, -3"),
        (r"$x=\boxed{2}$, $\boxed{3}$ or $\boxed{4}$.", "2, 3, 4"),
        (r"\boxed{5}, then \boxed{1}, \boxed{2}", "1, 2"),
        (r"\boxed{1},", "1"),
        ("no box", None),
        ("", None),
    ],
)
def test_extract_boxed(text, inside):
    assert grading.extract_boxed(text) == inside


def _boxed_oracle(text):
    """The definition, literally: last opening, then count braces that no backslash escapes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    at = start = start + len("\\boxed{")
    depth = 1
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].strip()
        at += 1
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\", "\\{", "\\\\", "1", "x"])))
def test_extract_boxed_equals_its_definition(parts):
    text = "".join(parts)
    assert grading.extract_boxed(text) == _boxed_oracle(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it costs $1,234.50.", "1234.5"),
        ("x = -3", "-3"),
        ("5-3", "3"),
        ("(-5)", "-5"),
        ("\u22125", "-5"),
        ("-0.0", "0"),
        ("007", "7"),
        ("1, 2, 3", "3"),
        ("1,2345", None),
        ("in 2 steps.", "2"),
        ("none", None),
        ("\u0665", None),
    ],
)
def test_extract_last_number(text, number):
    assert grading.extract_last_number(text) == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4), st.text("a ,.$=", max_size=5))
def test_last_number_keeps_the_value(value, before):
    found = grading.extract_last_number(f"{before} {value:f}")
    assert decimal.Decimal(found) == value


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("hashes", "#### 7\n#### 1,800", "1800"),
        ("hashes", "#### 18\nThat is all, in 3 steps.", "18"),
        ("hashes", "#### 18 apples", "18"),
        ("hashes", "#### $1,018.50", "1018.5"),
        ("hashes", "#### 3/4", "0.75"),
        ("hashes", "#### 3 or 4", "3 or 4"),
        ("hashes", "#### Yes, all 3", "Yes, all 3"),
        ("hashes", "1800", None),
        ("tagged", "<answer>1</answer> no: <answer> 2 </answer>", "2"),
        ("tagged", "<answer>1", None),
        ("final", r"<answer>1</answer> \boxed{2}", "1"),
        ("final", r"is \boxed{2}", "2"),
        ("final", " 3 ", "3"),
        ("final", r"<answer>\boxed{-4}</answer>", "-4"),
        ("final", "<answer>$-4$</answer>", "-4"),
        ("final", r"<answer>It is \boxed{-4}.</answer>", "-4"),
        ("final", "<think>is it 5?</think>\n\n 3", "3"),
        ("final", r"so \boxed{5}?</think> \boxed{3}", "3"),
        ("final", "<answer>5</answer></think>$3$", "3"),
        ("final", r"<think>maybe \boxed{5}", None),
        ("tagged", r"<answer>\boxed{-4}</answer>", "-4"),
        ("tagged", "<answer>$a$ and $b$</answer>", "$a$ and $b$"),
        ("text", " 3 ", "3"),
    ],
)
def test_other_extractors(name, text, found):
    assert grading.EXTRACTORS[name](text) == found


@pytest.mark.parametrize(
    ("name", "answer", "completion", "grade"),
    [
        ("exact", "Paris", " Paris\n", 1),
        ("exact", "Paris", "Paris.", 0),
        ("last_number", "18", "3 * 6 = 18.0 dollars", 1),
        ("last_number", "18", "18 or 19", 0),
        ("last_number", "none", "none", 0),
        ("boxed", r"\frac{1}{2}", r"\boxed{ \frac{1} {2} }", 1),
        ("boxed", "5", "5", 0),
        ("boxed", "2", r"\boxed{1} or \boxed{2}", 0),
        ("boxed", "$5$", r"\boxed{5}", 1),
        ("boxed", "5", r"\boxed{$5$}", 1),
        ("boxed", "(1,2)", r"\boxed{(1,\,2)}", 1),
        ("boxed", "1 2", r"\boxed{12}", 0),
        ("boxed", "1 2", r"\boxed{1\;2}", 1),
        ("boxed", "a b", r"\boxed{ab}", 1),
        ("last_number", "between 3 and 5", "5", 0),
        ("last_number", "18 apples", "18", 1),
    ],
)
def test_graders(name, answer, completion, grade):
    assert grading.find_grader(name)(answer, completion) == grade


@pytest.mark.parametrize(
    ("answer", "box", "grade"),
    [
        ("1/2", r"\frac{1}{2}", 1),
        ("0.5", r"\tfrac12", 1),
        (r"5\pi", "5", 0),
        (r"5\pi", r"\pi \cdot 5", 1),
        ("$5$", "x=5", 1),
        ("1<x<2", "(1,2)", 1),  # the reference comes first: the other way round it is wrong
        ("(1,2)", "1<x<2", 0),
        (r"\text{Evelyn}", "Evelyn", 1),
        ("(1,2)", "(2,1)", 0),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        ("7", "garbage" * 1000, 0),
        ("50%", "0.5", 1),
        ("1/3", "0.333333", 1),  # its own rounding, as in the official evaluation
        ("1/3", "0.333", 0),
        ("1e-5", "5", 0),
    ],
)
def test_math_verify(answer, box, grade):
    pytest.importorskip("math_verify")
    assert grading.GRADERS["math_verify"](answer, f"\\boxed{{{box}}}") == grade


def test_groups_are_by_the_first_member_and_equal_texts_are_never_compared():
    compared = []

    def near(answer, other):
        """Neither transitive nor symmetric."""
        compared.append((answer, other))
        return int(other) - int(answer) == 1

    answers = ["1", None, "2", "3", "1", "0", "3"]
    # 2 is near 1; 3 is near 2, which is no first member; 0 is near 1 in the other order.
    assert grading.group_answers(answers, near) == [0, None, 0, 1, 0, 0, 1]
    assert all(a != b for a, b in compared) and len(compared) == len(set(compared))
    assert grading.group_answers([], near) == []


def test_answers_vote_by_mathematics():
    pytest.importorskip("math_verify")
    answers = [r"\frac{1}{2}", "0.5", r"\frac{2}{4}", "2", "$2$", None, "1<x<2", "(1,2)", "(2,1)"]
    same = grading.GRADERS["math_verify"].same
    assert grading.group_answers(answers, same) == [0, 0, 0, 1, 1, None, 2, 2, 3]


@pytest.mark.parametrize(
    ("answer", "other", "equal"),
    [
        ("1,000", "1000.0", True),
        ("-0", "0", True),
        ("12 apples", "12", False),
        ("", "", False),
        ("5", "-5", False),
    ],
)
def test_same_value(answer, other, equal):
    assert grading.same_value(answer, other) == equal


@pytest.mark.parametrize(
    ("grader", "key", "fault"),
    [
        ("boxed", "$5$", None),
        ("boxed", r"\text{Evelyn}", None),
        ("boxed", "two of them", None),
        ("boxed", "No.", None),
        ("boxed", "The answer is 5", "prose"),
        ("math_verify", "They meet at noon.", "prose"),
        ("boxed", "5\n6", "prose"),
        ("boxed", r"so \boxed{5}", "a box of its own"),
        ("boxed", r"\frac{1}{2", "braces"),
        ("boxed", "1}", "braces"),
        ("math_verify", "9" * 2001, "2,000 characters"),
        ("last_number", "9" * 2001, "2,000 characters"),
        ("last_number", "five", "not one number"),
        ("last_number", "3 or 4", "not one number"),
        ("last_number", "12:30", "not one number"),
        ("last_number", "1/2", None),
        ("last_number", "18 apples", None),
        ("exact", "The answer is 5.", None),
        (lambda answer, completion: 0.0, "never", None),
    ],
)
def test_a_key_that_can_never_be_right_is_told(grader, key, fault):
    found = grading.key_fault(grading.find_grader(grader), key)
    assert (fault is None) == (found is None) and (fault or "") in (found or "")


@pytest.mark.parametrize(
    ("answer_from", "text", "answer"),
    [
        ("boxed", r"\boxed{5}, once more: \boxed{ 5 }", "5"),
        ("boxed", r"\boxed{2} and \boxed{3}", "2, 3"),
        ("boxed", r"\boxed{\boxed{5}}", "5"),
        ("boxed", r"\boxed{0.5} that is \boxed{\frac12}", r"\frac12"),
        ("boxed", r"first \boxed{2}, hence \boxed{3}", UserError),
        ("text", r"first \boxed{2}, hence \boxed{3}", r"first \boxed{2}, hence \boxed{3}"),
        ("hashes", "#### 2\n#### 3", UserError),
        ("hashes", "#### Step 1\n#### 2 steps\n#### 3", "3"),
        ("hashes", "#### 3.0\n#### 3", "3"),
        ("tagged", "<answer>2</answer> or <answer>3</answer>", UserError),
        ("tagged", r"<answer>3</answer> or <answer>\boxed{3}</answer>", "3"),
        ("final", "<answer>2</answer> or <answer>3</answer>", UserError),
        ("final", "<think><answer>2</answer></think><answer>3</answer>", "3"),
    ],
)
def test_no_box_of_a_reference_is_lost(answer_from, text, answer):
    if answer is UserError:
        with pytest.raises(UserError, match="several (boxes|answers), '2' and '3'"):
            grading.reference_answer(answer_from, text)
    else:
        assert grading.reference_answer(answer_from, text) == answer


def test_an_unknown_grader_is_told():
    with pytest.raises(UserError, match=r"JsonlProblems.grader is 'latex'.*boxed, math_verify"):
        grading.find_grader("latex", "JsonlProblems.grader")


MEGABYTES = [
    "{" * 2_000_000,
    "\\boxed{" * 300_000,
    "\\boxed " * 300_000,
    "\\boxed{" + "{" * 1_000_000 + "}" * 1_000_000,
    "\\boxed" + " " * 2_000_000,
    "\\" * 2_000_001,
    "9" * 2_000_000,
    "1," * 1_000_000,
    "1,2345," * 300_000,
    "-" * 2_000_000,
    "#" * 2_000_000,
    "<answer>" * 200_000 + "</answer>" * 200_000,
    "\\boxed{1}," * 100_000,
    "x1 " * 500_000,
]


@pytest.mark.parametrize("text", MEGABYTES, ids=lambda text: text[:9])
def test_extraction_is_linear(text):
    """A quadratic scan of these would take hours."""
    for extract in grading.EXTRACTORS.values():
        extract(text)
    grading.reference_answer("final", text[:500_000])


@settings(max_examples=200)
@given(st.text(alphabet="\\boxed{}1234567890.,-# <answer>/\n\ud7ff\u0660"))
def test_no_text_breaks_an_extractor_or_a_grader(text):
    for extract in grading.EXTRACTORS.values():
        assert isinstance(extract(text), str | None)
    for name in ("exact", "last_number", "boxed"):
        assert grading.GRADERS[name]("1", text) in (0.0, 1.0)
