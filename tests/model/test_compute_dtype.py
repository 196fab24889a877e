# SPDX-License-Identifier: Apache-2.0
"""Weights travel and are kept in the dtype that computes with them, and no bit changes."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from opsd_jax.divergence.losses import DivergenceConfig
from opsd_jax.method.optimizer import OptimizerConfig, make_optimizer
from opsd_jax.method.teacher import TeacherConfig
from opsd_jax.method.train_step import (
    Method,
    init_state,
    jitted_step,
    state_shardings,
    train_step,
)
from opsd_jax.model.compute_dtype import narrowed
from opsd_jax.model.config import LoraConfig
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.sharding import MeshConfig, make_mesh, on_mesh
from opsd_jax.run.assembly import layout, split_trainable
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.rollout import rollout
from tests.tiny import tiny_batch, tiny_config, tiny_variables

KINDS = {
    "dense": dict(biases=("q_proj",), qk_norm=True, post_norm=True, tie_embeddings=True),
    "experts": dict(num_experts=4, experts_per_token=2),
    "adapters": dict(lora=LoraConfig(rank=3, alpha=6.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_decoder_reads_the_same_from_narrowed_variables(kind):
    config = tiny_config(**KINDS[kind], dtype="bfloat16")
    wide = tiny_variables(dataclasses.replace(config, dtype="float32"))
    narrow = narrowed(wide, "bfloat16")
    found = {
        (path[-1].key == "scale", leaf.dtype.name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(narrow)
    }
    assert found == {(True, "float32"), (False, "bfloat16")}
    batch = tiny_batch(4)
    positions = jnp.broadcast_to(jnp.arange(11), (4, 11))
    with jax.disable_jit():
        wanted, given = (
            Decoder(config).apply(v, batch.teacher.ids, positions)[0] for v in (wide, narrow)
        )
    np.testing.assert_array_equal(given, wanted)


def test_what_is_narrow_already_stays():
    variables = {"params": {"kernel": jnp.ones(2, jnp.bfloat16), "int8": jnp.ones(2, jnp.int8)}}
    variables |= {"scales": {"kernel": jnp.ones(2)}}
    kept = narrowed(variables, "float32") | narrowed(variables, "bfloat16")
    assert jax.tree.map(lambda x: x.dtype, kept) == jax.tree.map(lambda x: x.dtype, variables)


def method_of(dtype: str, kept: str = "float32") -> Method:
    return Method(
        model=Decoder(tiny_config(dtype=dtype, remat=True)),
        rollout=RolloutConfig(max_new_tokens=6, stop_ids=(3,), segment_len=3, unroll_layers=0),
        divergence=DivergenceConfig(implementation="fused"),
        teacher=TeacherConfig(dtype=kept).build(),
        optimizer=make_optimizer(OptimizerConfig(), 1e-3),
        num_micro_batches=1,
    )


def partitioned(method: Method, mesh: Mesh, rules, folder) -> str:
    """The step as the partitioner leaves it: a CPU would compute bfloat16 products in float32."""
    shapes, variables = layout(method.model, mesh, rules)
    state = jax.eval_shape(
        lambda t, f, key: init_state(method, t, f, key),
        *split_trainable(shapes),
        jax.random.key(0),
    )
    step = jitted_step(method, state_shardings(method, state, variables, mesh), mesh)
    lowered = on_mesh(step.lower, mesh, rules)(state, tiny_batch(8))
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partition.*"}
    lowered.compile(compiler_options=options)
    (path,) = folder.glob("*jit_train_step*after_spmd-partitioning*.txt")
    return path.read_text()


# Ends of the names of what needs a whole matrix: layers, weights of a rollout, the fused head.
PRODUCTS = ("dot_general", "sharding_constraint", "shard_map")


@pytest.fixture
def no_cache():
    """What comes out of the compilation cache is not partitioned, nor dumped."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.parametrize("model", [1, 2])
def test_weights_are_gathered_in_bfloat16_where_the_step_computes_in_it(model, tmp_path, no_cache):
    """In the rollout and in the update, layers and head, along `data`; rows of a table that are
    looked up are not asked for."""
    config = MeshConfig(model=model)
    mesh = make_mesh(config)
    weights = {}
    for dtype in ("float32", "bfloat16"):
        text = partitioned(method_of(dtype), mesh, config.rules, tmp_path / dtype)
        gathers = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(.*op_name=\"(.*?)\"", text)
        weights[dtype] = {
            (half, kind)
            for kind, shape, name in gathers
            for half in ("rollout", "update")
            if "," in shape and f"/{half}/" in name and name.endswith(PRODUCTS)
        }
    assert weights["float32"] == {("rollout", "f32"), ("update", "f32")}
    assert weights["bfloat16"] == {("rollout", "bf16"), ("update", "bf16")}


@pytest.mark.slow
@pytest.mark.parametrize("model", [1, 2])
@pytest.mark.parametrize("implementation", ["dense", "fused"])
def test_products_are_narrow_and_gradients_meet_in_float32(
    model, implementation, tmp_path, no_cache
):
    """Of a bfloat16 step with float32 masters, whatever is multiplied or exchanged."""
    config = MeshConfig(model=model)
    mesh = make_mesh(config)
    divergence = DivergenceConfig(implementation=implementation)
    method = dataclasses.replace(method_of("bfloat16"), divergence=divergence)
    text = partitioned(method, mesh, config.rules, tmp_path)
    kinds = dict(re.findall(r"%?([\w.-]+) = \(?(\w+)\[", text))
    products = re.findall(r"= \w+\[[\d,]*\]\S* dot\((.*?)\),", text)
    met = {kinds[x.split()[-1].lstrip("%")] for pair in products for x in pair.split(", ")}
    assert met == {"bf16"} and len(products) > 30
    matrices = ("md,mf->df", "md,mv->vd", "update/transpose(update)/jvp()/reduce_sum")
    exchanged = re.findall(r"= \(?(\w+)\[[\d,]+\]\S* all-reduce\(.*?op_name=\"(.*?)\"", text)
    assert {kind for kind, name in exchanged if any(m in name for m in matrices)} == {"f32"}


def test_a_rollout_from_masters_is_that_from_what_they_are_rounded_to():
    config = tiny_config(dtype="bfloat16")
    masters, prompts = tiny_variables(tiny_config()), tiny_batch(4).student
    sample = jax.jit(
        partial(rollout, Decoder(config), config=RolloutConfig(6, segment_len=3, stop_ids=(3,)))
    )
    one, other = (
        sample(v, prompts.ids, prompts.lengths, jax.random.key(1))
        for v in (masters, narrowed(masters, "bfloat16"))
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_a_bfloat16_copy_teaches_the_same_in_bfloat16():
    """Two steps, every metric, bit for bit; in float32 the copy is another teacher."""

    def metrics_of(dtype, kept):
        method = method_of(dtype, kept)
        variables = {"params": tiny_variables(tiny_config())["params"]}
        state = init_state(method, variables, {}, jax.random.key(0))
        step, found = jax.jit(partial(train_step, method)), []
        for seed in range(2):
            state, metrics, _ = step(state, tiny_batch(8, seed=seed))
            found.append(metrics)
        return found

    jax.tree.map(
        np.testing.assert_array_equal,
        metrics_of("bfloat16", "bfloat16"),
        metrics_of("bfloat16", "float32"),
    )
    exact, rounded = metrics_of("float32", "float32"), metrics_of("float32", "bfloat16")
    assert exact[0]["loss/divergence"] != rounded[0]["loss/divergence"]
