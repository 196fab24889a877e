# SPDX-License-Identifier: Apache-2.0
"""Rollouts for `opsd tokens` and `opsd probe`: asked, answered and graded as in a training step."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.data.attempts import Attempt, Group
from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.grader_pool import Grade
from opsd_jax.data.problems import Problem, ProblemSet
from opsd_jax.data.rendering import asked_text, render
from opsd_jax.data.training_prompts import AfterPrompts
from opsd_jax.errors import UserError
from opsd_jax.method.batch import Batch, Policy, ungrouped
from opsd_jax.method.reason_first import Reasoner
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import on_mesh
from opsd_jax.run.finished_run import Restored
from opsd_jax.run.graded_rows import GradeAll
from opsd_jax.run.stepping import to_batch
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion, pad
from opsd_jax.sampling.random_keys import Use, key_for
from opsd_jax.sampling.rollout import rollout


class Shown(NamedTuple):
    """Rows to look at, a problem each.

    problems, teacher_prompts, texts, grades: of each row; batch: all that both roles read;
    completion: host arrays.
    """

    problems: list[Problem]
    teacher_prompts: list[str]
    batch: Batch
    completion: Completion
    texts: list[str]
    grades: list[Grade]

    @property
    def rewards(self) -> list[float]:
        return [each.value for each in self.grades]


def shown_rows(run: Restored, problems: ProblemSet, num: int, seed: int, grade: GradeAll) -> Shown:
    """The first `num` problems that fit their budgets, answered once each by the student.

    Where the teacher is asked after the rollout, each is answered train.group_size times, and the
    first answer is shown for which the teacher's contexts could be built.

    Raises:
      UserError: no problem fits, or no context could be built.
    """
    contexts, tokenizer = run.experiment.training_contexts, run.tokenizer
    after, size = None, 1
    if contexts.after_rollout:
        after = AfterPrompts(contexts, tokenizer, problems, run.experiment.rollout.max_new_tokens)
        size = run.experiment.train.group_size
    chosen, prompts = asked_problems(contexts, tokenizer, problems, num)
    arrays: dict[str, Any] = {}
    for name, ids in prompts.items():
        padded, lengths = pad(ids, max(map(len, ids)), tokenizer.pad_id)
        arrays |= {f"{name}_ids": padded, f"{name}_length": lengths}
    batch = jax.tree.map(jnp.asarray, to_batch(arrays, size, contexts.teachers))
    batch, completion = sample(run, batch, seed)
    texts = [tokenizer.decode(ids) for ids in said_ids(completion)]
    asked = [problem for problem in chosen for _ in range(size)]
    graded = grade(asked, texts)
    if after is None:
        prompts_shown = [asked_text(contexts, problem) for problem in chosen]
        return Shown(chosen, prompts_shown, batch, completion, texts, graded)
    attempts = [
        Attempt(after.shown(text), each.value if problem.answer else None, each.feedback)
        for problem, text, each in zip(asked, texts, graded, strict=True)
    ]
    rows = Shown(asked, [], batch, completion, texts, graded)
    return _with_contexts(rows, attempts, size, contexts, after)


def _with_contexts(
    rows: Shown, attempts: list[Attempt], size: int, contexts: ContextConfig, after: AfterPrompts
) -> Shown:
    """The first row of each group for which the contexts that need attempts could be built."""
    kept: dict[int, tuple[int, Any, str]] = {}
    statuses = []
    for row, problem in enumerate(rows.problems):
        group, first = Group.of_row(attempts, row, size), row // size
        found = after(problem, group)
        statuses.append(found.status)
        if found.ids is not None and first not in kept:
            kept[first] = (row, found.ids, asked_text(contexts, problem, group))
    if not kept:
        raise UserError(
            "no context of the teacher could be built from these rollouts "
            f"({', '.join(f'{statuses.count(s)} {s}' for s in sorted(set(statuses)))}); ask for "
            "a larger num, or with another seed"
        )
    numbers = np.array([row for row, _, _ in kept.values()])

    def take(tree: Any) -> Any:
        return jax.tree.map(lambda x: np.asarray(x)[numbers], ungrouped(tree))

    batch = take(rows.batch)
    known = dict(zip(contexts.teachers, (batch.teacher, *batch.views), strict=True))
    for n, name in enumerate(after.names):
        ids = [found[n] for _, found, _ in kept.values()]
        known[name] = type(batch.student)(*pad(ids, max(map(len, ids)), after.pad_id))
    teacher, *views = (known[name] for name in contexts.teachers)
    return Shown(
        [rows.problems[row] for row in numbers],
        [text for _, _, text in kept.values()],
        dataclasses.replace(batch, teacher=teacher, views=tuple(views)),
        take(rows.completion),
        [rows.texts[row] for row in numbers],
        [rows.grades[row] for row in numbers],
    )


def asked_problems(
    contexts: ContextConfig, tokenizer: Any, problems: ProblemSet, num: int
) -> tuple[list[Problem], dict[str, list[list[int]]]]:
    """The first `num` problems that fit, and their prompts by context.

    Raises:
      UserError: none fits.
    """
    chosen: list[Problem] = []
    names = ["student", *(name for name in contexts.teachers if not contexts.is_after(name))]
    prompts: dict[str, list[list[int]]] = {name: [] for name in names}
    for i in range(len(problems)):
        rendered = {name: render(contexts, tokenizer, problems[i], name) for name in names}
        if all(ids is not None for ids in rendered.values()):
            chosen.append(problems[i])
            for name, ids in rendered.items():
                prompts[name].append(ids or [])
        if len(chosen) == num:
            break
    if not chosen:
        raise UserError("no problem fits contexts.student_max_tokens and teacher_max_tokens")
    return chosen, prompts


def sample(run: Restored, batch: Batch, seed: int) -> tuple[Batch, Completion]:
    """The batch with all that the teacher reads, and the student's rollouts on the host."""
    method = run.parts.method
    compiled = jax.jit(partial(_sampled, method.model, method.rollout, method.reasoner))
    key = key_for(Use.SHOWN, jax.random.key(seed))
    sampled = on_mesh(compiled, run.parts.mesh, run.parts.rules)
    return jax.device_get(sampled(run.student, run.teacher, batch, key))


def _sampled(
    model: Decoder,
    settings: RolloutConfig,
    reasoner: Reasoner | None,
    student: dict,
    teacher: dict,
    batch: Batch,
    key: jax.Array,
) -> tuple[Batch, Completion]:
    prompts, completion_key = batch.student, key_for(Use.COMPLETIONS, key)
    completion = rollout(model, student, prompts.ids, prompts.lengths, completion_key, settings)
    if reasoner:
        analysis_key = key_for(Use.ANALYSES, key)
        analysis = reasoner.write(Policy(model, teacher), batch.teacher, analysis_key)
        batch = reasoner.join(batch, analysis)
        completion = dataclasses.replace(completion, analysis=analysis)
    return batch, completion


def analysis_texts(run: Restored, completion: Completion) -> list[str | None]:
    """What the teacher read behind its prompt in every row, None where it does not reason first."""
    if completion.analysis is None:
        return [None] * len(completion.ids)
    transition = run.experiment.contexts.transition
    # Without the stop token, as `Reasoner.join` has it.
    return [run.tokenizer.decode(ids) + transition for ids in said_ids(completion.analysis)]


def said_ids(completion: Any) -> list[list[int]]:
    """The sampled ids of every row of a completion or an analysis, without the stop token."""
    return [
        ids[mask].tolist()[: -1 if stopped else None]
        for ids, mask, stopped in zip(
            completion.ids, completion.mask, completion.stopped, strict=True
        )
    ]
