# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a file fills which part of which parameter, in both directions.

Our parameters are stacked over layers (and experts) with the input axes first; a file has one
matrix per layer, output rows first. Import reads, per device, only the rows and columns that
the device holds; export does the opposite, tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from opsd_jax.model.config import ModelConfig
from opsd_jax.pretrained.families import FAMILIES, TENSORS

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter and the tensors that it is made of.

    Attributes:
      path: its path in the tree, joined with "/".
      shape: its shape, leading layer and expert axes included.
      num_leading: how many leading axes count tensors (0, 1 for layers, 2 with experts).
      ours: one letter for each further axis.
      theirs: for each axis of the file's tensor, the letters it merges, major first.
      tensors: leading index -> (tensor name, its first row there).
    """

    path: str
    shape: tuple[int, ...]
    num_leading: int
    ours: str
    theirs: tuple[str, ...]
    tensors: Mapping[tuple[int, ...], tuple[str, int]]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.ours, self.shape[self.num_leading :], strict=True))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the file (of our rows, if it holds others' too)."""
        return tuple(math.prod(self.sizes[a] for a in axes) for axes in self.theirs)

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """One entry of the stack in the layout of the file."""
        order = [self.ours.index(a) for axes in self.theirs for a in axes]
        return np.ascontiguousarray(values.transpose(order).reshape(self.tensor_shape))

    def file_index(self, index: Index) -> tuple[Index, Index]:
        """What to read of a tensor for `index` of one entry, and what to keep of that.

        Only the major letter of a merged axis can be cut in the file; the rest is cut after.

        Returns:
          the index into the file's tensor and the index into the read values in our layout.
        """
        cut = dict(zip(self.ours, index, strict=True))
        read, keep = [], dict(cut)
        for axes in self.theirs:
            start, stop, _ = cut[axes[0]].indices(self.sizes[axes[0]])
            inner = math.prod(self.sizes[a] for a in axes[1:])
            read.append(slice(start * inner, stop * inner))
            keep[axes[0]] = slice(None)
        return tuple(read), tuple(keep[a] for a in self.ours)

    def from_file(self, values: np.ndarray) -> np.ndarray:
        """Values read at a `file_index`, in our layout."""
        split, letters = [], "".join(self.theirs)
        for axes, size in zip(self.theirs, values.shape, strict=True):
            inner = [self.sizes[a] for a in axes[1:]]
            split += [size // math.prod(inner), *inner]
        return values.reshape(split).transpose([letters.index(a) for a in self.ours])


def leaves(config: ModelConfig, shapes: Mapping[str, Any]) -> list[Leaf]:
    """Every parameter of the tree with the tensors that fill it.

    Args:
      config: its `family` decides the names.
      shapes: the "params" tree, of anything with a shape.
    """
    family = FAMILIES[config.family or "llama"]
    flat = {
        "/".join(str(key.key) for key in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    stored = {}
    for path in flat:
        name, layout = TENSORS[path]
        stored[path] = (family.names.get(path, name), layout)
    blocks = _block_rows(flat, stored)
    return [_leaf(path, shape, stored[path], blocks.get(path, 0)) for path, shape in flat.items()]


def _block_rows(flat: Mapping[str, tuple], stored: Mapping[str, tuple]) -> dict[str, int]:
    """First row of each parameter that shares its tensor with others ("name#i")."""
    shared: dict[str, list[tuple[int, str]]] = {}
    for path, (name, _) in stored.items():
        if "#" in name:
            base, block = name.split("#")
            shared.setdefault(base, []).append((int(block), path))
    rows = {}
    for members in shared.values():
        first = 0
        for _, path in sorted(members):
            rows[path] = first
            first += _leaf(path, flat[path], stored[path], 0).tensor_shape[0]
    return rows


def _leaf(path: str, shape: tuple, stored: tuple[str, str], first_row: int) -> Leaf:
    name, layout = stored
    ours, theirs = layout.split("->")
    num_leading = len(shape) - len(ours)
    name = name.split("#")[0]
    tensors = {
        at: (name.format(**dict(zip("le", at, strict=False))), first_row)
        for at in itertools.product(*(range(n) for n in shape[:num_leading]))
    }
    return Leaf(path, shape, num_leading, ours, tuple(theirs.split()), tensors)


def file_shapes(plan: list[Leaf]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file of this model has."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in plan:
        for name, first_row in leaf.tensors.values():
            rows, *rest = leaf.tensor_shape
            end = max(first_row + rows, shapes.get(name, (0,))[0])
            shapes[name] = (end, *rest)
    return shapes


def to_file(plan: list[Leaf], params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a parameter tree, one at a time, in the names and layout of a file.

    `plan` is the `leaves` of the tree, whose arrays are on the host.
    """
    blocks: dict[str, list[tuple[int, Leaf, np.ndarray]]] = {}
    for leaf, values in zip(plan, jax.tree.leaves(params), strict=True):
        for at, (name, first_row) in leaf.tensors.items():
            blocks.setdefault(name, []).append((first_row, leaf, values[at]))
    for name, members in blocks.items():
        parts = [
            leaf.to_file(part) for _, leaf, part in sorted(members, key=lambda member: member[0])
        ]
        yield name, parts[0] if len(parts) == 1 else np.concatenate(parts)
