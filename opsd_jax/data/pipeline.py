# SPDX-License-Identifier: Apache-2.0
"""From a problem set to batches of arrays: Grain's shuffle, epochs and position.

    indices that fit -> shuffle -> repeat -> global batch -> render -> stack -> narrow

Every host makes the whole batch, and `shard_batch` takes from it what the mesh puts on its devices.
Rendering is cheap beside a step, and the order of a pod's devices is the hardware's own choice. So
a batch is the same on 1 and on 8 hosts, and the position is simply the step.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator

import grain
import numpy as np

from opsd_jax.data.problems import Problem, ProblemSet
from opsd_jax.errors import UserError

log = logging.getLogger(__name__)
Render = Callable[[Problem], dict[str, np.ndarray] | None]
Narrow = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Global batches; every `iter` starts at the beginning.

    The iterators are Grain's: `get_state` and `set_state`, or Orbax through
    `grain.checkpoint.CheckpointSave(it)` and `CheckpointRestore(it)`.

    Attributes:
      dataset: yields {"index": [B] int32 positions in the problem set, **rendered [B, ...]}.
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
    batch_size: int,
    seed: int = 0,
    narrow: Narrow | None = None,
) -> Batches:
    """Batches of rendered problems without end, in a new order in each epoch.

    Every problem is rendered once here, to know which ones fit. Batches run across the ends of
    epochs.

    Args:
      problems: the same on all hosts.
      render: problem -> arrays of fixed shapes and dtypes, or None if a prompt is over budget.
      batch_size: rows of a global batch.
      seed: of the order.
      narrow: a batch's arrays -> the same without columns that are padding in all rows.

    Raises:
      UserError: fewer problems fit than a batch has rows.
    """
    fitting = np.array(list(_fitting(problems, render)), np.int32)
    num_dropped = len(problems) - len(fitting)
    if num_dropped:
        log.warning(
            "%d of %d problems are dropped: a prompt or a reference is over its budget.",
            num_dropped,
            len(problems),
        )
    if len(fitting) < batch_size:
        raise UserError(
            f"a batch of {batch_size} problems is more than the {len(fitting)} problems "
            f"there are ({num_dropped} of {len(problems)} were dropped because a prompt is over "
            "contexts.*_max_tokens or a reference over rollout.max_new_tokens); take a smaller "
            "batch, more problems or larger budgets."
        )
    batches = (
        grain.MapDataset.source(fitting)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size, drop_remainder=True)
        .map(functools.partial(_render_rows, problems, render, narrow))
    )
    # One thread: it keeps ahead of the device, and tokenizers need not be safe for more.
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return Batches(batches.to_iter_dataset(reading), len(fitting), num_dropped)


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
    problems: ProblemSet, render: Render, narrow: Narrow | None, indices: np.ndarray
) -> dict[str, np.ndarray]:
    """Arrays of the problems at these positions."""
    rows = [render(problems[int(i)]) for i in indices]
    kept = [row for row in rows if row is not None]
    if len(kept) < len(rows):
        raise ValueError("render must be pure: it now refuses a problem that it accepted before.")
    arrays = {k: np.stack([row[k] for row in kept]) for k in kept[0]}
    if narrow is not None:
        arrays = narrow(arrays)
    return {"index": indices} | arrays
