# SPDX-License-Identifier: Apache-2.0
"""`opsd data`: the first rows as each role will see them, and what is wrong with the rest.

Before a minute is spent on training: prompts with their special tokens marked, token counts, what
is left out, the answer and the grade of the reference. It needs the tokenizer and loads no weights.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from opsd_jax.data.grader_pool import GraderPool
from opsd_jax.data.inspection import Finding, Row, boxed_or_not, findings, look, over_budget
from opsd_jax.data.notices import idle_switches, told_answers, unended_turns
from opsd_jax.data.problems import ProblemSet
from opsd_jax.data.tokenizer import Tokenizer, quoted
from opsd_jax.errors import UserError
from opsd_jax.run.config import load_experiment
from opsd_jax.run.experiment import Experiment, tokenizer_of

MOST_ROWS = 1000  # that are rendered and graded, evenly spread; all are loaded
_MOST_CHARACTERS = 4000  # of a prompt that is shown


class Part(NamedTuple):
    """A problem set of an experiment and who is asked its problems."""

    field: str
    problems: ProblemSet
    roles: tuple[str, ...]
    source: str


def data_command(gin_files: Sequence[str], bindings: Sequence[str], num: int = 3) -> list[Finding]:
    """`opsd data`: prints what it finds.

    Args:
      gin_files, bindings: of the experiment.
      num: rows to show of each problem set.

    Raises:
      UserError: rows that cannot be read, or faults, which are told on the way.
    """
    experiment, _ = load_experiment(gin_files, bindings)
    tokenizer = tokenizer_of(experiment.train.model)
    found: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="opsd_data_") as cache:
        parts = [*parts_of(experiment, cache)]
        for part in parts:
            found += inspect(experiment, tokenizer, part, num)
        found += shared_questions(parts)
    found += [Finding(text) for text in notices(experiment, tokenizer)]
    if not found:
        _print("nothing to change was found")
    for finding in found:
        _print(f"{'FAULT' if finding.is_fault else 'note'}: {finding.text}")
    if faults := [finding for finding in found if finding.is_fault]:
        raise UserError(f"{faults[0].text}" + f" ({len(faults)} faults)" * (len(faults) > 1))
    return found


def parts_of(experiment: Experiment, cache: str) -> Iterator[Part]:
    """The training and the held-out problems."""
    train = experiment.train
    for field, source, roles in (
        ("train.problems", train.problems, ("student", "teacher")),
        ("train.heldout", train.heldout, ("evaluation",)),
    ):
        if source is not None:
            before = tuple(r for r in roles if not experiment.training_contexts.is_after(r))
            yield Part(field, source.load(cache), before, type(source).__name__)


def inspect(experiment: Experiment, tokenizer: Tokenizer, part: Part, num: int) -> list[Finding]:
    """Prints the first rows of a problem set and a summary; gives what is wrong."""
    contexts = experiment.training_contexts
    total = len(part.problems)
    spread = np.linspace(0, total - 1, min(total, MOST_ROWS)).astype(int).tolist()
    indices = sorted({*range(min(num, total)), *spread})
    with GraderPool(part.problems.grade, num_workers=experiment.train.grader_workers) as pool:
        rows = look(contexts, tokenizer, part.problems, indices, part.roles, pool)
        found = findings(contexts, rows, part.source)
        first = rows[0]
        asker = part.roles[0]
        if asker in first.prompts:
            text = shown_ids(tokenizer, first.prompts[asker])
            found += boxed_or_not(text, first.problem, pool, asker)
    _print(f"{part.field} = @{part.source}(): {total:,} problems, {len(rows):,} looked at")
    for row in rows[:num]:
        _print(as_text(experiment, tokenizer, row))
    _print(summary(experiment, rows))
    left = sum(over_budget(contexts, row) is None and row.error is None for row in rows)
    wanted = experiment.train.batch_size // experiment.train.group_size
    if part.field == "train.problems" and total == len(rows) and 0 < left < wanted:
        found.append(
            Finding(
                f"a step takes {wanted:,} problems, and {left:,} are left; lower train.batch_size",
                True,
            )
        )
    if special := sum(quoted(tokenizer, t) != t for row in rows for t in _texts(row)):
        found.append(
            Finding(
                f"special tokens of the tokenizer stand in {special:,} texts of {part.field}: they "
                "are encoded as text; contexts.special_tokens = 'error' names the rows"
            )
        )
    longest = max((row.num_reference for row in rows), default=0)
    limit = experiment.rollout.max_new_tokens
    if part.field == "train.problems" and longest > limit:
        over = sum(row.num_reference > limit for row in rows)
        found.append(
            Finding(
                f"{over:,} of {len(rows):,} references are longer than rollout.max_new_tokens = "
                f"{limit:,}, up to {longest:,} tokens: answers as long would be cut short"
            )
        )
    return [Finding(f"{part.field}: {f.text}", f.is_fault) for f in found]


def _texts(row: Row) -> tuple[str, ...]:
    return (row.problem.question_text, row.problem.solution, row.problem.answer)


def as_text(experiment: Experiment, tokenizer: Tokenizer, row: Row) -> str:
    """A row as every role sees it."""
    contexts, problem = experiment.training_contexts, row.problem
    lines = [f"\n== {problem.id}"]
    for role, ids in row.prompts.items():
        lines.append(f"-- {role}: {len(ids):,} tokens of {contexts.budget(role):,}")
        lines += [f"   | {line}" for line in _cut(shown_ids(tokenizer, ids)).split("\n")]
    if row.error:
        lines.append(f"-- cannot be asked: {row.error}")
    elif reason := over_budget(contexts, row):
        lines.append(f"-- left out: {reason}")
    answers = " or ".join(map(repr, (problem.answer, *problem.other_answers)))
    lines.append(f"-- answer: {answers if problem.answer else 'none: nothing is graded'}")
    if row.grade is not None:
        said = "no answer" if row.grade.answer is None else repr(row.grade.answer)
        outcome = "" if row.grade.outcome == "graded" else f" ({row.grade.outcome})"
        lines.append(
            f"-- reference: {row.num_reference:,} tokens, states {said}: grade "
            f"{row.grade.value:g}{outcome}"
        )
    elif problem.solution:
        lines.append(f"-- reference: {row.num_reference:,} tokens, not graded")
    if problem.columns:
        lines.append(f"-- further columns: {', '.join(problem.columns)}")
    return "\n".join(lines)


def summary(experiment: Experiment, rows: Sequence[Row]) -> str:
    """Lengths and what is left out, over all rows that were looked at."""
    contexts = experiment.training_contexts
    lines = ["\ntokens (least, median, most):"]
    for role in rows[0].prompts:
        counts = [len(row.prompts[role]) for row in rows if role in row.prompts]
        lines.append(f"  {role}: {min(counts):,}, {int(np.median(counts)):,}, {max(counts):,}")
    if counts := [row.num_reference for row in rows if row.num_reference]:
        lines.append(f"  reference: {min(counts):,}, {int(np.median(counts)):,}, {max(counts):,}")
    dropped = [row for row in rows if over_budget(contexts, row)]
    lines.append(f"left out: {len(dropped):,} of {len(rows):,}")
    if dropped:
        lines[-1] += f", {dropped[0].problem.id!r} first ({over_budget(contexts, dropped[0])})"
    if graded := [row.grade.value for row in rows if row.grade is not None]:
        silent = sum(row.grade.answer is None for row in rows if row.grade is not None)
        lines.append(
            f"grade of the references: {np.mean(graded):.3f} on average"
            + (f"; {silent:,} of {len(graded):,} state no answer that is read" if silent else "")
        )
    return "\n".join(lines) + "\n"


def shared_questions(parts: Sequence[Part]) -> list[Finding]:
    """Told of questions that are trained on and held out."""
    if len(parts) < 2:
        return []
    train, heldout = (
        [" ".join(part.problems[i].question_text.split()) for i in range(len(part.problems))]
        for part in parts
    )
    trained = set(train)
    shared = sum(question in trained for question in heldout)
    if not shared:
        return []
    return [
        Finding(
            f"{shared:,} of {len(heldout):,} held-out problems are trained on too (the same "
            "question): held-out accuracy would be in part recall; hold out with hash_start and "
            "hash_stop",
            shared == len(heldout),
        )
    ]


def notices(experiment: Experiment, tokenizer: Tokenizer) -> list[str]:
    """What `opsd train` tells at its start, as far as it needs no weights."""
    contexts = experiment.contexts
    stop_ids = {*tokenizer.stop_ids, *experiment.rollout.stop_ids}
    told = unended_turns(tokenizer, stop_ids)
    inner = getattr(tokenizer, "inner", None)
    if inner is not None and not inner.chat_template:
        told.append(
            "this tokenizer has no chat template: prompts are lines of a dialogue; name the model "
            "that was tuned for chat, or put its chat_template.jinja beside the tokenizer"
        )
    roles = ["student", "analysis" if experiment.teacher.reasons else "teacher"]
    roles += ["evaluation"] * (experiment.train.heldout is not None)
    if contexts.is_after("teacher"):
        told.append("contexts.teacher shows what a rollout gives, so the teacher is not shown here")
    return told + told_answers(contexts, roles) + idle_switches(contexts, tokenizer, roles)


def shown_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids with special tokens in «», so that they differ from text that looks so."""
    inner = getattr(tokenizer, "inner", None)
    controls = set(getattr(tokenizer, "controls", lambda ids: ())(ids))

    def text(some: Sequence[int]) -> str:
        if inner is None:
            return tokenizer.decode(some)
        return inner.decode(some, clean_up_tokenization_spaces=False)

    pieces: list[str] = []
    for is_control, some in itertools.groupby(ids, controls.__contains__):
        if is_control:
            pieces += [f"«{_printable(text([token]))}»" for token in some]
        else:
            pieces.append(_printable(text(list(some))))
    return "".join(pieces)


def _printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _cut(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    left = len(text) - 2 * half
    return f"{text[:half]}\n[… {left:,} characters …]\n{text[-half:]}"


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
