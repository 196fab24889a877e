# SPDX-License-Identifier: Apache-2.0
"""The corpus that the base model of the testbed is warm-started on, written in NumPy.

The writer of the corpus is the behaviour that the base is to learn. It follows its own prefix
step by step. With a reference in context it uses the lemma whose key (left digit, step) it needs,
if there is one, and its memory otherwise; without a reference it always uses its memory, which is
right about strong facts and mostly wrong about weak ones (`ChainTask.memory`).

Three disturbances make the hinted behaviour a rule rather than a coincidence:
  counterfactual  lemmas with random results: only looking up can predict them;
  drop            a lemma replaced by an irrelevant one: the writer falls back on its memory.
                  `near` of the replacements keep the step and change the left digit only, so that
                  the key must be compared in full;
  wrong_prefix    a result replaced by a random digit from which the chain goes on; this
                  puts the writer where a student's wrong rollout puts the teacher.
Without `drop` and `wrong_prefix` the base becomes a *leaky* teacher: off the reference, it names
the reference's next result instead of what follows from the prefix.

Where asked, rows with an answer as context are written, too: the same lemmas in the student's own
notation and order, for methods whose teacher sees another answer of a step. Likewise rows with
feedback, a single one of the lemmas, for methods whose teacher is told what a wrong line should
have been.
"""

import dataclasses

import numpy as np

from opsd_jax.fields import Share, require
from opsd_jax.testbed.world import (
    BAR,
    EOS,
    EQUALS,
    HASH,
    NUM_DIGITS,
    QUERY,
    SEMICOLON,
    STEPS,
    ChainTask,
    facts,
)

SHOWN = ("nothing", "reference", "answer", "feedback")


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """How the hinted rows of the corpus are disturbed; all are probabilities.

    Attributes:
      counterfactual: of a row, to have random lemma results.
      drop: of a lemma, to be replaced by an irrelevant one.
      near: of a replacement, to keep the step and change the left digit only.
      wrong_prefix: of a result, to be replaced by a random digit (in plain rows too).
    """

    counterfactual: Share = 0.7
    drop: Share = 0.3
    near: Share = 0.7
    wrong_prefix: Share = 0.3

    def __post_init__(self):
        require("WarmStartCorpus", self)


@dataclasses.dataclass(frozen=True)
class CorpusRows:
    """Rows `prompt | response` of one length, with what the response tokens are to be.

    Attributes:
      ids: [n, T] int32; the last C tokens are the response.
      targets: [n, C] int32: what the writer would say in place of each response token. Differs
        from `ids` only where a wrong prefix was planted.
      target_fact: [n, C] int32: where the target came from memory, the number of the fact (a row
        of `ChainTask.memory` reshaped to [200, 10]), else -1. Training on that row instead of
        the one drawn digit takes the noise of the draw out of the gradient.
    """

    ids: np.ndarray
    targets: np.ndarray
    target_fact: np.ndarray


def write_rows(
    task: ChainTask,
    config: CorpusConfig,
    rng: np.random.Generator,
    num_rows: int,
    shown: str,
) -> CorpusRows:
    """Draws training problems and writes `num_rows` rows; `shown`, of `SHOWN`, is their context."""
    train = np.flatnonzero(~task.heldout)
    left, steps = task.problem(train[rng.integers(len(train), size=num_rows)])
    question = np.concatenate([left[:, None], _step_ids(steps)], axis=1)
    parts = [question, np.full((num_rows, 1), QUERY)]
    lemmas = None
    if shown != "nothing":
        lemmas = _draw_lemmas(task, config, rng, left, steps)
        if shown == "answer":
            context = _answer_ids(lemmas)
        elif shown == "feedback":
            lemmas = _one_of(rng, lemmas)
            context = _lines(lemmas)[:, 0]
        else:
            context = _reference_ids(task, rng, lemmas)
        parts[1:1] = [np.full((num_rows, 1), BAR), context]
    prompt = np.concatenate(parts, axis=1)
    response, targets, target_fact = _respond(task, config, rng, left, steps, lemmas)
    rows = (np.concatenate([prompt, response], axis=1), targets, target_fact)
    return CorpusRows(*(array.astype(np.int32) for array in rows))


def _step_ids(steps: np.ndarray) -> np.ndarray:
    return NUM_DIGITS + steps


@dataclasses.dataclass(frozen=True)
class _Lemmas:
    """What each row is shown: [n, K] keys and results, and the [n] answer that they lead to."""

    lefts: np.ndarray
    steps: np.ndarray
    results: np.ndarray
    answer: np.ndarray


