# SPDX-License-Identifier: Apache-2.0
"""From a problem set to batches of arrays: Grain's shuffle, epochs, host shards and position.

    indices that fit -> shuffle -> repeat -> global batch -> this host's rows -> render -> stack
                                                                             -> narrow

The order is one global stream, cut into global batches before hosts take their rows. So an epoch
shows every problem once whatever the number of hosts, their rows never overlap, row h of a global
batch is the same problem on 1 and on 8 hosts, and the position is simply the step.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags

from opsd_jax.errors import UserError
from opsd_jax.problems import Problem, ProblemSet

log = logging.getLogger(__name__)
Render = Callable[[Problem], dict[str, np.ndarray] | None]
Narrow = Callable[[list[Problem], dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How batches are drawn.

    Attributes:
      batch_size: rows of a global batch, over all hosts.
      seed: of the order.
      shuffle: a new order in each epoch; False keeps the order of the set.
      num_epochs: None repeats for ever. Batches run across the ends of epochs; rows that do not
        fill a last batch are left out.
      num_workers: processes that render; 0 renders in a thread. A position taken with one number
        of workers does not fit another, and with processes an iterator needs `close()`.
    """

    batch_size: int
    seed: int = 0
    shuffle: bool = True
    num_epochs: int | None = None
    num_workers: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.seed < 0 or self.num_workers < 0:
            raise UserError(
                "batch_size must be >= 1, .seed and .num_workers >= 0, got "
                f"{self.batch_size}, {self.seed} and {self.num_workers}."
            )
        if self.num_epochs is not None and self.num_epochs < 1:
            raise UserError(f"num_epochs must be >= 1 or None, got {self.num_epochs}.")


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of one host; every `iter` starts at the beginning.

    The iterators are Grain's: `get_state` and `set_state`, or Orbax through
    `grain.checkpoint.CheckpointSave(it)` and `CheckpointRestore(it)`.

    Attributes:
      dataset: yields {"index": [b] int32 positions in the problem set, **rendered [b, ...]} with
        b = batch_size / num_hosts.
      num_problems: how many are drawn from.
      num_dropped: how many had no rendering.
    """

    dataset: grain.IterDataset
    num_problems: int
    num_dropped: int

    def __iter__(self) -> grain.DatasetIterator:
        return iter(self.dataset)


def make_batches(
    problems: ProblemSet,
    render: Render,
    config: PipelineConfig,
    *,
    host: int = 0,
    num_hosts: int = 1,
    narrow: Narrow | None = None,
) -> Batches:
    """Batches of rendered problems for one host.

    Every problem is rendered once here, to know on all hosts alike which ones fit.

    Args:
      problems: the same on all hosts.
      render: problem -> arrays of fixed shapes and dtypes, or None if a prompt is over budget.
      config: see `PipelineConfig`.
      host, num_hosts: `jax.process_index()` and `jax.process_count()`.
      narrow: (problems of the global batch, this host's arrays) -> the arrays without columns
        that are padding in all rows; all hosts then have the same shapes.

    Raises:
      UserError: nothing fits, fewer problems than a batch has rows, or a batch that does
        not divide among the hosts.
    """
    if config.batch_size % num_hosts:
        raise UserError(
            f"batch_size {config.batch_size} does not divide among {num_hosts} hosts; "
            f"make it a multiple of {num_hosts}."
        )
    fitting = np.array(list(_fitting(problems, render)), np.int32)
    num_dropped = len(problems) - len(fitting)
    if num_dropped:
        log.warning(
            "%d of %d problems are dropped: a prompt is longer than its budget.",
            num_dropped,
            len(problems),
        )
    if len(fitting) < config.batch_size:
        raise UserError(
            f"batch_size {config.batch_size} is more than the {len(fitting)} problems "
            f"there are ({num_dropped} of {len(problems)} were dropped because a prompt is longer "
            "than its budget); take a smaller batch, more problems or larger budgets."
        )
    rows = config.batch_size // num_hosts
    indices = grain.MapDataset.source(fitting).seed(config.seed)
    if config.shuffle:
        indices = indices.shuffle()
    batches = (
        indices.repeat(config.num_epochs)
        .batch(config.batch_size, drop_remainder=True)
        .map(functools.partial(_render_rows, problems, render, narrow, host * rows, rows))
    )
    # One thread: it keeps ahead of the device, and tokenizers need not be safe for more.
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = batches.to_iter_dataset(reading)
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags, also where nobody has any
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(config.num_workers))
    return Batches(dataset, len(fitting), num_dropped)


def _fitting(problems: ProblemSet, render: Render) -> Iterator[int]:
    """Positions of the problems with a rendering."""
    shapes = None
    for index in range(len(problems)):
        problem = problems[index]
        row = render(problem)
        if row is None:
            continue
        these = {name: (array.shape, array.dtype) for name, array in row.items()}
        shapes = shapes or these
        if these != shapes:
            raise ValueError(f"render gave {these} for {problem.id}, but {shapes} before it.")
        yield index


def _render_rows(
    problems: ProblemSet,
    render: Render,
    narrow: Narrow | None,
    first: int,
    num_rows: int,
    batch: np.ndarray,
) -> dict[str, np.ndarray]:
    """Arrays of the rows first … first + num_rows - 1 of a global batch of positions."""
    indices = batch[first : first + num_rows]
    rows = [render(problems[int(i)]) for i in indices]
    kept = [row for row in rows if row is not None]
    if len(kept) < len(rows):
        raise ValueError("render must be pure: it now refuses a problem that it accepted before.")
    arrays = {k: np.stack([row[k] for row in kept]) for k in kept[0]}
    if narrow is not None:
        arrays = narrow([problems[int(i)] for i in batch], arrays)
    return {"index": indices} | arrays
