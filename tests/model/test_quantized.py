# SPDX-License-Identifier: Apache-2.0
"""Sampling with int8 matrices: against NumPy, and against float matrices of the same values."""

import dataclasses
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.errors import UserError
from opsd_jax.method.objective import compare
from opsd_jax.method.train_step import sample_completion, update
from opsd_jax.model.config import LoraConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.quantized import channel_scale, quantized, round_to_int8
from opsd_jax.model.sharding import (
    FULLY_SHARDED,
    MeshConfig,
    batch_sharding,
    make_mesh,
    variable_shardings,
)
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.decoding_form import changes_weights, decoding_form
from opsd_jax.sampling.rollout import rollout
from tests.method.test_train_step import method_of, state_of
from tests.pretrained.test_families import CASES, SHAPE
from tests.representatives import representatives
from tests.sampling.test_rollout import compiled_text
from tests.sampling.test_slots import alone, questions, sampler
from tests.tiny import tiny_batch, tiny_config, tiny_variables

CONFIG = RolloutConfig(9, stop_ids=(3,), segment_len=3, weights="int8")
NUM_INPUTS = {"o_proj": 2}  # Of a kernel's axes; one in every other projection.


def dequantised(params):
    """Float64 oracle, one output at a time: (params as int8 would have them, bound of the error).

    Every output's column has its own scale, max |column| / 127.
    """

    def column(w):
        scale = np.abs(w).max() / 127
        return w if scale == 0 else np.round(w / scale) * scale, np.full(w.shape, scale / 2)

    found, bounds = {}, {}
    for path, leaf in flatten_dict(params).items():
        is_table = path[-1] in ("embed", "lm_head")
        if not is_table and path[-1] != "kernel":
            found[path] = leaf
            continue
        w = np.asarray(leaf, np.float64)
        layers = w if path[0] == "layers" else w[None]
        if is_table:  # Rows are the outputs of the head.
            columns = layers.transpose(0, 2, 1)
        else:
            num_in = NUM_INPUTS.get(path[-2], 1)
            columns = layers.reshape(len(layers), int(np.prod(layers.shape[1 : 1 + num_in])), -1)
        pairs = [[column(c) for c in layer.T] for layer in columns]
        for k, out in enumerate((found, bounds)):
            back = np.array([[pair[k] for pair in layer] for layer in pairs]).transpose(0, 2, 1)
            back = back.transpose(0, 2, 1) if is_table else back
            out[path] = jnp.asarray(back.reshape(w.shape), jnp.float32)
    return unflatten_dict(found), unflatten_dict(bounds)


def sampled(config, variables, settings, seed=0):
    prompts = tiny_batch(4).student
    jitted = jax.jit(partial(rollout, Decoder(config), config=settings))
    return jitted(variables, prompts.ids, prompts.lengths, jax.random.key(seed))


def assert_same(one, other):
    assert one.ids.tolist() == other.ids.tolist() and one.mask.tolist() == other.mask.tolist()
    np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def test_values_and_scales_are_those_of_numpy():
    variables = tiny_variables(tiny_config(lora=LoraConfig(rank=3, alpha=6.0)))
    found = quantized(variables)
    assert set(found) == {"params", "lora", "scales"}
    wanted, bounds = dequantised(variables["params"])
    params, scales = flatten_dict(found["params"]), flatten_dict(found["scales"])
    assert set(scales) == set(flatten_dict(bounds))
    for path, leaf in params.items():
        exact = np.asarray(flatten_dict(variables["params"])[path])
        if path not in scales:
            np.testing.assert_array_equal(leaf, exact)
            continue
        assert leaf.dtype == jnp.int8 and scales[path].dtype == jnp.float32
        back = np.asarray(leaf, np.float64) * scales[path]
        np.testing.assert_allclose(back, flatten_dict(wanted)[path], atol=1e-6)
        assert (np.abs(back - exact) <= flatten_dict(bounds)[path] * (1 + 1e-5)).all()
    jax.tree.map(np.testing.assert_array_equal, found["lora"], variables["lora"])


def test_a_channel_of_zeros_stays_zero():
    matrix = jnp.array([[0.0, 2.0], [0.0, -1.0]])
    scale = channel_scale(matrix, (-2,))
    np.testing.assert_allclose(scale, [[0.0, 2 / 127]])
    assert round_to_int8(matrix, scale).tolist() == [[0, 127], [0, -64]]  # -63.5 goes to even.


LORA = LoraConfig(rank=3, alpha=6.0)


@pytest.mark.parametrize(
    "unroll_layers, lora, tied",
    representatives(
        itertools.product([0, 4], [None, LORA], [False, True]), (0, LORA, False), (4, None, True)
    ),
)
def test_a_rollout_is_that_of_float_matrices_with_the_same_values(unroll_layers, lora, tied):
    config = tiny_config(lora=lora, tie_embeddings=tied, biases=("q_proj", "down_proj"))
    variables = tiny_variables(config)
    settings = dataclasses.replace(CONFIG, unroll_layers=unroll_layers)
    out = sampled(config, variables, settings)
    plain = dataclasses.replace(settings, weights=None)
    same = variables | {"params": dequantised(variables["params"])[0]}
    assert_same(out, sampled(config, same, plain))
    exact = sampled(config, variables, plain)
    assert np.abs(exact.logps - out.logps).max() > 1e-3  # It is another policy.


