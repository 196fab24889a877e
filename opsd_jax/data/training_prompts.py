# SPDX-License-Identifier: Apache-2.0
"""The prompts of a training set in few widths: before the rollout, and after it where asked.

A batch is as wide as the narrowest of a few levels that all its prompts fit. So a run compiles as
many steps as there are levels and no more.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from opsd_jax.data.attempts import Attempt, Group, without_thinking
from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.problems import Problem, ProblemSet
from opsd_jax.data.rendering import (
    Unsafe,
    chosen_ids,
    fits,
    opens_thought,
    prompt_ids,
    render,
)
from opsd_jax.data.templates import NothingToShow
from opsd_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def widths(longest: Sequence[int], num: int) -> list[tuple[int, ...]]:
    """Levels of widths, ascending: the longest prompts and halves of them, multiples of 8.

    Args:
      longest: tokens of the longest prompt of each context.
      num: of levels; one that saves fewer than 32 columns is not worth a compilation.
    """
    halvings = [n for n in range(num) if n == 0 or sum(longest) >= 64 << (n - 1)]
    return [tuple(-(-length // (8 << n)) * 8 for length in longest) for n in reversed(halvings)]


def level_for(levels: list[tuple[int, ...]], longest: Sequence[int]) -> tuple[int, ...]:
    """The narrowest level that prompts of these lengths fit."""
    return next(w for w in levels if all(a <= b for a, b in zip(longest, w, strict=True)))


class TrainingPrompts:
    """The student's and the teacher's prompts of a problem set, rendered once.

    Contexts that need this step's attempts are not among them (`AfterPrompts`), but a problem that
    has no room for one is left out.

    Args:
      config: templates and budgets.
      tokenizer: of the model.
      problems: the training problems.
      after: what is rendered after the rollout; None where nothing is.

    Attributes:
      names: of the contexts: "student", then of "teacher" and its views those known before.
      levels: a width for each of them, ascending.
      longest: tokens of the longest prompt of the student and of the teacher's contexts.
      num_equal: rows in which every context of the teacher's is the student's.
    """

    def __init__(
        self,
        config: ContextConfig,
        tokenizer: Tokenizer,
        problems: ProblemSet,
        after: AfterPrompts | None = None,
    ):
        self._pad_id = tokenizer.pad_id
        self.names = ("student", *(n for n in config.teachers if not config.is_after(n)))
        self._rows: dict[str, tuple[np.ndarray, ...] | None] = {}
        for i in range(len(problems)):
            problem = problems[i]
            ids = [render(config, tokenizer, problem, name) for name in self.names]
            kept = [np.array(row, np.int32) for row in ids if row is not None]
            has_room = len(kept) == len(ids) and (after is None or after.has_room(problem))
            self._rows[problem.id] = tuple(kept) if has_room else None
        fitting = [row for row in self._rows.values() if row is not None]
        longest = [max((len(row[n]) for row in fitting), default=1) for n in range(len(self.names))]
        shown = [] if after else fitting
        self.num_equal = sum(all(np.array_equal(row[0], r) for r in row[1:]) for row in shown)
        later = after.longest if after else ()
        self.longest = (longest[0], max((*longest[1:], *later)))
        self.levels = widths(longest, config.num_widths)

    def __call__(self, problem: Problem) -> dict[str, np.ndarray] | None:
        """Arrays <name>_ids [width] and <name>_length [] int32; None if over budget."""
        rows = self._rows[problem.id]
        if rows is None:
            return None
        out: dict[str, Any] = {}
        for name, row, width in zip(self.names, rows, self.levels[-1], strict=True):
            out[f"{name}_ids"] = np.full(width, self._pad_id, np.int32)
            out[f"{name}_ids"][: len(row)] = row
            out[f"{name}_length"] = np.int32(len(row))
        return out

    def narrow(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a batch, cut to the narrowest level that its prompts fit."""
        level = level_for(self.levels, [arrays[f"{name}_length"].max() for name in self.names])
        cut = {
            f"{name}_ids": arrays[f"{name}_ids"][:, :width]
            for name, width in zip(self.names, level, strict=True)
        }
        return arrays | cut


