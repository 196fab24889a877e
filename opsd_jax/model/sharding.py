# SPDX-License-Identifier: Apache-2.0
"""Sharding (FSDP, tensor, sequence, replicas): a mesh, and a table from logical to mesh axes.

Parameters carry logical axis names (`decoder.py`); the table sends them to mesh axes. With the
default table the batch and the parameters are split over `data` (fully sharded) and heads, MLP
and vocabulary over `model` (tensor parallel). `replica`, outside of both, splits the batch alone:
parameters are whole in each replica, and gradients are summed over them. `sequence` is more `data`
until texts are scored, whose tokens it then splits (`texts_split`). Arrays whose dimension does not
divide stay whole in that dimension. What used to be `pjit` is `jax.jit` with these shardings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from opsd_jax.errors import UserError
from opsd_jax.fields import Count, require

Axis = str | tuple[str, ...] | None
Rules = tuple[tuple[str, Axis], ...]

FULLY_SHARDED: Rules = (
    ("batch", "data"),
    ("length", None),
    ("embed", "data"),
    ("vocab", "model"),
    ("heads", "model"),
    ("kv_heads", "model"),
    ("head_dim", None),
    ("mlp", "model"),
    ("experts", None),
    ("layers", None),
    ("lora_rank", None),
)
REPLICATED_OVER_DATA: Rules = tuple(
    (name, None if name == "embed" else axis) for name, axis in FULLY_SHARDED
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh and the placement of parameters on it.

    Args:
      data: devices along `data`; -1 takes all that the others leave.
      model: devices along `model` (tensor parallelism).
      fully_sharded: also split the parameters and the optimiser over `data`.
      replica: devices along `replica`; as many as there are slices or hosts, it keeps all exchange
        but that of gradients within each.
      sequence: devices along `sequence`, for texts that are too long for one: where they are
        scored, each has a part of every text, and of the heads while these attend
        (arXiv 2309.14509), so `model` times `sequence` must divide their number.
    """

    data: Annotated[int, (-1,)] | Count = -1
    model: Count = 1
    fully_sharded: bool = True
    replica: Count = 1
    sequence: Count = 1

    def __post_init__(self):
        require("mesh", self)

    @property
    def rules(self) -> Rules:
        rules = dict(FULLY_SHARDED if self.fully_sharded else REPLICATED_OVER_DATA)
        more = ("sequence",) * (self.sequence > 1)
        outer = ("replica",) * (self.replica > 1)
        if outer or more:
            rules["batch"] = (*outer, "data", *more)
        if more and self.fully_sharded:
            rules["embed"] = (*more, "data")  # in this order `looked_up` can exchange parts
        return tuple(rules.items())

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Devices along each axis, outermost first; no `replica` or `sequence` where there is one.

        Raises:
          UserError: so many devices do not fill it.
        """
        others = self.replica * self.sequence * self.model
        data = self.data if self.data > 0 else max(1, num_devices // others)
        sizes = {"replica": self.replica, "data": data, "sequence": self.sequence}
        sizes = {name: n for name, n in sizes.items() if n > 1 or name == "data"}
        sizes["model"] = self.model
        if math.prod(sizes.values()) != num_devices:
            names = " times ".join(f"mesh.{name} = {n}" for name, n in sizes.items())
            raise UserError(f"{names} must equal the number of devices, {num_devices}")
        return sizes


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh, with devices in the order that suits the hardware: of several slices, the outermost
    axes leave one.

    Raises:
      UserError: the devices at hand do not fill the mesh.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Auto axes: the compiler places intermediates; linen's logical constraints need it.
    kinds = (AxisType.Auto,) * len(sizes)
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)
    # Hosts of GPUs are slices, too, and `jax.make_mesh` refuses several.
    outer = []
    for size in sizes.values():
        outer.append(math.gcd(size, slices))
        slices //= outer[-1]
    inner = [size // part for size, part in zip(sizes.values(), outer, strict=True)]
    grid = create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(sizes), axis_types=kinds)


def axis_size(mesh: Mesh | AbstractMesh, axis: Axis) -> int:
    """Devices along a mesh axis, or along several of them together."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape[name] for name in names)


def rows_axis(mesh: Mesh | AbstractMesh) -> Axis:
    """What splits a batch, but where texts are split."""
    names = tuple(name for name in ("replica", "data", "sequence") if name in mesh.shape)
    return names if len(names) > 1 else "data"


def rows_axis_in_words(mesh: Mesh, *without: str) -> tuple[str, str]:
    """Names and numbers of what splits a batch: ("mesh.replica x mesh.data", "2 x 4")."""
    sizes = {name: n for name, n in mesh.shape.items() if name not in ("model", *without)}
    return " x ".join(f"mesh.{name}" for name in sizes), " x ".join(map(str, sizes.values()))


