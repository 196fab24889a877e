# SPDX-License-Identifier: Apache-2.0
"""The model families: one row each, and what each of their tensors is called.

A row has the values a family fixes, the defaults that its config.json may leave out, and the
names in which it departs from Llama. A family that fits the switches of `ModelConfig` is added
here, with one case in tests/pretrained/test_families.py; no model code changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

_LAYER = "model.layers.{l}."

# Parameter path -> (tensor name, our axes "->" its axes). Letters: v vocab, d model, n heads,
# h head dim, f mlp, e experts. {l} and {e} index the leading axes of our stacked arrays.
TENSORS: dict[str, tuple[str, str]] = {
    "embed": ("model.embed_tokens.weight", "vd->v d"),
    "lm_head": ("lm_head.weight", "vd->v d"),
    "final_norm/scale": ("model.norm.weight", "d->d"),
    "layers/attention_norm/scale": (_LAYER + "input_layernorm.weight", "d->d"),
    "layers/mlp_norm/scale": (_LAYER + "post_attention_layernorm.weight", "d->d"),
    "layers/attention_post_norm/scale": (_LAYER + "post_attention_layernorm.weight", "d->d"),
    "layers/mlp_post_norm/scale": (_LAYER + "post_feedforward_layernorm.weight", "d->d"),
    "layers/attention/q_proj/kernel": (_LAYER + "self_attn.q_proj.weight", "dnh->nh d"),
    "layers/attention/k_proj/kernel": (_LAYER + "self_attn.k_proj.weight", "dnh->nh d"),
    "layers/attention/v_proj/kernel": (_LAYER + "self_attn.v_proj.weight", "dnh->nh d"),
    "layers/attention/o_proj/kernel": (_LAYER + "self_attn.o_proj.weight", "nhd->d nh"),
    "layers/attention/q_proj/bias": (_LAYER + "self_attn.q_proj.bias", "nh->nh"),
    "layers/attention/k_proj/bias": (_LAYER + "self_attn.k_proj.bias", "nh->nh"),
    "layers/attention/v_proj/bias": (_LAYER + "self_attn.v_proj.bias", "nh->nh"),
    "layers/attention/o_proj/bias": (_LAYER + "self_attn.o_proj.bias", "d->d"),
    "layers/attention/q_norm/scale": (_LAYER + "self_attn.q_norm.weight", "h->h"),
    "layers/attention/k_norm/scale": (_LAYER + "self_attn.k_norm.weight", "h->h"),
    "layers/mlp/gate_proj/kernel": (_LAYER + "mlp.gate_proj.weight", "df->f d"),
    "layers/mlp/up_proj/kernel": (_LAYER + "mlp.up_proj.weight", "df->f d"),
    "layers/mlp/down_proj/kernel": (_LAYER + "mlp.down_proj.weight", "fd->d f"),
    "layers/mlp/gate_proj/bias": (_LAYER + "mlp.gate_proj.bias", "f->f"),
    "layers/mlp/up_proj/bias": (_LAYER + "mlp.up_proj.bias", "f->f"),
    "layers/mlp/down_proj/bias": (_LAYER + "mlp.down_proj.bias", "d->d"),
    "layers/experts/router": (_LAYER + "mlp.gate.weight", "de->e d"),
    "layers/experts/gate_proj": (_LAYER + "mlp.experts.{e}.gate_proj.weight", "df->f d"),
    "layers/experts/up_proj": (_LAYER + "mlp.experts.{e}.up_proj.weight", "df->f d"),
    "layers/experts/down_proj": (_LAYER + "mlp.experts.{e}.down_proj.weight", "fd->d f"),
}

# "#i": the i-th block of rows of one tensor that holds several projections.
_FUSED = {
    "layers/attention/q_proj/kernel": _LAYER + "self_attn.qkv_proj.weight#0",
    "layers/attention/k_proj/kernel": _LAYER + "self_attn.qkv_proj.weight#1",
    "layers/attention/v_proj/kernel": _LAYER + "self_attn.qkv_proj.weight#2",
    "layers/mlp/gate_proj/kernel": _LAYER + "mlp.gate_up_proj.weight#0",
    "layers/mlp/up_proj/kernel": _LAYER + "mlp.gate_up_proj.weight#1",
}
_FOUR_NORMS = {"layers/mlp_norm/scale": _LAYER + "pre_feedforward_layernorm.weight"}

_QKV = ("q_proj", "k_proj", "v_proj")

IsLocal = Callable[[Mapping[str, Any], int], bool]


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
      architecture: the class name that transformers writes into `architectures`.
      defaults: what an absent key of config.json means.
      values: `ModelConfig` fields that are the same for the whole family.
      keys: `ModelConfig` field -> key of config.json, beyond the common ones.
      is_local: (config.json, layer) -> whether the window holds, unless `layer_types` says.
      names: parameter path -> tensor name, where it is not Llama's.
    """

    architecture: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_local: IsLocal | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def all_layers(_: Mapping[str, Any], layer: int) -> bool:
    return True


def last_layers(raw: Mapping[str, Any], layer: int) -> bool:
    return layer >= raw.get("max_window_layers", 28)


def all_but_every(period: int) -> IsLocal:
    return lambda raw, layer: (layer + 1) % raw.get("sliding_window_pattern", period) != 0


_QWEN = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 32,
}
_GEMMA = {
    "head_dim": 256,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
_GEMMA23 = _GEMMA | {
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA23_KEYS = {
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "query_scale": "query_pre_attn_scalar",
}
_OLMO: dict[str, Any] = {
    "pre_norm": False,
    "post_norm": True,
    "qk_norm": True,
    "qk_norm_over_heads": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {"rms_norm_eps": 1e-6}),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, {"biases": _QKV}, is_local=last_layers),
    "qwen3": Family(
        "Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, {"qk_norm": True}, is_local=last_layers
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _QWEN
        | {
            "num_key_value_heads": 4,
            "norm_topk_prob": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        {"qk_norm": True},
        {
            "num_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
            "norm_topk_prob": "norm_topk_prob",
            "mlp_dim": "moe_intermediate_size",
        },
        is_local=all_layers,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"rms_norm_eps": 1e-6, "sliding_window": 4096, "num_key_value_heads": 8},
        is_local=all_layers,
    ),
    "gemma": Family("GemmaForCausalLM", _GEMMA, {"norm_offset": 1.0, "embed_scale": "sqrt"}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA23 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"norm_offset": 1.0, "embed_scale": "sqrt", "post_norm": True},
        _GEMMA23_KEYS,
        is_local=all_but_every(2),
        names=_FOUR_NORMS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA23
        | {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        {"norm_offset": 1.0, "embed_scale": "sqrt", "post_norm": True, "qk_norm": True},
        _GEMMA23_KEYS,
        is_local=all_but_every(6),
        names=_FOUR_NORMS,
    ),
    "olmo2": Family("Olmo2ForCausalLM", {}, _OLMO),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {"rope_theta": 5e5, "sliding_window": 4096},
        _OLMO,
        is_local=all_but_every(4),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "use_sliding_window": False,
            "sliding_window": None,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
        },
    ),
    "phi3": Family("Phi3ForCausalLM", {"sliding_window": None}, is_local=all_layers, names=_FUSED),
    "granite": Family(
        "GraniteForCausalLM",
        {
            "rms_norm_eps": 1e-6,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        keys={
            "query_scale": "attention_multiplier",
            "embed_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "output_scale": "logits_scaling",
        },
    ),
}
