# SPDX-License-Identifier: Apache-2.0
"""Parameters as sampling reads them, made once: int8, cast, gathered, turned or joined."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from opsd_jax.errors import UserError
from opsd_jax.model.compute_dtype import narrowed
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.joined import joined
from opsd_jax.model.projection import merge_lora
from opsd_jax.model.quantized import quantized
from opsd_jax.model.sharding import num_devices, platform, variable_shardings
from opsd_jax.model.weights_first import turned
from opsd_jax.sampling.config import RolloutConfig


def decoding_form(model: Decoder, variables: dict, config: RolloutConfig) -> tuple[Decoder, dict]:
    """Model and constant variables as sampling reads them, made once per rollout.

    Args:
      model: the decoder.
      variables: {"params"[, "lora"]}; no gradient flows through what is returned.
      config: says which of the forms below to take.

    Returns:
      The model and {"params"[, "lora"][, "scales" of int8 matrices][, "turned" or "joined"
      matrices]}.

    Raises:
      UserError: `rollout.weights` is set for a mixture of experts, or a stop or pad id is not in
        the vocabulary.
    """
    config.check_ids(model.config.vocab_size)
    variables = jax.lax.stop_gradient(variables)
    if config.merge_adapters and model.config.lora:
        variables = {"params": merge_lora(model.config, variables)} if variables else {}
        model = Decoder(dataclasses.replace(model.config, lora=None))
    if config.weights is not None:
        if model.config.num_experts:
            raise UserError(
                f"rollout.weights = {config.weights!r} is not for a mixture of experts, whose "
                "grouped product would first make a wide copy of all of them; set it to None"
            )
        variables = quantized(variables)
    if config.dtype is not None:
        variables = cast(variables, config.dtype)
        model = Decoder(dataclasses.replace(model.config, dtype=config.dtype))
    variables = narrowed(variables, model.config.dtype)
    if config.attention != "xla":
        model = Decoder(dataclasses.replace(model.config, decode_attention=config.attention))
    if gathers(config):
        variables = gathered(model, variables, config)
    if unrolls(model, config):
        model, variables = unstacked(model, variables)
        join = joins(config)
        return model, joined(model.config, variables) if join else turned(variables)
    return model, variables


def changes_weights(model: Decoder, config: RolloutConfig) -> bool:
    """Whether `decoding_form` may make other arrays than those that it is given."""
    dtype = config.dtype or model.config.dtype
    other_numbers = dtype != "float32" or config.weights is not None or config.merge_adapters
    return other_numbers or gathers(config) or unrolls(model, config)


def gathers(config: RolloutConfig) -> bool:
    """Whether FSDP's shards are gathered once per rollout."""
    return config.gather_weights and num_devices("data", "sequence") > 1


def unrolls(model: Decoder, config: RolloutConfig) -> bool:
    """Whether the token loop has each layer by itself, instead of a scan over their stack."""
    most = config.unroll_layers
    if most is None:
        # A GPU copies a layer out of the stack, too: all weights and the cache, at every token.
        most = model.config.num_layers if platform() == "gpu" else 4
    return model.config.scan_layers and model.config.num_layers <= most


def joins(config: RolloutConfig) -> bool:
    """Whether launches are what a token waits for, and every device has whole matrices."""
    one = num_devices("data", "sequence") == 1
    whole = num_devices("model") == 1 and (gathers(config) or one)
    return platform() == "gpu" and whole and config.weights is None


def cast(variables: dict, dtype: str) -> dict:
    """The variables in another dtype; int8 values and their scales as they are."""

    def leaf(x: jax.Array) -> jax.Array:
        return x if x.dtype == jnp.int8 else x.astype(dtype)

    return {
        name: tree if name == "scales" else jax.tree.map(leaf, tree)
        for name, tree in variables.items()
    }


def gathered(model: Decoder, variables: dict, config: RolloutConfig) -> dict:
    """The variables whole on every device along `data`, split along `model` as they were.

    A fully sharded matrix is fetched from all devices where it is used: once per layer and pass in
    the loss, but once per token in decoding, which then waits for the network and for nothing else.
    """
    boxed = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    if config.weights is not None:
        boxed = jax.eval_shape(quantized, boxed)
    split = nn.get_logical_axis_rules()
    whole = tuple((name, None if name == "embed" else axis) for name, axis in split)
    # Split first: XLA would else gather the rounded floats, and make them int8 afterwards.
    for rules in (split, whole):
        wanted = variable_shardings(boxed, jax.sharding.get_abstract_mesh(), rules)
        place = jax.lax.with_sharding_constraint
        variables = {name: place(tree, wanted[name]) for name, tree in variables.items()}
    return variables


def unstacked(model: Decoder, variables: dict) -> tuple[Decoder, dict]:
    """The same model with a parameter array of its own for every layer.

    For decoding small models: a scan over layers reads each layer's weights and cache through a
    slice, which on a CPU is a copy, at every token. The arrays exist twice for that time.
    """

    def per_layer(collection: dict) -> dict:
        rest = {name: tree for name, tree in collection.items() if name != "layers"}
        layers = {
            f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], collection["layers"])
            for i in range(model.config.num_layers)
        }
        return rest | layers

    config = dataclasses.replace(model.config, scan_layers=False)
    return Decoder(config), {name: per_layer(tree) for name, tree in variables.items()}
