# SPDX-License-Identifier: Apache-2.0
"""Where the privileged model disagrees: both sides' next-token distributions, token by token.

`opsd tokens` samples a few rollouts of a finished run and writes workdir/tokens/step_XXXXXX.jsonl,
one sample a line; `opsd report` shows it. Alphabet: B batch, C completion, V vocabulary, K the
alternatives kept of each side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax.data.contexts import render
from opsd_jax.data.problems import Problem, ProblemSet
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.divergence.losses import DivergenceConfig, TokenDivergence, logit_divergence
from opsd_jax.errors import UserError
from opsd_jax.host.files import require_writable, write_json_lines
from opsd_jax.host.identity import problems_digest
from opsd_jax.method.batch import Batch, Policy
from opsd_jax.method.reason_first import Reasoner
from opsd_jax.method.scoring import completion_hidden
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.model.sharding import on_mesh
from opsd_jax.run.config import load_run
from opsd_jax.run.finished_run import Restored, restore_run
from opsd_jax.run.train import grading
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion, Context, pad
from opsd_jax.sampling.random_keys import Use, key_for
from opsd_jax.sampling.rollout import rollout

NUM_ALTERNATIVES = 5


@flax.struct.dataclass
class TokenComparison:
    """Both sides at every token of a completion.

    terms: fields [B, C]; student_ids, teacher_ids: [B, C, K] the most probable tokens of a side,
    in falling order; student_probs, teacher_probs: [B, C, K] their probabilities at
    temperature 1. Masked tokens hold anything but in `terms`, where they are 0.
    """

    terms: TokenDivergence
    student_ids: jax.Array
    student_probs: jax.Array
    teacher_ids: jax.Array
    teacher_probs: jax.Array


def compare_tokens(
    model: Decoder,
    config: DivergenceConfig,
    student_variables: dict,
    teacher_variables: dict,
    batch: Batch,
    completion: Completion,
    num_alternatives: int = NUM_ALTERNATIVES,
) -> TokenComparison:
    """Divergence, entropies and top alternatives of both roles on the same completion.

    Logits exist for one row at a time, [C, V].

    Args:
      model: the decoder of both roles.
      config: the divergence that is shown, at its own temperature.
      student_variables, teacher_variables: {"params"[, "lora"]} of each role.
      batch: prompts of both roles.
      completion: [B, C], the same ids for both.
      num_alternatives: K.
    """
    roles = [(student_variables, batch.student), (teacher_variables, batch.teacher)]
    if config.target is not None:
        roles.append((teacher_variables, batch.student))
    hiddens = tuple(completion_hidden(model, v, context, completion) for v, context in roles)
    heads = tuple(output_head(v["params"], model.config) for v, _ in roles)
    K = min(num_alternatives, heads[0].kernel.shape[0])

    def row(inputs) -> TokenComparison:
        ids, mask, *hiddens = inputs
        student, *teachers = map(head_logits, heads, hiddens)
        terms = logit_divergence(config, student, tuple(teachers), ids, mask)
        student_probs, student_ids = jax.lax.top_k(jax.nn.softmax(student), K)
        teacher_probs, teacher_ids = jax.lax.top_k(jax.nn.softmax(teachers[0]), K)
        return TokenComparison(terms, student_ids, student_probs, teacher_ids, teacher_probs)

    return jax.lax.map(row, (completion.ids, completion.mask, *hiddens))


def view_problems(run: Restored, problems: ProblemSet, num: int) -> tuple[list[Problem], Batch]:
    """The first `num` problems that fit both budgets, and their prompts in both roles.

    Raises:
      UserError: none fits.
    """
    chosen: list[Problem] = []
    prompts: dict[str, list[list[int]]] = {"student": [], "teacher": []}
    for i in range(len(problems)):
        rendered = {
            role: render(run.experiment.training_contexts, run.tokenizer, problems[i], role)
            for role in prompts
        }
        if all(ids is not None for ids in rendered.values()):
            chosen.append(problems[i])
            for role, ids in rendered.items():
                prompts[role].append(ids or [])
        if len(chosen) == num:
            break
    if not chosen:
        raise UserError("no problem fits contexts.student_max_tokens and teacher_max_tokens")
    contexts = {
        role: Context(*map(jnp.asarray, pad(rows, max(map(len, rows)), run.tokenizer.pad_id)))
        for role, rows in prompts.items()
    }
    return chosen, Batch(contexts["student"], contexts["teacher"])


def sample_and_compare(
    run: Restored, batch: Batch, seed: int = 0
) -> tuple[Completion, TokenComparison]:
    """Rollouts of the student and both sides on them, as host arrays; compiled once."""
    method = run.parts.method
    compiled = jax.jit(
        partial(_sampled, method.model, method.divergence, method.rollout, method.reasoner)
    )
    sample = on_mesh(compiled, run.parts.mesh, run.parts.rules)
    key = key_for(Use.SHOWN, jax.random.key(seed))
    return jax.device_get(sample(run.student, run.teacher, batch, key))


def _sampled(
    model: Decoder,
    divergence: DivergenceConfig,
    settings: RolloutConfig,
    reasoner: Reasoner | None,
    student: dict,
    teacher: dict,
    batch: Batch,
    key: jax.Array,
) -> tuple[Completion, TokenComparison]:
    prompts, completion_key = batch.student, key_for(Use.COMPLETIONS, key)
    completion = rollout(model, student, prompts.ids, prompts.lengths, completion_key, settings)
    if reasoner:
        analysis_key = key_for(Use.ANALYSES, key)
        analysis = reasoner.write(Policy(model, teacher), batch.teacher, analysis_key)
        batch = reasoner.join(batch, analysis)
        completion = dataclasses.replace(completion, analysis=analysis)
    return completion, compare_tokens(model, divergence, student, teacher, batch, completion)


def added_text(tokenizer: Tokenizer, whole: Sequence[int], parts: Sequence[int], token: int) -> str:
    """What `token` adds to the text of `whole`, tokens of a begun character lying between them.

    Empty for a stop token and for one that ends inside a character.
    """
    text = tokenizer.decode([*whole, *parts, token])[len(tokenizer.decode(whole)) :]
    return "" if text.endswith("\ufffd") else text


def text_before(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) for every token t: ids[start:end] reads as whole text, ids[end:t] as none yet.

    Only the last token that gave text is kept before `end`: enough for a leading space.
    """
    spans = []
    start = end = 0
    for t, token in enumerate(ids):
        spans.append((start, end))
        if added_text(tokenizer, ids[start:end], ids[end:t], token):
            start, end = end, t + 1
    return spans


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    A token that ends inside a character adds nothing; the one that completes it adds the whole
    character, and the last token adds what was never completed. Joined, they are the decoded text.
    """
    spans = text_before(tokenizer, ids)
    texts = [
        added_text(tokenizer, ids[start:end], ids[end:t], token)
        for t, ((start, end), token) in enumerate(zip(spans, ids, strict=True))
    ]
    if spans:
        start, end = spans[-1]
        texts[-1] = tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:end])) :]
    return texts


def token_rows(
    tokenizer: Tokenizer, completion: Completion, comparison: TokenComparison
) -> list[list[dict[str, Any]]]:
    """What the page shows of every token of every row, ready for json."""
    rows = []
    for b, mask in enumerate(np.asarray(completion.mask)):
        row = jax.tree.map(itemgetter(b), comparison)
        ids = np.asarray(completion.ids[b])[mask].tolist()
        rows.append(_row(tokenizer, row, ids, bool(completion.stopped[b])))
    return rows


def _row(
    tokenizer: Tokenizer, found: TokenComparison, ids: list[int], stopped: bool
) -> list[dict[str, Any]]:
    names = "divergence student_logps teacher_logps student_entropy teacher_entropy".split()
    texts, spans = token_texts(tokenizer, ids), text_before(tokenizer, ids)

    def top(t: int, side_ids: Any, side_probs: Any) -> list[list[Any]]:
        start, end = spans[t]
        return [
            [token, added_text(tokenizer, ids[start:end], ids[end:t], token), _number(prob)]
            for token, prob in zip(side_ids[t].tolist(), side_probs[t], strict=True)
        ]

    return [
        {
            "id": token,
            "text": texts[t],
            "stop": stopped and t == len(ids) - 1,
            **{name: _number(getattr(found.terms, name)[t]) for name in names},
            "student_top": top(t, found.student_ids, found.student_probs),
            "teacher_top": top(t, found.teacher_ids, found.teacher_probs),
        }
        for t, token in enumerate(ids)
    ]


def _number(value: Any) -> float | None:
    """Rounded for the page; null, which json has, for NaN and infinities, which it has not."""
    return round(float(value), 5) if np.isfinite(value) else None


def analysis_texts(run: Restored, completion: Completion) -> list[str | None]:
    """What the teacher read behind its prompt in every row, None where it does not reason first."""
    if completion.analysis is None:
        return [None] * len(completion.ids)
    written = completion_rows(completion.analysis)
    transition = run.experiment.contexts.transition
    # Without the stop token, as `Reasoner.join` has it.
    read = [
        ids[:-1] if stopped else ids
        for ids, stopped in zip(written, completion.analysis.stopped.tolist(), strict=True)
    ]
    return [run.tokenizer.decode(ids) + transition for ids in read]


def tokens_command(workdir: str, step: int | str | None, num: int, seed: int) -> Path:
    """`opsd tokens`: samples `num` rollouts of a run and writes what both sides think of them.

    Problems are the held-out ones, or the training problems where there are none.
    """
    require_writable(Path(workdir))
    run = restore_run(workdir, step, load_run)
    if run.teacher is None:
        raise UserError(
            f"--workdir={workdir}: its teacher.model is of another shape than the student, and "
            "`opsd tokens` compares weights of one shape"
        )
    train = run.experiment.train
    problems = (train.heldout or train.problems).load(str(Path(workdir) / "problems"))
    field = "train.heldout" if train.heldout else "train.problems"
    run.identity.check(field, {"problems": problems_digest(problems)})
    chosen, batch = view_problems(run, problems, num)
    completion, comparison = sample_and_compare(run, batch, seed)
    tokens = token_rows(run.tokenizer, completion, comparison)
    said = [[token["id"] for token in row if not token["stop"]] for row in tokens]
    texts = [run.tokenizer.decode(ids) for ids in said]
    with ExitStack() as stack:
        grades = grading(problems, train.grader_workers, stack)(chosen, texts)
    analyses = analysis_texts(run, completion)
    divergence = run.experiment.divergence.name  # or a function
    path = Path(workdir) / "tokens" / f"step_{run.step:06d}.jsonl"
    lines = [
        {
            "step": run.step,
            "id": problem.id,
            "question": problem.question_text,
            "teacher_prompt": run.experiment.training_contexts.prompt(problem, "teacher"),
            "analysis": analyses[b],
            "answer": problem.answer,
            "completion": texts[b],
            "reward": grades[b].value,
            "stopped": bool(completion.stopped[b]),
            "divergence": getattr(divergence, "__name__", divergence),
            "tokens": tokens[b],
        }
        for b, problem in enumerate(chosen)
    ]
    write_json_lines(path, lines)
    print(path)
    return path


def completion_rows(completion: Completion) -> list[list[int]]:
    """The sampled ids of every row, stop token included, padding removed."""
    return [ids[mask].tolist() for ids, mask in zip(completion.ids, completion.mask, strict=True)]
