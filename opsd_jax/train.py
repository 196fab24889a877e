# SPDX-License-Identifier: Apache-2.0
"""The loop: it places the parts of a run, and then only calls them.

Each step is dispatched before the numbers of the step before it are read, so the device never
waits for grading, logging or the disk. A step's line in metrics.jsonl is written before the
checkpoint of that step; a run that is killed anywhere goes on from its last whole checkpoint,
with the same batches, keys and numbers.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from opsd_jax.checkpoint import Checkpoints
from opsd_jax.completions import References
from opsd_jax.contexts import TrainingPrompts
from opsd_jax.errors import UserError
from opsd_jax.evaluate import Evaluator
from opsd_jax.experiment import (
    Assembly,
    Base,
    Experiment,
    assemble,
    external_variables,
    initial_state,
    initial_variables,
    load_teacher,
    split,
    teacher_variables,
)
from opsd_jax.files import read_json_lines, write_whole
from opsd_jax.generations import Generation
from opsd_jax.grader_pool import GraderPool
from opsd_jax.guard import Guard, forget_verdict, write_verdict
from opsd_jax.metrics import MetricWriters
from opsd_jax.operative_config import first_difference
from opsd_jax.pipeline import PipelineConfig, make_batches
from opsd_jax.preemption import Preemption
from opsd_jax.problems import ProblemSet
from opsd_jax.progress import ProgressLine
from opsd_jax.references import ReferenceRows
from opsd_jax.sharding import make_mesh, num_bytes, shard_batch
from opsd_jax.slots import Sampler
from opsd_jax.stepping import (
    Grade,
    Taken,
    check_answers,
    grade_metrics,
    make_step,
    rollout_timer,
    row_grader,
    to_batch,
)
from opsd_jax.tokenizer import Tokenizer
from opsd_jax.train_step import TrainState

BEST_METRIC = "eval/student/accuracy"


class Step(NamedTuple):
    """A dispatched step whose numbers nobody has read yet."""

    number: int
    taken: Taken
    problems: np.ndarray


def train(experiment: Experiment, config_text: str, workdir: str | Path) -> dict[str, float]:
    """Runs or resumes an experiment in `workdir`; returns the last evaluation's metrics.

    Args:
      experiment: what to run.
      config_text: its operative config, kept as workdir/config.gin.
      workdir: made if missing; if it holds a checkpoint of the same config, the run goes on.

    Raises:
      UserError: another config in the workdir, data or model that do not fit, a full disk, or
        a loss that is not finite.
    """
    workdir = Path(workdir)
    check_config(workdir, config_text)
    settings = experiment.train
    mesh = make_mesh(experiment.mesh)
    with ExitStack() as stack:
        progress = stack.enter_context(ProgressLine(settings.num_steps))
        base = settings.model.load(
            mesh, experiment.mesh.rules, str(workdir / "base"), progress.note
        )
        external = load_teacher(
            experiment, base.tokenizer, mesh, str(workdir / "base"), progress.note
        )
        parts = assemble(
            experiment, base.config, base.tokenizer, mesh, external and external.config
        )
        problems = settings.problems.load(str(workdir / "problems"))
        batches = training_batches(experiment, problems, base.tokenizer, progress.note)
        evaluator = make_evaluator(experiment, parts, base.tokenizer, workdir, stack)
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints", settings.keep_checkpoints, BEST_METRIC, progress.note
            )
        )
        state, tokens, start = start_or_resume(
            checkpoints, parts, batches, base, external, settings.seed
        )
        write_config(workdir, config_text)
        progress.note(
            f"{num_bytes(state.trainable) // 4:,} trainable parameters, {len(problems):,} "
            f"problems, mesh {dict(mesh.shape)}, from step {start}"
        )
        writers = stack.enter_context(
            MetricWriters(
                workdir,
                settings.tensorboard,
                settings.wandb,
                resumed_step=start or None,
                config=config_text,
            )
        )
        guard = Guard(experiment.guard)
        for line in read_json_lines(workdir / "metrics.jsonl", "step") if start else []:
            guard.see(line)
        loop = Loop(
            experiment,
            workdir,
            parts,
            base.tokenizer,
            problems,
            grading(problems, settings.grader_workers, stack),
            evaluator,
            writers,
            checkpoints,
            progress,
            guard,
            tokens_total=tokens,
            meta={"config": config_text},
        )
        preemption = stack.enter_context(Preemption())
        return loop.run(state, batches, start, preemption)


def check_config(workdir: Path, config_text: str) -> None:
    """Raises a UserError if the workdir holds checkpoints of another experiment."""
    path = workdir / "config.gin"
    if not path.exists() or not Checkpoints(workdir / "checkpoints").steps():
        return
    difference = first_difference(path.read_text(), config_text)
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
) -> Any:
    """This process's batches as a Grain iterator whose position can be saved.

    Raises:
      UserError: too few problems fit, or one cannot be graded where grades are needed.
    """
    settings, contexts = experiment.train, experiment.contexts
    if settings.objective.needs_rewards:
        check_answers(problems)
    render: Any = TrainingPrompts(contexts, tokenizer, problems)
    if isinstance(settings.completions, References):
        template, limit = settings.completions.template, experiment.rollout.max_new_tokens
        render = ReferenceRows(render, template, tokenizer, limit, contexts.too_long)
    num_problems = settings.batch_size // settings.group_size
    config = PipelineConfig(batch_size=num_problems, seed=settings.seed)
    hosts = {"host": jax.process_index(), "num_hosts": jax.process_count()}
    batches = make_batches(problems, render, config, **hosts)
    dropped = getattr(render, "dropped", ())
    if dropped:
        say(f"{len(dropped):,} problems left out: their reference exceeds rollout.max_new_tokens")
    return iter(batches)


def grading(problems: ProblemSet, num_workers: int, stack: ExitStack) -> Grade:
    """(problems, completions) -> rewards, in worker processes that `stack` will end."""
    pool = stack.enter_context(GraderPool(problems.grade, num_workers=num_workers))
    return lambda asked, texts: [grade.value for grade in pool.grade(asked, texts)]


def make_evaluator(
    experiment: Experiment,
    parts: Assembly,
    tokenizer: Tokenizer,
    workdir: Path,
    stack: ExitStack,
) -> Evaluator | None:
    """The evaluator of an experiment, None without held-out problems."""
    settings = experiment.train
    if settings.heldout is None:
        return None
    problems = settings.heldout.load(str(workdir / "problems"))
    sampler = Sampler(
        parts.model, tokenizer, parts.mesh, parts.rules, experiment.evaluate.batch_size
    )
    return Evaluator(
        experiment.evaluate,
        experiment.contexts,
        parts.method.rollout,
        sampler,
        problems,
        stack.enter_context(GraderPool(problems.grade, num_workers=settings.grader_workers)),
    )


def start_or_resume(
    checkpoints: Checkpoints,
    parts: Assembly,
    batches: Any,
    base: Base,
    external: Base | None,
    seed: int,
) -> tuple[TrainState, int, int]:
    """(state, tokens generated so far, finished steps); `batches` is set to its position."""
    teacher_params = external and external.params
    if not checkpoints.steps():
        return initial_state(parts, base.params, seed, teacher_params), 0, 0
    step, state, meta = checkpoints.restore(saved(parts.abstract), batches)
    frozen = split(initial_variables(parts, base.params, seed))[1]
    teacher = external_variables(parts, teacher_params)
    state = dataclasses.replace(state, frozen=frozen, external=teacher)
    return state, meta["tokens_total"], step


def saved(state: TrainState) -> TrainState:
    """What a checkpoint holds: all but frozen models, which their sources give again."""
    return dataclasses.replace(state, frozen={}, external={})


@dataclasses.dataclass
class Loop:
    """Dispatches steps and reports on them."""

    experiment: Experiment
    workdir: Path
    parts: Assembly
    tokenizer: Tokenizer
    problems: ProblemSet
    grade: Grade
    evaluator: Evaluator | None
    writers: MetricWriters
    checkpoints: Checkpoints
    progress: ProgressLine
    guard: Guard
    tokens_total: int
    meta: dict[str, Any]

    def __post_init__(self):
        self._grade_rows = row_grader(self.problems, self.tokenizer, self.grade)
        self._step = make_step(self.parts, self._grade_rows)
        self._time_rollout = rollout_timer(self.parts)
        self._rollout_s = float("nan")
        self._best = -np.inf
        self._read_at = time.monotonic()
        self.evaluated: dict[str, float] = {}

    def run(
        self, state: TrainState, batches: Iterator, start: int, preemption: Preemption
    ) -> dict[str, float]:
        """Steps start + 1 … num_steps; saves and returns early when asked to stop."""
        settings = self.experiment.train
        if self.guard.ends_the_run:
            self.progress.note("the guard has ended this run; guard.action = 'warn' lets it go on")
            return self.evaluated
        if jax.process_index() == 0:
            forget_verdict(self.workdir)
        if start == 0 and settings.eval_every_steps:
            self.writers.write(0, self.evaluate(0, state) | {"rollout/tokens_total": 0})
            self.progress.update(0, self.evaluated)
            self.watch(0, self.evaluated)
        waiting: Step | None = None
        for number in range(start + 1, settings.num_steps + 1):
            rows = next(batches)
            batch = shard_batch(to_batch(rows, settings.group_size), self.parts.mesh)
            numbers = np.repeat(rows["index"], settings.group_size)
            taken = self._step(state, batch, numbers)
            state = taken.state
            if waiting:
                self.report(waiting)
            waiting = Step(number, taken._replace(state=None), numbers)
            last = number == settings.num_steps
            stop = preemption.requested(number) or self.guard.ends_the_run
            evaluated: dict[str, float] = {}
            finished: float | None = None
            if due(number, settings.eval_every_steps, last):
                jax.block_until_ready(taken.metrics)
                finished = time.monotonic()
                if taken.rollout_s is None:
                    self._rollout_s = self._time_rollout(state, batch)
                evaluated = self.evaluate(number, state)
            save = due(number, settings.checkpoint_every_steps, last or stop)
            save = save or self.is_best(evaluated)
            if evaluated or save:
                self.report(waiting, evaluated, finished)
                waiting = None
            if save:
                meta = self.meta | {"tokens_total": self.tokens_total}
                self.checkpoints.save(number, saved(state), batches, meta, evaluated)
            if stop and not last:
                if not self.guard.ends_the_run:
                    self.progress.note(
                        f"stopped after step {number}; the same command goes on from here"
                    )
                break
        self.checkpoints.wait()
        if self.guard.ends_the_run:
            self.conclude()
        return self.evaluated

    def watch(self, number: int, metrics: dict[str, float]) -> None:
        """Says so when the metrics of a step set off an alarm."""
        for alarm in self.guard.see({"step": number} | metrics):
            if self.guard.config.action != "none":
                self.progress.note(f"guard: {alarm}")

    def conclude(self) -> None:
        """Records why the guard ended the run, and which checkpoint is to be taken."""
        wanted = self.guard.config.action == "restore"
        best = self.checkpoints.best_step() if wanted else None
        if jax.process_index() == 0:
            write_verdict(self.workdir, self.guard.alarms, best)
        taken = "the latest" if best is None else f"step {best}, the best evaluated,"
        self.progress.note(f"guard: the run ends here; eval and export take {taken} checkpoint")

    def is_best(self, evaluated: dict[str, float]) -> bool:
        """Whether this evaluation beats all before it in this process; it is then remembered."""
        accuracy = evaluated.get(BEST_METRIC, -np.inf)
        better = accuracy > self._best
        self._best = max(self._best, accuracy)
        return better

    def evaluate(self, number: int, state: TrainState) -> dict[str, float]:
        """Held-out accuracy of student and teacher, probes, and sample texts on disk."""
        metrics: dict[str, float] = {}
        teacher = teacher_variables(self.parts, state)
        if self.evaluator:
            metrics, generations, _ = self.evaluator(state.student, teacher)
            count = self.experiment.train.num_samples_logged
            rows = [
                {"role": role} | sample_row(generation)
                for role, found in generations.items()
                for generation in found[:count]
            ]
            self.writers.write_samples(number, rows)
        for probe in self.experiment.train.probes:
            metrics |= probe(self.parts.model, state.student, teacher, self.tokenizer)
        self.evaluated = metrics
        return metrics

    def report(
        self,
        step: Step,
        evaluated: dict[str, float] | None = None,
        finished: float | None = None,
    ) -> None:
        """Reads a step's numbers (waiting for them), grades its completions, writes its line.

        Args:
          step: what was dispatched.
          evaluated: metrics of an evaluation after this step, for the same line.
          finished: when the step was done, if an evaluation has taken time since.
        """
        found = jax.device_get(step.taken.metrics)
        rows = {name: found.pop(name) for name in list(found) if name.startswith("rows/")}
        metrics = {name: float(value) for name, value in found.items()}
        now = time.monotonic()
        step_s, self._read_at = (finished or now) - self._read_at, now
        if not np.isfinite(metrics["loss/objective"]) or not np.isfinite(
            metrics["optim/grad_norm"]
        ):
            raise UserError(
                f"step {step.number}: loss {metrics['loss/objective']}, gradient norm "
                f"{metrics['optim/grad_norm']}; the last checkpoint is untouched: resume from it "
                "with a smaller train.learning_rate, or inspect samples/"
            )
        tokens = int(metrics.pop("rollout/tokens"))
        self.tokens_total += tokens
        metrics |= {"rollout/tokens_total": self.tokens_total}
        if step.number % self.experiment.train.log_every_steps and not evaluated:
            return
        if step.taken.rollout_s is not None:
            self._rollout_s = step.taken.rollout_s
        if self.parts.method.completions.generates and np.isfinite(self._rollout_s):
            metrics["time/tokens_per_s"] = tokens / self._rollout_s
        grades = step.taken.grades
        if grades is None:
            grades = self._grade_rows(step.taken.completion, step.problems)
        metrics |= grade_metrics(grades, step.taken.completion, rows)
        metrics |= {
            "time/step_s": step_s,
            "time/rollout_s": self._rollout_s,
            "time/update_s": step_s - self._rollout_s,
        }
        metrics |= evaluated or {}
        self.writers.write(step.number, metrics)
        self.progress.update(step.number, metrics)
        self.watch(step.number, metrics)


def due(number: int, every: int, final: bool) -> bool:
    return final or bool(every and number % every == 0)


def sample_row(generation: Generation) -> dict[str, Any]:
    problem = generation.problem
    return {
        "id": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "completion": generation.text,
        "reward": generation.reward,
        "num_tokens": generation.num_tokens,
        "stopped": generation.stopped,
    }


def summary(workdir: str | Path) -> str:
    """Before and after, from the first and the last evaluation in metrics.jsonl."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if BEST_METRIC in line]
    if not found:
        return "no evaluation was made (train.heldout or train.eval_every_steps is unset)"
    first, last = found[0], found[-1]
    rows = [f"{'':34}{'step ' + str(first['step']):>14}{'step ' + str(last['step']):>14}"]
    for name in (n for n in first if n.startswith(("eval/", "probe/")) and not n.endswith("_se")):
        cells = []
        for line in (first, last):
            error = line.get(f"{name}_se")
            value = line.get(name)
            text = "-" if value is None else f"{value:.3f}"
            cells.append(text + (f" ±{error:.3f}" if error is not None else ""))
        rows.append(f"{name:34}{cells[0]:>14}{cells[1]:>14}")
    rows.append(f"{'generated tokens':34}{0:>14,}{last['rollout/tokens_total']:>14,}")
    return "\n".join(rows)
