# SPDX-License-Identifier: Apache-2.0
"""Metric writers: metrics.jsonl, sample texts, TensorBoard, W&B.

`metrics.jsonl` holds one json object per logged step, steps strictly increasing, whatever
happened to the run: a resumed run drops the lines after the step it goes on from, and the texts
of later steps with them. Names are flat `area/name`; plots and users' scripts read them.

Only process 0 writes; on the others every call here does nothing.

What a training step writes, nats per token of the student's own answers unless said (a divergence
that is a function of your own has that function's unit). Of contexts built after the rollout
`run/after_rollout.py` says more, of rollouts `method/train_step.py: rollout_metrics`.

  loss/objective              what is minimised, with clips and weights; of PolicyGradient about 0
                              whatever is learned, as its advantages are centred
  loss/divergence             what divergence.name says, over the whole vocabulary: without clip,
                              weights and support; of "sampled_token" KL(student || teacher). Runs
                              with other names cannot be compared by it
  loss/divergence_right       of answers graded 1/2 or more; loss/divergence_wrong, of the others
  loss/clip_fraction          tokens that the clip changes
  loss/negative_fraction      tokens whose loss is below 0, by more than rounding (1e-6)
  loss/kept_teacher_mass      teacher's probability on entries that support and clip leave alone
  loss/student_support_mass   student's probability on the entries of the support: what falls
                              where a truncated one loses it
  loss/token_weight           mean product of the token weights, where there are any
  loss/rows_fraction          rows that a term learns from, where that is not all
  loss/TERM                   what a term of a Mix adds to loss/objective; there the two above are
                              loss/TERM_token_weight and loss/TERM_rows_fraction
  student/entropy             and teacher/entropy: near log V a side has lost its weights
  student/nll_of_rollout      -log p of the answers under the student
  teacher/nll_of_rollout      the same under the teacher
  teacher/argmax_agreement    tokens where both sides' most probable token is the same
  teacher/no_context_fraction rows for which the teacher could be shown nothing: they weigh 0
  context/*_fraction          rows whose contexts built after the rollout ended so
  loss/importance_mean        min(pS / p_sampled, divergence.importance_clip), and
                              loss/importance_clip_fraction, the tokens that it bounds
  policy/clip_fraction        tokens whose probability ratio is clipped; policy/outside_support,
                              tokens that the student would no longer sample at all;
                              policy/advantage_size, mean |advantage| of a token, after its shape
  policy/kl_initial           KL of the student and the initial policy, as Anchor.name says
  rollout/logp_gap            |log p while sampling - log p while scoring|, before the step: 1e-6
                              in float32 on a CPU
  rollout/truncated_fraction  answers cut by rollout.max_new_tokens
  rollout/length_mean         tokens; rollout/length_p50, rollout/length_p90, rollout/length_max;
                              rollout/tokens_total is all generated so far
  rollout/finished_by_*       answers done within that percentage of the limit
  rollout/padded_fraction     places for tokens that hold none; rollout/idle_fraction, decoded steps
                              of answers that were done already
  rollout/reward_mean         mean grade, where answers can be graded; rollout/ungraded_fraction, of
                              those where the grader failed
  reward/std                  of the grades over the whole batch; reward/group_std, mean over the
                              groups of that within one; reward/zero_variance_fraction, groups
                              graded alike
  analysis/tokens             that the teacher wrote before it scores, analysis/length_mean of them
                              a row; analysis/truncated_fraction, those cut by their limit
  optim/learning_rate         of this step
  optim/grad_norm             before it is clipped; optim/update_norm, optim/param_norm: after the
                              step
  time/rollout_s, time/update_s, time/step_s
                              of a step that is one program, the rollout is timed at evaluations
  time/tokens_per_s           tokens of the rollout over time/rollout_s; the console's tok/s are
                              by the clock on the wall, over the latest steps with all they do
  eval/*                      held out (evaluation/statistics.py); probe/*, of train.probes
  step, wall_s                finished updates; seconds of running time

How busy the chips are; what cannot be known (a peak that chips.py does not list) has no name:

  time/rollout_tokens_per_s_per_chip  sampled
  time/update_tokens_per_s_per_chip   read in the update as the student, a group's prompt once
  chip/model_tflops           10^12 FLOPs of the step per chip, by formula (run/flops.py)
  chip/mfu, chip/update_mfu   their share of the peak (bfloat16, whatever train.dtype is) in
                              time/step_s and, of the update's own, in time/update_s
  chip/decode_bandwidth       share of the memory's bandwidth that the rollout needed at the least
  chip/memory_peak_gib        most in use on any device of process 0 since it started
  time/compile_s              since the line before; time/compile_programs, and of them
                              time/compile_from_disk (train.compilation_cache)
  time/data_s, time/grading_s waited for, since the line before
  goodput/*                   since the first start (host/goodput.py)

When a run misbehaves:

  loss/objective is flat and loss/divergence does not fall: the clip takes the lesson away
    (experiments/ablations/entry_clip.gin).
  rollout/logp_gap is not small: another policy samples than is scored (rollout.dtype,
    rollout.weights, rollout.merge_adapters).
  loss/divergence rises again, or eval/teacher/accuracy falls: the teacher moves with the student
    (teacher_live.gin); hold it with teacher.weights = "initial".
  probe/teacher/leak is above ok, or accuracy falls while the divergence does: the teacher says what
    only its reference can tell (leaky_teacher.gin); word its context otherwise.
  Lengths or truncated_fraction run away: one role's text never ends; look at samples/ and at the
    thinking switches of contexts.
"""

