# SPDX-License-Identifier: Apache-2.0
"""Generated problems kept on disk, by a TFDS builder (array_record, no TensorFlow)."""

import contextlib
import dataclasses
import hashlib
import io
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from opsd_jax.data.problems import Problem
from opsd_jax.errors import UserError, as_named

log = logging.getLogger(__name__)
ProblemT = TypeVar("ProblemT", bound=Problem)


@dataclasses.dataclass(eq=False, kw_only=True)
class _Config(tfds.core.BuilderConfig):
    problem_type: type[Problem]
    generate: Callable[[], Iterator[Problem]]

    def __str__(self) -> str:
        return self.name


class ProblemBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes the problems that its configuration generates; a subclass names the data set."""

    VERSION = tfds.core.Version("1.0.0")
    skip_registration = True

    def _info(self) -> tfds.core.DatasetInfo:
        names = _text_fields(self.builder_config.problem_type)
        features: dict = {name: tfds.features.Text() for name in names}
        features["position"] = tfds.features.Scalar(np.int64)  # TFDS stores in an order of its own
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"problems": self._generate_examples()}

    def _generate_examples(self):
        for position, problem in enumerate(self.builder_config.generate()):
            texts = {name: getattr(problem, name) for name in _text_fields(type(problem))}
            yield position, texts | {"position": position}


def generated_problems(
    builder: type[ProblemBuilder],
    name: str,
    key: str,
    problem_type: type[ProblemT],
    generate: Callable[[], Iterator[ProblemT]],
    cache_dir: str | None,
) -> tuple[ProblemT, ...]:
    """The problems of `generate`, in its order, made once for each `key`.

    Args:
      builder: names the data set and its version, part of the place on disk as is `name`.
      key: everything that the problems depend on, as text.
      problem_type: `Problem` or a subclass with further text fields.
      generate: makes the problems.
      cache_dir: where to keep them, made again if damaged; None makes them anew each time.

    Raises:
      UserError: the directory cannot be written, or whatever `generate` raises.
    """
    config = _Config(
        name=f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}",
        problem_type=problem_type,
        generate=generate,
    )
    with contextlib.ExitStack() as stack:
        root = cache_dir or stack.enter_context(tempfile.TemporaryDirectory())
        kept = pathlib.Path(root) / builder.name / config.name
        try:
            pathlib.Path(root).mkdir(parents=True, exist_ok=True)
            was_kept = kept.exists()
            try:
                rows = _rows(builder, config, root)
            except Exception as error:  # Its readers have many names for a file cut short.
                if not was_kept:
                    raise
                told = f"{kept} cannot be read ({str(error).splitlines()[0]})"
                log.warning("%s: made again.", as_named(told))
                shutil.rmtree(kept)
                rows = _rows(builder, config, root)
        except OSError as error:
            raise UserError(f"Cannot keep problems in {root}: {error}.") from error
    names = _text_fields(problem_type)
    return tuple(problem_type(**{name: row[name].decode() for name in names}) for row in rows)


def _text_fields(problem_type: type[Problem]) -> list[str]:
    """All but further columns and answers: what is generated has none."""
    names = [field.name for field in dataclasses.fields(problem_type)]
    return [name for name in names if name not in ("columns", "other_answers")]


def _rows(builder: type[ProblemBuilder], config: _Config, root: str) -> list[dict]:
    records = _build(builder, config, root).as_data_source("problems")
    return sorted((dict(record) for record in records), key=lambda row: row["position"])


def _build(builder: type[ProblemBuilder], config: _Config, root: str) -> ProblemBuilder:
    with _quiet():
        built = builder(config=config, data_dir=root, file_format="array_record")
        if built.data_path.exists():
            return built
        log.info("Generating %s in %s (once).", config.name, root)
        try:
            built.download_and_prepare()
        except OSError:
            if not built.data_path.exists():  # else another process was first, with the same
                raise
        return builder(config=config, data_dir=root, file_format="array_record")


@contextlib.contextmanager
def _quiet():
    """Without TFDS's progress bars, announced download (there is none) and warnings."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
