# SPDX-License-Identifier: Apache-2.0
"""The decoder once more in float64 NumPy, without JAX: nothing to compile for a changed config."""

import numpy as np

from opsd_jax.model.config import ModelConfig, layer_numbers


def slow_logits(c: ModelConfig, params: dict, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of full rows of tokens [B, T], layer by layer and head by head."""
    layers, T = params["layers"], ids.shape[1]
    numbers = {name: np.asarray(x, np.float64) for name, x in layer_numbers(c).items()}
    apart = np.arange(T)[:, None] - np.arange(T)[None]
    x = c.embed_scale * params["embed"][ids]
    for i in range(c.num_layers):
        seen = (apart >= 0) & (apart < numbers["window"][i])
        y = _norm(c, x, layers["attention_norm"]["scale"][i]) if c.pre_norm else x
        y = _attention(c, y, _layer(layers["attention"], i), numbers, i, seen)
        y = _norm(c, y, layers["attention_post_norm"]["scale"][i]) if c.post_norm else y
        x = x + c.residual_scale * y
        y = _norm(c, x, layers["mlp_norm"]["scale"][i]) if c.pre_norm else x
        if c.num_experts:
            y = _experts(c, y, _layer(layers["experts"], i))
        else:
            mlp = _layer(layers["mlp"], i)
            gate, up = (_project(y, mlp[f"{name}_proj"], "btd,df->btf") for name in ("gate", "up"))
            y = _project(_activate(c, gate) * up, mlp["down_proj"], "btf,fd->btd")
        y = _norm(c, y, layers["mlp_post_norm"]["scale"][i]) if c.post_norm else y
        x = x + c.residual_scale * y
    x = c.output_scale * _norm(c, x, params["final_norm"]["scale"])
    return _cap(x @ params["embed" if c.tie_embeddings else "lm_head"].T, c.final_softcap)


def _attention(c, x, layer, numbers, i, seen):
    q, k, v = (_project(x, layer[f"{name}_proj"], "btd,dnh->btnh") for name in "qkv")
    if c.qk_norm:
        q, k = (_head_norm(c, y, layer[f"{n}_norm"]["scale"]) for n, y in (("q", q), ("k", k)))
    q, k = _rotate(q, numbers["rope"][i]), _rotate(k, numbers["rope"][i])
    heads = []
    for head in range(c.num_heads):
        kv = head // (c.num_heads // c.num_kv_heads)
        scores = q[:, :, head] @ k[:, :, kv].swapaxes(1, 2) * numbers["query_scale"][i]
        scores = np.where(seen, _cap(scores, c.attention_softcap), -np.inf)
        heads.append(_softmax(scores) @ v[:, :, kv])
    return _project(np.stack(heads, axis=2), layer["o_proj"], "btnh,nhd->btd")


def _experts(c, x, layer):
    shares = _softmax(x @ layer["router"])
    out = np.zeros_like(x)
    for at in np.ndindex(*x.shape[:2]):
        chosen = np.argsort(-shares[at], kind="stable")[: c.experts_per_token]
        total = shares[at][chosen].sum() if c.norm_topk_prob else 1.0
        for e in chosen:
            inner = _activate(c, x[at] @ layer["gate_proj"][e]) * (x[at] @ layer["up_proj"][e])
            out[at] += shares[at][e] / total * (inner @ layer["down_proj"][e])
    return out


def _layer(tree, i):
    return {k: _layer(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}


def _project(x, layer, how):
    return np.einsum(how, x, layer["kernel"], optimize=True) + layer.get("bias", 0.0)


def _norm(c, x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * (c.norm_offset + scale)


def _head_norm(c, x, scale):
    if not c.qk_norm_over_heads:
        return _norm(c, x, scale)
    return _norm(c, x.reshape(*x.shape[:2], -1), scale.reshape(-1)).reshape(x.shape)


def _rotate(x, rope):
    angle = np.arange(x.shape[1])[:, None, None] * rope
    first, second = np.split(x, 2, axis=-1)
    sin, cos = np.sin(angle), np.cos(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _activate(c, x):
    if c.activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)
