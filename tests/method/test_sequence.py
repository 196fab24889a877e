# SPDX-License-Identifier: Apache-2.0
"""Texts split over `mesh.sequence`: what every device computes and holds, and the same numbers."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opsd_jax.divergence.config import DivergenceConfig
from opsd_jax.divergence.vocabulary import VocabularyMesh, vocabulary_mesh
from opsd_jax.errors import UserError
from opsd_jax.method.scoring import completion_hidden
from opsd_jax.method.train_step import init_state, jitted_step, state_shardings, update
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import MeshConfig, make_mesh, on_mesh, variable_shardings
from opsd_jax.run.assembly import check_batch, check_devices, split_trainable
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion
from tests.method.test_train_step import method_of
from tests.tiny import tiny_batch, tiny_config, tiny_variables

ROWS, LENGTH, PROMPT = 4, 1536, 1024  # of texts that attention reads in blocks


@cache
def compiled(kv_heads=4, **axes):
    """The update of ROWS long texts, fused, on four devices along `axes`."""
    config = tiny_config(embed_dim=32, num_kv_heads=kv_heads, remat=True, vocab_size=512)
    method = method_of(config, divergence=DivergenceConfig(implementation="fused", token_block=64))
    placement = MeshConfig(**axes)
    mesh = make_mesh(placement, jax.devices()[:4])
    boxed = jax.eval_shape(partial(init_variables, method.model), jax.random.key(0))
    variables = variable_shardings(boxed, mesh, placement.rules)

    def start(key):
        return init_state(method, *split_trainable(tiny_variables(config)), key)

    state = jax.eval_shape(start, jax.random.key(0))
    step = jitted_step(method, state_shardings(method, state, variables, mesh), mesh, learn)
    batch = tiny_batch(ROWS, PROMPT, PROMPT)
    completion = Completion(
        *(jnp.zeros((ROWS, LENGTH - PROMPT), kind) for kind in (jnp.int32, bool, jnp.float32)),
        jnp.zeros(ROWS, bool),
    )
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(tuple(axes)))
        ),
        (batch, completion),
    )
    return on_mesh(step.lower, mesh, placement.rules)(state, rows).compile()


def learn(method, state, rows):
    """`update` in the form of a step."""
    batch, completion = rows
    return *update(method, state, batch, completion), completion


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_devices_share_the_work_and_the_memory_of_a_text(kv_heads):
    """As much as if each had whole texts, of which it would need as many as there are devices."""
    whole, split = compiled(kv_heads, data=4), compiled(kv_heads, data=1, sequence=4)
    flops = [program.cost_analysis()["flops"] for program in (whole, split)]
    assert flops[1] < 1.1 * flops[0]
    held = [program.memory_analysis().temp_size_in_bytes for program in (whole, split)]
    assert held[1] < 1.2 * held[0]


def test_no_device_holds_a_whole_text_but_of_its_own_heads():
    """[rows, LENGTH, width] never; keys and values of one head of four, at whole length."""
    text = compiled(data=1, sequence=4).as_text()
    part = LENGTH // 4
    assert re.search(rf"f32\[{ROWS},{part},32\]", text)
    assert not re.search(rf"f32\[{ROWS},{LENGTH},32\]", text)
    completions = re.findall(rf"= \(?f32\[{ROWS},{LENGTH - PROMPT},32\].*op_name=.*", text)
    assert completions, "the rows that predict them are summed over the devices"
    assert [line for line in completions if "take_along_axis" not in line] == []
    assert re.search(rf"f32\[{ROWS},1,8,{LENGTH}\]|f32\[{ROWS},1,{LENGTH},8\]", text)
    assert not re.search(rf"f32\[{ROWS},4,8,{LENGTH}\]|f32\[{ROWS},4,{LENGTH},8\]", text)


@pytest.mark.parametrize("axes", [dict(data=1, sequence=4), dict(data=2, sequence=2)])
def test_only_heads_and_embeddings_change_places(axes):
    """A text's activations are never gathered or summed: four all-to-alls a layer and pass."""
    text = compiled(**axes).as_text()
    rows = rf"= [^=]*f32\[[^]]*\b({LENGTH}|{LENGTH // axes['sequence']})\b[^]]*\][^=]* "
    assert not re.search(rf"{rows}(all-gather|all-reduce|reduce-scatter)(-start)?\(", text)
    moved = re.findall(rf"{rows}all-to-all(?:-start)?\(.*op_name=\"([^\"]*)", text)
    passes = 4  # the student's and its recomputation, its gradient, the teacher's
    assert len([name for _, name in moved if "attention" in name]) == 4 * passes
    assert len(moved) < 4 * passes + 10  # embeddings, and what predicts the completions


@pytest.mark.parametrize("kv_heads", [1, 2, 4])  # of four heads on four devices
@pytest.mark.parametrize("length", [6, 16])  # six tokens do not, nor 9 + 6
def test_hidden_states_and_gradients_are_those_of_one_device(kv_heads, length):
    config = tiny_config(num_kv_heads=kv_heads)
    model, variables, batch = Decoder(config), tiny_variables(config), tiny_batch(2, 5, 9)
    ids = np.random.default_rng(0).integers(1, 24, (2, length))
    mask = np.arange(length) < np.array([[3], [length]])
    completion = Completion(jnp.asarray(ids), jnp.asarray(mask), mask * 1.0, mask[:, 0])

    def loss(variables):
        hidden = completion_hidden(model, variables, batch.teacher, completion)
        return jnp.sum(jnp.where(mask[..., None], jnp.sin(hidden), 0)), hidden

    run = jax.value_and_grad(loss, has_aux=True)
    placement = MeshConfig(data=2, sequence=4)
    found = on_mesh(jax.jit(run), make_mesh(placement), placement.rules)(variables)
    expected = jax.jit(run)(variables)
    (value, hidden), gradient = found
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-5)
    seen = mask[..., None]
    np.testing.assert_allclose(hidden * seen, expected[0][1] * seen, atol=2e-5)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, float(np.abs(want).max())))


def test_the_fused_loss_splits_tokens_where_rows_are_too_few():
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    place = vocabulary_mesh(mesh, (2, 8))
    assert (place.batch_axis, place.length_axis) == (("data",), "sequence")
    assert vocabulary_mesh(mesh, (8, 6)).batch_axis == ("data", "sequence")  # tokens do not divide
    assert vocabulary_mesh(mesh, (2, 6)) == VocabularyMesh(mesh, None, None, None)


def test_a_batch_divides_over_all_devices_and_micro_batches_over_those_with_other_texts():
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    check_batch(8, 4, mesh)
    with pytest.raises(
        UserError, match=r"12 must be a multiple of mesh.data x mesh.sequence = 2 x 4"
    ):
        check_batch(12, 1, mesh)
    with pytest.raises(UserError, match=r"num_micro_batches x mesh.data = 8 x 2"):
        check_batch(8, 8, mesh)
    with pytest.raises(
        UserError, match="mesh.data = 1 times mesh.sequence = 3 times mesh.model = 2"
    ):
        MeshConfig(data=1, sequence=3, model=2).sizes(8)


def test_heads_that_do_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(sequence=2, model=2))
    check_devices(tiny_config(num_kv_heads=1), RolloutConfig(4), mesh)
    with pytest.raises(
        UserError, match="sequence = 2 times mesh.model = 2 must divide the 6 heads"
    ):
        check_devices(tiny_config(num_heads=6, num_kv_heads=2), RolloutConfig(4), mesh)
    check_devices(tiny_config(num_heads=6), RolloutConfig(4), make_mesh(MeshConfig(model=4)))
