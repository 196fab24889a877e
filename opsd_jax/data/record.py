# SPDX-License-Identifier: Apache-2.0
"""One record of a problem set, whose question is a text or a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple


class Message(NamedTuple):
    """One turn of a conversation; `role` is a chat template's: system, user or assistant."""

    role: str
    content: str


Question = str | tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One record.

    Attributes:
      id: unique within its set.
      question: what both roles see: text, or the turns of a conversation that ends with the
        user's.
      solution: worked reference for the teacher; "" where the source has none.
      answer: what the grader compares with; what {answer} shows.
      other_answers: further ones that are as right.
      columns: every other column of the row as text, by name: further placeholders.
    """

    id: str
    question: Question
    solution: str
    answer: str
    other_answers: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict, kw_only=True, hash=False)

    @property
    def question_text(self) -> str:
        """The question as one text, for logs and comparisons; see `question_text`."""
        return question_text(self.question)


def question_text(question: Question) -> str:
    """A text as it is; of a conversation "role: content" of every turn, blank lines between.

    A conversation of one turn of the user's reads as its text.
    """
    if isinstance(question, str):
        return question
    if len(question) == 1 and question[0].role == "user":
        return question[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in question)
