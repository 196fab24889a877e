# SPDX-License-Identifier: Apache-2.0
"""Where the privileged model disagrees: both sides' next-token distributions, token by token.

`opsd tokens` samples a few rollouts of a finished run and writes workdir/tokens/step_XXXXXX.jsonl,
one sample a line; `opsd report` shows it. Alphabet: B batch, C completion, V vocabulary, K the
alternatives kept of each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np

from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.divergence.losses import DivergenceConfig, TokenDivergence, logit_divergence
from opsd_jax.errors import UserError
from opsd_jax.host.files import require_writable, write_json_lines
from opsd_jax.host.identity import problems_digest
from opsd_jax.host.stage import local, shown, upload
from opsd_jax.method.batch import Batch
from opsd_jax.method.objective import teacher_contexts
from opsd_jax.method.scoring import completion_hidden
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.model.sharding import on_mesh
from opsd_jax.run.config import load_run
from opsd_jax.run.finished_run import Restored, restore_run
from opsd_jax.run.shown_rows import Shown, analysis_texts, shown_rows
from opsd_jax.run.train import grading
from opsd_jax.sampling.prompts import Completion

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
    roles = [(student_variables, batch.student)]
    roles += [(teacher_variables, context) for context in teacher_contexts(config, batch)]
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


def compared(run: Restored, shown: Shown) -> TokenComparison:
    """Both sides on the rows that are shown, as host arrays."""
    method = run.parts.method
    compiled = jax.jit(partial(compare_tokens, method.model, method.divergence))
    compare = on_mesh(compiled, run.parts.mesh, run.parts.rules)
    return jax.device_get(compare(run.student, run.teacher, shown.batch, shown.completion))


def added_text(tokenizer: Tokenizer, whole: Sequence[int], parts: Sequence[int], token: int) -> str:
    """What `token` adds to the text of `whole`, tokens of a begun character lying between them.

    Empty for a stop token and for one that ends inside a character.
    """
    text = tokenizer.decode([*whole, *parts, token])[len(tokenizer.decode(whole)) :]
    return "" if text.endswith("\ufffd") else text


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    A token that ends inside a character adds nothing; the one that completes it adds the whole
    character, and the last token adds what was never completed. Joined, they are the decoded text.
    """
    return [text for text, _, _ in _texts_and_before(tokenizer, ids)]


def _texts_and_before(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """(text, start, end) for every token t: ids[start:end] reads as whole text, ids[end:t] as none.

    Only the last token that gave text is kept before `end`: enough for a leading space.
    """
    found = []
    start = end = 0
    for t, token in enumerate(ids):
        text = added_text(tokenizer, ids[start:end], ids[end:t], token)
        found.append((text, start, end))
        if text:
            start, end = end, t + 1
    if found:
        _, start, end = found[-1]
        rest = tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:end])) :]
        found[-1] = (rest, start, end)
    return found


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
    read = _texts_and_before(tokenizer, ids)

    def top(t: int, side_ids: Any, side_probs: Any) -> list[list[Any]]:
        _, start, end = read[t]
        return [
            [token, added_text(tokenizer, ids[start:end], ids[end:t], token), _number(prob)]
            for token, prob in zip(side_ids[t].tolist(), side_probs[t], strict=True)
        ]

    return [
        {
            "id": token,
            "text": read[t][0],
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


def tokens_command(workdir: str, step: int | str | None, num: int, seed: int) -> None:
    """`opsd tokens`: `write_tokens`, and the file's path on the terminal."""
    print(shown(write_tokens(workdir, step, num, seed)))


def write_tokens(workdir: str, step: int | str | None, num: int, seed: int) -> Path:
    """Samples `num` rollouts of a run and writes what both sides think of them; gives the file.

    Problems are the held-out ones, or the training problems where there are none.
    """
    kept = local(workdir)
    require_writable(kept)
    run = restore_run(kept, step, load_run)
    if run.teacher is None:
        raise UserError(
            f"{workdir}: its teacher.model is of another shape than the student, and "
            "`opsd tokens` compares weights of one shape"
        )
    train = run.experiment.train
    problems = (train.heldout or train.problems).load(str(kept / "problems"))
    field = "train.heldout" if train.heldout else "train.problems"
    run.identity.check(field, {"problems": problems_digest(problems)})
    with ExitStack() as stack:
        grade = grading(problems, train.grader_workers, stack)
        shown = shown_rows(run, problems, num, seed, grade)
    tokens = token_rows(run.tokenizer, shown.completion, compared(run, shown))
    analyses = analysis_texts(run, shown.completion)
    divergence = run.experiment.divergence.name  # or a function
    path = kept / "tokens" / f"step_{run.step:06d}.jsonl"
    lines = [
        {
            "step": run.step,
            "id": problem.id,
            "question": problem.question_text,
            "teacher_prompt": shown.teacher_prompts[b],
            "analysis": analyses[b],
            "answer": problem.answer,
            "completion": shown.texts[b],
            "reward": shown.rewards[b],
            "stopped": bool(shown.completion.stopped[b]),
            "divergence": getattr(divergence, "__name__", divergence),
            "tokens": tokens[b],
        }
        for b, problem in enumerate(shown.problems)
    ]
    write_json_lines(path, lines)
    upload(path)
    return path
