# SPDX-License-Identifier: Apache-2.0
"""What a teacher can teach, from one look at it before training: numbers, a table, an advice.

Names of the numbers, each mean with its standard error as `<name>_se` beside it:

  <role>/accuracy          of one answer per problem, the role in its own context
  <role>/from_wrong        the second half of a wrong answer of the student's, written by the role:
                           how often the whole is right
  <role>/right_answer      where the student states a wrong answer, behind its own text:
                           P(right) / (P(right) + P(wrong)) of the first token in which they differ.
                           Hardly above the student's own: the teacher follows the text; near 1: it
                           says what it was told, whatever the text leads to
  gap/<rows>               divergence per token on the student's answers, all or right or wrong
  agreement/<rows>         share of their tokens where both roles' most probable token is the same
  first/<k>                share of the gap in the first k tokens; first/<k>_of_tokens of the tokens

Alphabet: B rollouts, C tokens of a completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from opsd_jax.data.attempts import RIGHT
from opsd_jax.evaluation.statistics import mean_and_error

Metrics = Mapping[str, float]
ROLES = ("student", "teacher")
ROWS = ("all", "right", "wrong")
FIRST = (1, 8, 32)
MEASURED = {
    "accuracy": "accuracy",
    "from_wrong": "right, from half a wrong answer",
    "right_answer": "right answer behind wrong text",
}
NATS = "nats per token"
_NO_GAP = 1e-3  # nats per token; the quickstart's has 0.1 to 0.3, one learned in full 0.01
_LEAK = 0.5  # of P(right answer) behind wrong text, above the student's own


def with_error(name: str, found: tuple[float, float]) -> dict[str, float]:
    """{name, name_se} of a mean and its standard error, which may be NaN."""
    return dict(zip((name, f"{name}_se"), found, strict=True))


def per_token(sums_B: Sequence[float] | np.ndarray, counts_B: np.ndarray) -> tuple[float, float]:
    """Mean per token, Σ_b s_b / Σ_b n_b, and its standard error over rollouts.

    The tokens of a rollout depend on each other, so rollouts are drawn and not tokens:
    se² = B / (B - 1) · Σ_b (s_b - mean · n_b)² / (Σ_b n_b)² (a ratio's, by linearisation).

    Args:
      sums_B: s_b, over the tokens of each rollout.
      counts_B: n_b, its tokens.
    """
    total, B = counts_B.sum(), len(counts_B)
    if not total:
        return math.nan, math.nan
    mean = np.sum(sums_B) / total
    if B == 1:
        return float(mean), math.nan
    error = math.sqrt(B / (B - 1) * np.sum((sums_B - mean * counts_B) ** 2)) / total
    return float(mean), float(error)


def gap_metrics(
    divergence_BC: ArrayLike, agreement_BC: ArrayLike, mask_BC: np.ndarray, rewards_B: np.ndarray
) -> dict[str, float]:
    """The gap between teacher and student: on which rollouts, and on which of their tokens.

    Args:
      divergence_BC: nats.
      agreement_BC: 1 where the most probable token is the same.
      mask_BC: bool, tokens of the completions.
      rewards_B: grades in [0, 1]; NaN of what is not graded. Right is a grade of at least 1/2.
    """
    found: dict[str, float] = {}
    counts = mask_BC.sum(1)
    rows = {
        "all": np.ones(len(counts), bool),
        "right": rewards_B >= RIGHT,
        "wrong": rewards_B < RIGHT,
    }
    for name, those in rows.items():
        found[f"num/{name}"] = float(those.sum())
        for what, values in (("gap", divergence_BC), ("agreement", agreement_BC)):
            sums = np.where(mask_BC, values, 0).sum(1)
            found |= with_error(f"{what}/{name}", per_token(sums[those], counts[those]))
    total = np.where(mask_BC, divergence_BC, 0).sum()
    for k in FIRST:
        first = mask_BC & (np.arange(mask_BC.shape[1]) < k)
        share = np.where(first, divergence_BC, 0).sum() / total if total > 0 else math.nan
        found[f"first/{k}"] = float(share)
        found[f"first/{k}_of_tokens"] = float(first.sum() / max(1, counts.sum()))
    return found | {"num/tokens": float(counts.sum())}


def role_metrics(what: str, values: Mapping[str, Sequence[float] | np.ndarray]) -> dict[str, float]:
    """Means over problems of both roles; nothing where no problem has such a value."""
    found: dict[str, float] = {}
    for role, each in values.items():
        if len(each):
            found |= with_error(f"{role}/{what}", mean_and_error(each))
    return found


def table(found: Metrics, divergence: str = "divergence", unit: str = NATS) -> str:
    """The numbers for a terminal: roles side by side, then the gap on all, right, wrong answers.

    Args:
      found: the numbers.
      divergence: its name.
      unit: of the gap; of a user's own divergence it is not known to be nats.
    """
    lines = [
        f"{found['num/all']:,.0f} answers of the student's, {found['num/tokens']:,.0f} tokens: "
        f"{found['num/right']:,.0f} right, {found['num/wrong']:,.0f} wrong"
    ]
    if rows := [what for what in MEASURED if f"teacher/{what}" in found]:
        lines += ["", _line("", *ROLES)]
        for what in rows:
            count = found.get(f"num/{what}", found["num/all"])
            name = MEASURED[what] + (f" ({count:,.0f})" if f"num/{what}" in found else "")
            lines.append(_line(name, *(_cell(found, f"{role}/{what}") for role in ROLES)))
    named = [name for name in ROWS if found[f"num/{name}"]]
    lines += ["", _line("", *(f"{name} answers" for name in named))]
    for what, words in (("gap", f"{divergence}, {unit}"), ("agreement", "same first choice")):
        lines.append(_line(words, *(_cell(found, f"{what}/{name}") for name in named)))
    shares = (
        f"{found[f'first/{k}']:.0%} in the first {k if k > 1 else 'token'}"
        f" ({found[f'first/{k}_of_tokens']:.0%} of the tokens)"
        for k in FIRST
    )
    if not math.isnan(found["first/1"]):
        lines += ["", f"of the divergence: {', '.join(shares)}"]
    if probes := [f"{n} {v:.3f}" for n, v in found.items() if n.startswith("probe/")]:
        lines.append(f"the task's own probes: {', '.join(probes)}")
    return "\n".join(lines)


def kind(found: Metrics) -> str:
    """The advice in a word: what speaks first against training so, else what to expect."""
    if not found["num/tokens"]:
        return "silent"
    if found["gap/all"] < _NO_GAP:
        return "no gap"
    ahead, error = difference(found, "accuracy")
    if ahead <= 2 * error:
        mends, mends_error = difference(found, "from_wrong")
        if mends > 2 * mends_error:
            return "mends"
        return "worse" if ahead < -2 * error else "no better"
    if difference(found, "right_answer")[0] > _LEAK:
        return "leak"
    if found["first/8"] > 0.5 > 2 * found["first/8_of_tokens"]:
        return "beginning"
    return "ungraded" if math.isnan(error) else "ahead"  # that of one answer, too


def difference(found: Metrics, what: str) -> tuple[float, float]:
    """(teacher − student, its standard error) of one of `MEASURED`; NaN where it is not known."""
    student, teacher = (found.get(f"{role}/{what}", math.nan) for role in ROLES)
    errors = (found.get(f"{role}/{what}_se", math.nan) for role in ROLES)
    return teacher - student, math.hypot(*errors)


ADVICE = {
    "silent": "The student says nothing: see both prompts with opsd data.",
    "no gap": (
        "Nothing to learn: the teacher is {gap:.1g} {unit} from the student; show it "
        "something more in contexts.teacher (opsd data prints both prompts)."
    ),
    "worse": (
        "The teacher is worse than the student, by {less:.2f}, and no better from half a wrong "
        "answer: training so unlearns what the student can; see whether the model can read what "
        "contexts.teacher shows (opsd data prints both prompts)."
    ),
    "no better": (
        "The teacher is no better than the student within two standard errors of {error:.2f}: what "
        "contexts.teacher shows does not help it by this grader; train only if a manner is to be "
        "learned, and grade that."
    ),
    "mends": (
        "The teacher's own answers are no better than the student's, but from half a wrong answer "
        "it is right more often, by {mends:.2f}: there is something to learn; a better reference "
        "would teach more."
    ),
    "leak": (
        "The teacher names the right answer behind wrong text ({told:.2f} more than the student): "
        "it says what it was told, and the student can learn to guess but not to know; word "
        "contexts.teacher so that it reasons for itself, or reward instead."
    ),
    "beginning": (
        "{first:.0%} of the gap is in the first 8 tokens: a manner of beginning, learned within a "
        "few steps from short rollouts; rollout.max_new_tokens may be lower."
    ),
    "ungraded": (
        "{graded} is graded, so whether the teacher is better is not known; it disagrees all "
        "along the student's own text."
    ),
    "ahead": (
        "The teacher is ahead, keeps to the student's own text and disagrees all along it: what "
        "on-policy self-distillation needs."
    ),
}


def advice(found: Metrics, unit: str = NATS) -> str:
    """One sentence, of `kind`."""
    ahead, error = difference(found, "accuracy")
    return ADVICE[kind(found)].format(
        gap=found["gap/all"],
        unit=unit,
        error=error,
        less=-ahead,
        mends=difference(found, "from_wrong")[0],
        told=difference(found, "right_answer")[0],
        first=found["first/8"],
        graded="No answer" if math.isnan(ahead) else "Only one answer",
    )


def _cell(found: Metrics, name: str) -> str:
    value, error = found.get(name, math.nan), found.get(f"{name}_se", math.nan)
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" + ("" if math.isnan(error) else f" ±{error:.3f}")


def _line(name: str, *cells: str) -> str:
    return f"{name:38}" + "".join(f"{cell:>18}" for cell in cells)
