# SPDX-License-Identifier: Apache-2.0
"""What is wrong with rows, templates and graders, found by rendering and grading a few of them.

Each finding says what to change. Whether a grader can read what the prompt asks for is tried and
not guessed from its text; a turn that the chat template drops is refused by `rendering`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.grader_pool import Grade, GraderPool
from opsd_jax.data.problems import ProblemSet
from opsd_jax.data.record import Problem
from opsd_jax.data.rendering import prompt_ids
from opsd_jax.data.tokenizer import Tokenizer, quoted
from opsd_jax.errors import UserError


class Finding(NamedTuple):
    """A sentence; `is_fault` where training could not start, or would learn nothing."""

    text: str
    is_fault: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A problem as the roles see it.

    Attributes:
      problem: as loaded.
      prompts: role -> token ids, whatever their number; none where `error` says why.
      error: the first role that cannot be asked.
      num_reference: tokens of the solution.
      grade: of the solution as if it were a completion; None where there is none.
    """

    problem: Problem
    prompts: dict[str, list[int]]
    error: str | None
    num_reference: int
    grade: Grade | None


def look(
    config: ContextConfig,
    tokenizer: Tokenizer,
    problems: ProblemSet,
    indices: Sequence[int],
    roles: Sequence[str],
    pool: GraderPool,
) -> list[Row]:
    """The rows at some positions, rendered in each role and their solutions graded."""
    chosen = [problems[i] for i in indices]
    told = [p for p in chosen if p.solution and p.answer]
    grades = dict(
        zip([p.id for p in told], pool.grade(told, [p.solution for p in told]), strict=True)
    )
    rows = []
    for problem in chosen:
        prompts: dict[str, list[int]] = {}
        error, num_reference = None, 0
        try:
            for role in roles:
                prompts[role] = prompt_ids(config, tokenizer, problem, role)
            num_reference = len(tokenizer.encode(quoted(tokenizer, problem.solution)))
        except UserError as refusal:
            error = str(refusal)
        rows.append(Row(problem, prompts, error, num_reference, grades.get(problem.id)))
    return rows


def over_budget(config: ContextConfig, row: Row) -> str | None:
    """The first role whose prompt is too long, with its tokens; None where all fit."""
    for role, ids in row.prompts.items():
        if len(ids) > config.budget(role):
            return f"the {role}'s prompt has {len(ids):,} tokens, over {config.budget(role):,}"
    return None


def findings(config: ContextConfig, rows: Sequence[Row], source: str) -> list[Finding]:
    """All that a look at rows shows, the worst first.

    Args:
      config: the prompts.
      rows: of one problem set, as `look` gives them.
      source: what the user binds for it, such as "JsonlProblems".
    """
    errors = [row.error for row in rows if row.error]
    if errors:
        more = f" (and {len(errors) - 1:,} more of {len(rows):,})" if len(errors) > 1 else ""
        return [Finding(f"{errors[0]}{more}", True)]
    found = [
        *lengths(config, rows),
        *equal_roles(rows),
        *questions(rows, source),
        *references(rows, source),
    ]
    return sorted(found, key=lambda finding: not finding.is_fault)


def lengths(config: ContextConfig, rows: Sequence[Row]) -> list[Finding]:
    """Told of prompts over budget: of all rows a fault."""
    found = []
    for role in rows[0].prompts:  # of all rows, as each could be asked
        counts = [len(row.prompts[role]) for row in rows]
        name = f"contexts.{config.budget_field(role)} = {config.budget(role):,}"
        over = [count for count in counts if count > config.budget(role)]
        if not over:
            continue
        which = "all" if len(over) == len(counts) else f"{len(over):,} of"
        found.append(
            Finding(
                f"{which} {len(counts):,} rows are over {name}: the {role}'s prompts have up to "
                f"{max(counts):,} tokens (the shortest {min(counts):,}); raise it to {max(counts)} "
                "to keep them all",
                len(over) == len(counts),
            )
        )
    return found


def equal_roles(rows: Sequence[Row]) -> list[Finding]:
    """Told of a teacher that is asked what the student is asked."""
    both = [row.prompts for row in rows if {"student", "teacher"} <= set(row.prompts)]
    same = sum(prompts["student"] == prompts["teacher"] for prompts in both)
    if not same:
        return []
    return [
        Finding(
            f"the teacher is asked the same as the student in {same:,} of {len(both):,} rows: "
            "there is no privilege to distil; show {solution} or {answer} in contexts.teacher only",
            same == len(both),
        )
    ]