STATUS = ("built", "fallback", "missing", "too_long", "refused")


class Rendered(NamedTuple):
    """The contexts of a row after the rollout.

    ids: of each context in order, None where the row has none; status: of `STATUS`.
    """

    ids: tuple[list[int], ...] | None
    status: str


class AfterPrompts:
    """Contexts that need a step's attempts: which they are, how wide they get, and each row's.

    Args:
      config: templates and budgets.
      tokenizer: of the model.
      problems: the training problems, each of which is tried with an attempt of one digit: what a
        chat template refuses is told before the first step.
      max_new_tokens: of an attempt.

    Attributes:
      names: of the contexts.
      levels: a width for each of them, ascending; the last is that of the budget.
      longest: tokens of the longest prompts, about.
    """

    def __init__(
        self,
        config: ContextConfig,
        tokenizer: Tokenizer,
        problems: ProblemSet,
        max_new_tokens: int,
    ):
        self._config, self._tokenizer = config, tokenizer
        self.names = tuple(name for name in config.teachers if config.is_after(name))
        self._opened = config.strip_thinking and opens_thought(config, tokenizer)
        self._told = False
        self.pad_id = tokenizer.pad_id
        tried = {problems[i].id: self._try(problems[i]) for i in range(len(problems))}
        self._room = {name for name, longest in tried.items() if longest is not None}
        fitting = [longest for longest in tried.values() if longest is not None]
        budget = config.teacher_max_tokens
        self.longest = tuple(
            min(budget, max((row[n] for row in fitting), default=1) + max_new_tokens * shown)
            for n, shown in enumerate(map(self._num_attempts, self.names))
        )
        self.levels = widths(self.longest, config.num_widths)
        whole = widths([budget] * len(self.names), 1)
        self.levels += whole if whole[0] != self.levels[-1] else []

    def _num_attempts(self, name: str) -> int:
        """How many texts of a rollout a context shows at most."""
        shown = map(self._config.shows, self._config.alternatives(name))
        texts = {"attempt", "feedback", "sibling", "wrong_sibling"}
        return len(frozenset().union(*shown) & texts)

    def _try(self, problem: Problem) -> list[int] | None:
        """Lengths of the contexts around attempts of a digit; None where one has no room."""
        right, wrong = Attempt("1", 1.0, "1"), Attempt("1", 0.0, "1")
        groups = [Group((own, right, wrong), 0) for own in (right, wrong)]  # of unlike verdicts
        config, lengths = self._config, []
        for name in self.names:
            longest = 1
            for each, group in itertools.product(config.alternatives(name), groups):
                # A function is the user's own, and is called with what has happened.
                known = "student" if callable(config.template(each)) else each
                try:
                    ids = prompt_ids(config, self._tokenizer, problem, known, group)
                except NothingToShow:
                    continue
                if not fits(config, problem, each, ids):
                    return None
                longest = max(longest, len(ids))
            lengths.append(longest)
        return lengths

    def has_room(self, problem: Problem) -> bool:
        """Whether the contexts of a problem fit without what an attempt adds."""
        return problem.id in self._room

    def shown(self, text: str) -> str:
        """An attempt as it is shown."""
        return without_thinking(text, self._opened) if self._config.strip_thinking else text

    def __call__(self, problem: Problem, group: Group) -> Rendered:
        """The contexts of one row; a row that cannot have one of them has none.

        Raises:
          UserError: a function's turns are no conversation, or a prompt is over budget and
            `contexts.too_long` is "error".
        """
        rows, status = [], "built"
        for name in self.names:
            try:
                used, ids = chosen_ids(self._config, self._tokenizer, problem, name, group)
            except NothingToShow:
                return Rendered(None, "missing")
            except Unsafe as error:
                if not self._told:
                    self._told = True
                    log.warning("%s; such rows weigh nothing, this is said once.", error)
                return Rendered(None, "refused")
            if not fits(self._config, problem, name, ids):
                return Rendered(None, "too_long")
            rows.append(ids)
            status = "fallback" if used != name else status
        return Rendered(tuple(rows), status)
