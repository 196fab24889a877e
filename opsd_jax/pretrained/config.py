# SPDX-License-Identifier: Apache-2.0
"""config.json to `ModelConfig` and back.

Both generations are read, transformers 4 (`rope_theta`, `rope_scaling`) and 5
(`rope_parameters`), and exports carry both. A key that is not known is an error: it might change
the numbers. What is particular to a family stands in `families.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.model.config import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, ModelConfig
from opsd_jax.model.rope import RopeScaling
from opsd_jax.pretrained.families import FAMILIES, Family, all_layers

# Fields whose config.json value is not the number itself.
_DECODE = {
    "query_pre_attn_scalar": lambda x: float(x) ** -0.5,
    "logits_scaling": lambda x: 1.0 / x,
}
_ENCODE = {
    "query_pre_attn_scalar": lambda x: _whole(x**-2.0),
    "logits_scaling": lambda x: _whole(1.0 / x),
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
_BIAS_SWITCHES = {"attention_bias": ATTENTION_PROJECTIONS, "mlp_bias": MLP_PROJECTIONS}

_ALIASES = {"num_local_experts": "num_experts"}  # transformers 5 renames it on the way out

# Keys that do not touch the logits of a forward pass.
_INERT = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id "
    "eos_token_id pad_token_id initializer_range attention_dropout hidden_dropout resid_pdrop "
    "embd_pdrop classifier_dropout _name_or_path name_or_path max_window_layers pretraining_tp "
    "output_router_logits router_aux_loss_coef cache_implementation _attn_implementation "
    "attn_implementation unsloth_version unsloth_fixed is_llama_config rope_interleaved "
    "transformers.js_config auto_map sliding_window_pattern _sliding_window_pattern "
    "intermediate_size rope_theta rope_scaling rope_parameters rope_local_base_freq "
    "original_max_position_embeddings use_sliding_window sliding_window layer_types "
    "no_rope_layers no_rope_layer_interval id2label label2id task_specific_params "
    "chunk_size_feed_forward problem_type return_dict output_attentions output_hidden_states "
    "tokenizer_class prefix generation_config language".split()
)


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a config.json of either generation.

    Raises:
      UserError: an unsupported family, an unknown key or a value we have no switch for; named.
    """
    family = _family_of(raw)
    known = dict(family.defaults) | {_ALIASES.get(key, key): raw[key] for key in raw}
    used: set[str] = set()

    def take(key: str, *default: Any) -> Any:
        used.add(key)
        if known.get(key) is None:
            if default:
                return default[0]
            if key not in known:
                raise UserError(f"config.json: {key} is missing")
        return known[key]

    def count(key: str, *default: Any) -> int:
        value = take(key, *default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config.json: {key} must be a whole number >= 1, not {value!r}")
        return value

    def keyed(field: str) -> Any:
        key = family.keys[field]
        value, decode = take(key), _DECODE.get(key)
        return decode(_positive(value, key)) if decode and value is not None else value

    fields: dict[str, Any] = {
        "vocab_size": count("vocab_size"),
        "num_layers": count("num_hidden_layers"),
        "embed_dim": count("hidden_size"),
        "num_heads": count("num_attention_heads"),
        "tie_embeddings": bool(take("tie_word_embeddings", False)),
        "norm_eps": float(_positive(take("rms_norm_eps", 1e-5), "rms_norm_eps")),
        "max_positions": count("max_position_embeddings", 32768),
        "family": raw["model_type"],
    }
    fields["num_kv_heads"] = count("num_key_value_heads", fields["num_heads"])
    fields["head_dim"] = count("head_dim", fields["embed_dim"] // fields["num_heads"])
    if "mlp_dim" not in family.keys:
        fields["mlp_dim"] = count("intermediate_size")
    fields |= family.values
    fields |= {field: keyed(field) for field in family.keys}
    if fields.get("embed_scale") == "sqrt":
        fields["embed_scale"] = float(fields["embed_dim"]) ** 0.5
    biases = dict.fromkeys(fields.get("biases", ()))
    for key, projections in _BIAS_SWITCHES.items():
        if take(key, False):
            biases |= dict.fromkeys(projections)
    fields["biases"] = tuple(biases)
    activation = take("hidden_act", "silu")
    activation = take("hidden_activation", activation)
    fields["activation"] = _activation(activation, raw["model_type"])
    fields |= _layer_fields(known, family, fields["num_layers"])
    fields |= _rope_fields(known)
    _refuse_unknown(known, used)
    return ModelConfig(**fields)


def _family_of(raw: Mapping[str, Any]) -> Family:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {model_type!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    architecture = (raw.get("architectures") or [family.architecture])[0]
    without_head = family.architecture.removesuffix("ForCausalLM")
    if architecture not in (family.architecture, without_head, without_head + "Model"):
        raise UserError(
            f"config.json: architecture {architecture!r} is not supported; "
            f"{model_type} is read as {family.architecture}"
        )
    return family


def _positive(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UserError(f"config.json: {key} must be a positive number, not {value!r}")
    return value


def _object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The JSON object at a key, empty where there is none."""
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"config.json: {key} must be an object, not {value!r}")
    return value


def _activation(name: str, model_type: str) -> str:
    if model_type == "gemma" and name == "gelu":  # the official files mean the tanh form
        return "gelu"
    if name not in _ACTIVATIONS:
        raise UserError(
            f"config.json: activation {name!r} is not supported; {', '.join(_ACTIVATIONS)} are"
        )
    return _ACTIVATIONS[name]


def _refuse_unknown(known: Mapping[str, Any], used: set[str]) -> None:
    if known.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported")
    if known.get("decoder_sparse_step", 1) != 1 or known.get("mlp_only_layers"):
        raise UserError(
            "config.json: decoder_sparse_step and mlp_only_layers (a mixture of dense and "
            "expert layers) are not supported"
        )
    handled = used | _INERT | {"partial_rotary_factor", "decoder_sparse_step", "mlp_only_layers"}
    unknown = sorted(key for key in known if key not in handled and known[key])
    if unknown:
        raise UserError(
            f"config.json: unknown key {', '.join(unknown)}, which might change the logits; "
            "delete it from config.json if it does not"
        )


def _layer_fields(raw: Mapping[str, Any], family: Family, num_layers: int) -> dict[str, Any]:
    """Windows and unrotated layers."""
    fields: dict[str, Any] = {}
    types = raw.get("layer_types")
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    rotated = raw.get("no_rope_layers")  # despite its name, 1 where there is rope
    if rotated is None and raw.get("no_rope_layer_interval"):
        period = raw["no_rope_layer_interval"]
        rotated = [(layer + 1) % period != 0 for layer in range(num_layers)]
    if rotated is not None:
        fields["no_rope_layers"] = tuple(i for i, rope in enumerate(rotated) if not rope)
    if types is not None:
        if odd := sorted(set(types) - {"full_attention", "sliding_attention"}):
            raise UserError(f"config.json: layer_types {odd} are not supported")
        if len(types) != num_layers:
            raise UserError(
                f"config.json: layer_types has {len(types)} entries for {num_layers} layers"
            )
        local = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        if family.is_local is all_layers and local and len(local) < num_layers:
            raise UserError("config.json: mixed layer_types are not supported for this family")
    elif rotated is not None:
        local = fields["no_rope_layers"]  # SmolLM3 windows exactly those
    elif family.is_local is not None:
        local = tuple(i for i in range(num_layers) if family.is_local(raw, i))
    else:
        local = ()
    if window is not None and local:
        fields["window"] = int(_positive(window, "sliding_window"))
        fields["window_layers"] = None if len(local) == num_layers else local
    return fields


def _rope_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary bases and stretching of either generation of config.json."""
    both = _object(raw, "rope_parameters")
    theta = raw.get("rope_theta") or 10_000.0
    nested = "full_attention" in both or "sliding_attention" in both
    main = _object(both, "full_attention") if nested else both
    main = {"rope_theta": theta, **_object(raw, "rope_scaling"), **main}
    fields: dict[str, Any] = {
        "rope_theta": float(_positive(main["rope_theta"], "rope_theta")),
        "rope_scaling": rope_scaling_from_hf(main, raw),
    }
    local_theta = raw.get("rope_local_base_freq")
    if nested:
        local = {"rope_theta": local_theta or theta, **_object(both, "sliding_attention")}
        if rope_scaling_from_hf(local, raw) is not None:
            raise UserError("config.json: rope scaling of sliding_attention is not supported")
        local_theta = local["rope_theta"]
    elif raw["model_type"] == "olmo3":  # its windowed layers are never stretched
        local_theta = main["rope_theta"]
    if local_theta is not None:
        fields["local_rope_theta"] = float(_positive(local_theta, "rope_local_base_freq"))
    return fields


_SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "original_max_position_embeddings": "original_length",
    "truncate": "truncate",
}


def rope_scaling_from_hf(scaling: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeScaling | None:
    """`rope_scaling`, or one entry of `rope_parameters`; None where nothing is stretched."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    values = {k: v for k, v in scaling.items() if k not in ("rope_type", "type", "rope_theta")}
    if values.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1 is not supported")
    mscale = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    if any(mscale) and mscale[0] != mscale[1]:
        raise UserError("config.json: rope mscale and mscale_all_dim are not supported")
    if all(mscale):
        values.setdefault("attention_factor", 1.0)
    if unknown := sorted(set(values) - set(_SCALING_KEYS)):
        raise UserError(f"config.json: unknown rope parameter {', '.join(unknown)}")
    fields: dict[str, Any] = {
        _SCALING_KEYS[k]: v if k == "truncate" else _positive(v, f"rope {k}")
        for k, v in values.items()
        if v is not None
    }
    if kind != "linear":
        length = raw.get("original_max_position_embeddings")
        fields.setdefault("original_length", length or raw.get("max_position_embeddings", 0))
    if "factor" not in fields and fields.get("original_length"):
        longest = _positive(raw.get("max_position_embeddings"), "max_position_embeddings")
        fields["factor"] = longest / fields["original_length"]
    if "factor" not in fields:
        raise UserError(f"config.json: rope scaling {kind!r} needs a factor")
    return RopeScaling(kind=kind, **fields)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, readable by transformers 4 and 5.

    Raises:
      UserError: no family has this combination of switches.
    """
    candidates = (config.family,) if config.family else tuple(FAMILIES)
    for model_type in candidates:
        raw = _write(config, model_type)
        try:
            again = config_from_hf(raw)
        except UserError:
            continue
        same = dataclasses.replace(
            config, family=model_type, dtype="float32", remat=True, lora=None
        )
        if again == same:
            return raw
    tried = config.family or "any family"
    raise UserError(
        f"model: {tried} cannot express this combination of switches, so it cannot be exported "
        "to Hugging Face"
    )


def _write(config: ModelConfig, model_type: str) -> dict[str, Any]:
    family = FAMILIES[model_type]
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "attention_dropout": 0.0,
    }
    activation = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}[config.activation]
    raw["hidden_activation" if model_type in ("gemma2", "gemma3_text") else "hidden_act"] = (
        activation
    )
    for field, key in family.keys.items():
        value = getattr(config, field)
        if field == "query_scale" and value is None:
            value = config.head_dim**-0.5
        raw[key] = _ENCODE[key](value) if key in _ENCODE and value is not None else value
    own = set(family.values.get("biases", ()))
    raw["attention_bias"] = set(ATTENTION_PROJECTIONS) <= set(config.biases)
    raw["mlp_bias"] = set(MLP_PROJECTIONS) <= set(config.biases)
    if own:
        del raw["attention_bias"]
    local = [config.windows(layer) for layer in range(config.num_layers)]
    if "sliding_window" in family.defaults:
        raw["sliding_window"] = config.window
    if "use_sliding_window" in family.defaults:
        raw["use_sliding_window"] = any(local)
    if family.is_local not in (None, all_layers) or model_type == "smollm3":
        kinds = {True: "sliding_attention", False: "full_attention"}
        raw["layer_types"] = [kinds[is_local] for is_local in local]
    if model_type == "smollm3":
        raw["no_rope_layers"] = [
            int(layer not in config.no_rope_layers) for layer in range(config.num_layers)
        ]
    return raw | _write_rope(config, model_type)


def _write_rope(config: ModelConfig, model_type: str) -> dict[str, Any]:
    main: dict[str, Any] = {"rope_type": "default"}
    raw: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if scaling := config.rope_scaling:
        relevant = {
            "linear": (),
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
        }[scaling.kind]
        main = {"rope_type": scaling.kind, "factor": scaling.factor}
        main |= {k: v for k in relevant if (v := getattr(scaling, k)) is not None}
        if scaling.kind != "linear":
            main["original_max_position_embeddings"] = scaling.original_length
        raw["rope_scaling"] = dict(main)
    main["rope_theta"] = config.rope_theta
    if config.local_rope_theta is None:
        raw["rope_parameters"] = main
    else:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        raw["rope_parameters"] = {"full_attention": main, "sliding_attention": local}
        if model_type != "olmo3":
            raw["rope_local_base_freq"] = config.local_rope_theta
    return raw


def _whole(x: float) -> float | int:
    """Undoes the rounding of a reciprocal: 255.99999999999997 was 256."""
    near = float(f"{x:.12g}")
    return int(near) if near.is_integer() else near
