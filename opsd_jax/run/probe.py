# SPDX-License-Identifier: Apache-2.0
"""`opsd probe`: before a step is trained, what the teacher of an experiment can teach.

    problem ─> student's answer ─> grade ─> right | wrong ─┬─> both roles go on from its first half
                     └─> divergence, token by token        └─> both roles at the wrong answer itself

A minute instead of a run. `evaluation/forecast.py` says what the numbers are.
Alphabet: B rollouts, C completion, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.data.attempts import RIGHT
from opsd_jax.data.problems import ProblemSet
from opsd_jax.data.record import Problem
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError
from opsd_jax.evaluation import forecast
from opsd_jax.evaluation.evaluate import sample_keys
from opsd_jax.host.files import require_writable, write_whole
from opsd_jax.host.identity import identity_of
from opsd_jax.method.batch import ungrouped
from opsd_jax.method.scoring import completion_hidden
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.model.sharding import on_mesh
from opsd_jax.run.assembly import initial_state, load_models, teacher_variables
from opsd_jax.run.config import load_experiment
from opsd_jax.run.eval import as_json
from opsd_jax.run.experiment import Experiment
from opsd_jax.run.finished_run import Restored, say
from opsd_jax.run.graded_rows import GradeAll
from opsd_jax.run.pins import pinned
from opsd_jax.run.shown_rows import Shown, shown_rows
from opsd_jax.run.tokens import compared, token_texts
from opsd_jax.run.train import grading
from opsd_jax.sampling.prompts import Completion, Context
from opsd_jax.sampling.random_keys import Use, key_for
from opsd_jax.sampling.slots import Sampler


def probe_command(
    gin_files: Sequence[str], bindings: Sequence[str], num: int, seed: int, out: str | None
) -> dict[str, float]:
    """`opsd probe`: prints the table and the advice; writes the numbers as JSON to `out`."""
    if out is not None:
        require_writable(Path(out).absolute().parent)
    experiment, _ = pinned(load_experiment(gin_files, bindings)[0])
    with tempfile.TemporaryDirectory(prefix="opsd_probe_") as folder, ExitStack() as stack:
        problems = experiment.train.problems.load(folder)
        grade = grading(problems, experiment.train.grader_workers, stack)
        found = probe(untrained_run(experiment, folder), problems, num, seed, grade)
    divergence = experiment.divergence.name
    unit = "per token" if callable(divergence) else forecast.NATS
    name = divergence if isinstance(divergence, str) else getattr(divergence, "__name__", "own")
    print(forecast.table(found, name, unit), forecast.advice(found, unit), sep="\n\n")
    if out is not None:
        write_whole(Path(out), as_json(found) + "\n")
    return found


def untrained_run(experiment: Experiment, folder: str) -> Restored:
    """Student and teacher as they are before the first step.

    Raises:
      UserError: the teacher is a model of another shape.
    """
    identity = identity_of(Path(folder), {})
    base, external, parts = load_models(experiment, folder, say, identity)
    state = initial_state(parts, base.params, experiment.train.seed, external and external.params)
    teacher = teacher_variables(parts, state)
    if teacher is None:
        raise UserError(
            "teacher.model is of another shape than train.model, and `opsd probe` compares weights "
            "of one shape"
        )
    return Restored(experiment, parts, base.tokenizer, state.student, teacher, 0, identity)


def probe(
    run: Restored, problems: ProblemSet, num: int, seed: int, grade: GradeAll
) -> dict[str, float]:
    """All numbers of `forecast.py` on the first `num` problems that fit their budgets.

    Args:
      run: student and teacher.
      problems: those that are trained on.
      num: how many; where the teacher is shown attempts, each is answered train.group_size times.
      seed: of what is sampled.
      grade: of the problems.
    """
    shown = shown_rows(run, problems, num, seed, grade)
    terms = compared(run, shown).terms
    graded = np.array([bool(problem.answer) for problem in shown.problems])
    rewards = np.where(graded, shown.rewards, np.nan)
    mask = np.asarray(shown.completion.mask)
    found = forecast.gap_metrics(terms.divergence, terms.argmax_agreement, mask, rewards)
    if graded.any():
        asked = Asked(run, shown, grade, key_for(Use.SHOWN, jax.random.key(seed), 1))
        rows = np.flatnonzero(graded).tolist()
        teacher = asked.grades("teacher", rows, [[] for _ in rows])
        values = {"student": rewards[rows].tolist(), "teacher": teacher}
        found |= forecast.role_metrics("accuracy", values)
        wrong = np.flatnonzero(rewards < RIGHT).tolist()
        found |= from_wrong(asked, wrong) | right_answer(asked, wrong)
    for measure in run.experiment.train.probes:
        found |= measure(run.parts.model, run.student, run.teacher, run.tokenizer)
    return found


class Asked:
    """Both roles, to be asked for the rest of begun answers.

    Args:
      run: student and teacher.
      shown: what they were asked and what the student answered.
      grade: of the problems.
      key: of what is sampled; a row draws the same whichever role answers.
    """

    def __init__(self, run: Restored, shown: Shown, grade: GradeAll, key: jax.Array):
        self.run, self.shown, self.grade, self.key = run, shown, grade, key
        self.variables = {"student": run.student, "teacher": run.teacher or {}}
        self.contexts = {"student": shown.batch.student, "teacher": shown.batch.teacher}
        said = zip(shown.completion.ids, shown.completion.mask, strict=True)
        self.said = [ids[mask].tolist() for ids, mask in said]
        size, mesh = run.experiment.evaluate.batch_size, run.parts.mesh
        pad_id, rules = run.tokenizer.pad_id, run.parts.rules
        self.sampler = Sampler(run.parts.model, pad_id, mesh, rules, size)

    def grades(self, role: str, rows: Sequence[int], begun: Sequence[list[int]]) -> list[float]:
        """Grades of answers that a role finished.

        Args:
          role: "student" or "teacher".
          rows: which of the rows that are shown.
          begun: tokens of each answer that are there already; with the rest no more than
            rollout.max_new_tokens are kept.
        """
        settings, tokenizer = self.run.parts.method.rollout, self.run.tokenizer
        ids, lengths = (np.asarray(x) for x in jax.tree.leaves(self.contexts[role]))
        prompts = [
            ids[b, : lengths[b]].tolist() + start for b, start in zip(rows, begun, strict=True)
        ]
        keys = sample_keys(self.key, len(ids), 1)[np.array(rows)]
        texts = [""] * len(rows)
        for found in self.sampler(self.variables[role], prompts, settings, keys):
            rest = found.ids[:-1] if found.stopped else found.ids
            whole = (begun[found.prompt] + rest)[: settings.max_new_tokens]
            texts[found.prompt] = tokenizer.decode(whole)
        asked = [self.shown.problems[b] for b in rows]
        return [graded.value for graded in self.grade(asked, texts)]


def from_wrong(asked: Asked, wrong: Sequence[int]) -> dict[str, float]:
    """How often either role makes a right answer of the first half of a wrong one."""
    rows = [b for b in wrong if len(asked.said[b]) > 1]
    if not rows:
        return {}
    halves = [asked.said[b][: len(asked.said[b]) // 2] for b in rows]
    values = {role: asked.grades(role, rows, halves) for role in forecast.ROLES}
    return forecast.role_metrics("from_wrong", values) | {"num/from_wrong": float(len(rows))}


class Fork(NamedTuple):
    """Where a wrong answer and the right one part: row, token there, and both sides' token ids."""

    row: int
    place: int
    right: int
    wrong: int


