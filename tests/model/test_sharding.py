# SPDX-License-Identifier: Apache-2.0
"""Meshes over several slices of TPUs, or several hosts of GPUs, which JAX calls slices as well."""

import numpy as np
import pytest

from opsd_jax.model.sharding import MeshConfig, make_mesh


class Card:
    """What JAX tells of a device of another host; the numbers of hosts alternate here."""

    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    def __init__(self, number: int, slices: int):
        self.id, self.slice_index = number, number % slices
        self.process_index = self.slice_index


@pytest.mark.parametrize(
    "slices, config, outside",
    [
        (2, MeshConfig(), "data"),
        (2, MeshConfig(model=2), "data"),
        (2, MeshConfig(replica=2, model=2), "replica"),
        (4, MeshConfig(replica=2, model=2), "replica data"),
        (2, MeshConfig(model=8), "model"),
        (2, MeshConfig(replica=4), "replica"),
    ],
)
def test_the_outermost_axes_leave_a_slice(slices, config, outside):
    mesh = make_mesh(config, [Card(number, slices) for number in range(8)])
    assert sorted(card.id for card in mesh.devices.flat) == list(range(8))
    where = np.vectorize(lambda card: card.slice_index)(mesh.devices)
    crossed = [
        name
        for axis, name in enumerate(mesh.axis_names)
        if (where != where.take([0], axis=axis)).any()
    ]
    assert crossed == outside.split()
    assert [card.slice_index for card in mesh.devices.flat] == sorted(where.flat)
