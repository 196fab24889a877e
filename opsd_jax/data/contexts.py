# SPDX-License-Identifier: Apache-2.0
"""What each role is shown: all prompt text but the turn of a tokenizer without a chat template.

A template is text with the placeholders {question}, {solution}, {answer} and {instruction};
every other brace is plain text, so LaTeX needs no escapes. It becomes one user turn of the
tokenizer's chat template, with that role's own template switches, or of `tokenizer.PLAIN_FORMAT`
where there is none.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from opsd_jax.data.problems import Problem, ProblemSet
from opsd_jax.data.tokenizer import HFTokenizer, Tokenizer, quoted
from opsd_jax.errors import UserError
from opsd_jax.fields import Count, require

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

TRANSITION = "\n\nNow I solve the problem by my own reasoning.\n\n"

_PLACEHOLDER = re.compile(r"\{(question|solution|answer|instruction)\}")
_NEAR_PLACEHOLDER = re.compile(r"(?<![\w^])\{ *(?:question|solution|answer|instruction) *\}", re.I)


@dataclasses.dataclass(frozen=True)
class ContextConfig:
    """The prompts of the three roles.

    Args:
      student, teacher, evaluation: a name from `TEMPLATES`, or template text that contains
        {question}. What the teacher's template shows beyond the student's is the privilege.
      analysis: likewise, in the place of `teacher` where it reasons first (teacher.reasons). The
        evaluated teacher writes no analysis and is asked `teacher`.
      transition: text between the analysis and the solution, of the teacher's own turn.
      instruction: fills {instruction}.
      student_thinking, teacher_thinking, analysis_thinking, evaluation_thinking: passed to the chat
        template as `enable_thinking`; None passes nothing.
      student_max_tokens, teacher_max_tokens: budgets of the rendered prompts; a longer prompt is
        never cut.
      too_long: "drop" counts and leaves out problems over budget, "error" stops.
      special_tokens: what becomes of the tokenizer's special tokens in questions, solutions and
        answers: "text" encodes them as text, "error" stops and names the problem. Those in the
        templates here, in `instruction` and in `transition` are left what they are.
      num_widths: how many widths the batches of a run may have; each is compiled. 1 pads every
        batch to the longest prompts of the data.
    """

    student: str = "problem_boxed"
    teacher: str = "solution_boxed"
    evaluation: str = "boxed"
    analysis: str = "solution_analysis_boxed"
    transition: str = TRANSITION
    instruction: str = ""
    student_thinking: bool | None = None
    teacher_thinking: bool | None = None
    analysis_thinking: bool | None = False
    evaluation_thinking: bool | None = None
    student_max_tokens: Count = 1024
    teacher_max_tokens: Count = 4096
    too_long: Annotated[str, ("drop", "error")] = "drop"
    special_tokens: Annotated[str, ("text", "error")] = "text"
    num_widths: Count = 3

    def __post_init__(self):
        require("contexts", self)
        for role in ("student", "teacher", "evaluation", "analysis"):
            template = self.template(role)
            if "{question}" not in template:
                raise UserError(
                    f"contexts.{role} must be one of {sorted(TEMPLATES)} or a template with "
                    f"{{question}} in it, not {template!r}"
                )
            for near in _NEAR_PLACEHOLDER.findall(template):
                if not _PLACEHOLDER.fullmatch(near):
                    name = near.strip("{} ").lower()
                    raise UserError(f"contexts.{role} must say {{{name}}}, not {near}")
            if "{instruction}" in template and not self.instruction:
                raise UserError(
                    f"contexts.{role} uses {{instruction}}: set contexts.instruction to its text"
                )

    def template(self, role: str) -> str:
        """Template text of a role: "student", "teacher", "analysis" or "evaluation"."""
        chosen = getattr(self, role)
        return TEMPLATES.get(chosen, chosen)

    def reasoning_first(self) -> ContextConfig:
        """The same with a teacher that is asked for an analysis."""
        return dataclasses.replace(
            self, teacher=self.analysis, teacher_thinking=self.analysis_thinking
        )

    def budget(self, role: str) -> int:
        return self.teacher_max_tokens if role == "teacher" else self.student_max_tokens

    def prompt(self, problem: Problem, role: str) -> str:
        """The text of one role's user turn.

        All placeholders are filled in a single pass: a problem that itself contains
        "{solution}" leaks nothing.
        """
        fields = {
            "question": problem.question_text,
            "solution": problem.solution,
            "answer": problem.answer,
            "instruction": self.instruction,
        }
        return _PLACEHOLDER.sub(lambda m: shown(fields, m.group(1), problem), self.template(role))

    def switches(self, role: str) -> dict[str, Any]:
        """Keyword arguments of a role for the chat template."""
        thinking = getattr(self, f"{role}_thinking")
        return {} if thinking is None else {"enable_thinking": thinking}


def shown(fields: Mapping[str, str], name: str, problem: Problem) -> str:
    """The field that a template names; a UserError where the problem has none."""
    if not fields[name]:
        raise UserError(f"problem {problem.id!r} has no {name}, which a template shows")
    return fields[name]


def quoted_problem(config: ContextConfig, tokenizer: Tokenizer, problem: Problem) -> Problem:
    """The problem with special tokens in its texts made text, as `contexts.special_tokens` says.

    Raises:
      UserError: it has some and they are refused, or a text is not valid Unicode.
    """
    fields: dict[str, Any] = {}
    for name in ("question", "solution", "answer"):
        text = getattr(problem, name)
        if not isinstance(text, str):
            raise UserError(
                f"problem {problem.id!r}: its {name} must be text, not {type(text).__name__}"
            )
        try:
            fields[name] = quoted(tokenizer, text)
        except UserError as error:
            raise UserError(f"problem {problem.id!r}: its {name} is {error}") from None
        if config.special_tokens == "error" and fields[name] != text:
            raise UserError(
                f"problem {problem.id!r}: its {name} has special tokens of the tokenizer; remove "
                "them, or set contexts.special_tokens = 'text'"
            )
    return dataclasses.replace(problem, **fields)


def prompt_ids(
    config: ContextConfig, tokenizer: Tokenizer, problem: Problem, role: str
) -> list[int]:
    """Token ids of one role's prompt, whatever their number.

    Raises:
      UserError: the problem cannot be shown; it names the problem and the role.
    """
    text = config.prompt(quoted_problem(config, tokenizer, problem), role)
    try:
        ids = tokenizer.render(text, **config.switches(role))
        added = isinstance(tokenizer, HFTokenizer) and (
            tokenizer.controls(ids) != _own_controls(config, tokenizer, role)
        )
    except UserError as error:
        raise UserError(f"problem {problem.id!r}: the {role} prompt: {error}") from None
    if added:
        raise UserError(
            f"problem {problem.id!r}: the {role} prompt: its texts change which special tokens are "
            "in it, joined to one another or by the tokenizer's or the chat template's rewriting; "
            "remove what makes them"
        )
    if not ids:
        raise UserError(f"problem {problem.id!r}: the {role} prompt is empty")
    return ids


@functools.lru_cache(maxsize=16)
def _own_controls(config: ContextConfig, tokenizer: HFTokenizer, role: str) -> list[int]:
    """The special tokens of a role's prompt, whatever the problem."""
    text = config.prompt(Problem("", "1", "1", "1"), role)
    return tokenizer.controls(tokenizer.render(text, **config.switches(role)))


