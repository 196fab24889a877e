# SPDX-License-Identifier: Apache-2.0
"""What a model loses while it learns a rule: a text, some facts, its old answers.

`what_is_lost` goes into train.probes. The text and the facts were written for this file; neither
is a conversation, so no rule about answers touches them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from keeping import QUESTIONS, TOPICS

from opsd_jax.data.record import Message
from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.method.batch import Batch
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.run.tokens import compare_tokens
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Context, pad
from opsd_jax.sampling.rollout import rollout

TEXT = [
    "The ferry left the harbour a little after seven, when the fog had begun to lift from the "
    "water. Most of the passengers stayed below, where it was warm and smelled of coffee, but a "
    "few stood at the rail and watched the lighthouse grow small behind them. An old man with a "
    "basket of eggs told anyone who would listen that he had made this crossing every week for "
    "forty years and had never once been seasick. Nobody believed him until the wind turned.",
    "Bread rises because yeast feeds on the sugar in the dough and gives off carbon dioxide. The "
    "gas cannot escape, since kneading has turned the proteins of the flour into long elastic "
    "strands, and so it stretches the dough into thousands of small bubbles. In the oven the "
    "bubbles grow once more before the heat sets the walls between them. If the dough is left too "
    "long, the walls become thin and break, and the loaf comes out flat and sour.",
    "In the spring the town council decided to close the main street to cars on Sundays. The shop "
    "owners were against it at first, because they feared that customers would drive to the mall "
    "instead. After three months they counted again. More people came on foot and by bicycle than "
    "had ever come by car, they stayed longer, and the two cafes had to buy more chairs. By the "
    "end of the summer the owners asked whether the street could be closed on Saturdays as well.",
    "A map is a promise that somebody has been there before. The first maps of the coast were "
    "drawn by sailors who measured the depth of the water with a rope and a piece of lead, and "
    "wrote the numbers down in rows. Where nobody had measured, the paper stayed white. Today "
    "satellites see every rock and every roof, yet the bottom of the sea is still known less well "
    "than the surface of the moon, and most of it has never been seen by anyone.",
]
# Each text has one right end among those of its group.
FACTS = [
    (
        "The capital of {} is",
        "France Paris, England London, Italy Rome, Spain Madrid, Japan Tokyo, Russia Moscow, "
        "Egypt Cairo, Germany Berlin",
    ),
    (
        "The opposite of {} is",
        "hot cold, big small, black white, happy sad, fast slow, high low, young old, day night",
    ),
    (
        "The past tense of the verb {} is",
        "go went, see saw, eat ate, buy bought, write wrote, think thought, run ran, give gave",
    ),
    (
        "A young {} is called a",
        "dog puppy, cat kitten, sheep lamb, cow calf, horse foal, goat kid, bear cub, duck "
        "duckling",
    ),
]
NUM_QUESTIONS, NUM_TOKENS = 8, 32  # of the old answers


@gin.configurable
def what_is_lost(
    model: Decoder, student: dict, teacher: dict | None, tokenizer: Any
) -> dict[str, float]:
    """Nats per token of `TEXT`, accuracy on `FACTS`, KL(initial || student) on old answers.

    Args:
      model: the decoder of both.
      student: its variables.
      teacher: the initial model's, as teacher.weights = "initial" keeps them.
      tokenizer: with a chat template.

    Returns:
      probe/text_nats, probe/facts, and probe/kl_initial: per token of what the initial model
      answers to plain questions of the training's kinds.
    """
    rows = [tokenizer.encode(text) for text in TEXT]
    logps, mask = text_logps(model, student, rows, tokenizer.pad_id)
    found = {
        "probe/text_nats": float(-logps[mask].mean()),
        "probe/facts": facts_accuracy(model, student, tokenizer),
    }
    if teacher is not None:
        found["probe/kl_initial"] = old_answers_kl(model, student, teacher, tokenizer)
    return found


def text_logps(
    model: Decoder, variables: dict, rows: list[list[int]], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """log p of every token but the first of each row, [B, T - 1], and which of them are there."""
    ids, lengths = pad(rows, max(map(len, rows)), pad_id)
    logps = np.asarray(_next_logps(model, variables, ids), np.float64)
    return logps, np.arange(1, ids.shape[1]) < lengths[:, None]


@partial(jax.jit, static_argnums=0)
def _next_logps(model: Decoder, variables: dict, ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = model.apply(variables, ids, positions)
    head = output_head(variables["params"], model.config)

    def row(inputs):  # logits of one row at a time, [T - 1, V]
        hidden, following = inputs
        logps = jax.nn.log_softmax(head_logits(head, hidden))
        return jnp.take_along_axis(logps, following[:, None], axis=1)[:, 0]

    return jax.lax.map(row, (hidden[:, :-1], ids[:, 1:]))


def facts_accuracy(model: Decoder, variables: dict, tokenizer: Any) -> float:
    """Share of `FACTS` whose right end is more probable than the other ends of its group.

    Ends are told apart by their first token, which differs within each group.
    """
    right: list[bool] = []
    for template, pairs in FACTS:
        names, ends = zip(*(pair.split() for pair in pairs.split(", ")), strict=True)
        rows = [tokenizer.encode(template.format(name)) for name in names]
        firsts = np.array([tokenizer.encode(f" {end}")[0] for end in ends])
        if len(set(firsts)) < len(firsts):
            raise UserError(f"two ends of '{template}' begin with the same token of the tokenizer")
        ids, lengths = pad(rows, max(map(len, rows)), tokenizer.pad_id)
        logits = np.asarray(_last_logits(model, variables, ids, lengths))
        right += (logits[:, firsts].argmax(1) == np.arange(len(firsts))).tolist()
    return float(np.mean(right))


@partial(jax.jit, static_argnums=0)
def _last_logits(model: Decoder, variables: dict, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, V] behind the last token of each row."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = model.apply(variables, ids, positions)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return head_logits(output_head(variables["params"], model.config), last)


def old_answers_kl(model: Decoder, student: dict, initial: dict, tokenizer: Any) -> float:
    """Mean over the tokens of the initial model's own answers of KL(initial || student), nats."""
    texts = [QUESTIONS[i % len(QUESTIONS)].format(topic=TOPICS[i]) for i in range(NUM_QUESTIONS)]
    rows = [tokenizer.render_chat((Message("user", text),), "") for text in texts]
    ids, lengths = pad(rows, max(map(len, rows)), tokenizer.pad_id)
    settings = RolloutConfig(NUM_TOKENS).for_tokenizer(tokenizer.stop_ids, tokenizer.pad_id)
    return float(_kl(model, settings, student, initial, Context(ids, lengths)))


@partial(jax.jit, static_argnums=(0, 1))
def _kl(
    model: Decoder, settings: RolloutConfig, student: dict, initial: dict, context: Context
) -> jax.Array:
    said = rollout(model, initial, context.ids, context.lengths, jax.random.key(0), settings)
    batch = Batch(student=context, teacher=context)
    terms = compare_tokens(model, DivergenceConfig(), student, initial, batch, said, 1).terms
    return jnp.sum(terms.divergence) / jnp.sum(said.mask)
