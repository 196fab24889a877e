# SPDX-License-Identifier: Apache-2.0
"""The decoder's parts against NumPy in float64, and what must not matter to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from opsd_jax.errors import UserError
from opsd_jax.model.attention import attend
from opsd_jax.model.config import NO_WINDOW, LoraConfig, ModelConfig, layer_numbers
from opsd_jax.model.decoder import Decoder, Experts, init_variables
from opsd_jax.model.kv_cache import EMPTY_POSITION, KV, KVCache
from opsd_jax.model.rope import RopeScaling, rope_frequencies
from opsd_jax.model.sharding import FULLY_SHARDED, variable_shardings
from tests.representatives import representatives

BASE = dict(
    vocab_size=24,
    num_layers=3,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    rope_theta=100.0,
)
PLAIN = ModelConfig(**BASE)
WINDOWED = ModelConfig(**BASE, window=3, window_layers=(0, 2), post_norm=True, qk_norm=True)
MOE = ModelConfig(**BASE, num_experts=5, experts_per_token=2, norm_topk_prob=True)
B, T = 2, 9


def variables_of(config, seed=0):
    shapes = jax.eval_shape(lambda: init_variables(Decoder(config), jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), nn.meta.unbox(shapes)
    )


def ids_of(seed=0):
    return np.random.default_rng(seed).integers(0, 24, (B, T)).astype(np.int32)


POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


def hidden_of(config, variables, ids, positions=POSITIONS, **kwargs):
    with jax.disable_jit():
        return Decoder(config).apply(variables, jnp.asarray(ids), positions, **kwargs)


def numpy_attention(q, k, v, q_positions, k_positions, window, softcap):
    """[N, T, H], [N, S, H] -> [N, T, H] for one row, in float64."""
    scores = np.einsum("nth,nsh->nts", q, k)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    distance = q_positions[:, None] - k_positions[None]
    scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,nsh->nth", weights / weights.sum(-1, keepdims=True), v)


@given(window=st.integers(1, 12), cached=st.integers(0, 7), softcap=st.sampled_from([None, 1.5]))
@settings(max_examples=25, deadline=None)
def test_attention_over_two_stores_equals_numpy_over_one(window, cached, softcap):
    rng = np.random.default_rng(cached)
    K, G, H, S = 2, 2, 4, 7
    q, k, v = (rng.normal(size=(B, K * g, S, H)) for g in (G, 1, 1))
    positions = np.arange(S)

    def store(held):
        """Seven slots, those that are not held full of rubbish."""
        keys = np.where(held[:, None], k, 99.0).transpose(0, 1, 3, 2)
        values = np.where(held[:, None], v, 99.0)
        at = np.broadcast_to(np.where(held, positions, EMPTY_POSITION), (B, S))
        kv = KV(jnp.asarray(keys, jnp.float32), jnp.asarray(values, jnp.float32))
        return KVCache(kv, jnp.asarray(at))

    out = ATTEND(
        jnp.asarray(q.reshape(B, K, G, S, H), jnp.float32),
        (store(positions < cached), store(positions >= cached)),
        jnp.broadcast_to(positions, (B, S)),
        jnp.int32(window),
        softcap,
    )
    for b in range(B):
        want = numpy_attention(
            q[b], k[b].repeat(G, 0), v[b].repeat(G, 0), positions, positions, window, softcap
        )
        np.testing.assert_allclose(np.asarray(out[b]).reshape(want.shape), want, atol=2e-5)


ATTEND = jax.jit(attend, static_argnums=4)


@pytest.mark.parametrize("config", [PLAIN, WINDOWED, MOE], ids=["plain", "windowed", "moe"])
def test_later_tokens_do_not_reach_back_nor_padding_in(config):
    variables = variables_of(config)
    ids = ids_of()
    want, _ = hidden_of(config, variables, ids)
    changed = ids.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 24
    got, _ = hidden_of(config, variables, changed)
    np.testing.assert_allclose(got[:, :6], want[:, :6], atol=1e-6)
    assert np.abs(got[:, 6:] - want[:, 6:]).max() > 1e-2


def test_a_window_is_blind_beyond_its_reach():
    config = dataclasses.replace(PLAIN, window=3)  # 3 layers reach 3 · 2 tokens back
    variables = variables_of(config)
    changed = ids_of()
    changed[:, 0] = (changed[:, 0] + 1) % 24
    one, _ = hidden_of(config, variables, ids_of())
    two, _ = hidden_of(config, variables, changed)
    np.testing.assert_array_equal(one[:, 7:], two[:, 7:])
    assert np.abs(np.asarray(one - two))[:, 6].max() > 1e-5


@pytest.mark.parametrize("config", [PLAIN, WINDOWED, MOE], ids=["plain", "windowed", "moe"])
def test_slots_of_the_cache_may_stand_in_any_order(config):
    variables, ids = variables_of(config), ids_of()
    want, _ = hidden_of(config, variables, ids)
    _, kv = hidden_of(config, variables, ids[:, :6], POSITIONS[:, :6], return_kv=True)
    order = np.array([4, 0, 6, 2, 5, 1, 3, 7])  # two slots of rubbish among them
    keys = jnp.pad(kv.keys, [(0, 0)] * 4 + [(0, 2)], constant_values=7.0)[..., order]
    values = jnp.pad(kv.values, [(0, 0)] * 3 + [(0, 2), (0, 0)], constant_values=7.0)
    slots = np.pad(POSITIONS[:, :6], [(0, 0), (0, 2)], constant_values=EMPTY_POSITION)
    cache = KVCache(KV(keys, values[:, :, :, order]), jnp.asarray(slots[:, order]))
    got, none = hidden_of(config, variables, ids[:, 6:], POSITIONS[:, 6:], cache=cache)
    assert none is None
    np.testing.assert_allclose(got, want[:, 6:], atol=1e-5)


def test_experts_equal_a_loop_over_them():
    variables = variables_of(MOE)
    params = jax.tree.map(lambda x: x[0], variables["params"]["layers"]["experts"])
    x = np.random.default_rng(5).normal(size=(B, T, 16)).astype(np.float32)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def one_token(token):
        scores = token @ p["router"]
        share = np.exp(scores - scores.max())
        share /= share.sum()
        best = np.argsort(-share)[: MOE.experts_per_token]
        out = 0.0
        for e in best:
            gate, up = token @ p["gate_proj"][e], token @ p["up_proj"][e]
            out += (
                share[e]
                / share[best].sum()
                * (gate / (1 + np.exp(-gate)) * up)[None]
                @ (p["down_proj"][e])
            )
        return out[0]

    want = np.stack([[one_token(t) for t in row.astype(np.float64)] for row in x])
    got = Experts(MOE).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, atol=2e-5)

    def dense(params, x):  # every expert on every token: the gradient of the same function
        share = jax.nn.softmax(x @ params["router"])
        kept = share >= jax.lax.top_k(share, MOE.experts_per_token)[0][..., -1:]
        share = jnp.where(kept, share, 0)
        share = share / share.sum(-1, keepdims=True)
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, params["gate_proj"]))
        hidden = hidden * jnp.einsum("btd,edf->btef", x, params["up_proj"])
        return jnp.einsum("btef,efd,bte->btd", hidden, params["down_proj"], share)

    def loss(f):
        return lambda p, x: jnp.sum(jnp.sin(f(p, x)))

    ours = jax.grad(loss(lambda p, x: Experts(MOE).apply({"params": p}, x)), (0, 1))
    theirs = jax.grad(loss(dense), (0, 1))
    pairs = zip(
        jax.tree.leaves(ours(params, jnp.asarray(x))),
        jax.tree.leaves(theirs(params, jnp.asarray(x))),
        strict=True,
    )
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize(
    "config", representatives([PLAIN, WINDOWED, MOE], MOE), ids=["plain", "windowed", "moe"]
)
def test_eight_devices_give_the_numbers_of_one(config):
    variables, ids = variables_of(config), ids_of()
    want, _ = hidden_of(config, variables, ids)
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    boxed = jax.eval_shape(lambda: init_variables(Decoder(config), jax.random.key(0)))
    placed = jax.device_put(variables, variable_shardings(boxed, mesh, FULLY_SHARDED))
    with jax.set_mesh(mesh), nn.logical_axis_rules(FULLY_SHARDED):
        got, _ = jax.jit(Decoder(config).apply)(placed, jnp.asarray(ids), POSITIONS)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_bfloat16_computes_near_float32_from_float32_masters():
    variables = variables_of(WINDOWED)
    want, _ = hidden_of(WINDOWED, variables, ids_of())
    half = dataclasses.replace(WINDOWED, dtype="bfloat16")
    got, kv = hidden_of(half, variables, ids_of(), return_kv=True)
    assert got.dtype == kv.keys.dtype == kv.values.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - want).mean() < 0.05 * np.abs(want).mean()


def test_layers_differ_in_numbers_only():
    config = dataclasses.replace(
        PLAIN,
        window=4,
        window_layers=(1,),
        local_rope_theta=10.0,
        no_rope_layers=(2,),
        rope_scaling=RopeScaling("yarn", 4.0, 32),
    )
    numbers = layer_numbers(config)
    assert numbers["window"].tolist() == [NO_WINDOW, 4, NO_WINDOW]
    yarn, factor = rope_frequencies(8, 100.0, config.rope_scaling)
    np.testing.assert_array_equal(numbers["rope"][0], yarn)
    np.testing.assert_allclose(numbers["rope"][1], 10.0 ** (-np.arange(4) / 4), rtol=1e-6)
    assert not numbers["rope"][2].any()
    plain = 8**-0.5
    np.testing.assert_allclose(numbers["query_scale"], [plain * factor**2, plain, plain], 1e-6)
    assert factor == pytest.approx(1 + 0.1 * np.log(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of"),
        ({"dtype": "float16"}, "model.dtype"),
        ({"activation": "relu"}, "model.activation"),
        ({"window": 0}, "model.window"),
        ({"biases": ("lm_head",)}, "model.biases"),
        ({"num_experts": 4}, "experts_per_token"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **change)


def test_configs_are_hashable_whatever_kind_of_list_gin_gives():
    config = dataclasses.replace(
        PLAIN, lora=LoraConfig(2, 2.0, targets=["q_proj"]), biases=["q_proj"], no_rope_layers=[1]
    )
    assert hash(config) == hash(dataclasses.replace(config, biases=("q_proj",)))
