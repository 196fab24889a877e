# SPDX-License-Identifier: Apache-2.0
"""The testbed's problems as a TFDS data set (array_record, no TensorFlow) and as a source.

The builder is procedural: it downloads nothing and always writes the same records. They are
read back at random by index, which is what Grain wants.
"""

import contextlib
import dataclasses
import io
import tempfile

import numpy as np
import tensorflow_datasets as tfds

from opsd_jax.errors import UserError
from opsd_jax.problems import Problem
from opsd_jax.testbed import ChainTask, grade

SPLITS = ("train", "heldout")
_FIELDS = tuple(field.name for field in dataclasses.fields(Problem))


@dataclasses.dataclass(frozen=True)
class ChainArithmetic:
    """Source of testbed problems (see testbed.py).

    Attributes:
      split: "train" (nine problems in ten) or "heldout"; the two never share a problem.
      num_problems: how many to draw, without repetition.
      num_ops: steps of a problem.
      seed: chooses which problems of the split are drawn; the first n of a larger draw with the
        same seed are the same problems.
    """

    split: str = "train"
    num_problems: int = 8192
    num_ops: int = 3
    seed: int = 0

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(
                f"ChainArithmetic.split must be one of {', '.join(SPLITS)}, got {self.split!r}."
            )
        available = int(_members(self.split, self.num_ops).sum())
        if not 1 <= self.num_problems <= available:
            raise UserError(
                f"ChainArithmetic.num_problems must be 1 to {available} for the {self.split} "
                f"split with num_ops = {self.num_ops}, got {self.num_problems}."
            )

    @property
    def indices(self) -> np.ndarray:
        """[num_problems] numbers of the problems drawn (`ChainTask.record`)."""
        members = np.flatnonzero(_members(self.split, self.num_ops))
        return np.random.RandomState(self.seed).permutation(members)[: self.num_problems]

    def load(self, cache_dir: str | None) -> "ChainProblems":
        """The problems, built once below `cache_dir` (None: in a temporary directory)."""
        scratch = None if cache_dir else tempfile.TemporaryDirectory(prefix="chain_arithmetic_")
        builder = ChainArithmeticBuilder(
            config=_BuilderConfig.of(self),
            data_dir=cache_dir or scratch.name,
            file_format="array_record",
        )
        # TFDS announces a download, which there is none of, and draws progress bars.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare()
        return ChainProblems(builder.as_data_source(self.split), scratch)


@dataclasses.dataclass(frozen=True)
class ChainProblems:
    """A problem set over the built records."""

    records: object
    scratch: tempfile.TemporaryDirectory | None = None  # Holds the files while we live.

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Problem:
        record = self.records[index]
        return Problem(**{name: record[name].decode() for name in _FIELDS})

    def grade(self, problem: Problem, completion: str) -> float:
        """1.0 if the completion states the problem's answer (`testbed.grade`), else 0.0."""
        return grade(problem.answer, completion)


@dataclasses.dataclass(eq=False, kw_only=True)
class _BuilderConfig(tfds.core.BuilderConfig):
    source: ChainArithmetic

    @classmethod
    def of(cls, source: ChainArithmetic) -> "_BuilderConfig":
        name = f"{source.split}_{source.num_problems}_ops{source.num_ops}_seed{source.seed}"
        return cls(name=name, source=source)


class ChainArithmeticBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes the records of one `ChainArithmetic` source; use `ChainArithmetic.load`."""

    name = "chain_arithmetic"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = {name: tfds.features.Text() for name in _FIELDS}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Chained arithmetic mod 10 with keyed lemmas in random order.",
            features=tfds.features.FeaturesDict(text),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        source = self.builder_config.source
        return {source.split: self._generate_examples(source)}

    def _generate_examples(self, source: ChainArithmetic):
        task = ChainTask(num_ops=source.num_ops)
        for index in source.indices:
            problem = task.record(int(index))
            yield problem.id, dataclasses.asdict(problem)


def _members(split: str, num_ops: int) -> np.ndarray:
    """[num_problems of the task] bool: which problems belong to the split."""
    heldout = ChainTask(num_ops=num_ops).heldout
    return heldout if split == "heldout" else ~heldout
