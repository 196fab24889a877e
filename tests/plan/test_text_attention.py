# SPDX-License-Identifier: Apache-2.0
"""What the compilers of accelerators make of attention to whole texts, forward and backward."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opsd_jax.model.config import ModelConfig
from opsd_jax.model.kv_cache import KV
from opsd_jax.model.text_attention import attend_text, fastest
from opsd_jax.plan.targets import find_target
from tests.plan.test_targets import INSTALLED

# Heads of Qwen3-1.7B.
SHAPE = dict(vocab_size=8, num_layers=1, embed_dim=2048, num_heads=16, num_kv_heads=8, mlp_dim=8)
MODELS = {
    "bfloat16": dict(head_dim=128, dtype="bfloat16"),
    "float32": dict(head_dim=128, dtype="float32"),
    "capped": dict(head_dim=128, dtype="bfloat16", attention_softcap=50.0),
    "wide heads": dict(head_dim=256, dtype="bfloat16"),
}
OWN = {"h100:1": "__cudnn$fmha", "v5e:2x2": "tpu_custom_call"}
compilers = [
    pytest.param(
        target,
        marks=pytest.mark.skipif(not INSTALLED[kind], reason=f"no extra plan-{kind} here"),
    )
    for target, kind in (("h100:1", "cuda"), ("v5e:2x2", "tpu"))
]


def compiled(target: str, config: ModelConfig, T: int) -> str:
    """Gradients of attention by what `fastest` names, for one device."""
    mesh = Mesh(np.array(find_target(target).devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())

    def array(*shape, dtype=config.dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def loss(q, keys, values, positions):
        out = attend_text(config, q, KV(keys, values), positions, jnp.int32(1 << 30))
        return jnp.sum(out.astype(jnp.float32))

    K, H = config.num_kv_heads, config.head_dim
    operands = array(1, K, 2, T, H), array(1, K, H, T), array(1, K, T, H)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*operands, array(1, T, dtype="int32"))
    return lowered.compile().as_text()


def squares(text: str, T: int) -> list[str]:
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", text))
    return [s for s in shapes if sum(int(n) >= T for n in s.split(",")) > 1]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("T", [4096, 20_001])
@pytest.mark.parametrize("target", compilers)
def test_no_text_has_a_square_of_scores(target, T, model):
    """Nor is any length refused: with cuDNN an odd one has no gradient."""
    config = ModelConfig(**SHAPE, **MODELS[model])
    platform = find_target(target).devices[0].platform
    name = fastest(config, platform)
    text = compiled(target, ModelConfig(**SHAPE, **MODELS[model], attention=name), T)
    assert not squares(text, T)
    assert (OWN[target] in text) == (name != "xla")
    assert name == "splash" if platform == "tpu" else (name == "cudnn") == (model == "bfloat16")
