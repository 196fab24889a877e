# SPDX-License-Identifier: Apache-2.0
"""What a step by hand begins with: random variables of a model, and a batch of problems."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.problems import Problem
from opsd_jax.data.rendering import render
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError
from opsd_jax.method.batch import Batch
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.sampling.prompts import Context, pad


def random_variables(model: Decoder, key: jax.Array) -> dict:
    """Freshly initialised variables of a decoder: {"params"} and, with adapters, {"lora"}.

    Args:
      model: the decoder.
      key: typed PRNG key.
    """
    return nn.meta.unbox(jax.jit(init_variables, static_argnums=0)(model, key))


def make_batch(contexts: ContextConfig, tokenizer: Tokenizer, problems: Iterable[Problem]) -> Batch:
    """Student's and teacher's prompts of some problems, right-padded to the longest of each role.

    Args:
      contexts: what each role is shown.
      tokenizer: turns text to ids.
      problems: B of them.

    Returns:
      A batch with student.ids [B, P] and teacher.ids [B, Q], int32.

    Raises:
      UserError: no problem, or one over its budget of tokens.
    """
    if contexts.after_rollout:
        raise UserError("make_batch comes before a rollout: contexts.teacher shows what one gives")
    asked = list(problems)
    if not asked:
        raise UserError("make_batch needs at least one problem")

    def role_prompts(role: str) -> Context:
        rows = []
        for problem in asked:
            ids = render(contexts, tokenizer, problem, role)
            if ids is None:
                raise UserError(
                    f"problem {problem.id!r}: its {role} prompt is over "
                    f"contexts.{contexts.budget_field(role)} = {contexts.budget(role)}; raise it, "
                    "or leave the problem out"
                )
            rows.append(ids)
        padded, lengths = pad(rows, max(map(len, rows)), tokenizer.pad_id)
        return Context(jnp.asarray(padded), jnp.asarray(lengths))

    views = tuple(role_prompts(name) for name in contexts.teachers[1:])
    return Batch(role_prompts("student"), role_prompts("teacher"), views=views)
