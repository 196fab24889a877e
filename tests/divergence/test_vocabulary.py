# SPDX-License-Identifier: Apache-2.0
"""A vocabulary split over eight devices against NumPy on the whole of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from opsd_jax.divergence.vocabulary import Vocabulary

V, PADDED = 21, 24
LOGITS = np.random.default_rng(0).integers(-3, 4, (5, V)).astype(np.float32)  # many ties
INDEX = np.array([[0, 20, -1], [3, 4, 5], [-1, -1, -1], [20, 0, 7], [2, -1, 9]])


def split(method):
    """`method(vocabulary, local logits)` on 8 slices of the padded vocabulary."""
    mesh = jax.make_mesh((8,), ("model",), (AxisType.Auto,))
    vocabulary = Vocabulary(V, "model")

    def local(logits):
        return method(vocabulary, vocabulary.without_padding(logits))

    whole = np.pad(LOGITS, ((0, 0), (0, PADDED - V)), constant_values=99)
    out = PartitionSpec(None, "model") if method in SLICED else PartitionSpec()
    spec = PartitionSpec(None, "model")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    result = np.asarray(jax.jit(mapped)(whole))
    return result[:, :V] if method in SLICED else result


def log_softmax(vocabulary, logits):
    return vocabulary.log_softmax(logits, 1.3)


def put(vocabulary, logits):
    values = jnp.broadcast_to(jnp.arange(1.0, 4.0), INDEX.shape)
    return vocabulary.put(values, jnp.asarray(INDEX), logits)


def take(vocabulary, logits):
    return vocabulary.take(logits, jnp.asarray(INDEX))


def top_4(vocabulary, logits):
    return vocabulary.top_k(logits, 4)


def log_sum_exp(vocabulary, logits):
    return vocabulary.log_sum_exp(jnp.where(logits > 0, logits, -jnp.inf))


def maximum(vocabulary, logits):
    return vocabulary.max(logits)


SLICED = (log_softmax, put)


def expected(method):
    z = LOGITS.astype(np.float64)
    if method is log_softmax:
        return z / 1.3 - np.log(np.exp(z / 1.3).sum(-1, keepdims=True))
    if method is put:
        want = np.zeros_like(z)
        for row, places in enumerate(INDEX):
            for value, place in enumerate(places, start=1):
                if place >= 0:
                    want[row, place] = value
        return want
    if method is take:
        return np.where(INDEX < 0, -np.inf, np.take_along_axis(z, np.maximum(INDEX, 0), -1))
    if method is top_4:
        return np.argsort(-z, axis=-1, kind="stable")[:, :4]
    if method is log_sum_exp:
        return np.log(np.where(z > 0, np.exp(z), 0).sum(-1))
    return z.max(-1)


@pytest.mark.parametrize("method", [log_softmax, put, take, top_4, log_sum_exp, maximum])
@pytest.mark.parametrize("where", ["split", "whole"])
def test_method(method, where):
    got = split(method) if where == "split" else method(Vocabulary(V), jnp.asarray(LOGITS))
    np.testing.assert_allclose(got, expected(method), rtol=1e-6, atol=1e-6)


def test_log_sum_exp_of_nothing_has_a_gradient():
    total = functools.partial(Vocabulary(4).log_sum_exp)
    value, gradient = jax.value_and_grad(total)(jnp.full(4, -jnp.inf))
    assert value == -np.inf and not np.any(gradient)
