# SPDX-License-Identifier: Apache-2.0
"""Where a run's base model comes from: files or a random start."""

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
from opsd_jax.model.config import DTYPES, ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import Rules, variable_shardings
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.pretrained.load import load_pretrained, load_tokenizer_of
from opsd_jax.run.experiment import Base
from opsd_jax.sampling.random_keys import Use, key_for

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A model from files.

    Args:
      path: a Hugging Face directory, a GGUF file, `owner/name[@revision]` on the Hub, or "smollm2";
        the latter two are fetched once.
      dtype: of the parameters as loaded; those that are trained become float32.
    """

    path: str
    dtype: Annotated[str, DTYPES] = "float32"

    def __post_init__(self):
        require("PretrainedModel", self)

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer_of(self.path)

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
      tokenizer: "testbed", a directory with tokenizer files, or a model's name on the Hub.
      config: a `ModelConfig`, a directory whose config.json is read, or "testbed".
      seed: of the parameters.
    """

    tokenizer: str = "testbed"
    config: ModelConfig | str = "testbed"
    seed: Seed = 0

    def __post_init__(self):
        require("RandomModel", self)

    def load_tokenizer(self) -> Tokenizer:
        return _tokenizer(self.tokenizer)

    def load(self, mesh: Mesh, rules: Rules, cache_dir: str, say: Say) -> Base:
        del cache_dir
        config, tokenizer = _shape(self.config), _tokenizer(self.tokenizer)
        model = Decoder(config)

        def init(key: jax.Array) -> dict:
            return init_variables(model, key)["params"]

        key = key_for(Use.PARAMETERS, jax.random.key(self.seed))
        shardings = variable_shardings(jax.eval_shape(init, key), mesh, rules)
        params = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=shardings)(key)
        say(f"model: random, {config.num_layers} layers, width {config.embed_dim}")
        return Base(config, params, tokenizer)


# The testbed is imported where it is named alone: the package works without its folder.


def _shape(config: ModelConfig | str) -> ModelConfig:
    if config == "testbed":
        from opsd_jax.testbed.warm_start import TESTBED_MODEL

        return TESTBED_MODEL
    if isinstance(config, str):
        return config_from_hf(read_json(os.path.join(config, "config.json")))
    return config


def _tokenizer(name: str) -> Tokenizer:
    if name == "testbed":
        from opsd_jax.testbed.world import ChainTokenizer

        return ChainTokenizer()
    return load_tokenizer(name)
