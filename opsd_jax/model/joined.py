# SPDX-License-Identifier: Apache-2.0
"""Fused projections (q, k, v; gate, up): one product for all, all adapters in a second one.

    [y₁ y₂ … x A₁ x A₂ …] = x [W₁ W₂ … A₁ A₂ …]
    yᵢ += scale · (x Aᵢ) Bᵢ          as one product with the blocks B₁, B₂, … on a diagonal

For decoding on GPUs, where a token waits for the launches of many small products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from opsd_jax.model.config import LoraConfig, ModelConfig
from opsd_jax.model.quantized import INPUT_AXES

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def joined(config: ModelConfig, variables: dict) -> dict:
    """The kernels, biases and adapters of projections as `joined_product` takes them.

    Args:
      config: of the decoder.
      variables: {"params"[, "lora"]}, layers not stacked; what is no projection stays.

    Returns:
      {"params"[, "lora"], "joined"}; the last has for each group, under the name of its first
      projection, kernel: [in, out + R of each], b: [R of each, out], bias: [out].
    """
    left = flatten_dict(variables)
    found: dict[tuple[str, ...], jax.Array] = {}
    for place in {path[1:-2] for path in left if path[-1] == "kernel"}:
        for names in GROUPS:
            if ("params", *place, names[0], "kernel") not in left:
                continue
            own = [_taken(left, (*place, name)) for name in names]
            size = math.prod(own[0]["kernel"].shape[: len(INPUT_AXES[names[0]])])
            blocks = num_blocks(config, len(names))
            for key, array in _join(own, size, blocks, config.lora).items():
                found["joined", *place, names[0], key] = array
    return unflatten_dict(left | found)


def num_blocks(config: ModelConfig, num_projections: int) -> int:
    """Parts that the outputs of a group alternate in: q, k and v come head by head."""
    return config.num_kv_heads if num_projections == 3 else 1


def _taken(left: dict, place: tuple[str, ...]) -> dict[str, jax.Array]:
    """What one projection has: kernel, and where it has them bias, a, b."""
    return {path[-1]: left.pop(path) for path in list(left) if path[1:-1] == place}


def _join(
    own: Sequence[dict[str, jax.Array]], size: int, blocks: int, lora: LoraConfig | None
) -> dict[str, jax.Array]:
    """One group.

    Args:
      own: of each projection.
      size: of their input.
      blocks: the first part of all outputs comes first, then the second of all, and so on.
      lora: of their adapters.
    """

    def side_by_side(matrices: Sequence[jax.Array]) -> jax.Array:
        parts = [m.reshape(m.shape[0], blocks, -1) for m in matrices]
        return jnp.concatenate(parts, axis=2).reshape(len(parts[0]), -1)

    kernels = [each["kernel"].reshape(size, -1) for each in own]
    dtype, widths = kernels[0].dtype, [kernel.shape[1] for kernel in kernels]
    found = {"kernel": side_by_side(kernels)}
    if lora and any("a" in each for each in own):
        adapters = [each["a"].reshape(size, -1) for each in own if "a" in each]
        found["kernel"] = jnp.concatenate([found["kernel"], *adapters], axis=1)
        rows, at = [], 0
        for each, width in zip(own, widths, strict=True):
            row = jnp.zeros((len(adapters), lora.rank, width), dtype)
            if "a" in each:
                row, at = row.at[at].set(each["b"].reshape(-1, width) * lora.scale), at + 1
            rows.append(row.reshape(-1, width))
        found["b"] = side_by_side(rows)
    if any("bias" in each for each in own):
        none = [jnp.zeros((1, width), dtype) for width in widths]
        biases = [each.get("bias", zeros) for each, zeros in zip(own, none, strict=True)]
        found["bias"] = side_by_side([bias.reshape(1, -1) for bias in biases])[0]
    return found


def joined_product(group: dict[str, jax.Array], x: jax.Array, num_in: int) -> jax.Array:
    """The projections of a group side by side, with biases and adapters.

    Args:
      group: one of `joined`.
      x: [..., in], `num_in` axes of inputs.

    Returns:
      [..., out].
    """
    y = x.reshape(*x.shape[: x.ndim - num_in], -1) @ group["kernel"].astype(x.dtype)
    width = y.shape[-1] if "b" not in group else group["b"].shape[1]
    y, adapted = jnp.split(y, [width], axis=-1)
    if "bias" in group:
        y = y + group["bias"].astype(x.dtype)
    return y if "b" not in group else y + adapted @ group["b"].astype(x.dtype)


def apart(y: jax.Array, shapes: Sequence[tuple[int, ...]], blocks: int) -> list[jax.Array]:
    """[..., out] -> [..., *shape] of each projection."""
    rows, sizes = y.shape[:-1], [math.prod(shape) // blocks for shape in shapes]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    found = jnp.split(y.reshape(*rows, blocks, -1), ends, axis=-1)
    return [y.reshape(*rows, *shape) for y, shape in zip(found, shapes, strict=True)]
