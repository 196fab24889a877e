# SPDX-License-Identifier: Apache-2.0
"""`opsd train`: loads the parts of a run, restores its checkpoint if it has one, and loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from opsd_jax.data.grader_pool import GraderPool
from opsd_jax.data.problems import ProblemSet
from opsd_jax.errors import UserError
from opsd_jax.evaluation.runs import ACCURACY, Run, read_run
from opsd_jax.host.bucket_checkpoint import checkpoints_of
from opsd_jax.host.checkpoint import Checkpoints
from opsd_jax.host.chips import compile_clock
from opsd_jax.host.compilation_cache import kept_programs
from opsd_jax.host.config_text import first_difference
from opsd_jax.host.files import read_metrics, read_text, write_whole
from opsd_jax.host.goodput import Goodput
from opsd_jax.host.guard import VERDICT, Guard, replayed
from opsd_jax.host.heap import compilers_memory_returned
from opsd_jax.host.identity import OWN_CODE, identity_of, own_code_parts
from opsd_jax.host.lock import only_writer
from opsd_jax.host.metrics import MetricWriters, require_packages
from opsd_jax.host.pod import connected_mesh, wait_for_all
from opsd_jax.host.preemption import Preemption
from opsd_jax.host.profile_window import ProfileWindow
from opsd_jax.host.progress import ProgressLine
from opsd_jax.host.stage import local
from opsd_jax.host.watchdog import Watchdog
from opsd_jax.method.train_step import TrainState
from opsd_jax.model.sharding import num_bytes
from opsd_jax.run.assembly import (
    Assembly,
    check_batch,
    external_variables,
    frozen_variables,
    initial_state,
)
from opsd_jax.run.experiment import Base, Experiment
from opsd_jax.run.graded_rows import GradeAll
from opsd_jax.run.inputs import load_inputs
from opsd_jax.run.loop import Loop, saved
from opsd_jax.run.meter import Meter, Throughput
from opsd_jax.run.pins import pinned


def train(
    experiment: Experiment,
    config_text: str,
    workdir: str | Path,
    on_stop: Callable[[], None] = lambda: None,
    progress: ProgressLine | None = None,
) -> dict[str, float]:
    """Runs or resumes an experiment in `workdir`; returns the last evaluation's metrics.

    Args:
      experiment: what to run.
      config_text: its operative config, kept as workdir/config.gin.
      workdir: made if missing; if it holds a checkpoint of the same config, the run goes on. A
        folder, or "gs://BUCKET/RUN" or "s3://BUCKET/RUN".
      on_stop: called once a run that was asked to stop before its last step is saved.
      progress: what shows how far it is; None is a line on the terminal.

    Raises:
      UserError: another command or another config in the workdir, data or model that do not
        fit, a full disk, or a loss that is not finite.
    """
    workdir = local(workdir)
    with ExitStack() as stack:
        line = progress or ProgressLine(experiment.train.num_steps)
        progress = stack.enter_context(line)
        stack.enter_context(only_writer(workdir, progress.note))
        experiment, config_text = pinned(experiment, config_text, workdir)
        stack.enter_context(kept_programs(experiment.train.compilation_cache, workdir))
        stack.enter_context(compilers_memory_returned())
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
    require_packages(settings.tensorboard, settings.wandb)
    kept = settings.keep_checkpoints
    checkpoints = stack.enter_context(checkpoints_of(workdir, kept, ACCURACY, say))
    identity = identity_of(workdir, checkpoints.meta())
    identity.tell_versions(say)
    read = load_inputs(experiment, workdir, say, identity, stack)
    parts, problems = read.parts, read.problems
    wait_for_all()
    state, counted, start = start_or_resume(
        checkpoints, parts, read.batches, read.base, read.external, settings.seed
    )
    write_config(workdir, config_text)
    say(
        f"{num_bytes(state.trainable) // 4:,} trainable parameters, {len(problems):,} "
        f"problems, mesh {dict(mesh.shape)}, from step {start}"
    )
    if start >= settings.num_steps:
        say(f"nothing is left to do: train.num_steps = {settings.num_steps}")
    goodput = Goodput(workdir, start, counted["kept_s"]) if jax.process_index() == 0 else None
    loop = Loop(
        experiment,
        workdir,
        parts,
        read.base.tokenizer,
        problems,
        grading(problems, settings.grader_workers, stack),
        read.evaluator,
        make_writers(experiment, workdir, start, config_text, stack),
        checkpoints,
        progress,
        guard_of(experiment, workdir, start),
        stack.enter_context(ProfileWindow(workdir, settings.profile_steps, say)),
        Meter(Throughput(parts), compiling, counted["kept_s"], goodput),
        stack.enter_context(Watchdog(60 * settings.hang_minutes)),
        tokens_total=counted["tokens_total"],
        meta={"config": config_text} | identity.meta(),
        after=read.after,
    )
    return loop, state, read.batches, start


def train_whole(experiment: Experiment, config_text: str, workdir: str | Path) -> Run:
    """`train` for scripts of many runs: the finished run, read back.

    Of one that was finished before, only the files are read: no model and no problems, which may
    be others by now.

    Raises:
      UserError: also when the run ended before its last step, or its metrics are gone, so that no
        script goes on.
    """
    workdir, name = local(workdir), str(workdir)
    if not is_finished(experiment, config_text, workdir):
        train(experiment, config_text, workdir)
    run, step = read_run(workdir), saved_step(workdir)
    if step < experiment.train.num_steps:
        if (workdir / VERDICT).exists():
            raise UserError(f"{name} was ended by its guard after step {step}: see {VERDICT} there")
        raise UserError(
            f"{name} was stopped after step {step}; the same command goes on from there"
        )
    if not run.history:
        raise UserError(
            f"{name} is trained to step {step}, but has no line in metrics.jsonl: put the file "
            "back, or name another workdir"
        )
    return run


def is_finished(experiment: Experiment, config_text: str, workdir: Path) -> bool:
    """Whether a workdir holds this experiment, trained to its last step, with nothing to conclude.

    Raises:
      UserError: it holds another experiment, or one that other code was imported for.
    """
    step = saved_step(workdir)
    if step < experiment.train.num_steps or not (workdir / "config.gin").exists():
        return False
    check_config(workdir, pinned(experiment, config_text, workdir)[1])
    identity = identity_of(workdir, checkpoints_of(workdir).meta())
    identity.check(OWN_CODE, own_code_parts(experiment.imports))
    return not guard_of(experiment, workdir, step).ends_the_run


def saved_step(workdir: Path) -> int:
    """The step of the latest checkpoint, 0 without one: metrics.jsonl need not have every step."""
    return max(checkpoints_of(workdir).steps(), default=0)


def check_config(workdir: Path, config_text: str) -> None:
    """Raises a UserError if the workdir holds checkpoints or metrics of another experiment."""
    path = workdir / "config.gin"
    text = checkpoints_of(workdir).meta().get("config")
    if text is None and path.exists() and read_metrics(workdir / "metrics.jsonl"):
        text = read_text(path)
    difference = None if text is None else first_difference(text, config_text)
    if difference is not None:
        raise UserError(
            f"{path} belongs to another experiment: {difference}; use another workdir, or "
            "the old setting"
        )


def write_config(workdir: Path, config_text: str) -> None:
    """Writes config.gin; only now, when all that can be wrong with the input has been seen."""
    if jax.process_index() == 0:
        write_whole(workdir / "config.gin", config_text)


def grading(problems: ProblemSet, num_workers: int, stack: ExitStack) -> GradeAll:
    """(problems, completions) -> grades, in worker processes that `stack` will end."""
    return stack.enter_context(GraderPool(problems.grade, num_workers=num_workers)).grade


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
    lines = read_metrics(workdir / "metrics.jsonl") if start else []
    return replayed(experiment.guard, (line for line in lines if line["step"] <= start))


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
