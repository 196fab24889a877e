# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
from flax import linen as nn

from opsd_jax.model.config import LORA_TARGETS, LoraConfig
from opsd_jax.model.decoder import Decoder, init_variables
from tests.tiny import tiny_config


def test_adapters_start_as_pefts_do():
    """kaiming_uniform(a = sqrt 5): A uniform within ±fan_in^-1/2, B zero."""
    config = tiny_config(embed_dim=48, mlp_dim=80, lora=LoraConfig(rank=64, alpha=8))
    init = jax.jit(lambda key: nn.meta.unbox(init_variables(Decoder(config), key))["lora"])
    adapters = jax.tree_util.tree_flatten_with_path(init(jax.random.key(0)))[0]
    fan_in = {"o_proj": 4 * 8, "down_proj": 80}
    seen = set()
    for path, leaf in adapters:
        *_, name, which = (part.key for part in path)
        seen.add((name, which))
        if which == "b":
            assert not np.any(leaf)
            continue
        bound = fan_in.get(name, 48) ** -0.5
        assert 0.99 * bound < np.abs(leaf).max() <= bound, name
        np.testing.assert_allclose(np.std(leaf), bound / 3**0.5, rtol=0.04, err_msg=name)
    assert seen == {(name, which) for name in LORA_TARGETS for which in "ab"}