def variable_shardings(boxed: Any, mesh: Mesh | AbstractMesh, rules: Any) -> Any:
    """Shardings of a boxed abstract variable tree (from `jax.eval_shape` of an init).

    Returns:
      The unboxed tree with a `NamedSharding` for every leaf; a mesh axis that does not divide
      its dimension, or is already used by an earlier one, is left out.
    """
    table = dict(rules)

    def place(leaf):
        names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
        spec: list[Axis] = []
        for name, size in zip(names, shape, strict=True):
            axis = table[name] if name is not None else None
            fits = axis is not None and size % axis_size(mesh, axis) == 0 and axis not in spec
            spec.append(axis if fits else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over `data`, `replica` and `sequence`."""
    return NamedSharding(mesh, PartitionSpec(rows_axis(mesh)))


def on_mesh(compiled: Callable, mesh: Mesh, rules: Rules) -> Callable:
    """The function, called under the mesh and the logical axis rules."""

    def call(*args):
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            return compiled(*args)

    return call


@contextmanager
def texts_split() -> Iterator[int]:
    """In its scope the rules split texts over `sequence`, and rows over the other axes alone.

    Heads that attend are split over both `sequence` and `model`. Gives the number of parts: 1, and
    nothing is changed, where the mesh that is set has no such axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if "sequence" not in mesh.shape:
        yield 1
        return
    rules = dict(nn.get_logical_axis_rules())
    rules["batch"] = tuple(name for name in ("replica", "data") if name in mesh.shape)
    rules |= {"length": "sequence", "kv_heads": ("sequence", "model")}
    with nn.logical_axis_rules(tuple(rules.items())):
        yield mesh.shape["sequence"]


def placed(x: jax.Array, *names: str | None) -> jax.Array:
    """x where the rules have its axes, those whole that do not divide.

    Of rows that do not divide XLA fills up the last part, and on a mesh with `model` the gradient
    of an embedding then has what came of the filling.
    """
    if jax.sharding.get_abstract_mesh().empty or not nn.get_logical_axis_rules():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*dividing(x.shape, *names)))


def dividing(shape: Sequence[int], *names: str | None) -> list[Axis]:
    """The mesh axes of logical ones, by the rules; None where they do not divide."""
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    axes = [rules.get(name) if name else None for name in names]
    return [
        axis if size % axis_size(mesh, axis) == 0 else None
        for size, axis in zip(shape, axes, strict=True)
    ]


def in_parts(x_BTNH: jax.Array) -> jax.Array:
    """Of texts that are split, each device's part for all heads that `model` gives it.

    Attention wants whole texts for some heads; left alone, the compiler also projects these whole.
    """
    if dict(nn.get_logical_axis_rules()).get("length") is None:
        return x_BTNH
    return placed(x_BTNH, "batch", "length", "heads", "head_dim")


def num_devices(*axes: str) -> int:
    """Along axes of the mesh that is set."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(axis, 1) for axis in axes)


def whole_groups(num_rows: int, copies: int) -> int:
    """`copies`, or 1 where some device would have a part of a group of so many rows only."""
    return 1 if num_rows % (copies * num_devices("replica", "data", "sequence")) else copies


def length_axis(mesh: Mesh | AbstractMesh, length: int) -> Axis:
    """What splits so many tokens of a text that was read under `texts_split`."""
    size = dict(mesh.shape).get("sequence", 1)
    return "sequence" if size > 1 and length % size == 0 else None


def platform() -> str:
    """cpu, gpu or tpu: of the mesh that is set, which need not be here, or of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def looked_up(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """table[ids], where the table may be split along D; no row visits another replica.

    A device looks up its part of D for the texts of all that hold the other parts, and these then
    exchange. Left alone, the compiler takes that to be the texts of all devices.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    axes, length = rules.get("batch", rows_axis(mesh)), rules.get("length")
    replica = "replica" if "replica" in mesh.shape else None
    if not (replica or length) or len(ids_BT) % axis_size(mesh, axes):
        return table_VD[ids_BT]
    place = jax.lax.with_sharding_constraint
    anyhow = PartitionSpec.UNCONSTRAINED
    x_BTD = table_VD[place(ids_BT, PartitionSpec(replica))]
    x_BTD = place(x_BTD, PartitionSpec(replica, None, anyhow))
    if length:
        x_BTD = place(x_BTD, PartitionSpec(axes, None, length))
    return place(x_BTD, PartitionSpec(axes, length))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays of a batch that every process holds whole (NumPy leaves, the batch leading).

    The mesh decides which rows a device gets: on a pod those of a process need not be adjacent,
    and with `model` across processes they are not its own alone.
    """
    sharding = batch_sharding(mesh)

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda rows: x[rows])

    return jax.tree.map(place, batch)


def num_bytes(tree: Any) -> int:
    """Bytes of all leaves, whole arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
