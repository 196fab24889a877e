# SPDX-License-Identifier: Apache-2.0
"""The cases of forecast.py: a recipe, teachers and bases that differ, and studies that are done."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
RECIPE = (
    "divergence.clip = 'rescale'",
    "TestbedBase.warm_start = @WarmStart()",
    "evaluate.roles = ('student',)",
    "evaluate.greedy = False",
    "train.probes = ()",
)
UNGATED = "WarmStart.require_gate = False"
READS_MORE = ("WarmStart.answer_rows = 24", "WarmStart.feedback_rows = 24")
GROUPS = "train.group_size = 8"
Row = Mapping[str, Any]


class Case(NamedTuple):
    """What is special of a case.

    about: for the table; gin_file: below experiments/; bindings: over the recipe; same_as: the case
    that is the same one before the first step, which is all that the probe sees; ended: of a study
    of a pretrained model, which is its own recipe, what came of it.
    """

    about: str
    gin_file: str = "quickstart.gin"
    bindings: tuple[str, ...] = ()
    same_as: str = ""
    ended: Callable[[], Row] | None = None


def _hint(about: str, *bindings: str) -> Case:
    return Case(about, "ablations/hints.gin", bindings)


def _corpus(about: str, *bindings: str) -> Case:
    """A base that was never taught to go on from its own text when it has a reference."""
    lines = (UNGATED, "WarmStart.corpus = @WarmStartCorpus()", *bindings)
    return Case(about, bindings=lines)


def _loss(name: str) -> tuple[str, tuple[str, ...]]:
    """An ablation with the loss of its file, not of the recipe."""
    clip = "entry" if name == "entry_clip" else "none"
    return f"ablations/{name}.gin", (f"divergence.clip = '{clip}'",)


def ends(curves: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]) -> Row:
    """Held-out accuracy of each seed before, at its best and at the end.

    "error" is the standard error of the difference of two evaluations, of which `errors` has those
    of the first and the last of each seed.
    """
    return {
        "before": [float(curve[0]) for curve in curves],
        "best": [float(max(curve)) for curve in curves],
        "last": [float(curve[-1]) for curve in curves],
        "error": float(np.mean(np.linalg.norm(errors, axis=1))),
    }


def ended(before: float, best: float, last: float, num: int) -> Row:
    """What came of a study: shares of `num` held-out problems, of one seed."""
    errors = [math.sqrt(share * (1 - share) / num) for share in (before, last)]
    return ends([[before, best, last]], [errors])


def ended_rule(rule: str) -> Row:
    """What came of OPSD on a rule: the seeds of experiments/rules/runs.csv."""
    sys.path.append(str(HERE / "rules"))
    from results import KEPT, SE, by_method, read

    runs = by_method(read(HERE / "rules" / "runs.csv"), rule=rule, before="")["OPSD"]
    kept = [[line[KEPT] for line in each.evaluations] for each in runs]
    return ends(kept, [[each.evaluations[at][SE] for at in (0, -1)] for each in runs])


def _rule(name: str) -> Case:
    lines = (f"RuleQuestions.rule = {name!r}",)
    return Case(f"SmolLM2, rule: {name}", "rules/opsd.gin", lines, ended=partial(ended_rule, name))


CASES = {
    "quickstart": Case("the reference"),
    "warm_1": Case("the reference, another base", bindings=("WarmStart.seed = 1",)),
    "warm_2": Case("the reference, a third base", bindings=("WarmStart.seed = 2",)),
    "weak_600": Case("a base of 600 steps", bindings=(UNGATED, "WarmStart.num_steps = 600")),
    "weak_400": Case("a base of 400 steps", bindings=(UNGATED, "WarmStart.num_steps = 400")),
    "no_drop": _corpus("a base that never missed a lemma", "WarmStartCorpus.drop = 0.0"),
    "no_wrong": _corpus(
        "a base that never went on from an error", "WarmStartCorpus.wrong_prefix = 0.0"
    ),
    "leaky": Case("a leaky base", "ablations/leaky_teacher.gin"),
    "irrelevant_1": _hint(
        "1 of 3 lemmas irrelevant",
        "contexts.teacher = @irrelevant_lemmas",
        "irrelevant_lemmas.num = 1",
    ),
    "irrelevant_2": _hint(
        "2 of 3 lemmas irrelevant",
        "contexts.teacher = @irrelevant_lemmas",
        "irrelevant_lemmas.num = 2",
    ),
    "wrong_25": _hint(
        "a quarter of the lemmas wrong",
        "contexts.teacher = @wrong_lemmas",
        "wrong_lemmas.share = 0.25",
    ),
    "wrong_50": _hint(
        "half of the lemmas wrong", "contexts.teacher = @wrong_lemmas", "wrong_lemmas.share = 0.5"
    ),
    "wrong_100": _hint(
        "all lemmas wrong", "contexts.teacher = @wrong_lemmas", "wrong_lemmas.share = 1.0"
    ),
    "two_lemmas": _hint("the answer and 2 lemmas", "first_lemmas.num = 2"),
    "one_lemma": _hint("the answer and 1 lemma", "first_lemmas.num = 1"),
    "answer_alone": _hint("the answer alone"),
    "other_reference": Case("another problem's reference", "ablations/other_reference.gin"),
    "plain_context": Case("nothing", "ablations/plain_context.gin"),
    "unread_sibling": Case(
        "a sibling, which the base cannot read",
        bindings=("contexts.teacher = '{question}|{sibling}?'", GROUPS),
    ),
    "reference_8": Case("the reference, 8 problems a step", bindings=(*READS_MORE, GROUPS)),
    "sibling": Case(
        "a sibling, 8 problems a step",
        bindings=(*READS_MORE, GROUPS, "contexts.teacher = '{question}|{sibling}?'"),
    ),
    "feedback": Case(
        "feedback on wrong answers",
        bindings=(
            *READS_MORE,
            "contexts.teacher = '{question}|{feedback}?'",
            "train/ChainArithmetic.feedback = True",
        ),
    ),
    "live": Case("the reference, live weights", "ablations/teacher_live.gin", (), "quickstart"),
    "entry_clip": Case("the reference, the official clip", *_loss("entry_clip"), "quickstart"),
    "no_clip": Case("the reference, no clip", *_loss("forward_kl"), "quickstart"),
    "leaky_no_clip": Case("a leaky base, no clip", *_loss("leaky_teacher"), "leaky"),
    # The pretrained ones; of letters and sums the numbers of experiments/README.md.
    "rule_sentence": _rule("sentence"),
    "rule_json": _rule("json"),
    "rule_greeting": _rule("greeting"),
    "letters": Case(
        "SmolLM2, letters", "smollm2_letters.gin", ended=partial(ended, 0.183, 0.663, 0.570, 128)
    ),
    "sums": Case(
        "SmolLM2, sums", "smollm2_sums.gin", ended=partial(ended, 0.052, 0.068, 0.068, 96)
    ),
}


def lines(case: Case, out: Path) -> list[str]:
    if case.ended is not None:
        return [*case.bindings]
    return [*RECIPE, f"TestbedBase.cache_dir = '{out / 'bases'}'", *case.bindings]
