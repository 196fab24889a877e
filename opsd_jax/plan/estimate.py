# SPDX-License-Identifier: Apache-2.0
"""The least time that a step can take on a chip, from what it computes, reads and exchanges.

    prefill, update   max(FLOPs / peak, bytes exchanged / link)
    a decoded token   max(FLOPs / peak, bytes read / bandwidth) + exchanged / link
                      (+ kernels x launch on a GPU)

A floor, by rooflines (Williams et al. 2009): nothing here knows how good a kernel is. What a run
may expect is the floor divided by the efficiency that its chip reaches, see `REACHED`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from opsd_jax.host.chips import Peak
from opsd_jax.method.train_step import Method
from opsd_jax.model.sharding import axis_size, rows_axis
from opsd_jax.plan.program import Collective
from opsd_jax.run.assembly import Assembly
from opsd_jax.run.flops import (
    Lengths,
    decoding_bytes,
    forward_parts,
    prefill_flops,
    readings,
    repeated,
    step_flops,
)

LAUNCH_S = 2.5e-6  # of one kernel, without command buffers; 2 to 3 on an H100 host
REACHED = 0.5  # of the roofline, in the estimate: a wish, measured nowhere yet
# Bytes/s that a chip exchanges along one axis. TPU: both directions of an axis of the torus, from
# jax-ml.github.io/scaling-book (chapter "TPUs"); NVIDIA: one direction of NVLink, of the data
# sheets, and one 400 Gb/s port for each card between hosts.
LINKS = {"v4": 90e9, "v5e": 90e9, "v5p": 180e9, "v6e": 180e9}
LINKS |= {"a100": 300e9, "h100": 450e9, "h200": 450e9}
BETWEEN_HOSTS = 50e9
Link = Callable[[Collective], float]
# Bytes/s between a card and its host's memory, one direction of PCIe, of the data sheets; that of
# TPUs is not published.
TO_HOST = {"a100": 32e9, "h100": 64e9, "h200": 64e9}


class Seconds(NamedTuple):
    """Of one step, at the roofline."""

    rollout: float
    update: float

    @property
    def step(self) -> float:
        return self.rollout + self.update


def exchange_seconds(found: Sequence[Collective], scope: str, link: Link) -> float:
    """Time on the links of all collectives of one half of the step; none overlaps with anything."""
    return sum(each.num_bytes * each.times / link(each) for each in found if each.scope == scope)


def executed_flops(parts: Assembly, lengths: Lengths) -> tuple[float, float] | None:
    """FLOPs of (rollout, update) as compiled, over all devices: padded, and recomputed with remat.

    Of a prompt that a group shares, attention is made for every row (`model/branches.py`), and all
    where a device's rows, in the update those of a micro-batch, are no whole groups. None where the
    model FLOPs have no formula (`run.flops.step_flops`).

    Args:
      parts: of the run.
      lengths: of the padded batch.
    """
    found = step_flops(parts.method, lengths)
    if found is None:
        return None
    config, method = parts.model.config, scored_in_groups(parts, len(lengths.student))
    rollout, _ = step_flops(sampled_in_groups(parts, len(lengths.student)), lengths) or found
    _, update = step_flops(method, lengths) or found
    again = repeated(method, lengths.student)
    *products, attended = forward_parts(config, again, 0 * again)
    more = 3 * attended
    for reader, prompts, shared in readings(method, lengths):
        prompts = repeated(method, prompts[: len(prompts) * shared])
        more += forward_parts(reader, prompts, 0 * prompts)[-1]
    if config.remat:
        texts = lengths.student + lengths.completion  # the layers of both, without logits
        layers = forward_parts(config, texts, 0 * texts)
        more += layers[-1]
        if config.remat is True:
            more += sum(layers[:-1]) - sum(products)
    return rollout, update + method.num_updates * more


def sampled_in_groups(parts: Assembly, num_rows: int) -> Method:
    """The method, of groups of 1 where the rollout reads each row's prompt."""
    method, mesh = parts.method, parts.mesh
    if num_rows % (method.group_size * axis_size(mesh, rows_axis(mesh))):
        return dataclasses.replace(method, group_size=1)
    return method


def scored_in_groups(parts: Assembly, num_rows: int) -> Method:
    """The method, of groups of 1 where the update reads each row's prompt."""
    method = parts.method
    by_length = method.num_micro_batches > 1 and method.num_widths > 1
    if by_length or "sequence" in parts.mesh.shape:
        return dataclasses.replace(method, group_size=1)
    return sampled_in_groups(parts, num_rows // method.num_micro_batches)


def offload_seconds(parts: Assembly, lengths: Lengths, link: float | None) -> float:
    """The way of the kept activations to the host's memory and back, at `link` bytes/s each way."""
    config = parts.model.config
    if config.remat != "offload_projections" or link is None:
        return 0.0
    method = scored_in_groups(parts, len(lengths.student))
    tokens = float(np.sum(lengths.student + lengths.completion))
    tokens -= float(np.sum(repeated(method, lengths.student)))
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim + config.embed_dim
    width += 2 * max(1, config.experts_per_token) * config.mlp_dim  # that of down_proj is not kept
    num_bytes = tokens * config.num_layers * width * np.dtype(config.dtype).itemsize
    return parts.method.num_updates * 2 * num_bytes / parts.mesh.size / link


def step_seconds(
    parts: Assembly,
    lengths: Lengths,
    peak: Peak,
    found: Sequence[Collective],
    link: Link,
    kernels_per_token: float | None,
    to_host: float | None,
) -> Seconds | None:
    """The floor of both halves; None where the work has no formula.

    Args:
      parts: of the run.
      lengths: of the padded batch.
      peak: of a chip.
      found: what the chips exchange.
      link: the bytes/s of each.
      kernels_per_token: launches for a decoded token, None where they cost nothing (TPU).
      to_host: bytes/s to the host's memory, None where it is not known and counts as nothing.
    """
    chips = parts.mesh.size
    done = executed_flops(parts, lengths)
    if done is None:
        return None
    rollout, update = done
    update_s = max(
        update / chips / peak.flops,
        exchange_seconds(found, "update", link),
        offload_seconds(parts, lengths, to_host),
    )
    if not rollout:
        return Seconds(0.0, update_s)
    prefill = prefill_flops(sampled_in_groups(parts, len(lengths.student)), lengths)
    params = jax.tree.leaves(parts.abstract.student["params"])
    weight_bytes = max(leaf.dtype.itemsize for leaf in params)
    axes = (axis_size(parts.mesh, rows_axis(parts.mesh)), parts.mesh.shape["model"])
    read = decoding_bytes(parts.method, lengths, weight_bytes, *axes) or 0.0
    decoding = max((rollout - prefill) / chips / peak.flops, read / peak.bandwidth)
    launches = (kernels_per_token or 0) * LAUNCH_S * int(np.max(lengths.completion))
    exchange = exchange_seconds(found, "rollout", link)
    return Seconds(prefill / chips / peak.flops + decoding + launches + exchange, update_s)
