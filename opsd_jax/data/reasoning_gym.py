# SPDX-License-Identifier: Apache-2.0
"""Problems from reasoning-gym: seeded, verifiable, without end, and graded by their own scorers."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from opsd_jax.data import grading
from opsd_jax.data.builder import ProblemBuilder, generated_problems
from opsd_jax.data.numbers import plain_number, read_number
from opsd_jax.data.problems import LoadedProblems, Problem
from opsd_jax.errors import UserError
from opsd_jax.fields import Count, Seed, require

SPLITS = ("train", "heldout")
_HELDOUT_ONE_IN = 10
_PLAIN = re.compile(r"-?[0-9]+(\.[0-9]+)?")
# Where some data sets keep an answer of several right ones, having none in the usual place.
_EXAMPLE_ANSWERS = ("possible_answer", "example_answer", "example_correct_answer")


@dataclasses.dataclass(frozen=True)
class ReasoningProblem(Problem):
    """A problem with the data set's own record, as a Python literal, for its scorer."""

    entry: str


@dataclasses.dataclass(frozen=True)
class ReasoningGym:
    """Source over any data set of reasoning-gym.

    Questions are distinct, and their hash decides the split: "train" and "heldout" never share
    one, whatever the seeds. (The library draws item i of seed s from the random stream s + i, so
    that neighbouring seeds repeat almost all items.)

    Five data sets (isomorphic_strings, knight_swap, polynomial_multiplication, ransom_note,
    word_ladder) also depend on PYTHONHASHSEED: several processes need the same, or one cache.

    Attributes:
      name: the data set, for example "gsm_symbolic".
      params: its parameters, for example {"min_terms": 2, "max_terms": 2}.
      split: "train", nine of ten questions, or "heldout".
      num_problems: how many.
      seed: where the draws start.
      solution_from: metadata field with a worked solution; where it is missing, the answer
        stands in.
      answer_from: what part of a completion is shown to the scorer (`grading.EXTRACTORS`);
        "final" is what is tagged or boxed, else all of it.
    """

    name: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    split: Annotated[str, SPLITS] = "train"
    num_problems: Count = 1000
    seed: Seed = 0
    solution_from: str = "answer_cot"
    answer_from: Annotated[str, tuple(grading.EXTRACTORS)] = "final"

    def __post_init__(self):
        require("ReasoningGym", self)

    def load(self, cache_dir: str | None = None) -> LoadedProblems:
        """The problems, built once below `cache_dir` (None: anew each time).

        Raises:
          UserError: the package is missing, no such data set or parameter, or fewer distinct
            questions than asked for.
        """
        _create(self.name, dict(self.params))
        problem_fields = dataclasses.asdict(dataclasses.replace(self, answer_from="final"))
        version = importlib.metadata.version("reasoning-gym")
        problems = generated_problems(
            ReasoningGymBuilder,
            name=f"{self.name}_{self.split}",
            key=json.dumps([version, problem_fields], sort_keys=True, default=repr),
            problem_type=ReasoningProblem,
            generate=self._generate,
            cache_dir=cache_dir,
        )
        scorer = ReasoningScorer(self.name, dict(self.params), self.answer_from)
        return LoadedProblems(problems, scorer)

    def _generate(self) -> Iterator[ReasoningProblem]:
        one_in = _HELDOUT_ONE_IN if self.split == "heldout" else 1
        draws = 2 * one_in * self.num_problems + 1000
        dataset = _create(self.name, {**self.params, "seed": self.seed, "size": draws})
        seen: set[str] = set()
        for index in range(draws):
            entry = dataset[index]
            question = entry["question"]
            if question in seen or _split_of(question) != self.split:
                continue
            seen.add(question)
            yield self._problem(index, entry)
            if len(seen) == self.num_problems:
                return
        raise UserError(
            f"ReasoningGym.num_problems: {draws} draws of {self.name} gave {len(seen)} different "
            f"{self.split} questions, not {self.num_problems}; ask for fewer or widen params."
        )

    def _problem(self, index: int, entry: dict[str, Any]) -> ReasoningProblem:
        metadata = entry["metadata"]
        answer = entry["answer"]
        if answer is None:
            answer = next((metadata[key] for key in _EXAMPLE_ANSWERS if key in metadata), "")
        if not isinstance(answer, str):
            answer = json.dumps(answer)
        return ReasoningProblem(
            id=f"{self.name}/{self.seed}/{index}",
            question=entry["question"],
            solution=str(metadata.get(self.solution_from) or answer),
            answer=answer,
            entry=repr({**entry, "metadata": _literals(metadata)}),
        )


@dataclasses.dataclass(frozen=True)
class ReasoningScorer:
    """The data set's own `score_answer`; small enough to be sent to worker processes.

    Some scorers evaluate the model's text as Python: use a `GraderPool`.
    """

    name: str
    params: dict[str, Any]
    answer_from: str

    def __call__(self, problem: Problem, completion: str) -> float:
        assert isinstance(problem, ReasoningProblem)
        answer = grading.EXTRACTORS[self.answer_from](completion)
        if answer is None:
            return 0.0
        entry = ast.literal_eval(problem.entry)
        score = float(self._dataset.score_answer(answer, entry))
        value = read_number(answer)
        if score < 1 and value is not None and not _PLAIN.fullmatch(answer):
            # The library reads one notation; what is written as `1{,}234` is tried as 1234.
            score = max(score, float(self._dataset.score_answer(plain_number(value), entry)))
        return min(max(score, 0.0), 1.0)

    def extract(self, completion: str) -> str | None:
        """What the scorer is shown; with "final" and "text" that is never nothing."""
        return grading.EXTRACTORS[self.answer_from](completion) or None

    def same(self, answer: str, other: str) -> bool:
        """One text or, where both are a number alone, one value.

        The library scores answers against a problem and does not say when two are equal.
        """
        return grading.same_box(answer, other) or grading.same_value(answer, other)

    def warm_up(self) -> None:
        """Imports the library and makes the data set."""
        self._dataset  # noqa: B018

    @functools.cached_property
    def _dataset(self) -> Any:
        return _create(self.name, self.params)


class ReasoningGymBuilder(ProblemBuilder):
    """Writes the records of one `ReasoningGym` source; use `ReasoningGym.load`."""

    name = "reasoning_gym"


def _create(name: str, params: dict[str, Any]) -> Any:
    """The library's data set."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(
            "ReasoningGym needs the package reasoning-gym: pip install '.[reasoning]'"
        ) from None
    if name not in DATASETS:
        raise UserError(
            f"ReasoningGym.name: reasoning-gym has no data set {name!r}; it has "
            f"{', '.join(sorted(DATASETS))}."
        )
    try:
        return reasoning_gym.create_dataset(name, **params)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        known = ", ".join(field.name for field in dataclasses.fields(DATASETS[name][1]))
        raise UserError(
            f"ReasoningGym.params: {name} does not accept {params} ({reason}); its parameters are "
            f"{known}."
        ) from error


def _split_of(question: str) -> str:
    code = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big")
    return SPLITS[code % _HELDOUT_ONE_IN == 0]


def _literals(metadata: dict[str, Any]) -> dict[str, Any]:
    """What can be written as a Python literal; no scorer was seen to need the rest."""
    kept = {}
    for key, value in metadata.items():
        with contextlib.suppress(ValueError, SyntaxError):
            kept[key] = ast.literal_eval(repr(value))
    return kept
