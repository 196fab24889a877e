# SPDX-License-Identifier: Apache-2.0
"""What a run reads before its first step: problems, models, held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from opsd_jax.data.grader_pool import GraderPool
from opsd_jax.data.notices import (
    asked_after,
    beyond_positions,
    equal_prompts,
    idle_switches,
    told_answers,
    unended_turns,
)
from opsd_jax.data.pipeline import make_batches
from opsd_jax.data.problems import ProblemSet
from opsd_jax.data.references import ReferenceRows
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.data.training_prompts import AfterPrompts, TrainingPrompts
from opsd_jax.evaluation.evaluate import ROLES, Evaluator
from opsd_jax.host.identity import (
    OWN_CODE,
    Identity,
    RowsDigest,
    digest,
    own_code_parts,
    problems_digest,
)
from opsd_jax.run.after_rollout import AfterRollout, after_rollout
from opsd_jax.run.assembly import Assembly, load_models
from opsd_jax.run.experiment import Base, Experiment
from opsd_jax.run.graded_rows import check_answers
from opsd_jax.sampling.slots import Sampler


class Inputs(NamedTuple):
    """All that a run reads: its data, its models, and what is made of them."""

    problems: ProblemSet
    base: Base
    external: Base | None
    parts: Assembly
    after: AfterRollout | None
    batches: Any  # a Grain iterator
    evaluator: Evaluator | None


def load_inputs(
    experiment: Experiment,
    workdir: Path,
    say: Callable[[str], None],
    identity: Identity,
    stack: ExitStack,
) -> Inputs:
    """Loads data and models, held to those that the run began with; says what is worth knowing.

    Args:
      experiment, workdir: as in `train`.
      say: told what happens meanwhile.
      identity: of the run.
      stack: what has to be closed after the run is entered there.
    """
    settings = experiment.train
    identity.check(OWN_CODE, own_code_parts(experiment.imports))
    # A wrong path in the data is told before a base is taught or loaded.
    cache = str(workdir / "problems")
    problems = settings.problems.load(cache)
    heldout = None if settings.heldout is None else settings.heldout.load(cache)
    base, external, parts = load_models(experiment, workdir, say, identity)
    after = after_rollout(experiment, problems, base.tokenizer, parts.mesh)
    batches, longest = training_batches(
        experiment, problems, base.tokenizer, say, identity, after.prompts if after else None
    )
    evaluator = None
    if heldout is not None:
        evaluator = make_evaluator(experiment, parts, base.tokenizer, heldout, stack)
        identity.check("train.heldout", heldout_parts(evaluator))
    tell_contamination(problems, evaluator, say)
    for notice in start_notices(experiment, parts, base.tokenizer, longest, evaluator):
        say(notice)
    return Inputs(problems, base, external, parts, after, batches, evaluator)


def training_batches(
    experiment: Experiment,
    problems: ProblemSet,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
    identity: Identity,
    after: AfterPrompts | None = None,
) -> tuple[Any, tuple[int, int]]:
    """Global batches as a Grain iterator whose position can be saved, and the longest prompts.

    Raises:
      UserError: they are not the problems that the run began with, too few of them fit, or one
        cannot be graded where grades are needed.
    """
    settings, contexts = experiment.train, experiment.training_contexts
    if settings.objective.needs_rewards:
        check_answers(problems, "train.objective")
    prompts = TrainingPrompts(contexts, tokenizer, problems, after)
    render: Any = prompts
    if settings.references:
        template, limit = settings.references.template, experiment.rollout.max_new_tokens
        stop_ids = experiment.rollout.stop_ids
        render = ReferenceRows(prompts, template, tokenizer, limit, contexts, stop_ids)
    num_problems = settings.batch_size // settings.group_size
    rows = RowsDigest(render)
    batches = make_batches(problems, rows, num_problems, settings.seed, prompts.narrow)
    parts = {"problems": problems_digest(problems), "prompts and references": rows.close()}
    identity.check("train.problems", parts)
    dropped = getattr(render, "dropped", ())
    if dropped:
        say(f"{len(dropped):,} problems left out: their reference exceeds rollout.max_new_tokens")
    if prompts.num_equal and experiment.asks_teacher and experiment.teacher.model is None:
        say(
            f"the teacher is asked the same as the student in {prompts.num_equal:,} of "
            f"{len(problems):,} problems: there is no privilege to distil; show {{solution}} or "
            "{answer} in contexts.teacher only"
        )
    return iter(batches), prompts.longest


def make_evaluator(
    experiment: Experiment,
    parts: Assembly,
    tokenizer: Tokenizer,
    problems: ProblemSet,
    stack: ExitStack,
) -> Evaluator:
    """The evaluator of an experiment on held-out problems; `stack` ends its graders."""
    sampler = Sampler(
        parts.model, tokenizer.pad_id, parts.mesh, parts.rules, experiment.evaluate.batch_size
    )
    return Evaluator(
        experiment.evaluate,
        experiment.contexts,
        parts.method.rollout,
        sampler,
        tokenizer,
        problems,
        stack.enter_context(
            GraderPool(problems.grade, num_workers=experiment.train.grader_workers)
        ),
    )


def start_notices(
    experiment: Experiment,
    parts: Assembly,
    tokenizer: Tokenizer,
    longest: tuple[int, int] | None,
    evaluator: Evaluator | None,
) -> list[str]:
    """What is worth knowing before anything is computed, a sentence each (`data.notices`).

    Args:
      longest: tokens of the student's and the teacher's longest training prompt; None for an
        evaluation alone.
    """
    contexts, rollout = experiment.contexts, parts.method.rollout
    max_positions = parts.model.config.max_positions
    roles: list[str] = []
    told: list[str] = []
    if evaluator is not None or experiment.train.completions.generates:
        told += unended_turns(tokenizer, rollout.stop_ids)
    if longest is not None:
        reasoner = parts.method.reasoner
        roles += ["student", "analysis" if reasoner else "teacher"]
        num_new = rollout.max_new_tokens
        read = reasoner.settings.max_new_tokens + len(reasoner.transition_ids) if reasoner else 0
        for role, tokens, new in (
            ("student", longest[0], num_new),
            ("teacher", longest[1], num_new + read),
        ):
            lower = f"contexts.{role}_max_tokens or rollout.max_new_tokens"
            told += beyond_positions(role, tokens, new, max_positions, lower)
    if evaluator is not None:
        num_new = evaluator.settings.max_new_tokens
        for role, prompts in evaluator.prompts.items():
            context, thinking = ROLES[role]
            roles += [context] if thinking is None else []
            tokens = max(len(prompt.ids) for prompt in prompts)
            lower = "evaluate.max_new_tokens or the budgets of contexts"
            told += beyond_positions(f"evaluated {role}", tokens, num_new, max_positions, lower)
        asked = {role: [p.ids for p in prompts] for role, prompts in evaluator.prompts.items()}
        told += equal_prompts(asked) + asked_after(contexts, evaluator.config.roles)
    return told + told_answers(contexts, roles) + idle_switches(contexts, tokenizer, roles)


def heldout_parts(evaluator: Evaluator) -> dict[str, str]:
    """What is evaluated on: all problems, and the prompts of each role in order."""
    prompts = {
        f"prompts of {role}": digest(json.dumps([(p.problem.id, p.ids) for p in prompts]))
        for role, prompts in evaluator.prompts.items()
    }
    return {"problems": problems_digest(evaluator.problems)} | prompts


def tell_contamination(
    problems: ProblemSet, evaluator: Evaluator | None, say: Callable[[str], None]
) -> None:
    """Says how many held-out problems have a question that is trained on too, if any has."""
    if evaluator is None:
        return
    trained = {" ".join(problems[i].question_text.split()) for i in range(len(problems))}
    asked = {p.problem.id: p.problem for prompts in evaluator.prompts.values() for p in prompts}
    shared = sum(" ".join(problem.question_text.split()) in trained for problem in asked.values())
    if shared:
        say(
            f"{shared:,} of {len(asked):,} held-out problems are trained on too (the same "
            "question): held-out accuracy is in part recall"
        )
