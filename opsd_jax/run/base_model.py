# SPDX-License-Identifier: Apache-2.0
"""Where a run's base model comes from: files, a random start, or the testbed's warm start."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Annotated

import jax
from flax import linen as nn
from jax.sharding import Mesh

from opsd_jax.data.tokenizer import Tokenizer, load_tokenizer
from opsd_jax.errors import UserError
from opsd_jax.fields import Seed, require
from opsd_jax.host.files import read_json
from opsd_jax.host.pod import first_process_first
from opsd_jax.model.config import DTYPES, ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import Rules, variable_shardings
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.pretrained.load import load_pretrained
from opsd_jax.run.experiment import Base
from opsd_jax.testbed.warm_start import TESTBED_MODEL, WarmStartConfig, load_or_train
from opsd_jax.testbed.world import ChainTokenizer

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A model from files.

    Args:
      path: a Hugging Face directory, a GGUF file, or "smollm2" (fetched once).
      dtype: of the parameters as loaded; those that are trained become float32.
    """

    path: str
    dtype: Annotated[str, DTYPES] = "float32"

    def __post_init__(self):
        require("PretrainedModel", self)

    def load(self, mesh: Mesh, rules: Rules, cache_dir: str, say: Say) -> Base:
        del cache_dir
        found = load_pretrained(self.path, self.dtype, mesh, rules)
        if found.tokenizer is None:
            raise UserError(f"{self.path}: no tokenizer files; copy the model's own into it")
        say(f"model: {self.path}, {found.config.num_layers} layers, width {found.config.embed_dim}")
        return Base(found.config, found.params, found.tokenizer)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """Random parameters, to train from nothing or to test a shape.

    Args:
      tokenizer: "testbed", or a directory with tokenizer files.
      config: a `ModelConfig`, or a directory whose config.json is read.
      seed: of the parameters.
    """

    tokenizer: str = "testbed"
    config: ModelConfig | str = TESTBED_MODEL
    seed: Seed = 0

    def __post_init__(self):
        require("RandomModel", self)

    def load(self, mesh: Mesh, rules: Rules, cache_dir: str, say: Say) -> Base:
        del cache_dir
        config = self.config
        if isinstance(config, str):
            config = config_from_hf(read_json(os.path.join(config, "config.json")))
        model = Decoder(config)

        def init(key: jax.Array) -> dict:
            return init_variables(model, key)["params"]

        key = jax.random.key(self.seed)
        shardings = variable_shardings(jax.eval_shape(init, key), mesh, rules)
        params = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=shardings)(key)
        say(f"model: random, {config.num_layers} layers, width {config.embed_dim}")
        tokenizer: Tokenizer = (
            ChainTokenizer() if self.tokenizer == "testbed" else load_tokenizer(self.tokenizer)
        )
        return Base(config, params, tokenizer)


@dataclasses.dataclass(frozen=True)
class TestbedBase:
    """The testbed's warm-started base, trained on first use and kept below the cache directory.

    On a pod process 0 trains it and the others read it: all start from the same bits.

    Args:
      warm_start: the recipe.
      cache_dir: where bases are kept, to share one between runs; None is the run's workdir. All
        hosts of a pod must see it.
    """

    __test__ = False  # Not a test class, whatever pytest makes of its name.

    warm_start: WarmStartConfig = WarmStartConfig()
    cache_dir: str | None = None

    def load(self, mesh: Mesh, rules: Rules, cache_dir: str, say: Say) -> Base:
        del mesh, rules
        folder = self.cache_dir or cache_dir
        base = first_process_first(
            lambda: load_or_train(self.warm_start, TESTBED_MODEL, folder, say),
            f"the testbed's base below {folder}",
        )
        return Base(TESTBED_MODEL, base.params, ChainTokenizer())