def right_answer(asked: Asked, wrong: Sequence[int]) -> dict[str, float]:
    """Whether either role, behind wrong text, would rather say the right answer than the wrong."""
    shown, run = asked.shown, asked.run
    forks = []
    for b in wrong:
        stated = shown.grades[b].answer or ""
        found = fork(run.tokenizer, asked.said[b], stated, shown.problems[b])
        forks += [Fork(b, *found)] if found else []
    if not forks:
        return {}
    rows, places, right, wrong_ids = np.array(forks).T
    completion = jax.tree.map(lambda x: np.asarray(x)[rows], shown.completion)
    values: dict[str, np.ndarray] = {}
    compiled = jax.jit(partial(two_logps, run.parts.model))
    for role in forecast.ROLES:
        context = jax.tree.map(lambda x: np.asarray(x)[rows], ungrouped(asked.contexts[role]))
        logps = on_mesh(compiled, run.parts.mesh, run.parts.rules)(
            asked.variables[role], context, completion, places, np.stack([right, wrong_ids], 1)
        )
        gap = np.asarray(logps, np.float64) @ [1, -1]
        values[role] = 1 / (1 + np.exp(-np.clip(gap, -700, 700)))
    return forecast.role_metrics("right_answer", values) | {"num/right_answer": float(len(forks))}


def fork(
    tokenizer: Tokenizer, ids: Sequence[int], stated: str, problem: Problem
) -> tuple[int, int, int] | None:
    """(place, right id, wrong id) where the stated answer's tokens leave the right answer's.

    Args:
      tokenizer: of the ids.
      ids: of an answer, its stop token included.
      stated: the wrong answer, as the grader read it.
      problem: has the right one.

    Returns:
      None where the text has no such answer, or the right one begins it: "1" of a stated "12".
    """
    texts = token_texts(tokenizer, ids)
    at = "".join(texts).rfind(stated) if stated else -1
    if at < 0:
        return None
    starts = np.cumsum([0, *map(len, texts)])
    first = int(np.searchsorted(starts, at, side="right")) - 1
    lead = texts[first][: at - starts[first]]  # a space, where tokens begin with one
    for place, right in enumerate(tokenizer.encode(lead + problem.answer), start=first):
        if place >= len(ids):
            return None
        if right != ids[place]:
            return place, right, ids[place]
    return None


def two_logps(
    model: Decoder,
    variables: dict,
    context: Context,
    completion: Completion,
    places: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    """Log-probabilities of two tokens at one place of each completion, [B, 2] float32.

    Args:
      model, variables, context: of the role.
      completion: [B, C], of which what lies before the place is read.
      places: [B].
      ids: [B, 2].
    """
    hidden = completion_hidden(model, variables, context, completion)
    rows = jnp.take_along_axis(hidden, places[:, None, None], axis=1)[:, 0]
    logits = head_logits(output_head(variables["params"], model.config), rows)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1)
