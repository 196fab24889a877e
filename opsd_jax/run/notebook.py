# SPDX-License-Identifier: Apache-2.0
"""Whole runs from Python, for notebooks and scripts: `train`, `evaluate`, `tokens`, `load_run`.

A call that is repeated in one process compiles nothing again (`process_programs`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError
from opsd_jax.evaluation.inline import TokenView, run_html, token_view
from opsd_jax.evaluation.runs import ACCURACY, Columns, Run, columns, newest, read_run
from opsd_jax.fields import Count, Seed, check
from opsd_jax.host.compilation_cache import process_programs
from opsd_jax.host.files import is_bucket, read_json_lines
from opsd_jax.host.progress import ProgressLine, in_notebook
from opsd_jax.host.stage import local, shown
from opsd_jax.model.decoder import Decoder
from opsd_jax.run.config import load_experiment
from opsd_jax.run.config import load_run as load_config
from opsd_jax.run.eval import evaluate_held_out
from opsd_jax.run.experiment import Experiment
from opsd_jax.run.finished_run import Restored, restore_run
from opsd_jax.run.gin_files import with_absolute_paths
from opsd_jax.run.gin_text import gin_lines
from opsd_jax.run.live import LivePanel
from opsd_jax.run.tokens import write_tokens
from opsd_jax.run.train import train as train_in

Lines = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class TrainingRun(Run):
    """A workdir as one looks at it in a notebook; what needs the model is loaded on first use.

    Attributes:
      workdir: the folder.
      config: text of config.gin; `settings` has its bindings by name.
      history: the lines of metrics.jsonl as dicts.
    """

    @cached_property
    def metrics(self) -> Columns:
        """Every metric by name, [N] float64, aligned with `steps`; NaN where a step has none."""
        return columns(self)

    @property
    def steps(self) -> np.ndarray:
        """[N] int64, the steps that were logged."""
        return np.array([line["step"] for line in self.history], np.int64)

    def samples(self, step: int | None = None) -> list[dict[str, Any]]:
        """Graded completions of an evaluation (role, question, completion, reward, …).

        Args:
          step: of the evaluation; None is the latest.
        """
        folder = self.workdir / "samples"
        path = newest(folder) if step is None else folder / f"step_{step:06d}.jsonl"
        if path is None or not path.exists():
            known = sorted(int(p.stem.removeprefix("step_")) for p in folder.glob("step_*.jsonl"))
            which = "" if step is None else f" of step {step}"
            raise UserError(f"{folder} has no samples{which}; it has steps {known}")
        return read_json_lines(path)

    @cached_property
    def restored(self) -> Restored:
        """Student, decoder and tokenizer after the guard's choice or the latest checkpoint."""
        with process_programs():
            return restore_run(self.workdir, None, load_config, with_teacher=False)

    @property
    def student(self) -> dict:
        """The student's variables, {"params"[, "lora"]}."""
        return self.restored.student

    @property
    def model(self) -> Decoder:
        return self.restored.parts.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.restored.tokenizer

    def __repr__(self) -> str:
        parts = [repr(shown(self.workdir)), f"step {self.last_step}"]
        total = self.settings.get("train.num_steps", "")
        if total.isdigit() and int(total) >= self.last_step:
            parts[1] += f" of {total}"
        if self.num_tokens:
            parts.append(
                f"{self.num_tokens:,.0f} {'generated' if self.generates else 'target'} tokens"
            )
        if len(accuracy := self.series(ACCURACY)):
            parts.append(f"{ACCURACY} {accuracy[0, 1]:.3f} -> {accuracy[-1, 1]:.3f}")
        return f"TrainingRun({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return run_html(self)


def load_run(workdir: str | os.PathLike[str]) -> TrainingRun:
    """Reads a workdir of `train`, finished or not: `load_run(workdir).metrics["loss/divergence"]`.

    Of one in a bucket the files are fetched, anew at each call.

    Raises:
      UserError: no such folder, or one that no run has written to.
    """
    return TrainingRun(**vars(read_run(local(workdir))))