def render(
    config: ContextConfig, tokenizer: Tokenizer, problem: Problem, role: str
) -> list[int] | None:
    """Token ids of one role's prompt, or None when it is over budget and may be dropped.

    Raises:
      UserError: over budget with `too_long = "error"`, or it cannot be rendered.
    """
    ids = prompt_ids(config, tokenizer, problem, role)
    budget = config.budget(role)
    if len(ids) <= budget:
        return ids
    if config.too_long == "error":
        name = "teacher_max_tokens" if role == "teacher" else "student_max_tokens"
        raise UserError(
            f"problem {problem.id!r}: the {role} prompt has {len(ids)} tokens, over "
            f"contexts.{name} = {budget}; raise it, or set contexts.too_long = 'drop'"
        )
    return None


class TrainingPrompts:
    """The student's and the teacher's prompts of a problem set, rendered once.

    A batch is as wide as the narrowest of a few levels that all its prompts fit: the longest
    prompts of the data, and halves of them, rounded up to a multiple of 8. So a run compiles as
    many steps as there are levels and no more.

    Args:
      config: templates and budgets.
      tokenizer: of the model.
      problems: the training problems.

    Attributes:
      levels: (student's width, teacher's width), ascending.
      longest: tokens of the student's and the teacher's longest prompt.
    """

    ROLES = ("student", "teacher")

    def __init__(self, config: ContextConfig, tokenizer: Tokenizer, problems: ProblemSet):
        self._pad_id = tokenizer.pad_id
        self._rows: dict[str, tuple[np.ndarray, ...] | None] = {}
        for i in range(len(problems)):
            problem = problems[i]
            ids = [render(config, tokenizer, problem, role) for role in self.ROLES]
            kept = [np.array(row, np.int32) for row in ids if row is not None]
            self._rows[problem.id] = tuple(kept) if len(kept) == len(ids) else None
        fitting = [row for row in self._rows.values() if row is not None]
        longest = [max((len(row[role]) for row in fitting), default=1) for role in range(2)]
        self.longest = (longest[0], longest[1])
        # A level that saves fewer than 32 columns is not worth a compilation.
        halvings = [n for n in range(config.num_widths) if n == 0 or sum(longest) >= 64 << (n - 1)]
        self.levels = [
            tuple(-(-length // (8 << n)) * 8 for length in longest) for n in reversed(halvings)
        ]

    def __call__(self, problem: Problem) -> dict[str, np.ndarray] | None:
        """Arrays <role>_ids [P or Q] and <role>_length [] int32; None if over budget."""
        rows = self._rows[problem.id]
        if rows is None:
            return None
        out: dict[str, Any] = {}
        for role, row, width in zip(self.ROLES, rows, self.levels[-1], strict=True):
            out[f"{role}_ids"] = np.full(width, self._pad_id, np.int32)
            out[f"{role}_ids"][: len(row)] = row
            out[f"{role}_length"] = np.int32(len(row))
        return out

    def narrow(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a batch, cut to the narrowest level that its prompts fit."""
        longest = [arrays[f"{role}_length"].max() for role in self.ROLES]
        level = next(w for w in self.levels if all(a <= b for a, b in zip(longest, w, strict=True)))
        cut = {
            f"{role}_ids": arrays[f"{role}_ids"][:, :width]
            for role, width in zip(self.ROLES, level, strict=True)
        }
        return arrays | cut
