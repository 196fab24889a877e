# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_jax.method.scoring import completion_hidden, join, scored_ids
from opsd_jax.model import text_attention
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import FULLY_SHARDED, MeshConfig, batch_sharding, make_mesh
from opsd_jax.sampling.prompts import Completion, Context
from tests.tiny import VOCAB, text_hidden, tiny_batch, tiny_config, tiny_variables

jitted_hidden = jax.jit(completion_hidden, static_argnums=0)


def completion_of(ids) -> Completion:
    ids = jnp.asarray(ids, jnp.int32)
    mask = jnp.ones(ids.shape, bool)
    return Completion(ids, mask, jnp.zeros(ids.shape), jnp.ones(ids.shape[:1], bool))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_join_is_prompt_then_completion(B, P, C, seed):
    rng = np.random.default_rng(seed)
    prompt, completion = rng.integers(0, 9, (B, P)), rng.integers(0, 9, (B, C))
    lengths = rng.integers(1, P + 1, B)
    joined = join(Context(jnp.asarray(prompt), jnp.asarray(lengths)), jnp.asarray(completion))
    for b in range(B):
        expected = [*prompt[b, : lengths[b]], *completion[b]]
        assert joined[b, : len(expected)].tolist() == expected


def test_no_id_is_read_often_because_of_padding():
    """The embedding's gradient would pile up there, as a scatter with one index."""
    B, P, C, V = 4, 9, 30, 500
    lengths, said = jnp.array([9, 1, 5, 2]), np.array([1, 30, 7, 0])
    context = Context(jnp.zeros((B, P), jnp.int32), lengths)
    completion = completion_of(np.full((B, C), 7))
    completion = dataclasses.replace(completion, mask=np.arange(C) < said[:, None])
    ids = np.asarray(scored_ids(context, completion, V))
    read = np.concatenate([ids[b, : lengths[b] + said[b]] for b in range(B)])
    np.testing.assert_array_equal(np.sort(read), [0] * 17 + [7] * 38)
    counts = np.bincount(ids.ravel(), minlength=V) - np.bincount(read, minlength=V)
    assert counts.max() == 1 and counts.sum() == B * (P + C) - len(read)


def test_each_context_scores_the_same_ids_at_its_own_offset(any_config):
    """Invariant 1: row t is the hidden state after [prompt, completion[:t]], alone and unpadded."""
    model, variables = Decoder(any_config), tiny_variables(any_config)
    batch = tiny_batch(3)
    completion = completion_of(np.random.default_rng(1).integers(1, VOCAB, (3, 4)))
    for context in (batch.student, batch.teacher):
        hidden = jitted_hidden(model, variables, context, completion)
        for b in range(3):
            prompt = context.ids[b, : context.lengths[b]]
            for t in range(4):
                text = [*prompt.tolist(), *completion.ids[b, :t].tolist()]
                alone = text_hidden(any_config)(variables, text)
                np.testing.assert_allclose(hidden[b, t], alone[-1], atol=1e-5)


def test_padding_changes_nothing():
    model, variables = Decoder(tiny_config()), tiny_variables(tiny_config())
    context = tiny_batch(4).teacher
    completion = completion_of(np.random.default_rng(2).integers(1, VOCAB, (4, 5)))
    hidden = jitted_hidden(model, variables, context, completion)
    padded = jnp.pad(context.ids, [(0, 0), (0, 3)], constant_values=VOCAB - 1)
    wider = jitted_hidden(model, variables, Context(padded, context.lengths), completion)
    np.testing.assert_allclose(wider, hidden, atol=1e-5)
    # Other pad ids in the same shape: not one bit.
    beyond = jnp.arange(context.ids.shape[1]) >= context.lengths[:, None]
    other = Context(jnp.where(beyond, VOCAB - 1, context.ids), context.lengths)
    np.testing.assert_array_equal(jitted_hidden(model, variables, other, completion), hidden)
    # A masked tail of the completion cannot reach the tokens before it.
    tail = completion_of(completion.ids.at[:, 3:].set(0))
    np.testing.assert_array_equal(
        jitted_hidden(model, variables, context, tail)[:, :4], hidden[:, :4]
    )