def train(
    experiment: Lines | Experiment, workdir: str | os.PathLike[str], bindings: Lines = ()
) -> TrainingRun:
    """Runs or resumes an experiment, as `opsd train` does; returns the run.

    Called again with the same arguments it goes on where it was stopped. An interrupted call
    (Ctrl-C, a notebook's stop button, SIGTERM) saves after the current step and returns. A
    notebook shows a bar and curves that move, a terminal a line.

    Args:
      experiment: a gin file or several, or an `Experiment` (of `load_experiment`, say).
      workdir: made if missing; resumed if it holds the same experiment. Also "gs://BUCKET/RUN" and
        "s3://BUCKET/RUN".
      bindings: one gin binding or several, such as "train.num_steps = 3".

    Raises:
      UserError: what is wrong, in one sentence.
    """
    lines = _listed(bindings)
    if isinstance(experiment, Experiment):
        written = gin_lines(experiment)
        found, text = load_experiment([], written)
        if found != with_absolute_paths(experiment):
            raise UserError("this Experiment cannot be written as gin; train from a gin file")
        if lines:
            found, text = load_experiment([], [*written, *lines])
    else:
        found, text = load_experiment(_listed(experiment), lines)
    with process_programs():
        folder = local(workdir)
        train_in(found, text, folder, progress=_panel(found, folder))
    return load_run(workdir)


def _panel(experiment: Experiment, workdir: Path) -> ProgressLine | None:
    """What a notebook shows; None for a terminal's line."""
    if not in_notebook():
        return None
    from IPython.display import display

    return LivePanel(experiment.train.num_steps, workdir, display)


def evaluate(
    workdir_or_model: str | os.PathLike[str],
    gin_file: Lines | None = None,
    bindings: Lines = (),
    step: int | str | None = None,
    out: str | None = None,
) -> dict[str, float]:
    """Held-out accuracy of a run or a model from files, as `opsd eval` has it; returns metrics.

    Args:
      workdir_or_model: a workdir of `train`, or what `load_model` reads.
      gin_file: what to evaluate on; a run's own held-out problems without one.
      bindings: one gin binding or several, after the files.
      step: of a run: a checkpoint, 0 for the base, "best"; None as in `load_run`.
      out: folder of the generations; None is WORKDIR/eval/NAME.

    Returns:
      "step" and eval/* metrics, as summary.json has them.

    Raises:
      UserError: what is wrong, in one sentence.
    """
    path = os.fspath(workdir_or_model)
    is_run = is_bucket(path) or (Path(path) / "config.gin").exists()
    if not is_run and step is not None:
        raise UserError(f"step = {step!r} does not apply to {path}, which is no training workdir")
    files = [] if gin_file is None else _listed(gin_file)
    if not is_run and not files:
        raise UserError(
            f"{path} has no config.gin, so it is no training workdir; a model needs gin_file, "
            "which says on what and how it is evaluated"
        )
    workdir, model = (path, None) if is_run else (None, path)
    with process_programs():
        return evaluate_held_out(files, _listed(bindings), workdir, model, step, out)


def tokens(
    workdir: str | os.PathLike[str], num: int = 4, step: int | str | None = None, seed: int = 0
) -> TokenView:
    """Where the teacher disagrees, token by token, as `opsd tokens` has it; a notebook shows it.

    Args:
      workdir: of `train`.
      num: rollouts, sampled anew.
      step: a checkpoint, 0 for the base, "best"; None as in `load_run`.
      seed: of problems and rollouts.

    Raises:
      UserError: no run there, or a teacher of another shape.
    """
    check("num", num, Count)
    check("seed", seed, Seed)
    with process_programs():
        return token_view(write_tokens(os.fspath(workdir), step, num, seed))


def _listed(lines: Lines) -> list[str]:
    """One line or path, or several."""
    several = [lines] if isinstance(lines, str | os.PathLike) else lines
    return [str(line) for line in several]