def questions(rows: Sequence[Row], source: str) -> list[Finding]:
    """Told of one question for many rows, and of one that has its solution in it."""
    texts = [" ".join(row.problem.question_text.split()) for row in rows]
    found = []
    if len(set(texts)) * 2 <= len(texts) and len(texts) > 1:
        often = max(set(texts), key=texts.count)
        found.append(
            Finding(
                f"{len(texts):,} rows have {len(set(texts)):,} different questions, most often "
                f"{_short(often)!r}: is {source}.question_column the question?",
                len(set(texts)) == 1,
            )
        )
    leaks = [
        row.problem.id
        for row, text in zip(rows, texts, strict=True)
        if len(row.problem.solution) >= 20 and " ".join(row.problem.solution.split()) in text
    ]
    if leaks:
        found.append(
            Finding(
                f"{len(leaks):,} of {len(rows):,} questions contain their solution, {leaks[0]!r} "
                f"first: the student would be shown it; correct {source}.question_column",
                len(leaks) == len(rows),
            )
        )
    return found


def references(rows: Sequence[Row], source: str) -> list[Finding]:
    """Told of solutions that the grader gives 0 although they state an answer."""
    graded = [(row.problem, row.grade) for row in rows if row.grade is not None]
    failed = [(p, g) for p, g in graded if g.outcome != "graded"]
    # A grader that takes the whole text for an answer says nothing about a reference.
    read = [(p, g) for p, g in graded if g.answer and g.answer != p.solution.strip()]
    wrong = [(p, g) for p, g in read if g.outcome == "graded" and g.value == 0]
    found = []
    if failed:
        problem, grade = failed[0]
        found.append(
            Finding(
                f"the grader fails on {len(failed):,} of {len(graded):,} references, "
                f"{problem.id!r} first: {grade.outcome} {grade.detail}".rstrip(),
                len(failed) == len(graded),
            )
        )
    if wrong:
        problem, grade = wrong[0]
        found.append(
            Finding(
                f"{len(wrong):,} of {len(graded):,} references state another answer than their "
                f"key, {problem.id!r} first: {_short(str(grade.answer))!r}, and the key is "
                f"{_short(problem.answer)!r}; correct {source}.answer_column, {source}.answer_from "
                f"or {source}.grader",
                len(wrong) * 2 > len(graded),
            )
        )
    keys = {row.problem.answer for row in rows}
    if len(rows) >= 8 and len(keys) == 1 and keys != {""}:
        found.append(
            Finding(
                f"all {len(rows):,} answers are {_short(keys.pop())!r}: does {source} read them "
                "from the right column?"
            )
        )
    return found


def boxed_or_not(text: str, problem: Problem, pool: GraderPool, role: str) -> list[Finding]:
    """Told where a prompt asks for an answer in a box and the grader reads none, or reverse.

    Args:
      text: of a role's prompt.
      problem: that it asks.
      pool: of its problem set.
      role: for the sentence, such as "student".
    """
    if not problem.answer:
        return []
    states = {
        "in a box": f"So the answer is \\boxed{{{problem.answer}}}.",
        "at the end of a sentence": f"So the answer is {problem.answer}",
        "alone": problem.answer,
        "in <answer> tags": f"So it is clear. <answer>{problem.answer}</answer>",
    }
    graded = pool.grade([problem] * len(states), list(states.values()))
    right = [form for form, grade in zip(states, graded, strict=True) if grade.value > 0]
    asks = "boxed" in text
    if asks and "in a box" not in right:
        read = f"it reads an answer {' or '.join(right)}" if right else "nor in any other form"
        return [
            Finding(
                f"the {role}'s prompt asks for \\boxed{{}}, and the grader gives a right answer in "
                f"a box 0 ({read}): choose the grader 'boxed' or 'math_verify', or another "
                f"contexts.{role}",
                True,
            )
        ]
    if not asks and right == ["in a box"]:
        return [
            Finding(
                f"the grader reads an answer in \\boxed{{}} alone, which the {role}'s prompt does "
                f"not ask for: ask for it in contexts.{role}, or choose another grader"
            )
        ]
    return []


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
