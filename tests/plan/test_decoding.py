# SPDX-License-Identifier: Apache-2.0
"""What H100's compiler makes of a decoded token: how many kernels, and no copies of weights; what
a TPU's does."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh

from opsd_jax.model.config import LoraConfig, ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import FULLY_SHARDED, batch_sharding, on_mesh, variable_shardings
from opsd_jax.plan.program import Program, body_of, num_bytes
from opsd_jax.plan.targets import find_target
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.rollout import rollout
from tests.plan.test_targets import INSTALLED

pytestmark = pytest.mark.slow
on_card = pytest.mark.skipif(not INSTALLED["cuda"], reason="the plan-cuda extra is not installed")
on_tpu = pytest.mark.skipif(not INSTALLED["tpu"], reason="the plan-tpu extra is not installed")
# Layers of Qwen3-1.7B, two of them, under a small vocabulary.
SHAPE = ModelConfig(
    vocab_size=4096,
    num_layers=2,
    embed_dim=2048,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=6144,
    qk_norm=True,
    tie_embeddings=True,
    dtype="bfloat16",
    lora=LoraConfig(rank=64, alpha=128.0),
)
A_MATRIX = 2048 * 1024 * 2  # bytes of the smallest of a layer, k_proj


def compiled_rollout(target="h100:1", **settings) -> Program:
    """32 rows with prompts of 512 tokens on one device; float32 masters, top-k and top-p."""
    mesh = Mesh(
        np.array(find_target(target).devices[:1]).reshape(1, 1),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
    )
    model = Decoder(SHAPE)
    boxed = jax.eval_shape(partial(init_variables, model), jax.random.key(0))

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shardings = variable_shardings(boxed, mesh, FULLY_SHARDED)
    variables = jax.tree.map(placed, nn.meta.unbox(boxed), shardings)
    rows = batch_sharding(mesh)
    ids = placed(jax.ShapeDtypeStruct((32, 512), jnp.int32), rows)
    lengths = placed(jax.ShapeDtypeStruct((32,), jnp.int32), rows)
    config = RolloutConfig(65, temperature=1.1, top_k=20, top_p=0.95, segment_len=16, **settings)

    @jax.jit
    def run(variables, ids, lengths):
        with jax.named_scope("rollout"):
            return rollout(model, variables, ids, lengths, jax.random.key(0), config)

    lowered = on_mesh(run.lower, mesh, FULLY_SHARDED)(variables, ids, lengths)
    return Program.parse(lowered.compile().as_text())


def copied(program: Program) -> list[str]:
    """What a token loop copies, converts or joins that is as large as a matrix."""
    found, left = [], [body_of(w) for w in program.token_loops()]
    while left:
        for each in program.computations[left.pop()]:
            left += [body_of(each)] if each.opcode == "while" else []
            inside = re.search(r"calls=%?([\w.\-]+)", each.line)
            parts = program.computations[inside.group(1)] if inside else [each]
            opcodes = {part.opcode for part in parts}
            moves = {"dynamic-slice", "concatenate", "copy", "transpose"} & opcodes
            if moves and "dot" not in opcodes and num_bytes(each.result) >= A_MATRIX:
                found.append(each.result)
            if opcodes <= {"parameter", "convert", "bitcast"} and "convert" in opcodes:
                found += [each.result] if num_bytes(each.result) >= A_MATRIX else []
    return found


@on_card
@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 2 * 30 + 42),
        ({"attention": "pallas"}, 2 * 17 + 44),
        ({"attention": "pallas", "merge_adapters": True}, 2 * 10 + 44),
    ],
)
def test_a_token_is_few_kernels_and_copies_nothing(settings, most):
    program = compiled_rollout(**settings)
    assert program.kernels_per_token() <= most
    assert copied(program) == []


@on_card
def test_scanned_layers_are_copied_out_of_their_stack():
    """So the test above can fail."""
    assert len(copied(compiled_rollout(unroll_layers=0))) >= 7


@on_tpu
@pytest.mark.parametrize("settings", [{}, {"attention": "pallas"}])
def test_a_tpu_copies_no_weights_within_its_memory(settings):
    """Though the layers are scanned: a product reads its matrix out of the stack. What is moved to
    the chip's own memory, S(1), is not read again."""
    copies = copied(compiled_rollout("v5e:2x2", unroll_layers=0, **settings))
    assert [each for each in copies if "S(1)" not in each] == []
