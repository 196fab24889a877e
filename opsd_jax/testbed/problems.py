# SPDX-License-Identifier: Apache-2.0
"""The testbed's problems as a source: procedural, seeded, split by the problems' own hash."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated

import numpy as np

from opsd_jax.data.builder import ProblemBuilder, generated_problems
from opsd_jax.data.grading import AnswerForm, Given, same_text
from opsd_jax.data.problems import AnswerGrader, LoadedProblems, Problem
from opsd_jax.errors import UserError
from opsd_jax.fields import Count, Seed, require
from opsd_jax.testbed.world import ChainTask, correction, extract_answer

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class ChainArithmetic:
    """Source of testbed problems (testbed.py).

    Attributes:
      split: "train", nine problems in ten, or "heldout"; the two never share a problem.
      num_problems: how many to draw, without repetition.
      num_ops: steps of a problem.
      seed: chooses which problems of the split are drawn, and their order.
      feedback: whether the grader also says what the first wrong line should have been.
    """

    split: Annotated[str, SPLITS] = "train"
    num_problems: Count = 8192
    num_ops: Annotated[int, ">= 1", "<= 4"] = 3
    seed: Seed = 0
    feedback: bool = dataclasses.field(default=False, repr=False)  # the problems are the same

    def __post_init__(self):
        require("ChainArithmetic", self)
        if self.num_problems > len(self._members):
            raise UserError(
                f"ChainArithmetic.num_problems must be at most {len(self._members)} for the "
                f"{self.split} split with num_ops = {self.num_ops}, not {self.num_problems}"
            )

    def load(self, cache_dir: str | None = None) -> LoadedProblems:
        """The problems, built once below `cache_dir` (None: anew each time)."""
        problems = generated_problems(
            ChainArithmeticBuilder,
            name=f"ops{self.num_ops}_{self.split}",
            key=repr(self),
            problem_type=Problem,
            generate=self._generate,
            cache_dir=cache_dir,
        )
        grader = _CorrectingGrader if self.feedback else AnswerGrader
        return LoadedProblems(problems, grader(AnswerForm(extract_answer, same_text)))

    @functools.cached_property
    def _members(self) -> np.ndarray:
        """Numbers of the problems of the split (`ChainTask.record`)."""
        heldout = ChainTask(num_ops=self.num_ops).heldout
        return np.flatnonzero(heldout if self.split == "heldout" else ~heldout)

    def _generate(self) -> Iterator[Problem]:
        task = ChainTask(num_ops=self.num_ops)
        # RandomState, not Generator: NumPy promises that its stream never changes.
        order = np.random.RandomState(self.seed).permutation(self._members)
        for index in order[: self.num_problems]:
            yield task.record(int(index))


class _CorrectingGrader(AnswerGrader):
    def __call__(self, problem: Problem, completion: str) -> Given:
        right = super().__call__(problem, completion)
        return right or (0.0, correction(problem.question_text, completion))


class ChainArithmeticBuilder(ProblemBuilder):
    """Testbed problems on disk; the name of the data set below the cache directory."""

    name = "chain_arithmetic"
    skip_registration = True
