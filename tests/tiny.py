# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, batches and a tokenizer, shared by the tests of several folders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from opsd_jax.divergence.likelihood import token_logps
from opsd_jax.method.batch import Batch
from opsd_jax.method.scoring import completion_hidden
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.head import output_head
from opsd_jax.sampling.prompts import Completion, Context

VOCAB = 24


def tiny_config(**changes) -> ModelConfig:
    shape = dict(
        vocab_size=VOCAB,
        num_layers=2,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=24,
        rope_theta=100.0,
        remat=False,
    )
    return ModelConfig(**(shape | changes))


@functools.cache
def tiny_variables(config: ModelConfig, seed: int = 0) -> dict:
    """Random parameters, sharp enough that distributions differ; adapters are not zero.

    Adapters are half as large, as they enter by their product: attention scores in the tens
    would turn the last bits of float32 into errors above 1e-5 on some processors.
    """
    shapes = nn.meta.unbox(
        jax.eval_shape(lambda key: init_variables(Decoder(config), key), jax.random.key(0))
    )
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        is_norm, is_adapter = path[-1].key == "scale", path[0].key == "lora"
        spread = 0.2 if is_norm or is_adapter else 0.4
        values = rng.normal(size=leaf.shape) * spread + is_norm
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def tiny_batch(batch_size: int = 8, student_len: int = 6, teacher_len: int = 11, seed: int = 0):
    """Ragged prompts of both roles, right-padded."""
    rng = np.random.default_rng(seed)

    def context(width):
        lengths = rng.integers(1, width + 1, batch_size).astype(np.int32)
        ids = rng.integers(1, VOCAB, (batch_size, width)).astype(np.int32)
        ids[np.arange(width) >= lengths[:, None]] = 0
        return Context(ids=jnp.asarray(ids), lengths=jnp.asarray(lengths))

    return Batch(student=context(student_len), teacher=context(teacher_len))


class WordTokenizer:
    """One id per word, for tests that need some tokenizer."""

    vocab_size, pad_id, stop_ids = 100, 0, (1, 2)

    def encode(self, text):
        return [3 + sum(map(ord, word)) % 97 for word in text.split()]

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids if i > 2)

    def render(self, prompt, **switches):
        return self.encode(prompt)


@functools.cache
def text_hidden(config: ModelConfig):
    """Jitted (variables, ids) -> hidden of one text, without cache, batch or prompt padding.

    The text is filled up to 32 tokens on the right, which causal attention cannot see, so that
    a slow loop over growing texts compiles once.
    """
    model = Decoder(config)
    run = jax.jit(lambda v, ids: model.apply(v, ids, jnp.arange(32)[None])[0])

    def hidden(variables, ids):
        filled = np.zeros((1, 32), np.int32)
        filled[0, : len(ids)] = ids
        return run(variables, filled)[0, : len(ids)]

    return hidden


def scored_logps(model: Decoder, variables: dict, context: Context, completion: Completion):
    """Log-probability of every token of a completion, by a forward pass over the whole text."""

    @jax.jit
    def score(variables):
        hidden = completion_hidden(model, variables, context, completion)
        head = output_head(variables["params"], model.config)
        return token_logps(head, hidden, completion.ids, completion.mask, None)[0]

    return np.asarray(score(variables))
