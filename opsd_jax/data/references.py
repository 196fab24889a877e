# SPDX-License-Identifier: Apache-2.0
"""The data's own completions as token rows: text, stop token, padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.problems import Problem
from opsd_jax.data.rendering import quoted_problem
from opsd_jax.data.templates import fill
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError

Render = Callable[[Problem], dict[str, np.ndarray] | None]


class ReferenceRows:
    """A problem's prompts with its reference completion beside them.

    Args:
      prompts: problem -> arrays of the two contexts, or None.
      template: text with {solution} and {answer}, or a function (problem) -> text.
      tokenizer: of the model.
      max_tokens: C, stop token included.
      contexts: `too_long` ("drop" counts a longer reference and leaves its problem out, "error"
        stops) and `special_tokens` are of references too.
      stop_ids: of the run, besides the tokenizer's.
    """

    def __init__(
        self,
        prompts: Render,
        template: str | Callable[[Problem], str],
        tokenizer: Tokenizer,
        max_tokens: int,
        contexts: ContextConfig,
        stop_ids: Sequence[int] = (),
    ):
        if not tokenizer.stop_ids:
            raise UserError("train.completions = @References() needs a tokenizer with a stop token")
        self._prompts, self._template, self._tokenizer = prompts, template, tokenizer
        self._end_id = getattr(tokenizer, "turn_end_id", tokenizer.stop_ids[0])
        self._stop_ids = {*tokenizer.stop_ids, *stop_ids}
        self._max_tokens, self._contexts = max_tokens, contexts
        self.dropped: set[str] = set()

    def __call__(self, problem: Problem) -> dict[str, np.ndarray] | None:
        """The prompts' arrays with reference_ids [C] and reference_length [] int32."""
        row = self._prompts(problem)
        if row is None:
            return None
        tokenizer = self._tokenizer
        text = self._text(problem)
        try:
            ids = [*tokenizer.encode(text), self._end_id]
        except UserError as error:
            raise UserError(f"problem {problem.id!r}: its reference: {error}") from None
        self._check_inside(problem, ids[:-1])
        if len(ids) > self._max_tokens:
            if self._contexts.too_long == "error":
                raise UserError(
                    f"problem {problem.id!r}: its reference has {len(ids)} tokens with the stop "
                    f"token, over rollout.max_new_tokens = {self._max_tokens}; raise it, or set "
                    "contexts.too_long = 'drop'"
                )
            self.dropped.add(problem.id)
            return None
        filled = np.full(self._max_tokens, tokenizer.pad_id, np.int32)
        filled[: len(ids)] = ids
        length = np.array(len(ids), np.int32)
        return row | {"reference_ids": filled, "reference_length": length}

    def _check_inside(self, problem: Problem, ids: Sequence[int]) -> None:
        """Raises a UserError where a token before the end would end a completion.

        An ordinary token may be a stop id too; then it cannot be encoded as anything else.
        """
        stops = [i for i in ids if i in self._stop_ids]
        if stops:
            raise UserError(
                f"problem {problem.id!r}: its reference has a stop id before its end, {stops[0]}; "
                "remove that token from its text, or the id from the stop ids"
            )

    def _text(self, problem: Problem) -> str:
        """The reference, with special tokens of the data made text.

        What a function writes is data too: it has put the problem's texts into its own.
        """
        if not callable(self._template):
            shown_problem = quoted_problem(self._contexts, self._tokenizer, problem)
            return reference_text(self._template, shown_problem)
        whole = dataclasses.replace(problem, solution=reference_text(self._template, problem))
        return quoted_problem(self._contexts, self._tokenizer, whole).solution


def reference_text(template: str | Callable[[Problem], str], problem: Problem) -> str:
    """The completion that a problem teaches, without its stop token.

    Placeholders are filled in a single pass, so that a solution may contain braces.
    """
    if callable(template):
        text = template(problem)
    else:
        fields = {"solution": problem.solution, "answer": problem.answer}
        text = fill(template, fields, "References.template", problem.id)
    if not text:
        raise UserError(f"problem {problem.id!r} has no reference completion to learn from")
    return text
