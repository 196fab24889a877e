# SPDX-License-Identifier: Apache-2.0
"""What a teacher of the testbed may be shown in place of its reference: less of it, or wrong lines.

    import hints
    contexts.teacher = @first_lemmas
    first_lemmas.num = 1

A reference `#0 8+6=4 0*2=0 4*5=0` is an answer and a lemma for each step, in random order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import gin

from opsd_jax.data.record import Problem
from opsd_jax.testbed.world import NUM_DIGITS, STEPS, facts


def _shown(problem: Problem, lemmas: Sequence[str]) -> str:
    return f"{problem.question}|{' '.join([problem.solution.split()[0], *lemmas])}?"


@gin.configurable
def first_lemmas(problem: Problem, num: int = 0) -> str:
    """The answer and the first `num` lemmas; a context of another length than the reference."""
    return _shown(problem, problem.solution.split()[1:][:num])


@gin.configurable
def irrelevant_lemmas(problem: Problem, num: int = 1) -> str:
    """The first `num` lemmas replaced by true ones that the problem does not need."""
    lemmas = problem.solution.split()[1:]
    rng = random.Random(problem.id)
    needed = {lemma[:3] for lemma in lemmas}
    keys = [(left, i) for left in range(NUM_DIGITS) for i in range(len(STEPS))]
    others = [(left, i) for left, i in keys if f"{left}{STEPS[i]}" not in needed]
    drawn = rng.sample(others, num)
    return _shown(problem, [f"{a}{STEPS[i]}={facts()[a, i]}" for a, i in drawn] + lemmas[num:])


@gin.configurable
def wrong_lemmas(problem: Problem, share: float = 0.5) -> str:
    """Each lemma has a wrong result with this probability; the answer stays right."""
    rng = random.Random(problem.id)
    lemmas = []
    for lemma in problem.solution.split()[1:]:
        shift = rng.randrange(1, NUM_DIGITS) if rng.random() < share else 0
        lemmas.append(f"{lemma[:-1]}{(int(lemma[-1]) + shift) % NUM_DIGITS}")
    return _shown(problem, lemmas)
