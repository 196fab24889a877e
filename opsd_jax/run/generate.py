# SPDX-License-Identifier: Apache-2.0
"""`opsd generate`: streams one answer to the terminal."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp

from opsd_jax.data.notices import unended_turns
from opsd_jax.data.problems import Problem
from opsd_jax.data.rendering import prompt_ids
from opsd_jax.data.tokenizer import Tokenizer, quoted
from opsd_jax.errors import UserError
from opsd_jax.host.pod import require_32_bits
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.random_keys import Use, key_for
from opsd_jax.sampling.rollout import stream


def generate_command(
    workdir: str | None,
    model: str | None,
    step: int | str | None,
    prompt: str,
    settings: RolloutConfig,
    seed: int,
    stop: Sequence[str] = (),
) -> None:
    """`opsd generate`: streams the answer to the terminal, up to the first of some strings.

    A run answers in its evaluation context, a model in the chat template's.
    """
    if workdir:
        # Late: a model from files needs no gin.
        from opsd_jax.run.config import load_run
        from opsd_jax.run.finished_run import restore_run

        run = restore_run(workdir, step, load_run, with_teacher=False)
        decoder, tokenizer, variables = run.parts.model, run.tokenizer, run.student
        problem = Problem("--prompt", prompt, "", "")
        ids = prompt_ids(run.experiment.contexts, tokenizer, problem, "evaluation")
        settings = dataclasses.replace(settings, stop_ids=run.experiment.rollout.stop_ids)
    else:
        from opsd_jax.pretrained.load import load_pretrained

        require_32_bits()
        found = load_pretrained(str(model))
        if found.tokenizer is None:
            raise UserError(f"--model={model}: no tokenizer files there")
        decoder, tokenizer, variables = found.model, found.tokenizer, {"params": found.params}
        ids = tokenizer.render(quoted(tokenizer, prompt))
    check_length(len(ids), settings.max_new_tokens, decoder.config.max_positions)
    settings = settings.for_tokenizer(tokenizer.stop_ids, tokenizer.pad_id)
    for notice in unended_turns(tokenizer, settings.stop_ids):
        print(notice, file=sys.stderr)
    lengths = jnp.array([len(ids)], jnp.int32)
    key = key_for(Use.SHOWN, jax.random.key(seed))
    tokens = stream(decoder, variables, jnp.array([ids], jnp.int32), lengths, key, settings)
    said = itertools.takewhile(lambda token: token not in settings.stop_ids, tokens)
    for text in texts(said, tokenizer, stop):
        print(text, end="", flush=True)
    print()


def check_length(prompt_len: int, max_tokens: int, max_positions: int) -> None:
    """Refuses an answer without a prompt, or beyond the positions that the model was trained for.

    The KV cache is allocated for all of them at once.
    """
    if not prompt_len:
        raise UserError("--prompt must not be empty: this model adds no tokens of its own")
    if prompt_len + max_tokens > max_positions:
        raise UserError(
            f"--max_tokens must be at most {max_positions - prompt_len}, not {max_tokens}: the "
            f"model has {max_positions} positions, of which the prompt takes {prompt_len}"
        )


def texts(tokens: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """The pieces of a text as its tokens come, up to the first of the `stop` strings.

    Held back as long as needed: half of a character, and what may be the beginning of a stop.
    """
    said: list[int] = []
    text, shown = "", 0
    for token in tokens:
        said.append(token)
        text = tokenizer.decode(said)
        found = [at for at in map(text.find, stop) if at >= 0]
        if found:
            yield text[shown : min(found)]
            return
        sure = len(text) if not text.endswith("\ufffd") else shown
        for end in stop:
            parts = (n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n]))
            sure = min(sure, len(text) - next(parts, 0))
        if sure > shown:
            yield text[shown:sure]
            shown = sure
    yield text[shown:]
