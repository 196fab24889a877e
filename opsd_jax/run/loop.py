# SPDX-License-Identifier: Apache-2.0
"""The training loop: dispatches steps, logs one step late, evaluates, saves and guards.

Each step is dispatched before the numbers of the step before it are read, so the device never
waits for logging or the disk, nor for grading unless the step learns from grades. A step's line in
metrics.jsonl is written before the checkpoint of that step; a run that is killed anywhere goes on
from its last whole checkpoint, with the same batches, keys and numbers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from opsd_jax.data.problems import ProblemSet
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import Evaluator
from opsd_jax.evaluation.generations import Generation
from opsd_jax.evaluation.runs import ACCURACY
from opsd_jax.host.checkpoint import Checkpoints
from opsd_jax.host.guard import Guard, forget_verdict, write_verdict
from opsd_jax.host.metrics import MetricWriters
from opsd_jax.host.pod import FirstProcessSays
from opsd_jax.host.preemption import Preemption
from opsd_jax.host.profile_window import ProfileWindow
from opsd_jax.host.progress import ProgressLine
from opsd_jax.host.watchdog import Watchdog
from opsd_jax.method.batch import Batch
from opsd_jax.method.optimizer import learning_rate_schedule
from opsd_jax.method.train_step import TrainState
from opsd_jax.model.sharding import shard_batch
from opsd_jax.run.after_rollout import AfterRollout
from opsd_jax.run.assembly import Assembly, teacher_variables
from opsd_jax.run.experiment import Experiment
from opsd_jax.run.flops import Lengths
from opsd_jax.run.graded_rows import GradeAll, grade_metrics, row_grader
from opsd_jax.run.meter import Meter
from opsd_jax.run.stepping import Taken, make_step, rollout_timer, to_batch

_BEFORE_LEARNING = (
    "no step was taken before it, so look at the settings of divergence, at functions of your own "
    "and at the model's weights"
)
_AFTER_LEARNING = (
    "look at samples/, and start again in another workdir with a smaller train.learning_rate; to "
    "go on from the last checkpoint, which is untouched, take it there as train.model = "
    "@FinishedRun()"
)


class Step(NamedTuple):
    """A dispatched step whose numbers nobody has read yet.

    prompts: [B] lengths of the prompts of student, teacher and views.
    """

    number: int
    taken: Taken
    problems: np.ndarray
    prompts: Sequence[np.ndarray]


@dataclasses.dataclass
class Loop:
    """Dispatches steps and reports on them."""

    experiment: Experiment
    workdir: Path
    parts: Assembly
    tokenizer: Tokenizer
    problems: ProblemSet
    grade: GradeAll
    evaluator: Evaluator | None
    writers: MetricWriters
    checkpoints: Checkpoints
    progress: ProgressLine
    guard: Guard
    profile: ProfileWindow
    meter: Meter
    watchdog: Watchdog
    tokens_total: int
    meta: dict[str, Any]
    after: AfterRollout | None = None

    def __post_init__(self):
        grade_rows = row_grader(self.problems, self.tokenizer, self.grade)
        self._grade_rows = self.meter.timed("grading", grade_rows)
        self._step = make_step(self.parts, self._grade_rows, self.after)
        self._time_rollout = rollout_timer(self.parts)
        self._rollout_s = float("nan")
        peak = self.experiment.train.learning_rate
        self._learning_rate = learning_rate_schedule(self.experiment.optimizer, peak)
        self._best = -np.inf
        self._time_to_save = FirstProcessSays(self.parts.mesh)
        self._saved_at = time.monotonic()
        self.evaluated: dict[str, float] = {}
        self.stopped = False  # before its last step, and not by the guard

    def run(
        self, state: TrainState, batches: Iterator, start: int, preemption: Preemption
    ) -> dict[str, float]:
        """Steps start + 1 … num_steps; saves and returns early when asked to stop."""
        settings, teachers = self.experiment.train, self.experiment.training_contexts.teachers
        if self.guard.ends_the_run:
            self.progress.note("the guard has ended this run; guard.action = 'warn' lets it go on")
            self.conclude()  # It may have been killed before it could, or now be told to restore.
            return self.evaluated
        if jax.process_index() == 0:
            forget_verdict(self.workdir)
        if start == 0 and settings.eval_every_steps:
            self.report_start(state)
        self.meter.begin()
        waiting: Step | None = None
        for number in range(start + 1, settings.num_steps + 1):
            with self.meter.waiting("data"):
                rows = next(batches)
            asked = to_batch(rows, settings.group_size, teachers)
            batch = shard_batch(asked, self.parts.mesh)
            numbers = np.repeat(rows["index"], settings.group_size)
            self.ask_for_time()
            with self.profile.step(number):
                taken = self._step(state, batch, numbers)
            state = taken.state
            if waiting:
                self.report(waiting)
            waiting = Step(
                number,
                taken._replace(state=None),
                numbers,
                prompts(rows, settings.group_size, taken, teachers),
            )
            self.profile.after(number, taken.metrics)
            last = number == settings.num_steps
            stop = preemption.requested() or self.guard.ends_the_run
            evaluated: dict[str, float] = {}
            if settings.eval_every_steps and due(number, settings.eval_every_steps, last):
                self.finish(taken, batch)
                evaluated = self.evaluate(number, state)
            save = self.is_best(evaluated)  # asked at each evaluation, which it remembers
            save = save or due(number, settings.checkpoint_every_steps, last or stop)
            save = save or self._time_to_save.said()
            if evaluated or save:
                self.report(waiting, evaluated)
                waiting = None
            if save:
                counted = {"tokens_total": self.tokens_total, "kept_s": self.meter.kept_s}
                meta = self.meta | counted
                self.checkpoints.save(number, saved(state), batches, meta, evaluated)
                self._saved_at = time.monotonic()
            if stop and not last:
                if not self.guard.ends_the_run:
                    self.stopped = True
                    self.progress.note(
                        f"stopped after step {number}; the same command goes on from here"
                    )
                break
        self.checkpoints.wait()
        if self.guard.ends_the_run:
            self.conclude()
        return self.evaluated

    def report_start(self, state: TrainState) -> None:
        """Evaluates what the run starts from and writes line 0."""
        self.writers.write(0, self.evaluate(0, state) | {"rollout/tokens_total": 0})
        self.progress.update(0, self.evaluated)
        self.watch(0, self.evaluated)

    def ask_for_time(self) -> None:
        """Whether it is time for a checkpoint, by the clock of process 0."""
        if minutes := self.experiment.train.checkpoint_every_minutes:
            self._time_to_save.ask(time.monotonic() - self._saved_at >= 60 * minutes)

    def finish(self, taken: Taken, batch: Batch) -> None:
        """Waits for a step, and times its rollout if that is a part of one program."""
        jax.block_until_ready(taken.metrics)
        self.meter.end()
        if taken.rollout_s is None:
            self._rollout_s = self._time_rollout(taken.state, batch)

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
        accuracy = evaluated.get(ACCURACY, -np.inf)
        better = accuracy > self._best
        self._best = max(self._best, accuracy)
        return better

    def evaluate(self, number: int, state: TrainState) -> dict[str, float]:
        """Held-out accuracy of student and teacher, probes, and sample texts on disk."""
        with self.watchdog.paused():
            return self._evaluated(number, state)

    def _evaluated(self, number: int, state: TrainState) -> dict[str, float]:
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

    def report(self, step: Step, evaluated: dict[str, float] | None = None) -> None:
        """Reads a step's numbers (waiting for them), grades its completions, writes its line.

        Args:
          step: what was dispatched.
          evaluated: metrics of an evaluation after this step, for the same line.
        """
        found = jax.device_get(step.taken.metrics)
        rows = {name: found.pop(name) for name in list(found) if name.startswith("rows/")}
        metrics = {name: float(value) for name, value in found.items()}
        step_s = self.meter.read()
        self.watchdog.beat()
        loss, grad_norm = metrics["loss/objective"], metrics["optim/grad_norm"]
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            advice = _AFTER_LEARNING if step.number > 1 else _BEFORE_LEARNING
            raise UserError(f"step {step.number}: loss {loss}, gradient norm {grad_norm}; {advice}")
        tokens = int(metrics.pop("rollout/tokens"))
        self.tokens_total += tokens
        metrics["rollout/tokens_total"] = self.tokens_total
        if step.number % self.experiment.train.log_every_steps and not evaluated:
            return
        if step.taken.rollout_s is not None:
            self._rollout_s = step.taken.rollout_s
        if self.parts.method.completions.generates and np.isfinite(self._rollout_s):
            metrics["time/tokens_per_s"] = tokens / self._rollout_s
        grades = step.taken.grades
        if grades is None:
            grades = self._grade_rows(step.taken.completion, step.problems)
        metrics |= grade_metrics(grades, rows) | dict(step.taken.contexts)
        metrics["optim/learning_rate"] = float(self._learning_rate(step.number - 1))
        metrics |= {
            "time/step_s": step_s,
            "time/rollout_s": self._rollout_s,
            "time/update_s": step_s - self._rollout_s,
        }
        student, teacher, *views = step.prompts
        teachers = self.experiment.training_contexts.teachers
        own = tuple(name in step.taken.lengths for name in teachers)
        lengths = Lengths(student, teacher, rows["rows/tokens"], tuple(views), own)
        metrics |= self.meter.line(step.number, lengths, tokens, self._rollout_s, step_s)
        metrics |= evaluated or {}
        self.writers.write(step.number, metrics)
        self.progress.update(step.number, metrics)
        self.watch(step.number, metrics)


def prompts(
    rows: dict[str, Any], group_size: int, taken: Taken, teachers: Sequence[str]
) -> list[np.ndarray]:
    """[B] lengths of a step's prompts: the student's, and those of the teacher and its views."""

    def of(name: str) -> np.ndarray:
        built = taken.lengths.get(name)
        return np.repeat(np.asarray(rows[f"{name}_length"]), group_size) if built is None else built

    return [of(name) for name in ("student", *teachers)]


def due(number: int, every: int, final: bool) -> bool:
    return final or bool(every and number % every == 0)


def sample_row(generation: Generation) -> dict[str, Any]:
    problem = generation.problem
    return {
        "id": problem.id,
        "question": problem.question_text,
        "answer": problem.answer,
        "completion": generation.text,
        "reward": generation.reward,
        "num_tokens": generation.num_tokens,
        "stopped": generation.stopped,
    }


def saved(state: TrainState) -> TrainState:
    """What a checkpoint holds: all but frozen models, which their sources give again."""
    return dataclasses.replace(state, frozen={}, external={})
