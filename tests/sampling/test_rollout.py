# SPDX-License-Identifier: Apache-2.0
"""The rollout against a slow loop that has no cache, no padding and no batch."""

import dataclasses
import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.method.objective import compare
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.model.kv_cache import KV, merge
from opsd_jax.model.sharding import (
    FULLY_SHARDED,
    MeshConfig,
    batch_sharding,
    make_mesh,
    variable_shardings,
)
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.rollout import rollout, stages
from opsd_jax.sampling.tokens import filter_logits, sample
from tests.representatives import representatives
from tests.tiny import VOCAB, text_hidden, tiny_batch, tiny_config, tiny_variables

# Segments of three tokens, so that every test crosses their borders.
CONFIG = RolloutConfig(
    max_new_tokens=8, temperature=1.3, top_k=9, top_p=0.9, stop_ids=(3, 5), segment_len=3
)


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


@pytest.mark.parametrize("temperature", representatives([0.0, 1.3], 1.3))
@pytest.mark.parametrize("any_config", representatives(["full", "lora"], "lora"), indirect=True)
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


@pytest.mark.parametrize(
    "segment_len, unroll_layers",
    representatives(itertools.product([1, 2, 64], [0, 4]), (1, 4), (2, 0)),
)
def test_neither_segments_nor_unrolling_change_a_token(segment_len, unroll_layers):
    """Long enough for the cache to grow three times."""
    model, variables = Decoder(tiny_config()), tiny_variables(tiny_config())
    prompts = tiny_batch(4).student
    config = dataclasses.replace(CONFIG, max_new_tokens=24, stop_ids=(3,))

    def run(**changes):
        changed = dataclasses.replace(config, **changes)
        jitted = jax.jit(partial(rollout, model, config=changed))
        return jitted(variables, prompts.ids, prompts.lengths, jax.random.key(1))

    out, base = run(segment_len=segment_len, unroll_layers=unroll_layers), run()
    assert out.ids.tolist() == base.ids.tolist() and out.mask.tolist() == base.mask.tolist()
    np.testing.assert_allclose(out.logps, base.logps, atol=1e-5)
    np.testing.assert_allclose(out.sampled_logps, base.sampled_logps, atol=1e-5)


@pytest.mark.parametrize("prompt_len", [1, 64, 500])
@pytest.mark.parametrize("num_segments", [0, 1, 2, 7, 64, 1000])
def test_the_cache_grows_in_few_stages_to_the_end(prompt_len, num_segments):
    ends = stages(prompt_len, num_segments, 16)
    assert len(ends) <= 4 and ends == sorted(set(ends))
    assert (ends[-1] if ends else 0) == num_segments


