# SPDX-License-Identifier: Apache-2.0
"""What one does with a model afterwards: evaluate it, talk to it, export it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils

from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import Evaluator
from opsd_jax.evaluation.generations import BY_PROBLEM_FILE, GenerationLog
from opsd_jax.evaluation.statistics import table
from opsd_jax.host.checkpoint import Checkpoints
from opsd_jax.host.checkpoint_record import checksums
from opsd_jax.host.files import write_json_lines, write_whole
from opsd_jax.host.guard import restored_step
from opsd_jax.host.lock import only_writer
from opsd_jax.host.metrics import plain
from opsd_jax.host.pod import connected_mesh
from opsd_jax.pretrained.export import save_adapter, save_pretrained
from opsd_jax.run.config import load_experiment, load_run
from opsd_jax.run.experiment import (
    Assembly,
    Experiment,
    assemble,
    external_variables,
    frozen_variables,
    initial_state,
    load_teacher,
    teacher_variables,
)
from opsd_jax.run.loop import BEST_METRIC


class Restored(NamedTuple):
    """A student as a run left it, and the teacher it had."""

    experiment: Experiment
    parts: Assembly
    tokenizer: Tokenizer
    student: dict
    teacher: dict | None
    step: int


def restore_run(
    workdir: str,
    step: int | str | None,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    with_teacher: bool = True,
) -> Restored:
    """Student and teacher of a training workdir, without the optimiser.

    Args:
      workdir: of `opsd train`.
      step: a checkpoint; 0 is what the run started from, loaded from its source again; "best" the
        best by held-out accuracy; None the one that the guard chose, or else the latest.
      gin_files: read after the run's own config.gin, for another evaluation.
      bindings: changes to them.
      with_teacher: False leaves it out; an external one is then not even looked for.
    """
    own = Path(workdir) / "config.gin"
    if not own.exists():
        raise UserError(f"--workdir={workdir}: no config.gin there; is it a training workdir?")
    experiment = load_run(str(own), gin_files, bindings)
    mesh = connected_mesh(experiment.mesh)
    base = experiment.train.model.load(
        mesh, experiment.mesh.rules, str(Path(workdir) / "base"), _say
    )
    external = None
    if with_teacher:
        external = load_teacher(experiment, base.tokenizer, mesh, str(Path(workdir) / "base"), _say)
    parts = assemble(experiment, base.config, base.tokenizer, mesh, external and external.config)
    if step is None and (step := restored_step(Path(workdir))) is not None:
        _say(f"step {step} is taken: the guard ended the run (see {workdir}/guard.json)")
    if step == 0:
        seed = experiment.train.seed
        state = initial_state(parts, base.params, seed, external and external.params)
    else:
        wanted = {"trainable": parts.abstract.trainable}
        if with_teacher:
            wanted["teacher"] = parts.abstract.teacher
        with Checkpoints(Path(workdir) / "checkpoints", None, BEST_METRIC, _say) as checkpoints:
            if isinstance(step, str) and (step := checkpoints.best_step()) is None:
                raise UserError(f"--step=best: no checkpoint of {workdir} was evaluated")
            found = checkpoints.restore_only(wanted, step)
        step = found.step
        state = dataclasses.replace(
            parts.abstract,
            frozen=frozen_variables(parts, base.params),
            external=external_variables(parts, external and external.params),
            **found.state,
        )
    teacher = teacher_variables(parts, state) if with_teacher else None
    return Restored(experiment, parts, base.tokenizer, state.student, teacher, step)


def plain_model(path: str, gin_files: Sequence[str] = (), bindings: Sequence[str] = ()) -> Restored:
    """A model from files in the place of a run: student and teacher are the same weights."""
    if not gin_files:
        raise UserError("--model needs --gin_file, which says on what and how it is evaluated")
    # What an experiment must bind and the evaluation of a model from files does not look at.
    untrained = (
        "train.problems = @ChainArithmetic()",
        "train.num_steps = 1",
        f"train.batch_size = {jax.device_count()}",
        "train.learning_rate = 1.0",
        "rollout.max_new_tokens = 1024",
    )
    chosen = (
        "train.model = @PretrainedModel()",
        f"PretrainedModel.path = {path!r}",
        "train.lora = None",
    )
    experiment, _ = load_experiment(gin_files, [*bindings, *chosen], untrained)
    mesh = connected_mesh(experiment.mesh)
    base = experiment.train.model.load(mesh, experiment.mesh.rules, "", _say)
    parts = assemble(experiment, base.config, base.tokenizer, mesh)
    variables = {"params": base.params}
    return Restored(experiment, parts, base.tokenizer, variables, variables, 0)


def evaluate_command(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    workdir: str | None,
    model: str | None,
    step: int | str | None,
    out: str | None,
) -> dict[str, float]:
    """`opsd eval`: samples, grades and counts; run again, it goes on where it was stopped.

    The folder has evaluation.json (what was evaluated), generations.jsonl (one line each, written
    as they come), by_problem.jsonl and summary.json.
    """
    from opsd_jax.run.train import make_evaluator  # late: only this command reads problems

    run = (
        restore_run(workdir, step, gin_files, bindings)
        if workdir
        else plain_model(str(model), gin_files, bindings)
    )
    what = Path(gin_files[-1]).stem if gin_files else "heldout"
    which = f"step_{run.step:06d}" if workdir else Path(str(model)).name
    folder = Path(out) if out else Path(workdir or ".") / "eval" / f"{what}_{which}"
    with ExitStack() as stack:
        cache = Path(workdir) if workdir else folder
        evaluator = make_evaluator(run.experiment, run.parts, run.tokenizer, cache, stack)
        if evaluator is None:
            raise UserError("train.heldout is None: bind it to the problems to evaluate on")
        writes = jax.process_index() == 0
        stack.enter_context(only_writer(folder, _say))
        log = stack.enter_context(GenerationLog(folder, record_of(run, evaluator), writes))
        check_same_folder(folder, log)
        if log.found:
            _say(f"{folder}: going on after {len(log.found):,} generations")
        found = evaluator(run.student, run.teacher, log)
    if writes:
        write_json_lines(folder / BY_PROBLEM_FILE, found.by_problem)
        text = json.dumps(plain({"step": run.step} | found.metrics), indent=1, allow_nan=False)
        write_whole(folder / "summary.json", text + "\n")
        _say(table(found.metrics))
        print(text)
    return found.metrics


def check_same_folder(folder: Path, log: GenerationLog) -> None:
    """Waits until every process has read the generations so far: the same for all.

    Raises:
      UserError: they are not, and the processes would wait for each other for ever.
    """
    if jax.process_count() > 1:
        number = zlib.crc32(json.dumps(sorted(log.found)).encode())
        seen = multihost_utils.process_allgather(np.uint32(number))
        if len(set(seen.tolist())) > 1:
            raise UserError(
                f"--out: {folder} has other generations on other hosts; it must be a folder that "
                "all of them see"
            )


def record_of(run: Restored, evaluator: Evaluator) -> dict[str, Any]:
    """All that decides what an evaluation samples and how it is graded, one flat level."""
    config = evaluator.config
    record: dict[str, Any] = {
        "step": run.step,
        "problems": re.sub(r" at 0x[0-9a-f]+", "", repr(run.experiment.train.heldout)),
        "dtype": run.experiment.train.dtype,
        "roles": list(config.roles),
        "num_samples": config.num_samples,
        "greedy": config.greedy,
        "seed": config.seed,
    }
    for name, value in dataclasses.asdict(evaluator.settings).items():
        record[f"sampling.{name}"] = value
    for name, variables in (("student", run.student), ("teacher", run.teacher)):
        record[f"{name}.weights"] = _digest(sorted(checksums(variables).items()))
    for role, prompts in evaluator.prompts.items():
        record[f"{role}.prompts"] = _digest([(p.problem.id, p.ids) for p in prompts])
        record[f"{role}.answers"] = _digest([(p.problem.id, p.problem.answer) for p in prompts])
    return record


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def export_command(workdir: str, step: int | str | None, out: str, form: str) -> None:
    """`opsd export`: a Hugging Face directory (adapters merged) or a PEFT adapter."""
    run = restore_run(workdir, step, with_teacher=False)
    config = run.parts.model.config
    if form == "peft":
        if config.lora is None:
            raise UserError(
                f"--format=peft: {workdir} trains all parameters and has no adapter; use "
                "--format=hf"
            )
        base = getattr(run.experiment.train.model, "path", "")
        save_adapter(out, config, run.student, base)
    else:
        save_pretrained(out, config, nn.meta.unbox(run.student), run.tokenizer)
    _say(f"step {run.step} written to {out}")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr)
