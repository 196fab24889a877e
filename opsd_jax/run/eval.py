# SPDX-License-Identifier: Apache-2.0
"""`opsd eval`: held-out accuracy of a run or of a model from files, sample by sample."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from opsd_jax.errors import UserError
from opsd_jax.evaluation.evaluate import Evaluator
from opsd_jax.evaluation.generations import (
    BY_PROBLEM_FILE,
    RECORD_FILE,
    GenerationLog,
    read_record,
)
from opsd_jax.evaluation.statistics import table
from opsd_jax.host.files import require_writable, write_json_lines, write_whole
from opsd_jax.host.identity import (
    Identity,
    digest,
    own_code_parts,
    tokenizer_digest,
    weights_digest,
)
from opsd_jax.host.lock import only_writer
from opsd_jax.host.metrics import plain
from opsd_jax.host.stage import local
from opsd_jax.run.assembly import load_models
from opsd_jax.run.config import load_experiment, load_run
from opsd_jax.run.finished_run import Restored, restore_run, say
from opsd_jax.run.inputs import heldout_parts, make_evaluator, start_notices
from opsd_jax.run.pins import pinned


def plain_model(path: str, gin_files: Sequence[str] = (), bindings: Sequence[str] = ()) -> Restored:
    """A model from files in the place of a run: student and teacher are the same weights."""
    if not gin_files:
        raise UserError("--model needs --gin_file, which says on what and how it is evaluated")
    # What an experiment must bind and the evaluation of a model from files does not look at.
    untrained = (
        "train.problems = @JsonlProblems()",
        "JsonlProblems.path = 'unused'",
        "train.num_steps = 1",
        "train.batch_size = 1",
        "train.learning_rate = 1.0",
        "rollout.max_new_tokens = 1024",
    )
    chosen = (
        "train.model = @PretrainedModel()",
        f"PretrainedModel.path = {path!r}",
        "train.lora = None",
    )
    experiment, _ = pinned(load_experiment(gin_files, [*bindings, *chosen], untrained)[0])
    identity = Identity(Path(path))
    base, _, parts = load_models(experiment, "", say, identity, with_teacher=False)
    variables = {"params": base.params}
    return Restored(experiment, parts, base.tokenizer, variables, variables, 0, identity)


def evaluate_held_out(
    gin_files: Sequence[str],
    bindings: Sequence[str],
    workdir: str | None,
    model: str | None,
    step: int | str | None,
    out: str | None,
) -> dict[str, float]:
    """Samples, grades and counts; called again, it goes on where it was stopped.

    The folder has evaluation.json (what was evaluated), generations.jsonl (one line each, written
    as they come), by_problem.jsonl and summary.json.

    Returns:
      "step" and the metrics of the evaluation.
    """
    kept = local(workdir) if workdir else None
    require_writable(Path(out or kept or "."))
    if kept:
        run = restore_run(kept, step, lambda own: load_run(own, gin_files, bindings))
    else:
        run = plain_model(str(model), gin_files, bindings)
    run = run._replace(experiment=pinned(run.experiment)[0])
    what = Path(gin_files[-1]).stem if gin_files else "heldout"
    which = f"step_{run.step:06d}" if kept else Path(str(model)).name
    folder = Path(out) if out else (kept or Path()) / "eval" / f"{what}_{which}"
    with ExitStack() as stack:
        keep_clock(run, folder)
        heldout = run.experiment.train.heldout
        if heldout is None:
            raise UserError("train.heldout is None: bind it to the problems to evaluate on")
        problems = heldout.load(str((kept or folder) / "problems"))
        evaluator = make_evaluator(run.experiment, run.parts, run.tokenizer, problems, stack)
        if kept and not gin_files and not bindings:
            run.identity.check("train.heldout", heldout_parts(evaluator))
        for notice in start_notices(run.experiment, run.parts, run.tokenizer, None, evaluator):
            say(notice)
        writes = jax.process_index() == 0
        stack.enter_context(only_writer(folder, say))
        log = stack.enter_context(GenerationLog(folder, record_of(run, evaluator), writes))
        check_same_folder(folder, log)
        if log.found:
            say(f"{folder}: going on after {len(log.found):,} generations")
        found = evaluator(run.student, run.teacher, log)
        metrics = {"step": run.step} | found.metrics
        if writes:  # while the folder is ours: in a bucket the lock's end sends them
            write_json_lines(folder / BY_PROBLEM_FILE, found.by_problem)
            write_whole(folder / "summary.json", as_json(metrics) + "\n")
    return metrics


def evaluate_command(*arguments: Any) -> None:
    """`opsd eval`: `evaluate_held_out`, shown as a table and printed as json."""
    metrics = evaluate_held_out(*arguments)
    if jax.process_index() == 0:
        say(table(metrics))
        print(as_json(metrics))


def as_json(metrics: dict[str, float]) -> str:
    return json.dumps(plain(metrics), indent=1, allow_nan=False)


def keep_clock(run: Restored, folder: Path) -> None:
    """Has chat templates tell the time at which the evaluation in a folder began.

    That is when the run began, where there is one; a model from files has none.
    """
    began = (read_record(folder) or {}).get("clock")
    if not run.identity.resumed and isinstance(began, str) and hasattr(run.tokenizer, "now"):
        try:
            run.tokenizer.now = datetime.datetime.fromisoformat(began)
        except ValueError:
            raise UserError(
                f"{folder}/{RECORD_FILE} is damaged; use another folder as out"
            ) from None
        run.identity.clock = began


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
                f"{folder} has other generations on other hosts; it must be a folder that "
                "all of them see"
            )


def record_of(run: Restored, evaluator: Evaluator) -> dict[str, Any]:
    """All that decides what an evaluation samples and how it is graded, one flat level."""
    config = evaluator.config
    record: dict[str, Any] = {
        "step": run.step,
        "clock": run.identity.clock,
        "grader": re.sub(r" at 0x[0-9a-f]+", "", repr(evaluator.problems.grade)),
        "code": own_code_parts(run.experiment.imports),
        "dtype": run.experiment.train.dtype,
        "roles": list(config.roles),
        "num_samples": config.num_samples,
        "greedy": config.greedy,
        "seed": config.seed,
    }
    for name, value in dataclasses.asdict(evaluator.settings).items():
        record[f"sampling.{name}"] = value
    for name, variables in (("student", run.student), ("teacher", run.teacher)):
        record[f"{name}.weights"] = weights_digest(variables)
    record["tokenizer"] = tokenizer_digest(run.tokenizer)
    for role, prompts in evaluator.prompts.items():
        record[f"{role}.prompts"] = digest(json.dumps([(p.problem.id, p.ids) for p in prompts]))
        answers = [(p.problem.id, p.problem.answer, *p.problem.other_answers) for p in prompts]
        record[f"{role}.answers"] = digest(json.dumps(answers))
    return record
