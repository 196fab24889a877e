# SPDX-License-Identifier: Apache-2.0
"""Chips that need not be here: `v5e:4x4`, `h100:2x8` as devices a compiler takes.

libtpu (extra `plan-tpu`) describes slices of TPUs by itself. The CUDA plugin (extra `plan-cuda`)
takes a description of a card and needs neither a card nor a driver.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from opsd_jax.errors import UserError

GIB = 2**30


class Target(NamedTuple):
    """devices: abstract ones, in the compiler's order; memory_bytes: of each; hosts: how many."""

    name: str
    devices: list[Any]
    memory_bytes: float
    hosts: int


# Memory of a chip, from the makers' pages: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}.
TPUS = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}


class Card(NamedTuple):
    """What XLA asks of an NVIDIA card; the rest it derives from the compute capability.

    name: as `jax.Device.device_kind` has it; shared_memory: bytes of a multiprocessor, of which a
    block may have 1,024 less; memory_bytes: as the driver reports it.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    bandwidth: int
    memory_bytes: int
    l2_bytes: int
    shared_memory: int
    fpus: int


# From the makers' data sheets and architecture papers, SXM boards.
_HOPPER: dict[str, Any] = dict(capability=(9, 0), multiprocessors=132, clock_ghz=1.98, fpus=128)
_HOPPER |= dict(l2_bytes=50 << 20, shared_memory=228 << 10)
CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        multiprocessors=108,
        clock_ghz=1.41,
        bandwidth=2_039 * 10**9,
        memory_bytes=84_987_740_160,
        l2_bytes=40 << 20,
        shared_memory=164 << 10,
        fpus=64,
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3", bandwidth=3_352 * 10**9, memory_bytes=84_978_434_048, **_HOPPER
    ),
    "h200": Card("NVIDIA H200", bandwidth=4_800 * 10**9, memory_bytes=150_754_820_096, **_HOPPER),
}


def find_target(text: str) -> Target:
    """The devices of a target such as "v5e:4x4", "h100:8" or "h100:2x8" (hosts x cards).

    Raises:
      UserError: no such chip or shape, or the compiler is not installed.
    """
    match = re.fullmatch(r"([a-z0-9]+):([0-9]{1,4}(?:x[0-9]{1,4}){0,2})", text)
    chip = match.group(1) if match else ""
    if chip not in TPUS and chip not in CARDS:
        raise UserError(
            f"--target must be one of {', '.join([*TPUS, *CARDS])} with a shape, such as v5e:4x4, "
            f"h100:8 or h100:2x8 (hosts x cards), not {text!r}"
        )
    shape = [int(n) for n in match.group(2).split("x")]  # type: ignore[union-attr]
    return tpu_slice(text, chip, shape) if chip in TPUS else cuda_hosts(text, chip, shape)


def tpu_slice(text: str, chip: str, shape: list[int]) -> Target:
    """A slice of TPUs, described by libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--target={text} needs the TPU compiler: pip install '.[plan-tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # Asks no metadata server, which is not there.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # No chip is taken.
    try:
        devices: list[Any] = list(topologies.get_topology_desc(text, platform="tpu").devices)
    except Exception as error:  # libtpu's own types, and words for people
        raise UserError(f"--target={text}: {str(error).splitlines()[0]}") from None
    if chip == "v4" and len(devices) != math.prod(shape):
        devices = devices[: math.prod(shape)]
    hosts = len({device.process_index for device in devices})
    return Target(text, devices, TPUS[chip], hosts)


def cuda_hosts(text: str, chip: str, shape: list[int]) -> Target:
    """Hosts of NVIDIA cards, described to the CUDA plugin."""
    # The parent first: a dotted name raises where its parent is not installed.
    parts = ("jax_plugins", "jax_plugins.xla_cuda12")
    if not all(importlib.util.find_spec(part) for part in parts):
        raise UserError(f"--target={text} needs the CUDA compiler: pip install '.[plan-cuda]'")
    if len(shape) > 2:
        raise UserError(f"--target={text}: cards are counted as N, or as hosts x cards")
    hosts, cards = (1, *shape)[-2:]
    if hosts * cards == 0:
        raise UserError(f"--target={text} has no cards")
    try:
        found = topologies.get_topology_desc(
            "",
            platform="cuda",
            topology=f"1x{hosts}x{cards}",  # partitions x hosts x cards
            target_config=description(CARDS[chip]),
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--target={text}: {str(error).splitlines()[0]}") from None
    return Target(text, list(found.devices), CARDS[chip].memory_bytes, hosts)


def description(card: Card) -> str:
    """The card as the text form of XLA's GpuTargetConfigProto."""
    major, minor = card.capability
    block = card.shared_memory - 1024
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {card.multiprocessors}
  fpus_per_core: {card.fpus}
  clock_rate_ghz: {card.clock_ghz}
  memory_bandwidth: {card.bandwidth}
  device_memory_size: {card.memory_bytes}
  l2_cache_size: {card.l2_bytes}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block}
  shared_memory_per_core: {card.shared_memory}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{card.name}"
"""