def _draw_lemmas(task, config, rng, left, steps) -> _Lemmas:
    """The lemmas of each problem's chain, made counterfactual and dropped as configured."""
    n, num_ops = steps.shape
    rows = np.arange(n)
    # One result for every fact in every row: a key that occurs twice in a row never disagrees.
    invented = rng.integers(NUM_DIGITS, size=(n, *facts().shape), dtype=np.uint8)
    counterfactual = rng.random((n, 1, 1)) < config.counterfactual
    stated = np.where(counterfactual, invented, facts())

    lefts, current = np.empty((n, num_ops), int), left
    for i in range(num_ops):
        lefts[:, i] = current
        current = stated[rows, current, steps[:, i]]

    shape = (n, num_ops)
    dropped = rng.random(shape) < config.drop
    near = rng.random(shape) < config.near
    other_left = (lefts + rng.integers(1, NUM_DIGITS, size=shape)) % NUM_DIGITS
    other_step = rng.integers(len(STEPS), size=shape)
    lefts = np.where(dropped, other_left, lefts)
    keys = np.where(dropped & ~near, other_step, steps)
    return _Lemmas(lefts, keys, stated[rows[:, None], lefts, keys], answer=current)


def _one_of(rng, lemmas: _Lemmas) -> _Lemmas:
    """One lemma of each row's, any of them."""
    n, num_ops = lemmas.steps.shape
    which = rng.integers(num_ops, size=(n, 1))
    lefts, steps, results = (
        np.take_along_axis(column, which, axis=1)
        for column in (lemmas.lefts, lemmas.steps, lemmas.results)
    )
    return _Lemmas(lefts, steps, results, lemmas.answer)


def _lines(lemmas: _Lemmas) -> np.ndarray:
    """[n, K, 4] ids of `8+6=4` for every lemma."""
    lefts = lemmas.lefts
    lines = [lefts, _step_ids(lemmas.steps), np.full_like(lefts, EQUALS), lemmas.results]
    return np.stack(lines, axis=-1)


def _answer_ids(lemmas: _Lemmas) -> np.ndarray:
    """[n, response_len - 1] ids of the lemmas as lines of an answer, which goes on with `#`."""
    n = len(lemmas.answer)
    ends = ((0, 0), (0, 0), (0, 1))
    lines = np.pad(_lines(lemmas), ends, constant_values=SEMICOLON).reshape(n, -1)
    return np.concatenate([lines, np.stack([np.full(n, HASH), lemmas.answer], axis=1)], axis=1)


def _reference_ids(task: ChainTask, rng, lemmas: _Lemmas) -> np.ndarray:
    """[n, reference_len] ids of `#answer` and the lemmas in random order."""
    n, num_ops = lemmas.steps.shape
    order = rng.permuted(np.tile(np.arange(num_ops), (n, 1)), axis=1)
    tokens = np.take_along_axis(_lines(lemmas), order[..., None], axis=1).reshape(n, -1)
    head = np.stack([np.full(n, HASH), lemmas.answer], axis=1)
    return np.concatenate([head, tokens], axis=1)


def _respond(task, config, rng, left, steps, lemmas: _Lemmas | None):
    """[n, C] response ids, targets and memory facts of a writer that follows its own prefix."""
    n, num_ops = steps.shape
    ids = np.full((n, task.response_len), EOS)
    ids[:, 2 : 5 * num_ops : 5], ids[:, 4 : 5 * num_ops : 5] = EQUALS, SEMICOLON
    ids[:, 1 : 5 * num_ops : 5] = _step_ids(steps)
    targets, target_fact = ids.copy(), np.full(ids.shape, -1)
    cumulative = np.cumsum(task.memory, axis=-1)
    current = left
    for i in range(num_ops):
        step, at = steps[:, i], 5 * i
        remembered = (rng.random((n, 1)) >= cumulative[current, step, :-1]).sum(-1)
        result, fact = remembered, current * len(STEPS) + step
        if lemmas is not None:
            match = (lemmas.lefts == current[:, None]) & (lemmas.steps == step[:, None])
            found, where = match.any(1), match.argmax(1)[:, None]
            looked_up = np.take_along_axis(lemmas.results, where, axis=1)[:, 0]
            result, fact = np.where(found, looked_up, result), np.where(found, -1, fact)
        ids[:, at] = targets[:, at] = current
        targets[:, at + 3], target_fact[:, at + 3] = result, fact
        wrong = rng.random(n) < config.wrong_prefix
        current = ids[:, at + 3] = np.where(wrong, rng.integers(NUM_DIGITS, size=n), result)
    ids[:, -3], ids[:, -2] = HASH, current
    targets[:, -3:] = ids[:, -3:]
    return ids, targets, target_fact