import importlib.util
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from opsd_jax.errors import UserError
from opsd_jax.host.files import read_metrics, read_text, write_json_lines, write_whole
from opsd_jax.host.pod import refuse_together
from opsd_jax.host.stage import remove

Scalars = Mapping[str, Any]


class _Sink(Protocol):
    def write(self, step: int, scalars: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricWriters:
    """Writes the metrics of each logged step everywhere they are wanted.

        with MetricWriters(workdir, tensorboard=True, resumed_step=checkpoint_step) as writers:
            writers.write(step, {"loss/divergence": 0.12, "rollout/tokens_total": 4096})
            writers.write_samples(step, [{"id": "7", "completion": "..."}])

    A line survives kill -9 once `write` has returned. Write the line of a step before saving
    its checkpoint, or a run killed between the two resumes without that line.

    Args:
      workdir: a folder on a file system; made if missing.
      tensorboard: also write event files to workdir/tensorboard (extra `tensorboard`).
      wandb: also log to Weights & Biases (extra `wandb`); WANDB_MODE=offline is respected and a
        resumed workdir goes on in the same W&B run.
      resumed_step: the step of the restored checkpoint; None starts the files anew.
      wandb_project: the W&B project.
      config: the text of the configuration, shown by W&B.

    Raises:
      UserError: an extra is not installed, or the workdir cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        tensorboard: bool = False,
        wandb: bool = False,
        *,
        resumed_step: int | None = None,
        wandb_project: str = "opsd_jax",
        config: str = "",
    ):
        self._workdir = Path(workdir)
        self._sinks: list[_Sink] = []
        self._last_step: int | None = resumed_step
        self._active = jax.process_index() == 0
        if not self._active:
            return
        # Missing packages are told before any file is touched.
        board = _import("tensorboardX", "tensorboard") if tensorboard else None
        wandb_module = _import("wandb", "wandb") if wandb else None
        self._sinks.append(_JsonLines(self._workdir / "metrics.jsonl", resumed_step))
        self._drop_texts(-1 if resumed_step is None else resumed_step)
        if board is not None:
            self._sinks.append(_TensorBoard(board, self._workdir / "tensorboard", resumed_step))
        if wandb_module is not None:
            fresh = resumed_step is None
            self._sinks.append(_WandB(wandb_module, self._workdir, wandb_project, config, fresh))

    def write(self, step: int, metrics: Scalars) -> None:
        """Logs one step; once per step, in increasing order.

        Args:
          step: the number of finished updates.
          metrics: `area/name` to number, NumPy or JAX scalar. NaN and infinities become null in
            metrics.jsonl and are left out elsewhere. `wall_s` (seconds of running time, going
            on over resumes) is added if it is not there.
        """
        if not self._active:
            return
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"metrics of step {step} come after those of {self._last_step}")
        self._last_step = step
        scalars = {name: plain(value) for name, value in metrics.items() if name != "step"}
        for sink in self._sinks:
            sink.write(step, scalars)

    def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes samples/step_XXXXXX.jsonl, whole or not at all."""
        if self._active:
            path = self._workdir / "samples" / f"step_{step:06d}.jsonl"
            write_json_lines(path, (plain(row) for row in rows))

    def _drop_texts(self, last_step: int) -> None:
        """Removes texts of later steps, which the report would show as this run's newest."""
        for folder in ("samples", "tokens"):
            for path in (self._workdir / folder).glob("step_*.jsonl"):
                step = path.stem.removeprefix("step_")
                if step.isdecimal() and int(step) > last_step:
                    remove(path)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        self._active = False

    def __enter__(self) -> "MetricWriters":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _JsonLines:
    def __init__(self, path: Path, resumed_step: int | None):
        kept = [] if resumed_step is None else read_metrics(path)
        kept = [line for line in kept if line["step"] <= (resumed_step or 0)]
        write_json_lines(path, kept)
        before_s = (kept[-1].get("wall_s") if kept else None) or 0.0
        self._start_s = time.monotonic() - before_s
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        wall_s = round(time.monotonic() - self._start_s, 3)
        line = json.dumps({"step": step, "wall_s": wall_s} | scalars, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, module: Any, folder: Path, resumed_step: int | None):
        purge_step = 0 if resumed_step is None else resumed_step + 1  # hides what is redone
        self._writer = module.SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, module: Any, workdir: Path, project: str, config: str, fresh: bool):
        id_file = workdir / "wandb" / "run_id.txt"
        run_id = None if fresh or not id_file.exists() else read_text(id_file).strip()
        self._run = module.init(
            project=project, dir=str(workdir), id=run_id, resume="allow", config={"gin": config}
        )
        write_whole(id_file, self._run.id)

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in scalars.items() if v is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


def require_packages(tensorboard: bool, wandb: bool) -> None:
    """Raises a UserError for a package that `MetricWriters` will miss, before a model is loaded.

    Process 0 alone writes, and on the others it need not be; all must call.
    """
    wanted = {"tensorboardX": ("tensorboard", tensorboard), "wandb": ("wandb", wandb)}
    missing = [
        _missing(module, extra)
        for module, (extra, is_wanted) in wanted.items()
        if is_wanted and importlib.util.find_spec(module) is None
    ]
    refuse_together(missing[0] if missing else None, "the writers of metrics")


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, extra) from error


def _missing(module: str, extra: str) -> UserError:
    return UserError(f"train.{extra} = True needs the package {module}: pip install '.[{extra}]'")


def plain(value: Any) -> Any:
    """What json can hold: Python numbers and text, null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return plain(np.asarray(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
