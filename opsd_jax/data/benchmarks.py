# SPDX-License-Identifier: Apache-2.0
"""Public benchmarks as problem sources: the files as their authors publish them on the Hub."""

from __future__ import annotations

import dataclasses
import fnmatch
from pathlib import Path
from typing import Annotated, NamedTuple

from opsd_jax.data.files import JsonlProblems, ParquetProblems
from opsd_jax.data.grading import Grader
from opsd_jax.data.problems import LoadedProblems
from opsd_jax.data.splits import is_hidden
from opsd_jax.errors import UserError
from opsd_jax.fields import require
from opsd_jax.host.hub import Listing, fetch, is_hub_name


class Published(NamedTuple):
    """Where a benchmark is and what its columns are.

    Attributes:
      hub_id: of the data set.
      files: the evaluated split, as a pattern inside the data set.
      question, answer: columns.
      solution: column for the teacher's context; None where no solution is published.
      id: column; a row without it is named by file and row.
      answer_from: how the answer is read out of its column (`grading.EXTRACTORS`).
    """

    hub_id: str
    files: str
    question: str = "problem"
    answer: str = "answer"
    solution: str | None = None
    id: str = "id"
    answer_from: str = "text"


# Every one is graded by math_verify on the last box, as in the official evaluation.
BENCHMARKS = {
    "aime24": Published("HuggingFaceH4/aime_2024", "data/train-*.parquet", solution="solution"),
    "aime25": Published("yentinglin/aime_2025", "data/train-*.parquet"),
    "hmmt25": Published("MathArena/hmmt_feb_2025", "data/train-*.parquet", id="problem_idx"),
    "math500": Published(
        "HuggingFaceH4/MATH-500", "test.jsonl", solution="solution", id="unique_id"
    ),
    "gsm8k": Published(
        "openai/gsm8k",
        "main/test-*.parquet",
        question="question",
        solution="answer",
        answer_from="hashes",
    ),
    "amc23": Published("math-ai/amc23", "test-*.parquet", question="question"),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark of `BENCHMARKS`.

    Attributes:
      name: which.
      path: a copy of the published data set, a folder or file of its rows alone, or
        `owner/name[@revision]` on the Hub; "" is there by its own id (needs the network once).
      grader: see `JsonlProblems`.
    """

    name: Annotated[str, tuple(BENCHMARKS)]
    path: str = ""
    grader: str | Grader = "math_verify"

    def __post_init__(self):
        require("Benchmark", self)

    def load(self, cache_dir: str | None = None) -> LoadedProblems:
        """Reads and checks every row.

        Raises:
          UserError: what `JsonlProblems.load` raises, or the data set cannot be fetched.
        """
        del cache_dir
        published = BENCHMARKS[self.name]
        name = self.path or published.hub_id
        path = _fetched(name, published) if is_hub_name(name) else Path(name).expanduser()
        # The published layout first: other splits lie beside the one that is evaluated.
        if _has_files(path, published.files):
            path /= published.files
        is_jsonl = path.name.endswith(JsonlProblems.suffixes) or (
            not _has_files(path, "**/*.parquet")
            and any(_has_files(path, f"**/*{end}") for end in JsonlProblems.suffixes)
        )
        source = JsonlProblems if is_jsonl else ParquetProblems
        rows = source(
            path=str(path),
            question_column=published.question,
            solution_column=published.solution,
            answer_column=published.answer,
            id_column=published.id,
            answer_from=published.answer_from,
            grader=self.grader,
        )
        try:
            return rows.load()
        except UserError as error:
            kind = source.__name__
            told = str(error).replace(f"{kind}.path", "Benchmark.path")
            if kind in told:
                told += f" Benchmark fixes these: rows of another form are read with @{kind}()."
            raise UserError(told) from None


def _has_files(path: Path, pattern: str) -> bool:
    """Whether a folder has such files that are not hidden."""
    found = path.glob(pattern) if path.is_dir() else iter(())
    return any(not is_hidden(each.relative_to(path)) for each in found)


def _fetched(name: str, published: Published) -> Path:
    """The folder of a data set on the Hub, with the files of the evaluated split in it."""

    def choose(listing: Listing) -> list[str]:
        files = [file for file in listing.sizes if fnmatch.fnmatchcase(file, published.files)]
        if not files:
            raise UserError(f"the Hub data set {name} has no {published.files}; set Benchmark.path")
        return files

    return fetch("dataset", name, choose)
