# SPDX-License-Identifier: Apache-2.0
"""Linear maps of the decoder, with optional biases and LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from opsd_jax.errors import UserError
from opsd_jax.model.config import LoraConfig, ModelConfig
from opsd_jax.model.joined import apart, joined_product, num_blocks
from opsd_jax.model.products import linear
from opsd_jax.model.quantized import scaled
from opsd_jax.model.weights_first import weights_first

PRODUCT = "projection"  # what `ModelConfig.remat` calls the outputs of projections


def logical(init: Callable[..., jax.Array], axes: tuple[str | None, ...]) -> Callable[..., Any]:
    """The initializer, with the logical names of the axes it fills."""
    return nn.with_logical_partitioning(init, axes)


class Projection(nn.Module):
    """A linear map over the trailing `in_shape` axes, with an optional bias and adapter.

    y = x W + bias + scale · (x A) B, where A and B live in the "lora" collection and B starts
    at zero. An int8 W has its scale in the "scales" collection (`quantized.py`). For sampling, W
    may stand in the "turned" collection instead (`weights_first.py`).
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    use_bias: bool = False
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        num_in = len(self.in_shape)
        init = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(num_in)),
            out_axis=tuple(range(num_in, num_in + len(self.out_shape))),
        )
        turned: jax.Array | None = self.get_variable("turned", "kernel")
        if turned is None:
            axes, shape = self.in_axes + self.out_axes, self.in_shape + self.out_shape
            kernel = self.param("kernel", logical(init, axes), shape)
            y = linear(x, kernel, num_in)
        else:
            y = weights_first(x, turned, num_in)
        y = scaled(y, self.get_variable("scales", "kernel"))
        if self.use_bias:
            zeros = logical(nn.initializers.zeros, self.out_axes)
            bias = self.param("bias", zeros, self.out_shape).astype(x.dtype)
            y = y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))
        # Absent collection = base model; during init the collection is mutable and is created.
        if self.lora and (self.has_variable("lora", "a") or self.is_mutable_collection("lora")):
            y = y + self._adapter(x, num_in, self.lora)
        return checkpoint_name(y, PRODUCT)

    def _adapter(self, x: jax.Array, num_in: int, lora: LoraConfig) -> jax.Array:
        def init_a():
            # PEFT's, kaiming_uniform(a = sqrt 5): uniform within ±fan_in^-1/2, deviation
            # (3 fan_in)^-1/2. Published learning rates rest on it.
            init = nn.initializers.variance_scaling(
                1 / 3, "fan_in", "uniform", in_axis=tuple(range(num_in)), out_axis=-1
            )
            axes = self.in_axes + ("lora_rank",)
            shape = self.in_shape + (lora.rank,)
            return logical(init, axes)(self.make_rng("params"), shape)

        def init_b():
            axes = ("lora_rank",) + self.out_axes
            shape = (lora.rank,) + self.out_shape
            return logical(nn.initializers.zeros, axes)(None, shape)

        a = self.variable("lora", "a", init_a).value
        b = self.variable("lora", "b", init_b).value
        if lora.dropout and self.has_rng("dropout"):
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - lora.dropout, x.shape)
            x = jnp.where(keep, x / (1 - lora.dropout), 0)
        return linear(linear(x, a, num_in), b, 1) * lora.scale


def project(
    module: nn.Module,
    x: jax.Array,
    inputs: dict[str, int],
    **outputs: dict[str, int],
) -> list[jax.Array]:
    """Projections of x inside a module, with the biases and adapters that its config gives them.

    For sampling they may be one product, in the "joined" collection (`joined.py`).

    Args:
      module: has a `config`; its compact call is running.
      x: [..., inputs].
      inputs: logical axis -> size.
      outputs: name of a projection -> the same of what it gives.

    Returns:
      [..., outputs] of each.
    """
    config: ModelConfig = module.config  # type: ignore[attr-defined]
    group: dict | None = module.get_variable("joined", next(iter(outputs)))
    if group is not None:
        shapes = [tuple(out.values()) for out in outputs.values()]
        blocks = num_blocks(config, len(outputs))
        return apart(joined_product(group, x, len(inputs)), shapes, blocks)

    def one(name: str, out: dict[str, int]) -> jax.Array:
        lora = config.lora if config.lora and config.lora.covers(name) else None
        shapes, axes = (tuple(inputs.values()), tuple(out.values())), (tuple(inputs), tuple(out))
        return Projection(*shapes, *axes, name in config.biases, lora, name=name)(x)

    return [one(name, out) for name, out in outputs.items()]


def merge_lora(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a model without adapters that computes the same: W + scale · A B.

    The sum is taken in float32 and rounded once to the dtype of W.

    Args:
      config: its `lora` gives the scale.
      variables: {"params"} or {"params", "lora"}.
    """
    lora = variables.get("lora")
    if not lora:
        return dict(variables["params"])
    if config.lora is None:
        raise UserError("these weights have adapters, but model.lora is not configured")
    scale = config.lora.scale

    def merged(params: Any, adapters: Any) -> Any:
        if not isinstance(params, Mapping):
            return params
        out = {name: merged(value, adapters.get(name, {})) for name, value in params.items()}
        if "a" in adapters:
            kernel = params["kernel"]
            a, b = adapters["a"].astype(jnp.float32), adapters["b"].astype(jnp.float32)
            num_layers, rank = a.shape[0], a.shape[-1]
            product = jnp.matmul(
                a.reshape(num_layers, -1, rank),
                b.reshape(num_layers, rank, -1),
                precision=jax.lax.Precision.HIGHEST,
            )
            total = kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)
            out["kernel"] = total.astype(kernel.dtype)
        return out

    return merged(variables["params"], lora)
