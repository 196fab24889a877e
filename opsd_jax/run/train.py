# SPDX-License-Identifier: Apache-2.0
"""`opsd train`: loads the parts of a run, restores its checkpoint if it has one, and loops."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

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
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import ROLES, Evaluator
from opsd_jax.evaluation.runs import Run, read_run
from opsd_jax.host.checkpoint import Checkpoints
from opsd_jax.host.chips import compile_clock
from opsd_jax.host.compilation_cache import kept_programs
from opsd_jax.host.config_text import first_difference
from opsd_jax.host.files import read_metrics, read_text, require_mounted, write_whole
from opsd_jax.host.goodput import Goodput
from opsd_jax.host.guard import Guard
from opsd_jax.host.identity import (
    OWN_CODE,
    Identity,
    RowsDigest,
    digest,
    identity_of,
    own_code_parts,
    problems_digest,
)
from opsd_jax.host.lock import only_writer
from opsd_jax.host.metrics import MetricWriters
from opsd_jax.host.pod import connected_mesh, wait_for_all
from opsd_jax.host.preemption import Preemption
from opsd_jax.host.profile_window import ProfileWindow
from opsd_jax.host.progress import ProgressLine
from opsd_jax.host.watchdog import Watchdog
from opsd_jax.method.train_step import TrainState
from opsd_jax.model.sharding import check_batch, num_bytes
from opsd_jax.run.after_rollout import after_rollout
from opsd_jax.run.assembly import (
    Assembly,
    external_variables,
    frozen_variables,
    initial_state,
    load_models,
)
from opsd_jax.run.experiment import Base, Experiment
from opsd_jax.run.graded_rows import GradeAll, check_answers
from opsd_jax.run.loop import BEST_METRIC, Loop, saved
from opsd_jax.run.meter import Meter, Throughput
from opsd_jax.run.pins import pinned
from opsd_jax.sampling.slots import Sampler


def train(
    experiment: Experiment,
    config_text: str,
    workdir: str | Path,
    on_stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Runs or resumes an experiment in `workdir`; returns the last evaluation's metrics.

    Args:
      experiment: what to run.
      config_text: its operative config, kept as workdir/config.gin.
      workdir: made if missing; if it holds a checkpoint of the same config, the run goes on.
      on_stop: called once a run that was asked to stop before its last step is saved.

    Raises:
      UserError: another command or another config in the workdir, data or model that do not
        fit, a full disk, or a loss that is not finite.
    """
    require_mounted(workdir, "the workdir")
    workdir = Path(workdir)
    with ExitStack() as stack:
        progress = stack.enter_context(ProgressLine(experiment.train.num_steps))
        stack.enter_context(only_writer(workdir, progress.note))
        experiment, config_text = pinned(experiment, config_text, workdir)
        stack.enter_context(kept_programs(experiment.train.compilation_cache, workdir))
        check_config(workdir, config_text)
        loop, state, batches, start = prepare(experiment, config_text, workdir, progress, stack)
        loop.run(state, batches, start, stack.enter_context(Preemption()))
    if loop.stopped:
        on_stop()
    return loop.evaluated


def prepare(
    experiment: Experiment,
    config_text: str,
    workdir: Path,
    progress: ProgressLine,
    stack: ExitStack,
) -> tuple[Loop, TrainState, Any, int]:
    """Loads all that a run is made of and restores what it left: (loop, state, batches, step).

    config.gin is written last, when all that can be wrong with the input has been seen.

    Args:
      experiment, config_text, workdir: as in `train`.
      progress: told what happens meanwhile.
      stack: what has to be closed after the run is entered there.
    """
    settings, say = experiment.train, progress.note
    compiling = stack.enter_context(compile_clock())
    mesh = connected_mesh(experiment.mesh)
    check_batch(settings.batch_size, settings.num_micro_batches, mesh)
    folder, kept = workdir / "checkpoints", settings.keep_checkpoints
    checkpoints = stack.enter_context(Checkpoints(folder, kept, BEST_METRIC, say))
    identity = identity_of(workdir, checkpoints.meta())
    identity.tell_versions(say)
    identity.check(OWN_CODE, own_code_parts(experiment.imports))
    # A wrong path in the data is told before a base is taught or loaded.
    cache = str(workdir / "problems")
    problems = settings.problems.load(cache)
    heldout = None if settings.heldout is None else settings.heldout.load(cache)
    base, external, parts = load_models(experiment, workdir, say, identity)
    after = after_rollout(experiment, problems, base.tokenizer, mesh)
    built_later = None if after is None else after.prompts
    batches, longest = training_batches(
        experiment, problems, base.tokenizer, say, identity, built_later
    )
    evaluator = None
    if heldout is not None:
        evaluator = make_evaluator(experiment, parts, base.tokenizer, heldout, stack)
        identity.check("train.heldout", heldout_parts(evaluator))
    tell_contamination(problems, evaluator, say)
    for notice in start_notices(experiment, parts, base.tokenizer, longest, evaluator):
        say(notice)
    wait_for_all()
    state, counted, start = start_or_resume(
        checkpoints, parts, batches, base, external, settings.seed
    )
    write_config(workdir, config_text)
    say(
        f"{num_bytes(state.trainable) // 4:,} trainable parameters, {len(problems):,} "
        f"problems, mesh {dict(mesh.shape)}, from step {start}"
    )
    goodput = Goodput(workdir, start) if jax.process_index() == 0 else None
    loop = Loop(
        experiment,
        workdir,
        parts,
        base.tokenizer,
        problems,
        grading(problems, settings.grader_workers, stack),
        evaluator,
        make_writers(experiment, workdir, start, config_text, stack),
        checkpoints,
        progress,
        guard_of(experiment, workdir, start),
        stack.enter_context(ProfileWindow(workdir, settings.profile_steps, say)),
        Meter(Throughput(parts), compiling, counted["kept_s"], goodput),
        stack.enter_context(Watchdog(60 * settings.hang_minutes)),
        tokens_total=counted["tokens_total"],
        meta={"config": config_text} | identity.meta(),
        after=after,
    )
    return loop, state, batches, start


