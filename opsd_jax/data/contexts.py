# SPDX-License-Identifier: Apache-2.0
"""What each role is shown: all prompt text but the turn of a tokenizer without a chat template.

A context is a list of chat turns. A template (`templates.py`) is one turn of the user's; where the
question is a conversation it takes the place of its last turn, and {question} in it is what that
turn says. A system text goes in front of the turns, a prefill behind them, in the role's own turn.
Where there is no chat template, the turns are lines of `tokenizer.PLAIN_FORMAT`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

from opsd_jax.data.attempts import Attempt
from opsd_jax.data.templates import AFTER, TEMPLATES, check_template, names_in, shows_data
from opsd_jax.errors import UserError
from opsd_jax.fields import Count, require

TRANSITION = "\n\nNow I solve the problem by my own reasoning.\n\n"
ROLES = ("student", "teacher", "evaluation", "analysis")

# Text, the name of one of `TEMPLATES`, or a function: see `ContextConfig`.
Template = str | Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class ContextConfig:
    """The prompts of the roles.

    A template is a name from `TEMPLATES` or text with a placeholder: {question}, {solution},
    {answer}, {instruction} or any column of the data. In the place of a template may stand a
    function of your own, (problem) -> the text of the user's turn, or all turns as a list of
    {"role": ..., "content": ...}.

    The teacher and its views may be asked what is known only when this step's answers are graded:
    {attempt} is the row's own answer, {grade} its grade, {verdict} the text of this config for such
    a grade, {feedback} what the grader said of it (a grader may return (grade, text)), {sibling}
    another answer to the same problem in this step that is right, {wrong_sibling} a wrong one. The
    nth of teacher and views that shows a sibling shows the nth one behind the row. A function
    (problem, attempts, number) is called then too: `attempts` are those of the problem's group
    (`attempts.Attempt`), `number` is the row's own; it returns None where it can build nothing.

    Args:
      student, teacher, evaluation: templates. What the teacher's shows beyond the student's is the
        privilege.
      analysis: likewise, in the place of `teacher` where it reasons first (teacher.reasons). The
        evaluated teacher writes no analysis and is asked `teacher`.
      views: templates of further contexts of the teacher, K - 1 of them: `divergence.target` makes
        one distribution of them. System text, prefill and budget are the teacher's.
      teacher_fallback: template for the rows that the teacher's has nothing to show of: no right
        sibling, no feedback, an empty column. None: such a row weighs nothing where it lacks what
        a rollout gives (context/missing_fraction), and is refused where the data lacks it.
      transition: text between the analysis and the solution, of the teacher's own turn.
      instruction: fills {instruction}.
      verdict_right, verdict_wrong: fill {verdict} where the attempt is right (a grade of at least
        1/2) or wrong; one that cannot be graded has none. Special tokens in them are text.
      student_system, teacher_system, evaluation_system, analysis_system: text of a system turn,
        which may have placeholders; behind a conversation's own.
      student_prefill, teacher_prefill, evaluation_prefill, analysis_prefill: text that opens the
        role's own answer, such as "<think>\\n"; it is prompt: not sampled, scored or graded.
      student_thinking, teacher_thinking, analysis_thinking, evaluation_thinking: passed to the chat
        template as `enable_thinking`; None passes nothing.
      strip_thinking: show attempts and siblings without what stands between <think> and </think>.
      student_max_tokens, teacher_max_tokens: budgets of the rendered prompts, the student's of the
        evaluation too; a longer prompt is never cut.
      too_long: "drop" counts and leaves out problems over budget (after the rollout: the row weighs
        nothing, context/too_long_fraction), "error" stops.
      special_tokens: what becomes of the tokenizer's special tokens in the data: "text" encodes
        them as text, "error" stops and names the problem. In attempts they are text. Those in the
        texts of this config are left what they are.
      num_widths: how many widths the batches of a run may have; each is compiled. 1 pads every
        batch to the longest prompts of the data.
    """

    student: Template = "problem_boxed"
    teacher: Template = "solution_boxed"
    evaluation: Template = "boxed"
    analysis: Template = "solution_analysis_boxed"
    views: tuple[Template, ...] = ()
    teacher_fallback: Template | None = None
    transition: str = TRANSITION
    instruction: str = ""
    verdict_right: str = "This answer is right."
    verdict_wrong: str = "This answer is wrong."
    student_system: str = ""
    teacher_system: str = ""
    evaluation_system: str = ""
    analysis_system: str = ""
    student_prefill: str = ""
    teacher_prefill: str = ""
    evaluation_prefill: str = ""
    analysis_prefill: str = ""
    student_thinking: bool | None = None
    teacher_thinking: bool | None = None
    analysis_thinking: bool | None = False
    evaluation_thinking: bool | None = None
    strip_thinking: bool = False
    student_max_tokens: Count = 1024
    teacher_max_tokens: Count = 4096
    too_long: Annotated[str, ("drop", "error")] = "drop"
    special_tokens: Annotated[str, ("text", "error")] = "text"
    num_widths: Count = 3

    def __post_init__(self):
        require("contexts", self)
        object.__setattr__(self, "views", tuple(self.views))  # Hashed by `rendering`.
        for name in (*ROLES, *self.teachers[1:], *self.alternatives("teacher")[1:]):
            self._check(name)

    def _check(self, name: str) -> None:
        template, field = self.template(name), f"contexts.{name}"
        if callable(template):
            if num_required(template) not in (1, 3):
                raise UserError(
                    f"{field} must be a function (problem) or (problem, attempts, number), but "
                    f"@{getattr(template, '__name__', template)} needs {num_required(template)} "
                    "arguments"
                )
        elif not shows_data(template):
            raise UserError(
                f"{field} must be one of {sorted(TEMPLATES)} or a template with a placeholder such "
                f"as {{question}} in it, not {template!r}"
            )
        for text in self._texts(name):
            check_template(field, text)
            if "{instruction}" in text and not self.instruction:
                raise UserError(
                    f"{field} uses {{instruction}}: set contexts.instruction to its text"
                )
            if "{verdict}" in text and not (self.verdict_right and self.verdict_wrong):
                raise UserError(
                    f"{field} shows {{verdict}}: set contexts.verdict_right and "
                    "contexts.verdict_wrong to texts"
                )
        if role_of(name) != "teacher" and self.is_after(name):
            raise UserError(
                f"{field} is asked before there are attempts: only contexts.teacher, "
                "teacher_fallback and views may show "
                + ", ".join(f"{{{name}}}" for name in AFTER)
                + " or be a function of them"
            )

    def template(self, name: str) -> Template:
        """The template of a context: a role, "teacher_fallback" or "views[n]"."""
        n = name.removeprefix("views[").removesuffix("]")
        chosen = getattr(self, name) if n == name else self.views[int(n)]
        return TEMPLATES.get(chosen, chosen) if isinstance(chosen, str) else chosen

    def _texts(self, name: str) -> list[str]:
        """All text of the config that a context may show."""
        owner = role_of(name)
        texts = (self.template(name), getattr(self, f"{owner}_system"), self.prefill(name))
        return [text for text in texts if isinstance(text, str)]

    def shows(self, name: str) -> frozenset[str]:
        """The placeholders of a context; of a function that sees attempts, "attempt"."""
        found = frozenset().union(*map(names_in, self._texts(name)))
        template = self.template(name)
        sees = callable(template) and num_required(template) == 3
        return found | {"attempt"} if sees else found

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teacher's contexts: "teacher" and its views."""
        return ("teacher", *(f"views[{n}]" for n in range(len(self.views))))

    def alternatives(self, name: str) -> tuple[str, ...]:
        """A context and, of "teacher", its fallback: a row is shown the first that it can be."""
        has_other = name == "teacher" and self.teacher_fallback is not None
        return (name, "teacher_fallback") if has_other else (name,)

    def is_after(self, name: str) -> bool:
        """Whether a context needs this step's attempts; "teacher" also if its fallback does."""
        return any(not self.shows(each).isdisjoint(AFTER) for each in self.alternatives(name))

    @property
    def after_rollout(self) -> frozenset[str]:
        """All that the teacher's contexts show of attempts; empty where none needs any."""
        names = (each for name in self.teachers for each in self.alternatives(name))
        return frozenset().union(*map(self.shows, names)) & frozenset(AFTER)

    def evaluated(self, role: str) -> str | None:
        """The context that an evaluated role is asked: a teacher without attempts its fallback."""
        if not self.is_after(role):
            return role
        has_other = self.teacher_fallback is not None and not self.is_after("teacher_fallback")
        return "teacher_fallback" if has_other else None

    def verdict(self, attempt: Attempt) -> str | None:
        """What {verdict} says of an attempt."""
        if attempt.grade is None:
            return None
        return self.verdict_right if attempt.is_right else self.verdict_wrong

    def prefill(self, name: str) -> str:
        return getattr(self, f"{role_of(name)}_prefill")

    def reasoning_first(self) -> ContextConfig:
        """The same with a teacher that is asked for an analysis."""
        fields = {
            f"teacher{part}": getattr(self, f"analysis{part}")
            for part in ("", "_system", "_prefill", "_thinking")
        }
        return dataclasses.replace(self, **fields)

    def budget(self, name: str) -> int:
        return getattr(self, self.budget_field(name))

    def budget_field(self, name: str) -> str:
        return "teacher_max_tokens" if role_of(name) == "teacher" else "student_max_tokens"

    def switches(self, name: str) -> dict[str, Any]:
        """Keyword arguments of a context for the chat template."""
        thinking = getattr(self, f"{role_of(name)}_thinking")
        return {} if thinking is None else {"enable_thinking": thinking}


def role_of(name: str) -> str:
    """Whose system text, prefill, switches and budget a context has."""
    return name if name in ROLES else "teacher"


def num_required(function: Callable[..., Any]) -> int:
    """Arguments by position that a function must be given; those bound in gin it has."""
    bound = getattr(function, "keywords", {})
    return sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for name, p in inspect.signature(function).parameters.items()
        if name not in bound
    )
