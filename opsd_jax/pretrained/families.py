# SPDX-License-Identifier: Apache-2.0
"""The model families: one row each, and what each of their tensors is called.

A row has the values a family fixes and the names in which it departs from Llama; what an absent
key of config.json means, transformers' own config class of the family says. A family that fits
the switches of `ModelConfig` is added here, with one case in tests/pretrained/test_families.py;
no model code changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
      architecture: the class name that transformers writes into `architectures`.
      values: `ModelConfig` fields that are the same for the whole family.
      keys: `ModelConfig` field -> key of config.json, beyond the common ones.
      names: parameter path -> tensor name, where it is not Llama's.
      local_rope: rope_parameters has an entry for each kind of layer.
      not_computed: keys of its config class that its code does not read: null, or refused.
      legacy_keys: positive numbers that transformers' config class reads without declaring them.
    """

    architecture: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    local_rope: bool = False
    not_computed: tuple[str, ...] = ()
    legacy_keys: tuple[str, ...] = ()


_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "embed_scale": "sqrt"}
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
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", {"biases": _QKV}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"qk_norm": True},
        {
            "num_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
            "norm_topk_prob": "norm_topk_prob",
            "mlp_dim": "moe_intermediate_size",
        },
        legacy_keys=("num_local_experts",),
    ),
    "mistral": Family("MistralForCausalLM"),
    "gemma": Family("GemmaForCausalLM", _GEMMA),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA | {"post_norm": True}, _GEMMA23_KEYS, _FOUR_NORMS),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | {"post_norm": True, "qk_norm": True},
        {k: v for k, v in _GEMMA23_KEYS.items() if k != "attention_softcap"},
        _FOUR_NORMS,
        local_rope=True,
        not_computed=("attn_logit_softcapping",),
        legacy_keys=("rope_local_base_freq", "sliding_window_pattern"),
    ),
    "olmo2": Family("Olmo2ForCausalLM", _OLMO),
    "olmo3": Family("Olmo3ForCausalLM", _OLMO, local_rope=True),
    "smollm3": Family("SmolLM3ForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", names=_FUSED),
    "granite": Family(
        "GraniteForCausalLM",
        keys={
            "query_scale": "attention_multiplier",
            "embed_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "output_scale": "logits_scaling",
        },
    ),
}
