# SPDX-License-Identifier: Apache-2.0
"""Sampling and scoring of every family: one function of the same ids, or a policy of its own.

More ragged prompts than slots, so rows are refilled, and segments of four tokens, so that every
completion crosses their borders. Scoring is compared with transformers in `test_huggingface.py`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import FULLY_SHARDED, MeshConfig, make_mesh
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.sampling.config import RolloutConfig
from opsd_jax.sampling.prompts import Completion, Context, pad
from opsd_jax.sampling.rollout import rollout
from opsd_jax.sampling.slots import Sampler
from tests.pretrained.test_families import CACHED, CASES, SHAPE
from tests.representatives import representatives
from tests.tiny import scored_logps

FAMILIES = sorted(CACHED | {"gemma"})
NUM_SLOTS, NUM_PROMPTS, P = 3, 8, 20
CONFIG = RolloutConfig(max_new_tokens=23, stop_ids=(3, 5, 7), segment_len=4, unroll_layers=0)


def decoder(case, dtype="float32"):
    """The model of a case and weights under which its logits are of order 1."""
    model_type, values = CASES[case]
    config = config_from_hf({"model_type": model_type, **SHAPE, **values})
    model = Decoder(dataclasses.replace(config, remat=False, dtype=dtype))
    shapes = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    r = np.random.default_rng(0)

    def fill(path, leaf):
        noise, name = r.normal(size=leaf.shape), path[-1].key
        if name == "scale":
            noise = 0.2 * noise + 1 - config.norm_offset
        elif name == "bias":
            noise *= 0.2
        elif name == "embedding":
            noise *= 0.5 if config.tie_embeddings else 1
        else:
            noise *= config.embed_dim**-0.5
        return jnp.asarray(noise, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(fill, nn.meta.unbox(shapes))


def questions():
    r = np.random.default_rng(0)
    lengths = r.integers(1, P + 1, NUM_PROMPTS)
    prompts = [r.integers(1, SHAPE["vocab_size"], n).tolist() for n in lengths]
    return prompts, Context(*map(jnp.asarray, pad(prompts, P, 0)))


def through_slots(model, variables, config):
    """(ids, mask, logps) of every prompt, [B, C] each."""
    prompts, _ = questions()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    run = Sampler(model, 0, mesh, FULLY_SHARDED, NUM_SLOTS)
    keys = jax.random.split(jax.random.key(3), NUM_PROMPTS)
    ids, mask, logps = (
        np.zeros((NUM_PROMPTS, CONFIG.max_new_tokens), dtype) for dtype in (np.int32, bool, "f")
    )
    for found in run(variables, prompts, config, keys):
        here = found.prompt, slice(len(found.ids))
        ids[here], mask[here], logps[here] = found.ids, True, found.logps
    return ids, mask, logps


def gaps(model, variables, ids, mask, logps):
    """|log-probability while sampling - while scoring| of the sampled tokens."""
    completion = Completion(jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(logps), None)
    scored = scored_logps(model, variables, questions()[1], completion)
    assert 0.3 < scored[mask].std() < 3, "logits of order 1, or the tolerance means nothing"
    assert mask.sum() > 4 * NUM_PROMPTS
    return np.abs(scored - logps)[mask]


@pytest.mark.parametrize("case", representatives(FAMILIES, "gemma3", "olmo3", "phi3", "qwen3_moe"))
def test_refilled_rows_have_the_logps_of_scoring(case):
    model, variables = decoder(case)
    assert gaps(model, variables, *through_slots(model, variables, CONFIG)).max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_rollout_with_unrolled_layers_has_the_logps_of_scoring(case):
    model, variables = decoder(case)
    prompts, config = questions()[1], dataclasses.replace(CONFIG, unroll_layers=4)
    jitted = jax.jit(partial(rollout, model, config=config))
    out = jitted(variables, prompts.ids, prompts.lengths, jax.random.key(1))
    gap = gaps(model, variables, np.asarray(out.ids), np.asarray(out.mask), np.asarray(out.logps))
    print(f"{case} float32: mean {gap.mean():.1e}, max {gap.max():.1e}")
    assert gap.max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_the_gap_in_bfloat16_is_bounded(case):
    """By what the README says; a router may choose another expert there."""
    model, variables = decoder(case, "bfloat16")
    gap = gaps(model, variables, *through_slots(model, variables, CONFIG))
    print(f"{case} bfloat16: mean {gap.mean():.1e}, max {gap.max():.1e}")
    assert gap.mean() <= 0.02 and gap.max() <= 0.3
