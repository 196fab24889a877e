# SPDX-License-Identifier: Apache-2.0
"""The rollout against a slow loop that has no cache, no padding and no batch."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import VOCAB, text_hidden, tiny_batch, tiny_config, tiny_variables

from opsd_jax.divergence import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.head import head_logits, output_head
from opsd_jax.model import Decoder
from opsd_jax.objective import compare
from opsd_jax.rollouts import RolloutConfig, rollout
from opsd_jax.sampling import filter_logits, sample

CONFIG = RolloutConfig(max_new_tokens=7, temperature=1.3, top_k=9, top_p=0.9, stop_ids=(3, 5))


def slow_rollout(model, variables, prompt, key, row, config):
    """One row: a full forward pass over the whole text for every token."""
    ids, out, logps = list(prompt), [], []
    for t in range(config.max_new_tokens):
        hidden = text_hidden(model.config)(variables, ids)
        logits = head_logits(output_head(variables["params"], model.config), hidden[-1:])
        if config.temperature == 0:
            token = int(jnp.argmax(logits[0]))
        else:
            uniform = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), t))
            kept = filter_logits(logits, config.temperature, config.top_k, config.top_p)
            token = int(sample(kept, uniform[None])[0])
        ids.append(token)
        out.append(token)
        logps.append(float(jax.nn.log_softmax(logits[0])[token]))
        if token in config.stop_ids:
            break
    return out, logps


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_rollout_equals_the_slow_loop(any_config, temperature):
    config = dataclasses.replace(CONFIG, temperature=temperature)
    model, variables = Decoder(any_config), tiny_variables(any_config)
    prompts, key = tiny_batch(4).student, jax.random.key(5)
    out = jax.jit(partial(rollout, model, config=config))(
        variables, prompts.ids, prompts.lengths, key
    )
    for row in range(4):
        prompt = prompts.ids[row, : prompts.lengths[row]].tolist()
        ids, logps = slow_rollout(model, variables, prompt, key, row, config)
        assert out.ids[row][out.mask[row]].tolist() == ids
        np.testing.assert_allclose(out.logps[row][out.mask[row]], logps, atol=2e-5)
        assert bool(out.stopped[row]) == (ids[-1] in config.stop_ids)
        assert not out.mask[row, len(ids) :].any()
        assert (out.ids[row, len(ids) :] == config.pad_id).all()
        assert (out.logps[row, len(ids) :] == 0).all()


def test_rollout_logps_equal_scoring_logps(any_config):
    """Invariant 4: the rollout and the scoring are one function of the same ids."""
    model, variables = Decoder(any_config), tiny_variables(any_config)
    batch = tiny_batch(8)
    prompts = batch.student
    out = jax.jit(partial(rollout, model, config=CONFIG))(
        variables, prompts.ids, prompts.lengths, jax.random.key(1)
    )
    terms = jax.jit(partial(compare, model, DivergenceConfig()))(variables, variables, batch, out)
    np.testing.assert_allclose(terms.student_logps, out.logps, atol=1e-5)


def test_a_row_depends_on_neither_padding_nor_neighbours():
    model, variables = Decoder(tiny_config()), tiny_variables(tiny_config())
    prompts = tiny_batch(5).student
    jitted = jax.jit(partial(rollout, model, variables, key=jax.random.key(2), config=CONFIG))

    def run(ids, lengths):
        return jitted(prompt_ids=ids, prompt_lengths=lengths)

    out = run(prompts.ids, prompts.lengths)
    wider = jnp.pad(prompts.ids, [(0, 0), (0, 4)], constant_values=VOCAB - 1)
    junk = jnp.where(jnp.arange(6) < prompts.lengths[:, None], prompts.ids, 7)
    neighbours = prompts.ids.at[1:].set(9)
    assert run(wider, prompts.lengths).ids.tolist() == out.ids.tolist()
    assert run(junk, prompts.lengths).ids.tolist() == out.ids.tolist()
    alone = run(neighbours, prompts.lengths.at[1:].set(2)).ids[0]
    assert alone.tolist() == out.ids[0].tolist()


def test_all_rows_may_stop_at_once_or_never():
    model, variables = Decoder(tiny_config()), tiny_variables(tiny_config())
    prompts = tiny_batch(3).student

    def run(config):
        jitted = jax.jit(partial(rollout, model, config=config))
        return jitted(variables, prompts.ids, prompts.lengths, jax.random.key(0))

    at_once = run(dataclasses.replace(CONFIG, stop_ids=tuple(range(VOCAB)), pad_id=1))
    assert at_once.mask.sum(axis=1).tolist() == [1, 1, 1] and at_once.stopped.all()
    never = run(dataclasses.replace(CONFIG, stop_ids=()))
    assert never.mask.all() and not never.stopped.any()
    single = run(dataclasses.replace(CONFIG, max_new_tokens=1))
    assert single.ids.shape == (3, 1)


@pytest.mark.parametrize(
    "field, value", [("max_new_tokens", 0), ("temperature", -1), ("top_k", -1), ("top_p", 0.0)]
)
def test_bad_settings_name_themselves(field, value):
    with pytest.raises(UserError, match=f"rollout.{field}"):
        dataclasses.replace(CONFIG, **{field: value})
