# SPDX-License-Identifier: Apache-2.0
"""Joined projections against those that stand alone."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from opsd_jax.model.config import LoraConfig
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.joined import joined
from opsd_jax.sampling import decoding_form
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.rollout import rollout
from tests.tiny import tiny_batch, tiny_config, tiny_variables

SOME = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
CASES = {
    "plain": {},
    "all-adapters": dict(lora=LoraConfig(rank=3, alpha=6.0)),
    "some": dict(lora=SOME, biases=("k_proj", "o_proj", "gate_proj"), qk_norm=True),
    "experts": dict(num_experts=3, experts_per_token=2),
}


@pytest.mark.parametrize("case", CASES)
def test_joined_layers_are_the_same_map(case):
    config = tiny_config(**CASES[case])
    variables = tiny_variables(config)
    model, layers = decoding_form.unstacked(Decoder(config), variables)
    form = joined(model.config, layers)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (3, 5)))
    positions = jnp.broadcast_to(jnp.arange(5), (3, 5))
    want, _ = model.apply(layers, ids, positions)
    got, _ = model.apply(form, ids, positions)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not [p for p in flatten_dict(form) if p[0] == "params" and p[-1] == "kernel"]
    assert not flatten_dict(form.get("lora", {}))
    without = {name: tree for name, tree in layers.items() if name != "lora"}
    if config.lora:  # The adapters act, so that losing one is seen.
        assert not np.allclose(model.apply(without, ids, positions)[0], want, atol=1e-3)


def test_a_layer_with_adapters_is_ten_products():
    """Two of each group and two of attention, instead of three of each projection."""
    config = tiny_config(**CASES["all-adapters"])
    model, layers = decoding_form.unstacked(Decoder(config), tiny_variables(config))
    ids = jnp.zeros((3, 5), jnp.int32)

    def products(variables):
        return jax.jit(model.apply).lower(variables, ids, ids).as_text().count("dot_general")

    assert products(layers) == config.num_layers * 23
    assert products(joined(model.config, layers)) == config.num_layers * 10


def test_a_rollout_is_the_same_in_the_form_of_gpus(monkeypatch):
    config = tiny_config(lora=SOME, biases=("q_proj",))
    model, variables = Decoder(config), tiny_variables(config)
    prompts, settings = tiny_batch(4).student, RolloutConfig(9, temperature=0.0, segment_len=3)

    def run():
        sample = jax.jit(partial(rollout, model, config=settings))
        return sample(variables, prompts.ids, prompts.lengths, jax.random.key(1))

    want = run()
    monkeypatch.setattr(decoding_form, "platform", lambda: "gpu")
    assert "joined" in decoding_form.decoding_form(model, variables, settings)[1]
    got = run()
    assert got.ids.tolist() == want.ids.tolist()
    np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "layers", "settings", "unrolled"),
    [
        ("cpu", 4, {}, True),
        ("cpu", 5, {}, False),
        ("tpu", 5, {}, False),
        ("gpu", 5, {}, True),
        ("gpu", 5, {"unroll_layers": 4}, False),
    ],
)
def test_layers_are_unrolled_where_a_slice_is_a_copy(
    monkeypatch, platform, layers, settings, unrolled
):
    monkeypatch.setattr(decoding_form, "platform", lambda: platform)
    model = Decoder(dataclasses.replace(tiny_config(), num_layers=layers))
    assert decoding_form.unrolls(model, RolloutConfig(4, **settings)) == unrolled


@pytest.mark.parametrize("stacked", [True, False])
def test_adapters_merged_once_are_the_same_map_in_float32(stacked):
    config = tiny_config(lora=SOME)
    model, variables = Decoder(config), tiny_variables(config)
    settings = RolloutConfig(4, merge_adapters=True, unroll_layers=0 if stacked else 4)
    assert decoding_form.changes_weights(model, settings)
    merged, form = decoding_form.decoding_form(model, variables, settings)
    assert "lora" not in form and merged.config.lora is None
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (3, 5)))
    positions = jnp.broadcast_to(jnp.arange(5), (3, 5))
    want, _ = model.apply(variables, ids, positions)
    got, _ = merged.apply(form, ids, positions)
    np.testing.assert_allclose(got, want, atol=1e-5)