@pytest.mark.parametrize("case", representatives(CASES, "qwen3", "gemma3"))
def test_every_family_runs_or_is_refused(case):
    model_type, values = CASES[case]
    raw = {"model_type": model_type, **SHAPE, **values}
    config = dataclasses.replace(config_from_hf(raw), num_layers=4)
    shapes = jax.eval_shape(partial(init_variables, Decoder(config)), jax.random.key(0))
    variables = nn.meta.unbox(shapes)
    row = jax.ShapeDtypeStruct((2, 6), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def run(variables, ids, lengths):
        model, form = decoding_form(Decoder(config), variables, CONFIG)
        return form, rollout(Decoder(config), variables, ids, lengths, jax.random.key(0), CONFIG)

    if config.num_experts:
        with pytest.raises(UserError, match="rollout.weights = 'int8' is not for a mixture of exp"):
            jax.eval_shape(run, variables, *row)
        return
    form, _ = jax.eval_shape(run, variables, *row)
    for path, leaf in flatten_dict(form["params"]).items():
        is_matrix = path[-1] in ("kernel", "embed", "lm_head")
        assert (leaf.dtype == jnp.int8) == is_matrix, path


def test_with_bfloat16_scales_stay_float32():
    config = tiny_config()
    settings = dataclasses.replace(CONFIG, dtype="bfloat16")
    _, form = decoding_form(Decoder(config), tiny_variables(config), settings)
    assert {x.dtype.name for x in jax.tree.leaves(form["scales"])} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(form["params"])} == {"int8", "bfloat16"}
    out = sampled(config, tiny_variables(config), settings)
    assert out.logps.dtype == jnp.float32 and np.isfinite(out.logps).all()


def test_slots_say_what_every_prompt_says_alone():
    settings = dataclasses.replace(CONFIG, max_new_tokens=23, unroll_layers=0)
    prompts, keys = questions(num=4, samples=2)
    run = sampler()
    assert changes_weights(run.model, settings)
    assert not changes_weights(run.model, dataclasses.replace(settings, weights=None))
    found = {s.prompt: s for s in run(tiny_variables(tiny_config()), prompts, settings, keys)}
    for i, (ids, logps, stopped) in enumerate(alone(prompts, keys, settings)):
        assert (found[i].ids, found[i].stopped) == (ids, stopped)
        np.testing.assert_allclose(found[i].logps, logps, atol=1e-5)


@pytest.mark.parametrize(
    "unroll_layers, mesh_config",
    representatives(
        itertools.product([0, 4], [MeshConfig(8, 1), MeshConfig(2, 4)]), (4, MeshConfig(2, 4))
    ),
)
def test_eight_devices_say_what_one_says(unroll_layers, mesh_config):
    config, prompts = tiny_config(), tiny_batch(8).student
    settings = dataclasses.replace(CONFIG, unroll_layers=unroll_layers)
    mesh, model, variables = make_mesh(mesh_config), Decoder(config), tiny_variables(config)
    boxed = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    placed = jax.device_put(variables, variable_shardings(boxed, mesh, FULLY_SHARDED))
    asked = jax.device_put((prompts.ids, prompts.lengths), batch_sharding(mesh))
    key = jax.random.key(0)
    with jax.set_mesh(mesh), nn.logical_axis_rules(FULLY_SHARDED):
        out = jax.jit(partial(rollout, model, config=settings))(placed, *asked, key)
    one = jax.jit(partial(rollout, model, config=settings))
    assert_same(jax.device_get(out), one(variables, prompts.ids, prompts.lengths, key))


@pytest.mark.parametrize("unroll_layers", representatives([0, 4], 0))
def test_bytes_are_gathered_and_not_floats(unroll_layers):
    """Of the matrices; norms and scales are gathered as they are."""
    settings = dataclasses.replace(CONFIG, unroll_layers=unroll_layers)
    text = compiled_text(tiny_config(), make_mesh(MeshConfig(8, 1)), settings)
    found = re.findall(r"= (\w+)\[([\d,]*)\][^=]* all-gather\(", text)
    sizes = {"s8": 0, "f32": 0}
    for dtype, shape in found:
        size = int(np.prod([int(n) for n in shape.split(",") if n]))
        if dtype in sizes:
            sizes[dtype] = max(sizes[dtype], size)
    c = tiny_config()
    assert sizes["s8"] >= c.embed_dim * c.mlp_dim and sizes["f32"] < c.embed_dim * c.embed_dim


def test_the_loss_never_sees_it_and_the_gap_is_told():
    plain = method_of(tiny_config())
    settings = dataclasses.replace(plain.rollout, weights="int8")
    method = dataclasses.replace(plain, rollout=settings)
    state, batch = state_of(method), tiny_batch(8)
    completion = jax.jit(partial(sample_completion, method))(state, batch)
    new, metrics = jax.jit(partial(update, method))(state, batch, completion)
    expected, others = jax.jit(partial(update, plain))(state, batch, completion)
    assert {x.dtype.name for x in jax.tree.leaves(new.trainable)} == {"float32"}
    jax.tree.map(np.testing.assert_array_equal, new.trainable, expected.trainable)
    assert metrics["loss/objective"] == others["loss/objective"]
    terms = jax.jit(partial(compare, method.model, DivergenceConfig()))(
        state.student, state.student, batch, completion
    )
    gap = np.abs(terms.student_logps - completion.logps)[np.asarray(completion.mask)].mean()
    assert 1e-3 < gap < 0.3
    np.testing.assert_allclose(metrics["rollout/logp_gap"], gap, rtol=1e-4)


def test_another_way_to_sample_keeps_it():
    assert CONFIG.sampling(max_new_tokens=4).weights == "int8" and CONFIG.is_plain
    with pytest.raises(UserError, match="rollout.weights must be 'int8' or None, not 'int4'"):
        dataclasses.replace(CONFIG, weights="int4")
