# SPDX-License-Identifier: Apache-2.0
"""Teacher contexts that are built between the halves of a step, from its graded completions.

sample -> completion -> grades -> this: each process for its own rows -> one batch for all -> learn
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from opsd_jax.data.attempts import Group
from opsd_jax.data.problems import ProblemSet
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.data.training_prompts import STATUS, AfterPrompts, Rendered, level_for
from opsd_jax.errors import UserError
from opsd_jax.method.batch import Batch
from opsd_jax.model.sharding import batch_sharding, shard_batch
from opsd_jax.run.experiment import Experiment
from opsd_jax.run.graded_rows import Graded, check_answers
from opsd_jax.sampling.prompts import Context, pad


class Rebuilt(NamedTuple):
    """A batch with its teacher contexts.

    metrics: what became of the rows; lengths: [B] of the prompts that were not known before, by
    the context's name.
    """

    batch: Batch
    metrics: dict[str, float]
    lengths: dict[str, np.ndarray]


class AfterRollout:
    """Renders the contexts of a step that need its attempts.

    Every process renders the rows that its devices hold, and all exchange the ids: with `model`
    across processes several hold a row, and one of their graders may have been slower.

    Args:
      prompts: what is rendered.
      problems: the training problems.
      group_size: G adjacent rows answer one problem.
      mesh: of the run.
      teachers: all contexts of the teacher in order, "teacher" and its views.
    """

    def __init__(
        self,
        prompts: AfterPrompts,
        problems: ProblemSet,
        group_size: int,
        mesh: Mesh,
        teachers: tuple[str, ...],
    ):
        self.prompts, self._problems, self._group_size = prompts, problems, group_size
        self._mesh, self._teachers = mesh, teachers

    def __call__(self, batch: Batch, graded: Graded, numbers: np.ndarray) -> Rebuilt:
        """The batch with the contexts of this step.

        Args:
          batch: whose student asked; contexts of the teacher that are not built here stay.
          graded: what its rows answered.
          numbers: [B] of their problems.
        """
        found = self.rows(graded, numbers)
        names, pad_id = self.prompts.names, self.prompts.pad_id
        # A row without contexts may hold any: it weighs nothing.
        filled = {row: each.ids or ([pad_id],) * len(names) for row, each in found.items()}
        sizes = {
            row: [STATUS.index(each.status), *map(len, filled[row])] for row, each in found.items()
        }
        status, *lengths = _of_first_holder(sizes, (len(numbers), len(names) + 1)).T
        level = level_for(self.prompts.levels, [int(each.max()) for each in lengths])
        contexts: dict[str, Any] = {}
        for n, (name, width) in enumerate(zip(names, level, strict=True)):
            rows = {row: pad([ids[n]], width, pad_id)[0][0] for row, ids in filled.items()}
            contexts[name] = Context(_of_first_holder(rows, (len(numbers), width)), lengths[n])
        built = status <= STATUS.index("fallback")
        placed, has_context = shard_batch((contexts, built), self._mesh)
        known = dict(zip(self._teachers, (batch.teacher, *batch.views), strict=True)) | placed
        teacher, *views = (known[name] for name in self._teachers)
        metrics = {
            f"context/{name}_fraction": float(np.mean(status == STATUS.index(name)))
            for name in STATUS[1:]
        }
        whole = dataclasses.replace(
            batch, teacher=teacher, views=tuple(views), has_context=has_context
        )
        return Rebuilt(whole, metrics, dict(zip(names, lengths, strict=True)))

    def rows(self, graded: Graded, numbers: np.ndarray) -> dict[int, Rendered]:
        """What each row of this process is shown, by its number in the batch."""
        size, shown = self._group_size, self.prompts.shown
        own = {row: each._replace(text=shown(each.text)) for row, each in graded.attempts.items()}
        found = {}
        for row in own:
            group = Group.of_row(own, row, size)
            found[row] = self.prompts(self._problems[int(numbers[row])], group)
        return found


def after_rollout(
    experiment: Experiment, problems: ProblemSet, tokenizer: Tokenizer, mesh: Mesh
) -> AfterRollout | None:
    """What builds the teacher's contexts that need a step's attempts; None where none does.

    Raises:
      UserError: a problem that cannot be graded, a context that cannot be rendered, or groups
        whose rows would lie on several processes.
    """
    settings, contexts = experiment.train, experiment.training_contexts
    shown = contexts.after_rollout
    if not shown:
        return None
    check_groups(mesh, settings.batch_size, settings.group_size)
    if graded := shown - {"attempt"}:
        check_answers(problems, f"a template that shows {{{min(graded)}}}")
    prompts = AfterPrompts(contexts, tokenizer, problems, experiment.rollout.max_new_tokens)
    return AfterRollout(prompts, problems, settings.group_size, mesh, contexts.teachers)


def check_groups(mesh: Mesh, batch_size: int, group_size: int) -> None:
    """Raises a UserError unless every process that holds a row holds its whole group.

    The same on all processes.
    """
    held: dict[int, set[int]] = {}
    places: Any = batch_sharding(mesh).devices_indices_map((batch_size,))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(batch_size)))
    for mine in held.values():
        groups = {row // group_size for row in mine}
        if len(mine) < len(groups) * group_size:
            raise UserError(
                f"contexts that show attempts need the {group_size} rows of a group on one "
                "process: make train.batch_size / train.group_size a multiple of the number of "
                "devices along `data`, or train.group_size smaller"
            )


def _of_first_holder(rows: dict[int, Any], shape: tuple[int, int]) -> Any:
    """[B, N] int32 on every process, each row of the first process that holds it."""
    values = np.full(shape, -1, np.int32)
    for row, value in rows.items():
        values[row] = value
    if jax.process_count() == 1:
        return values
    found = multihost_utils.process_allgather(values)
    first = np.argmax(found[:, :, 0] >= 0, axis=0)
    return found[first, np.arange(shape[0])]
