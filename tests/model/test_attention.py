# SPDX-License-Identifier: Apache-2.0
"""Every way to attend to a text against NumPy in float64, forward and backward."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from opsd_jax.errors import UserError
from opsd_jax.model import text_attention
from opsd_jax.model.attention import attend
from opsd_jax.model.config import NO_WINDOW
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.kv_cache import KV, KVCache
from opsd_jax.model.sharding import FULLY_SHARDED, MeshConfig, make_mesh
from opsd_jax.model.text_attention import attend_in_blocks, flash, splash
from opsd_jax.run.assembly import check_devices, model_of
from opsd_jax.sampling.config import RolloutConfig
from tests.tiny import tiny_batch, tiny_config, tiny_variables

B, K, G, H = 2, 2, 2, 16
# The kernels where there is neither a TPU nor a GPU.
SPLASH = partial(splash, interpret=True)
FLASH = partial(flash, implementation="xla")


def operands(T, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, K, G, T, H), (B, K, T, H), (B, K, T, H)
    return [jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32) for s in shapes]


def numpy_attention(q, k, v, window, softcap):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = np.einsum("bkgth,bksh->bkgts", q, k)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    distance = np.arange(s.shape[-2])[:, None] - np.arange(s.shape[-1])
    s = np.where((distance >= 0) & (distance < (window or NO_WINDOW)), s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bkgts,bksh->bkgth", w / w.sum(-1, keepdims=True), v)


def in_blocks(q, k, v, window, softcap):
    positions = jnp.broadcast_to(jnp.arange(q.shape[3]), (B, q.shape[3]))
    seen = jnp.int32(window or NO_WINDOW)
    return attend_in_blocks(q, KV(k.swapaxes(2, 3), v), positions, seen, softcap)


def whole(q, k, v, window, softcap):
    T = q.shape[3]
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    source = KVCache(KV(k.swapaxes(2, 3), v), positions)
    return attend(q, (source,), positions, jnp.int32(window or NO_WINDOW), softcap)


@pytest.mark.parametrize(
    ("function", "window", "softcap"),
    [
        (in_blocks, None, None),
        (in_blocks, 7, 1.5),
        (SPLASH, None, None),
        (SPLASH, 7, 1.5),
        (FLASH, None, None),
        (FLASH, 7, None),
    ],
)
def test_each_implementation_equals_numpy(function, window, softcap, monkeypatch):
    """At a length that no block divides; gradients against those of the plain form."""
    monkeypatch.setattr(text_attention, "QUERY_BLOCK", 32)
    q, k, v = operands(141)
    out = jax.jit(partial(function, window=window, softcap=softcap))(q, k, v)
    np.testing.assert_allclose(out, numpy_attention(q, k, v, window, softcap), atol=2e-5)

    def loss(function, *operands):
        return jnp.sum(jnp.sin(function(*operands, window, softcap)))

    got = jax.jit(jax.grad(partial(loss, function), (0, 1, 2)))(q, k, v)
    want = jax.jit(jax.grad(partial(loss, whole), (0, 1, 2)))(q, k, v)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


def test_long_texts_need_no_square_of_memory():
    """[T, T] scores of one layer would be 16 times what blocks of 512 queries need."""

    def temporaries(function):
        q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(8192))
        gradient = jax.grad(lambda *x: jnp.sum(function(*x, None, None)), (0, 1, 2))
        return jax.jit(gradient).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(in_blocks) < 0.2 * temporaries(whole)


def test_a_quarter_of_a_text_reads_no_key_behind_its_end():
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(8192))
    text = jax.jit(partial(in_blocks, window=None, softcap=None)).lower(q, k, v).as_text()
    widths = set(map(int, re.findall(r"x512x(\d+)xf32>", text)))
    assert {width for width in widths if width > 512} == {2048, 4096, 6144, 8192}


@pytest.mark.parametrize("windows", [None, (1,), (0, 1)], ids=["none", "mixed", "all"])
@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_model_says_the_same_through_kernels(name, windows, monkeypatch):
    """Also split over 4 x 2 devices, each with its rows and heads."""
    monkeypatch.setattr(text_attention, "splash", SPLASH)
    monkeypatch.setattr(text_attention, "flash", FLASH)
    config = tiny_config(window=None if windows is None else 4, window_layers=windows)
    variables, context = tiny_variables(config), tiny_batch(8).teacher
    positions = jnp.broadcast_to(jnp.arange(context.ids.shape[1]), context.ids.shape)
    want, _ = jax.jit(Decoder(config).apply)(variables, context.ids, positions)
    model = Decoder(tiny_config(window=config.window, window_layers=windows, attention=name))
    mesh = make_mesh(MeshConfig(4, 2))
    alone, _ = jax.jit(model.apply)(variables, context.ids, positions)
    with jax.set_mesh(mesh), nn.logical_axis_rules(FULLY_SHARDED):
        split, _ = jax.jit(model.apply)(variables, context.ids, positions)
    seen = np.arange(context.ids.shape[1]) < context.lengths[:, None]
    np.testing.assert_allclose(alone[seen], want[seen], atol=2e-5)
    np.testing.assert_allclose(split[seen], want[seen], atol=2e-5)


@pytest.mark.parametrize(
    ("platform", "changes", "name"),
    [
        ("cpu", dict(dtype="bfloat16"), "xla"),
        ("tpu", {}, "splash"),
        ("gpu", dict(dtype="bfloat16"), "cudnn"),
        ("gpu", {}, "xla"),
        ("gpu", dict(dtype="bfloat16", attention_softcap=5.0), "xla"),
        ("gpu", dict(dtype="bfloat16", head_dim=256), "xla"),
        ("gpu", dict(dtype="bfloat16", head_dim=60), "xla"),
        ("gpu", dict(dtype="bfloat16", attention="xla"), "xla"),
    ],
)
def test_a_run_attends_by_the_kernel_of_its_devices_where_it_can(platform, changes, name):
    """And what it takes is not refused afterwards; a name that is given is taken."""
    changes = {"attention": None, **changes}
    own = {key: changes.pop(key) for key in ("attention", "dtype") if key in changes}
    devices = np.array([SimpleNamespace(platform=platform)])
    mesh = SimpleNamespace(devices=devices, shape={"data": 1, "model": 1})
    train = SimpleNamespace(remat=True, lora=None, **{"dtype": "float32", **own})
    config = model_of(train, tiny_config(**changes), mesh).config
    assert config.attention == name
    check_devices(config, RolloutConfig(8), mesh)


@pytest.mark.parametrize("T", [1, 6, 7])
def test_cudnn_is_asked_for_even_lengths(T, monkeypatch):
    """Of odd ones it has no gradient."""
    asked, real = [], jax.nn.dot_product_attention

    def attention(q, *rest, **settings):
        asked.append(q.shape[1])
        return real(q, *rest, **settings | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    q, k, v = operands(T)
    got = text_attention.flash(q, k, v, None, None)
    want = in_blocks(q, k, v, None, None)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert asked == [T + T % 2]


@pytest.mark.parametrize(
    ("platform", "changes", "message"),
    [
        ("cpu", dict(attention="splash"), "needs a TPU, and the devices here are of kind 'cpu'"),
        ("tpu", dict(attention="cudnn", dtype="bfloat16"), "needs a GPU"),
        ("cpu", dict(decode_attention="pallas"), "attention = 'pallas' needs a TPU or a GPU, and"),
        ("gpu", dict(decode_attention="pallas"), "needs heads of 32, 64, 128 or 256 numbers"),
        ("gpu", dict(attention="cudnn"), "train.dtype = 'bfloat16'"),
        ("cpu", dict(remat="offload_projections"), "needs an accelerator"),
        ("gpu", dict(attention="cudnn", dtype="bfloat16", attention_softcap=5.0), "cannot cap"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(platform, changes, message):
    devices = np.array([SimpleNamespace(platform=platform)])
    mesh = SimpleNamespace(devices=devices, shape={"data": 1, "model": 1})
    rollout = RolloutConfig(8, attention=changes.pop("decode_attention", "xla"))
    with pytest.raises(UserError, match=re.escape(message)):
        check_devices(tiny_config(**changes), rollout, mesh)
    check_devices(tiny_config(), RolloutConfig(8), mesh)