def test_penalties_and_a_least_length_act_at_every_step():
    """Against a loop over numpy logits of the whole text, with the filters' own arithmetic."""
    model, variables = Decoder(tiny_config()), tiny_variables(tiny_config())
    prompts = tiny_batch(3).student
    config = dataclasses.replace(
        CONFIG,
        temperature=0.0,
        repetition_penalty=1.5,
        presence_penalty=2.0,
        min_new_tokens=4,
        stop_ids=tuple(range(VOCAB // 2)),
    )
    out = jax.jit(partial(rollout, model, config=config))(
        variables, prompts.ids, prompts.lengths, jax.random.key(0)
    )
    for row in range(3):
        text, said = prompts.ids[row, : prompts.lengths[row]].tolist(), []
        while len(said) < config.max_new_tokens:
            hidden = text_hidden(model.config)(variables, text)
            z = np.array(head_logits(output_head(variables["params"], model.config), hidden[-1]))
            for token in set(text):
                z[token] = z[token] / 1.5 if z[token] > 0 else z[token] * 1.5
            z[sorted(set(said))] -= 2.0
            if len(said) < config.min_new_tokens:
                z[list(config.stop_ids)] = -np.inf
            said.append(int(z.argmax()))
            text.append(said[-1])
            if said[-1] in config.stop_ids:
                break
        assert out.ids[row][out.mask[row]].tolist() == said
        assert len(said) >= 4


@pytest.mark.parametrize("temperature", representatives([1e-4, 1e-10, 1e-30], 1e-30))
def test_a_small_temperature_is_nearly_greedy(temperature):
    model, variables = Decoder(tiny_config()), tiny_variables(tiny_config())
    prompts = tiny_batch(8).student

    def run(temperature):
        config = RolloutConfig(9, temperature=temperature, stop_ids=(3,))
        sampled = jax.jit(partial(rollout, model, config=config))
        return sampled(variables, prompts.ids, prompts.lengths, jax.random.key(0))

    out = run(temperature)
    assert out.ids.tolist() == run(0.0).ids.tolist()
    np.testing.assert_allclose(out.sampled_logps, 0, atol=1e-5)


def test_sampled_logps_are_those_of_the_filtered_distribution():
    model, variables = Decoder(tiny_config()), tiny_variables(tiny_config())
    prompts, key = tiny_batch(4).student, jax.random.key(5)
    out = jax.jit(partial(rollout, model, config=CONFIG))(
        variables, prompts.ids, prompts.lengths, key
    )
    first = prompts.ids[0, : prompts.lengths[0]].tolist()
    for t in range(int(out.mask[0].sum())):
        hidden = text_hidden(model.config)(variables, first + out.ids[0, :t].tolist())
        logits = head_logits(output_head(variables["params"], model.config), hidden[-1:])
        kept = jax.nn.log_softmax(filter_logits(logits, 1.3, 9, 0.9))
        np.testing.assert_allclose(out.sampled_logps[0, t], kept[0, out.ids[0, t]], atol=2e-5)


@pytest.mark.parametrize("model_dtype, dtype", [("float32", "bfloat16"), ("bfloat16", None)])
def test_bfloat16_rollouts_stay_near_the_scoring(model_dtype, dtype):
    """bfloat16 has 8 bits: log-probabilities differ by hundredths, and by .01 on average."""
    config = dataclasses.replace(tiny_config(), dtype=model_dtype)
    model, variables = Decoder(config), tiny_variables(config)
    batch = tiny_batch(8)
    prompts, settings = batch.student, dataclasses.replace(CONFIG, dtype=dtype)
    out = jax.jit(partial(rollout, model, config=settings))(
        variables, prompts.ids, prompts.lengths, jax.random.key(1)
    )
    assert out.logps.dtype == jnp.float32
    terms = jax.jit(partial(compare, model, DivergenceConfig()))(variables, variables, batch, out)
    gap = np.abs(terms.student_logps - out.logps)
    assert 0 < gap.max() < 0.1 and gap.mean() < 0.02


def compiled_text(config, mesh, settings):
    """The compiled rollout of fully sharded parameters."""
    model, variables = Decoder(config), tiny_variables(config)
    boxed = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    shardings = variable_shardings(boxed, mesh, FULLY_SHARDED)
    rows, prompts = batch_sharding(mesh), tiny_batch(8).student

    def run(variables, ids, lengths):
        return rollout(model, variables, ids, lengths, jax.random.key(0), settings)

    with jax.set_mesh(mesh), nn.logical_axis_rules(FULLY_SHARDED):
        jitted = jax.jit(run, in_shardings=(shardings, rows, rows))
        return jitted.lower(variables, prompts.ids, prompts.lengths).compile().as_text()


@pytest.mark.parametrize("temperature", representatives([0.0, 1.0], 1.0))
def test_a_split_vocabulary_is_never_gathered(temperature):
    """No collective of the compiled rollout carries as many columns as there are tokens."""
    config = dataclasses.replace(tiny_config(), vocab_size=512)
    settings = dataclasses.replace(CONFIG, temperature=temperature, min_p=0.01)
    text = compiled_text(config, make_mesh(MeshConfig(2, 4)), settings)
    gathers = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather", text)
    assert "all-reduce" in text  # It is split at all.
    for shape in gathers:
        assert "512" not in shape.split(","), f"an all-gather of [{shape}]"


@pytest.mark.parametrize("unroll_layers", representatives([0, 4], 0))
def test_weights_are_gathered_once_and_not_at_every_token(unroll_layers):
    mesh, config = make_mesh(MeshConfig(8, 1)), dataclasses.replace(CONFIG, temperature=1.0)

    def gathers(gather_weights):
        """(outside, inside) of loops."""
        settings = dataclasses.replace(
            config, unroll_layers=unroll_layers, gather_weights=gather_weights
        )
        text = compiled_text(tiny_config(), mesh, settings)
        entry = re.search(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL).group()
        outside = entry.count(" all-gather(")
        return outside, text.count(" all-gather(") - outside

    outside, inside = gathers(True)
    assert outside > 0 == inside
    assert gathers(False)[1] > 0


@pytest.mark.parametrize("any_config", representatives(["full", "lora"], "full"), indirect=True)
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


@pytest.mark.parametrize("devices", [(1,), (2, 4), (8, 1)], ids=str)
def test_the_prompt_of_a_group_is_read_once(devices):
    """Same tokens, a quarter of the prefill; eight devices that share a prompt read all of it."""
    model, variables = Decoder(tiny_config()), tiny_variables(tiny_config())
    prompts = tiny_batch(4).student
    ids, lengths = (jnp.repeat(x, 4, axis=0) for x in (prompts.ids, prompts.lengths))
    ids = jnp.pad(ids, [(0, 0), (0, 40)])
    config = dataclasses.replace(CONFIG, max_new_tokens=4)
    mesh = make_mesh(MeshConfig(*devices), jax.devices()[: math.prod(devices)])
    out, costs, texts = {}, {}, {}
    with jax.set_mesh(mesh), nn.logical_axis_rules(FULLY_SHARDED):
        for copies in (1, 4):
            rows = batch_sharding(mesh)
            sample = jax.jit(
                partial(rollout, model, variables, config=config, copies=copies),
                in_shardings=(rows, rows, None),
            )
            compiled = sample.lower(ids, lengths, jax.random.key(0)).compile()
            out[copies] = compiled(*jax.device_put((ids, lengths), rows), jax.random.key(0))
            costs[copies], texts[copies] = compiled.cost_analysis()["flops"], compiled.as_text()
    assert out[4].ids.tolist() == out[1].ids.tolist()
    np.testing.assert_allclose(out[4].logps, out[1].logps, atol=1e-5)
    assert (costs[4] < 0.5 * costs[1]) == (devices != (8, 1))
    for collective in (" all-gather(", " all-to-all(", " collective-permute("):
        assert texts[4].count(collective) <= texts[1].count(collective)


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
    "field, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("min_new_tokens", 9),
        ("max_new_tokens", 16.0),
        ("top_k", 2.5),
        ("presence_penalty", float("nan")),
        ("segment_len", 0),
        ("segment_len", 4.0),
        ("unroll_layers", -1),
        ("dtype", "int4"),
        ("weights", "int4"),
    ],
)
def test_bad_settings_name_themselves(field, value):
    with pytest.raises(UserError, match=f"rollout.{field}"):
        dataclasses.replace(CONFIG, **{field: value})


def test_a_merge_moves_nothing_but_the_new_slots():
    """vmap of an update would transpose the whole store, there and back, at every segment."""
    keys, values = jnp.zeros((3, 4, 2, 5, 11)), jnp.zeros((3, 4, 2, 11, 5))
    rng = np.random.default_rng(0)
    new = KV(*(jnp.asarray(rng.normal(size=s)) for s in ((3, 4, 2, 5, 2), (3, 4, 2, 2, 5))))
    starts = jnp.array([0, 9, 4, 10])
    wanted = KV(np.zeros(keys.shape), np.zeros(values.shape))
    for row, start in enumerate([0, 9, 4]):  # The last one has no room and stays.
        wanted.keys[:, row, :, :, start : start + 2] = new.keys[:, row]
        wanted.values[:, row, :, start : start + 2] = new.values[:, row]
    jax.tree.map(np.testing.assert_allclose, merge(KV(keys, values), new, starts), wanted)
    text = str(jax.make_jaxpr(merge)(KV(keys, values), new, starts))
    assert "transpose" not in text and text.count("scatter[") == 2