def test_gradient_reaches_the_variables():
    model, variables = Decoder(tiny_config(remat=True)), tiny_variables(tiny_config())
    completion = completion_of([[1, 2]])
    context = Context(jnp.array([[3, 4]]), jnp.array([2]))

    def total(v):
        return jitted_hidden(model, v, context, completion).sum()

    gradient = jax.jit(jax.grad(total))(variables)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradient["params"]["layers"]))


def groups(num_prompts: int, copies: int, C: int, P: int = 6) -> tuple[Context, Completion]:
    """Rows of which each `copies` have one prompt; answers of all lengths from 0 on."""
    rows, rng = num_prompts * copies, np.random.default_rng(3)
    prompts = tiny_batch(num_prompts, P).student
    ids, lengths = (jnp.repeat(x, copies, axis=0) for x in (prompts.ids, prompts.lengths))
    said = np.arange(rows) * C // (rows - 1)
    completion = completion_of(rng.integers(1, VOCAB, (rows, C)))
    completion = dataclasses.replace(completion, mask=jnp.arange(C) < said[:, None])
    return Context(ids, lengths, copies), completion


def loss_and_gradient(model, variables, context, completion):
    def loss(variables):
        hidden = completion_hidden(model, variables, context, completion)
        return jnp.sum(jnp.where(completion.mask[..., None], jnp.sin(hidden), 0)), hidden

    (value, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(variables)
    return value, hidden * completion.mask[..., None], gradient


def assert_same(found, expected):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1.0, float(np.abs(want).max())))


def test_a_group_is_scored_as_its_rows_alone(any_config):
    """What predicts each token, and the gradient that it sends to every parameter."""
    model, variables = Decoder(any_config), tiny_variables(any_config)
    context, completion = groups(3, 4, 5)
    run = jax.jit(partial(loss_and_gradient, model))
    apart = dataclasses.replace(context, copies=1)
    assert_same(run(variables, context, completion), run(variables, apart, completion))


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_group_is_scored_by_any_attention(name, monkeypatch):
    """Kernels know texts alone, whose positions ascend from 0."""
    splash = partial(text_attention.splash, interpret=True)
    monkeypatch.setattr(text_attention, "splash", splash)
    flash = partial(text_attention.flash, implementation="xla")
    monkeypatch.setattr(text_attention, "flash", flash)
    context, completion = groups(2, 4, 5)
    apart = dataclasses.replace(context, copies=1)
    found = jax.jit(partial(loss_and_gradient, Decoder(tiny_config(attention=name))))(
        tiny_variables(tiny_config()), context, completion
    )
    expected = jax.jit(partial(loss_and_gradient, Decoder(tiny_config())))(
        tiny_variables(tiny_config()), apart, completion
    )
    assert_same(found, expected)


@pytest.mark.parametrize("devices", [(1,), (2, 4), (8, 1)], ids=str)
def test_the_prompt_of_a_group_is_scored_once(devices):
    """At less than half the work, and nothing that a row knows visits another device."""
    config = tiny_config(mlp_dim=256)  # products are most of the work, and not attention
    model, variables = Decoder(config), tiny_variables(config)
    context, completion = groups(4, 4, 3, P=40)
    mesh = make_mesh(MeshConfig(*devices), jax.devices()[: math.prod(devices)])
    out, costs, texts = {}, {}, {}
    with jax.set_mesh(mesh), nn.logical_axis_rules(FULLY_SHARDED):
        for copies in (1, 4):
            rows = batch_sharding(mesh)
            args = variables, dataclasses.replace(context, copies=copies), completion
            compiled = (
                jax.jit(partial(loss_and_gradient, model), in_shardings=(None, rows, rows))
                .lower(*args)
                .compile()
            )
            out[copies] = compiled(*args[:1], *jax.device_put(args[1:], rows))
            costs[copies], texts[copies] = compiled.cost_analysis()["flops"], compiled.as_text()
    assert_same(out[4], out[1])
    assert (costs[4] < 0.5 * costs[1]) == (devices != (8, 1))
    for collective in (" all-gather(", " all-to-all(", " collective-permute("):
        assert texts[4].count(collective) <= texts[1].count(collective)
