# SPDX-License-Identifier: Apache-2.0
"""Prompt text with placeholders: {question}, any column of the data, and what an attempt gives.

    {question} {solution} {answer} {instruction}                  what every problem set has
    {hint}                                                        a column of the data
    {attempt} {grade} {verdict} {feedback} {sibling} {wrong_sibling}    known after the rollout

Every other brace is plain text, so LaTeX needs no escapes: behind `_`, `^`, a command or another
brace no column is looked for (x^{n}, \\frac{a}{b}).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from opsd_jax.errors import UserError

BOXED = "Reason step by step and put your final answer in \\boxed{}."

TEMPLATES: dict[str, str] = {
    # The bare question: what a chat model is normally asked.
    "question": "{question}",
    # The published student and evaluation prompts differ by the label.
    "boxed": "{question}\n\n" + BOXED,
    "problem_boxed": "Problem: {question}\n\n" + BOXED,
    # The privileged context of arXiv 2601.18734: the meaning of its newest wording, which asks
    # for understanding rather than copying.
    "solution_boxed": (
        "Problem: {question}\n\n"
        "A verified solution to this problem is given for your eyes only.\n"
        "=== Reference Solution Begin ===\n{solution}\n=== Reference Solution End ===\n\n"
        "Work through the reference until you see why each of its steps holds. Then solve the "
        "problem yourself: do not copy or reword the reference, but reach the same answer by "
        "your own reasoning; you may explore, and turn back when a path fails.\n\n" + BOXED
    ),
    # What a teacher is asked that reasons first; the transition follows its analysis.
    "solution_analysis_boxed": (
        "Problem: {question}\n\n"
        "A verified solution to this problem is given for your eyes only.\n"
        "=== Reference Solution Begin ===\n{solution}\n=== Reference Solution End ===\n\n"
        "Before you solve the problem, analyse the reference: the idea it rests on, why each of "
        "its steps holds, and where one could go wrong. Only after this analysis solve the "
        "problem by your own reasoning.\n\n" + BOXED
    ),
    "answer_boxed": (
        "Problem: {question}\n\n"
        "The correct final answer is known to be {answer}. Find a full derivation of it by your "
        "own reasoning.\n\n" + BOXED
    ),
    "solution": (
        "{question}\n\nFor your eyes only, a verified solution:\n{solution}\n\n"
        "Answer the question in your own words, as if you had not been shown the solution."
    ),
    "answer": "{question}\n\n(For your eyes only: the correct answer is {answer}.)",
    "instruction": "{question}\n\n{instruction}",
}

BEFORE = ("question", "solution", "answer", "instruction")
AFTER = ("attempt", "grade", "verdict", "feedback", "sibling", "wrong_sibling")

_BRACES = re.compile(r"\{([^{}\n]+)\}")
_NAME = re.compile(r"[^\W\d][\w.-]*")
_LATEX = re.compile(r"(?:[_^\\}\]]|\\[A-Za-z]+\*?)$")  # what stands before a brace of LaTeX
_NEAR = re.compile(r"(?<![\w^])\{ *(?:" + "|".join(BEFORE + AFTER) + r") *\}", re.I)


class NothingToShow(UserError):
    """A placeholder has no value for this row."""


def check_template(field: str, template: str) -> None:
    """Raises a UserError where a placeholder is misspelt: "{ Answer }".

    Args:
      field: where the user wrote it, such as "contexts.teacher".
    """
    for near in _NEAR.findall(template):
        name = near.strip("{} ").lower()
        if near != f"{{{name}}}":
            raise UserError(f"{field} must say {{{name}}}, not {near}")


@functools.lru_cache(maxsize=64)
def names_in(template: str) -> frozenset[str]:
    """What a template may show: all that stands in braces where a placeholder can."""
    return frozenset(name for _, _, name in _places(template))


def shows_data(template: str) -> bool:
    """Whether a template has a placeholder that is another text for every problem."""
    return any(_NAME.fullmatch(name) and name != "instruction" for name in names_in(template))


def fill(template: str, fields: Mapping[str, str | None], field: str, problem_id: str = "") -> str:
    """The template with its placeholders filled, in one pass: values may contain braces.

    Args:
      template: the text.
      fields: what there is, by name; None or "" where this row has none.
      field: where the user wrote it.
      problem_id: of the row.

    Raises:
      NothingToShow: a value that the row does not have.
      UserError: a name that is none of the fields.
    """
    pieces, end = [], 0
    for start, stop, name in _places(template):
        if name not in fields:
            if name.strip() in fields:
                raise UserError(f"{field} must say {{{name.strip()}}}, not {{{name}}}")
            if not _NAME.fullmatch(name):
                continue
            raise UserError(
                f"{field} shows {{{name}}}, which problem {problem_id!r} does not have: it has "
                f"{', '.join(sorted(fields))}; correct the name, or write {{ {name} }} where "
                "braces are meant"
            )
        if not fields[name]:
            raise NothingToShow(f"problem {problem_id!r} has no {name}, which a template shows")
        pieces += [template[end:start], fields[name] or ""]
        end = stop
    return "".join([*pieces, template[end:]])


def _places(template: str) -> list[tuple[int, int, str]]:
    """(start, end, name) of every {name} that may be a placeholder.

    The names of `BEFORE` and `AFTER` are placeholders wherever they stand.
    """
    found: list[tuple[int, int, str]] = []
    for match in _BRACES.finditer(template):
        start, stop = match.span()
        adjacent = bool(found) and found[-1][1] == start  # "{question}{hint}"
        latex = _LATEX.search(template, max(start - 40, 0), start) and not adjacent
        if match[1] in BEFORE + AFTER or not latex:
            found.append((start, stop, match[1]))
    return found
