# SPDX-License-Identifier: Apache-2.0
"""What a model of the testbed believes: about single facts, and after a wrong step.

The wrong-prefix probe predicts whether self-distillation will work. The first result of a response
is forced to be wrong, and the model is asked for the second. Then
  ok    is the probability of what follows from that prefix, and
  leak  the probability of the reference's second result, which does not follow.
A good teacher, with the reference in its context, is as good here as the student without it. One
that jumps back to the reference (leaks) teaches the student to guess what it cannot know.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.data.problems import Problem
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.testbed.world import (
    STEPS,
    ChainTask,
    ChainTokenizer,
    facts,
    own_notation,
    true_results,
)

NUM_PROBES = 512

CONTEXTS = {
    "reference": lambda problem: problem.solution,
    "answer": lambda problem: own_notation(problem.question_text),
    "feedback": lambda problem: own_notation(problem.question_text).split(";")[0],
}


def wrong_prefix_probe(
    model: Decoder, student: dict, teacher: dict | None, tokenizer: Any
) -> dict[str, float]:
    """Wrong-prefix probe of both roles and the student's belief in weak and strong facts.

    Args:
      model: the decoder.
      student: variables of the student, who sees the question.
      teacher: variables of the teacher, who also sees the reference; None leaves it out.
      tokenizer: of the testbed; the probe knows no other notation.

    Returns:
      probe/student/ok, probe/student/leak, probe/teacher/ok, probe/teacher/leak, and
      probe/weak, probe/strong: the mean probability of the right result.
    """
    task = ChainTask()
    metrics: dict[str, float] = {}
    for role, variables in (("student", student), ("teacher", teacher)):
        if variables is None:
            continue
        shown = "reference" if role == "teacher" else "nothing"
        ok, leak = after_wrong_step(model, variables, tokenizer, task, shown)
        metrics |= {f"probe/{role}/ok": ok, f"probe/{role}/leak": leak}
    belief = fact_beliefs(model, student, tokenizer, task)
    metrics["probe/weak"] = float(belief[task.is_weak].mean())
    metrics["probe/strong"] = float(belief[~task.is_weak].mean())
    return metrics


def prompt_with(shown: str, problem: Problem) -> str:
    """The prompt of a problem with nothing or one of `CONTEXTS`."""
    question = problem.question_text
    return f"{question}?" if shown == "nothing" else f"{question}|{CONTEXTS[shown](problem)}?"


def after_wrong_step(
    model: Decoder,
    variables: dict,
    tokenizer: ChainTokenizer,
    task: ChainTask,
    shown: str,
    num_probes: int = NUM_PROBES,
) -> tuple[float, float]:
    """Mean (ok, leak) over held-out problems whose first result was replaced by a wrong one.

    `shown` is "nothing" or one of `CONTEXTS`.
    """
    rng = np.random.RandomState(0)  # Its stream is frozen, so the probe never changes.
    rows, right, reference = [], [], []
    for index in _heldout(task, num_probes):
        left, steps = task.problem(index)
        results = true_results(left, steps)
        wrong = (results[0] + rng.randint(1, 10)) % 10
        problem, (first, second) = task.record(index), (STEPS[s] for s in steps[:2])
        prompt = prompt_with(shown, problem)
        rows.append(tokenizer.encode(f"{prompt}{left}{first}={wrong};{wrong}{second}="))
        right.append(facts()[wrong, steps[1]])
        reference.append(results[1])
    probs = _next_token_probs(model, variables, np.array(rows))
    each = np.arange(len(rows))
    return float(probs[each, right].mean()), float(probs[each, reference].mean())


def fact_beliefs(
    model: Decoder, variables: dict, tokenizer: ChainTokenizer, task: ChainTask
) -> np.ndarray:
    """[10, 20] probability of the right result of every fact, asked as a problem's first step."""
    rng = np.random.RandomState(0)
    rows = []
    for left, step in np.ndindex(*facts().shape):
        rest = "".join(STEPS[s] for s in rng.randint(len(STEPS), size=task.num_ops - 1))
        first = f"{left}{STEPS[step]}"
        rows.append(tokenizer.encode(f"{first}{rest}?{first}="))
    probs = _next_token_probs(model, variables, np.array(rows))
    return probs[np.arange(len(rows)), facts().ravel()].reshape(facts().shape)


def corrected_belief(
    model: Decoder, variables: dict, tokenizer: ChainTokenizer, task: ChainTask
) -> float:
    """Mean probability of the right result of a weak fact behind right lines, where it is shown.

    That is how a teacher is asked that sees what an answer's first wrong line should have been.
    """
    probs = []
    for line in range(task.num_ops):
        rows, right = [], []
        for index in _heldout(task, NUM_PROBES):
            left, steps = task.problem(index)
            results = true_results(left, steps)
            if not task.is_weak[(left, *results)[line], steps[line]]:
                continue
            question = task.record(index).question_text
            lines = own_notation(question).split(";")
            told = ";".join(lines[:line] + [lines[line][:-1]])
            rows.append(tokenizer.encode(f"{question}|{lines[line]}?{told}"))
            right.append(results[line])
        found = _next_token_probs(model, variables, np.array(rows))
        probs.append(found[np.arange(len(rows)), right])
    return float(np.concatenate(probs).mean())


def _heldout(task: ChainTask, num: int) -> np.ndarray:
    """Numbers of `num` held-out problems, from all over them."""
    return np.flatnonzero(task.heldout)[:: max(1, task.heldout.sum() // num)][:num]


def _next_token_probs(model: Decoder, variables: dict, ids_BT: np.ndarray) -> np.ndarray:
    """[B, V] next-token probabilities of rows of one length."""
    return np.asarray(_last_probs(model, variables, jnp.asarray(ids_BT, jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _last_probs(model: Decoder, variables: dict, ids_BT: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    hidden, _ = model.apply(variables, ids_BT, positions)
    logits = head_logits(output_head(variables["params"], model.config), hidden[:, -1])
    return jax.nn.softmax(logits, axis=-1)
