# SPDX-License-Identifier: Apache-2.0
"""Public benchmarks as problem sources: the files as their authors publish them on the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, NamedTuple

from opsd_jax.data.files import JsonlProblems, ParquetProblems, is_hidden
from opsd_jax.data.grading import Grader
from opsd_jax.data.problems import LoadedProblems
from opsd_jax.errors import UserError
from opsd_jax.fields import require


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
      path: a copy of the published data set, or a folder or file of its rows alone; "" fetches
        it from the Hub by its id (needs the network once).
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
        path = Path(self.path).expanduser() if self.path else _fetch(published)
        # The published layout first: other splits lie beside the one that is evaluated.
        pattern = path / published.files
        is_layout = _has_files(path, published.files)
        is_jsonl = path.suffix == ".jsonl" or (
            not _has_files(path, "**/*.parquet") and _has_files(path, "**/*.jsonl")
        )
        if is_layout:
            is_jsonl = published.files.endswith(".jsonl")
        source = JsonlProblems if is_jsonl else ParquetProblems
        rows = source(
            path=str(pattern if is_layout else path),
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
            name = source.__name__
            told = str(error).replace(f"{name}.path", "Benchmark.path")
            if name in told:
                told += f" Benchmark fixes these: rows of another form are read with @{name}()."
            raise UserError(told) from None


def _has_files(path: Path, pattern: str) -> bool:
    """Whether a folder has such files that are not hidden."""
    found = path.glob(pattern) if path.is_dir() else iter(())
    return any(not is_hidden(each.relative_to(path)) for each in found)


def _fetch(published: Published) -> Path:
    """The data set's folder in the Hub's own cache, downloaded if it is not there."""
    advice = f"download {published.hub_id} and set Benchmark.path to its folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"Benchmark.path is empty and huggingface_hub is not installed: {advice}"
        ) from None
    try:
        folder = snapshot_download(
            published.hub_id, repo_type="dataset", allow_patterns=[published.files]
        )
    except Exception as error:  # No network, no such file, a gate: the library has many names.
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise UserError(f"{published.hub_id} cannot be fetched ({reason}); {advice}") from None
    return Path(folder)