def train_whole(experiment: Experiment, config_text: str, workdir: Path) -> Run:
    """`train` for scripts of many runs: the finished run, read back.

    Raises:
      UserError: also when the run was stopped before its last step, so that no script goes on.
    """
    train(experiment, config_text, workdir)
    run = read_run(workdir)
    if run.last_step < experiment.train.num_steps:
        raise UserError(
            f"{workdir} was stopped after step {run.last_step}; the same command goes on from there"
        )
    return run


def check_config(workdir: Path, config_text: str) -> None:
    """Raises a UserError if the workdir holds checkpoints or metrics of another experiment."""
    path = workdir / "config.gin"
    text = Checkpoints(workdir / "checkpoints").meta().get("config")
    if text is None and path.exists() and read_metrics(workdir / "metrics.jsonl"):
        text = read_text(path)
    difference = None if text is None else first_difference(text, config_text)
    if difference is not None:
        raise UserError(
            f"{path} belongs to another experiment: {difference}; use another --workdir, or "
            "the old setting"
        )


def write_config(workdir: Path, config_text: str) -> None:
    """Writes config.gin; only now, when all that can be wrong with the input has been seen."""
    if jax.process_index() == 0:
        write_whole(workdir / "config.gin", config_text)


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
    return iter(batches), prompts.longest


def grading(problems: ProblemSet, num_workers: int, stack: ExitStack) -> GradeAll:
    """(problems, completions) -> grades, in worker processes that `stack` will end."""
    return stack.enter_context(GraderPool(problems.grade, num_workers=num_workers)).grade


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


def make_writers(
    experiment: Experiment, workdir: Path, start: int, config_text: str, stack: ExitStack
) -> MetricWriters:
    """Where the metrics go; what lies behind the step that a run resumes from is dropped."""
    settings = experiment.train
    return stack.enter_context(
        MetricWriters(
            workdir,
            settings.tensorboard,
            settings.wandb,
            resumed_step=start or None,
            config=config_text,
        )
    )


def guard_of(experiment: Experiment, workdir: Path, start: int) -> Guard:
    """The guard of a run, which has seen what a resumed run wrote up to its step.

    Process 0 drops the later lines, maybe after another process has read them here.
    """
    guard = Guard(experiment.guard)
    for line in read_metrics(workdir / "metrics.jsonl") if start else []:
        if line["step"] <= start:
            guard.see(line)
    return guard


def start_or_resume(
    checkpoints: Checkpoints,
    parts: Assembly,
    batches: Any,
    base: Base,
    external: Base | None,
    seed: int,
) -> tuple[TrainState, dict[str, Any], int]:
    """(state, what was counted so far, finished steps); `batches` is set to its position."""
    counted = {"tokens_total": 0, "kept_s": 0.0}
    teacher_params = external and external.params
    if not checkpoints.steps():
        return initial_state(parts, base.params, seed, teacher_params), counted, 0
    step, state, meta = checkpoints.restore(saved(parts.abstract), batches)
    frozen = frozen_variables(parts, base.params)
    teacher = external_variables(parts, teacher_params)
    state = dataclasses.replace(state, frozen=frozen, external=teacher)
    return state, {name: meta.get(name, value) for name, value in counted.items()}, step
