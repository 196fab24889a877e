# SPDX-License-Identifier: Apache-2.0
"""What became of a problem in this step: its graded answers, and what a template shows of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

RIGHT = 0.5  # the least grade of a right answer
_TAGS = re.compile(r"(</?think>)")


class Attempt(NamedTuple):
    """One answer.

    Attributes:
      text: what was written, without its stop token.
      grade: in [0, 1]; None where the problem has no answer to compare with.
      feedback: what the grader said of it, "" for nothing.
    """

    text: str
    grade: float | None
    feedback: str = ""

    @property
    def is_right(self) -> bool:
        return self.grade is not None and self.grade >= RIGHT

    @property
    def is_wrong(self) -> bool:
        return self.grade is not None and self.grade < RIGHT


class Group(NamedTuple):
    """All answers to one problem in a step, and which of them is the row's own."""

    attempts: tuple[Attempt, ...]
    number: int

    @classmethod
    def of_row(
        cls, attempts: Mapping[int, Attempt] | Sequence[Attempt], row: int, size: int
    ) -> Group:
        """The group of a row of a batch, in which `size` adjacent rows answer one problem."""
        first = row // size * size
        return cls(tuple(attempts[i] for i in range(first, first + size)), row - first)

    def fields(self, sibling: int = 0, wrong_sibling: int = 0) -> dict[str, str | None]:
        """Values of the placeholders `templates.AFTER`, None where there is nothing to show.

        Args:
          sibling, wrong_sibling: which of those there are, counted from the row onwards and, past
            the last, from the first again.
        """
        own = self.attempts[self.number]
        return {
            "attempt": own.text,
            "grade": None if own.grade is None else f"{own.grade:g}",
            "feedback": own.feedback,
            "sibling": self._other(sibling, right=True),
            "wrong_sibling": self._other(wrong_sibling, right=False),
        }

    def _other(self, nth: int, right: bool) -> str | None:
        """The nth other right (or wrong) answer behind the row, in the group's circle."""
        others = self.attempts[self.number + 1 :] + self.attempts[: self.number]
        found = [a.text for a in others if (a.is_right if right else a.is_wrong) and a.text]
        return found[nth % len(found)] if found else None


def without_thinking(text: str, opened: bool = False) -> str:
    """The text without what stands between <think> and </think>, trimmed.

    Args:
      opened: whether the prompt had opened a thought that the text goes on with. A text whose
        first tag closes one is read so whatever it was.
    """
    kept, thinking = [], opened
    parts = _TAGS.split(text)
    if "</think>" in parts[1:2]:
        thinking = True
    for part in parts:
        if part in ("<think>", "</think>"):
            thinking = part == "<think>"
        elif not thinking:
            kept.append(part)
    return "".join(kept).strip()
