# SPDX-License-Identifier: Apache-2.0
"""config.json to `ModelConfig` and back.

What an absent key means and how the two generations of files differ (transformers 4 has
`rope_theta` and `rope_scaling`, 5 has `rope_parameters`; exports carry both) is left to
transformers' own config class of the family. A key that this class does not know is an error where
it says anything: it might change the numbers. So is a value that we do not compute as transformers
does.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.host.foreign_values import ForeignValues, shown
from opsd_jax.model.config import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, ModelConfig
from opsd_jax.pretrained.families import FAMILIES, Family
from opsd_jax.pretrained.rope_parameters import check_rotation, rope_fields, write_rope

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

# The config class writes lists of this length before anybody looks at the weights.
_MOST_LAYERS = 10_000

# Read by every family's code, though not every config class declares them.
_READ_BY_ALL = frozenset(
    "head_dim rope_theta rope_scaling original_max_position_embeddings".split()
)

# Keys that do not touch the logits of a forward pass, beside those of text generation.
INERT = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id "
    "eos_token_id pad_token_id initializer_range attention_dropout hidden_dropout resid_pdrop "
    "embd_pdrop classifier_dropout _name_or_path name_or_path pretraining_tp output_router_logits "
    "router_aux_loss_coef _attn_implementation attn_implementation unsloth_version unsloth_fixed "
    "is_llama_config transformers.js_config auto_map _sliding_window_pattern id2label label2id "
    "num_labels task_specific_params chunk_size_feed_forward problem_type return_dict "
    "output_attentions output_hidden_states tokenizer_class prefix generation_config language "
    "is_decoder is_encoder_decoder tie_encoder_decoder pruned_heads finetuning_task".split()
)

# Known to some config class, and not computed here unless they have this value (or null).
_ONLY: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "use_rope": (True,),
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a config.json of either generation.

    Raises:
      UserError: an unsupported family, an unknown key or a value we have no switch for; named.
    """
    written = ForeignValues("config.json", raw)
    model_type, family = _family_of(written)
    for key in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
        written.count(key)
    written.count("head_dim", None)
    num_layers = written.count("num_hidden_layers", most=_MOST_LAYERS)
    _refuse_unknown(written, model_type, family)
    theirs = _as_transformers_reads(written, model_type, family)
    num_heads, embed_dim = theirs.count("num_attention_heads"), theirs.count("hidden_size")
    num_kv_heads = theirs.count("num_key_value_heads", num_heads)
    head_dim = theirs.count("head_dim", embed_dim // num_heads)
    if num_heads % num_kv_heads:
        theirs.refuse("num_key_value_heads", f"must divide num_attention_heads {num_heads}")
    if head_dim % 2 or head_dim < 2:
        raise UserError(f"config.json: head_dim must be even, not {head_dim}")
    fields: dict[str, Any] = {
        "vocab_size": theirs.count("vocab_size"),
        "num_layers": num_layers,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "mlp_dim": theirs.count("intermediate_size"),
        "tie_embeddings": theirs.flag("tie_word_embeddings"),
        "norm_eps": float(theirs.number("rms_norm_eps", positive=True)),
        "activation": _activation(theirs),
        "biases": tuple(family.values.get("biases", ())) + _switched_biases(theirs),
        "max_positions": theirs.count("max_position_embeddings"),
        "family": model_type,
    }
    fields |= {k: v for k, v in family.values.items() if k != "biases"}
    fields |= {field: _family_value(theirs, key) for field, key in family.keys.items()}
    if fields.get("embed_scale") == "sqrt":
        fields["embed_scale"] = float(embed_dim) ** 0.5
    fields |= _layer_fields(written, theirs, num_layers)
    fields |= rope_fields(theirs, family)
    config = ModelConfig(**fields)
    check_rotation(config)
    return config


def _family_of(raw: ForeignValues) -> tuple[str, Family]:
    model_type = raw.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {shown(model_type, quote=True)} is not supported; supported "
            f"are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    names = raw.items("architectures", str, "class names", [])
    without_head = family.architecture.removesuffix("ForCausalLM")
    for name in names[:1]:
        if name not in (family.architecture, without_head, without_head + "Model"):
            raise UserError(
                f"config.json: architecture {shown(name, quote=True)} is not supported; "
                f"{model_type} is read as {family.architecture}"
            )
    return model_type, family


@functools.cache
def class_fields(model_type: str) -> Mapping[str, Any]:
    """The keys that transformers' config class of a family declares, with their defaults."""
    from transformers import CONFIG_MAPPING

    return {f.name: f.default for f in dataclasses.fields(CONFIG_MAPPING[model_type])}


@functools.cache
def _generation_keys() -> frozenset[str]:
    """Old files carry them in config.json; transformers moves them to the generation config."""
    from transformers import GenerationConfig

    return frozenset(GenerationConfig().to_dict())


def _as_transformers_reads(raw: ForeignValues, model_type: str, family: Family) -> ForeignValues:
    """What transformers' config class makes of the keys it reads: defaults filled in, rope and
    layers in the form of version 5."""
    from transformers import CONFIG_MAPPING, logging

    for key in ("rope_scaling", "rope_parameters"):
        raw.object(key)
    beside = raw.object("rope_parameters").values
    if family.local_rope and raw.values.get("rope_scaling") and beside:
        if not isinstance(beside.get("full_attention"), Mapping):
            raw.refuse("rope_scaling", "must stand inside rope_parameters.full_attention")
    for key in (*family.legacy_keys, "no_rope_layer_interval"):
        raw.number(key, None, positive=True)
    rotated = raw.items("no_rope_layers", int, "numbers, one a layer", None)
    if rotated is not None and len(rotated) < raw.values["num_hidden_layers"]:
        raw.refuse("no_rope_layers", "must have an entry for each layer")
    read = (class_fields(model_type).keys() - INERT) | _READ_BY_ALL | set(family.legacy_keys)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its doubts about keys that we refuse, over many lines
    try:
        passed = {key: copy.deepcopy(raw.values[key]) for key in raw.values if key in read}
        config = CONFIG_MAPPING[model_type](**passed)
    except Exception as error:  # of many kinds, all about these values
        told = shown(" ".join(str(error).split()), limit=300)
        raise UserError(f"config.json: transformers does not take it: {told}") from error
    finally:
        logging.set_verbosity(verbosity)
    values = {key: getattr(config, key, None) for key in class_fields(model_type)}
    return ForeignValues("config.json", values | {"head_dim": getattr(config, "head_dim", None)})


def _refuse_unknown(raw: ForeignValues, model_type: str, family: Family) -> None:
    for key, allowed in _ONLY.items():
        value = raw.values.get(key)
        if value is not None and (isinstance(value, str) or value not in allowed):
            raw.refuse(key, f"must be {allowed[0]}: nothing else is supported")
    for key in family.not_computed:
        if raw.values.get(key) is not None:
            raw.refuse(key, "must be null in this family, whose code does not read it")
    known = class_fields(model_type).keys() | _generation_keys() | INERT | _ONLY.keys()
    known = known | _READ_BY_ALL | set(family.legacy_keys) | {"use_sliding_window", "layer_types"}
    if raw.values.get("use_sliding_window") is False:
        known |= {"sliding_window", "max_window_layers"}
    unknown = sorted(
        key
        for key, value in raw.values.items()
        # What is off, absent or empty changes nothing; a factor of 0 would.
        if key not in known and (value or (value == 0 and value is not False))
    )
    if unknown:
        raise UserError(
            f"config.json: unknown key {', '.join(map(shown, unknown[:8]))}, which might change "
            "the logits; delete it from config.json if it does not"
        )


def _family_value(theirs: ForeignValues, key: str) -> Any:
    if key == "num_experts_per_tok":
        return theirs.count(key, most=theirs.count("num_experts"))
    if key in ("num_experts", "moe_intermediate_size"):
        return theirs.count(key)
    if key == "norm_topk_prob":
        return theirs.flag(key)
    value = theirs.number(key, None, positive=True)
    return _DECODE[key](value) if key in _DECODE and value is not None else value


def _switched_biases(theirs: ForeignValues) -> tuple[str, ...]:
    return sum((p for key, p in _BIAS_SWITCHES.items() if theirs.flag(key, False)), ())


def _activation(theirs: ForeignValues) -> str:
    key = "hidden_activation" if "hidden_activation" in theirs.values else "hidden_act"
    name = theirs.text(key)
    if name not in _ACTIVATIONS:
        theirs.refuse(key, f"must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _layer_fields(raw: ForeignValues, theirs: ForeignValues, num_layers: int) -> dict[str, Any]:
    """Windows and unrotated layers."""
    fields: dict[str, Any] = {}
    if "no_rope_layers" in theirs.values:  # despite its name, 1 where there is rope
        rotated = theirs.items("no_rope_layers", int, "numbers, one a layer")
        fields["no_rope_layers"] = tuple(i for i in range(num_layers) if not rotated[i])
    window = theirs.count("sliding_window", None)
    if "layer_types" in theirs.values:
        types = theirs.items("layer_types", str, "names")
    else:  # the window, if the class knows one at all, holds everywhere
        types = ["full_attention" if window is None else "sliding_attention"] * num_layers
        if raw.items("layer_types", str, "names", types) != types:
            raw.refuse(
                "layer_types", f"must be {types[0]} in all {num_layers} layers of this family"
            )
    if odd := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise UserError(f"config.json: layer_types {shown(odd)} are not supported")
    local = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if local and (window is None or theirs.flag("use_sliding_window", True) is False):
        raise UserError("config.json: layer_types has sliding_attention, but sliding_window is off")
    if local:
        fields["window"] = window
        fields["window_layers"] = None if len(local) == num_layers else local
    return fields


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
    gated = "hidden_activation" in class_fields(model_type)
    raw["hidden_activation" if gated else "hidden_act"] = activation
    for field, key in family.keys.items():
        value = getattr(config, field)
        if field == "query_scale" and value is None:
            value = config.head_dim**-0.5
        raw[key] = _ENCODE[key](value) if key in _ENCODE and value is not None else value
    if "biases" not in family.values:  # else which there are is the family's
        raw["attention_bias"] = set(ATTENTION_PROJECTIONS) <= set(config.biases)
    raw["mlp_bias"] = set(MLP_PROJECTIONS) <= set(config.biases)
    local = [config.windows(layer) for layer in range(config.num_layers)]
    known = class_fields(model_type)
    if "sliding_window" in known:
        raw["sliding_window"] = config.window
    if "use_sliding_window" in known:
        raw["use_sliding_window"] = any(local)
    if "layer_types" in known:
        kinds = {True: "sliding_attention", False: "full_attention"}
        raw["layer_types"] = [kinds[is_local] for is_local in local]
    if model_type == "smollm3":
        raw["no_rope_layers"] = [
            int(layer not in config.no_rope_layers) for layer in range(config.num_layers)
        ]
    return raw | write_rope(config, model_type)


def _whole(x: float) -> float | int:
    """Undoes the rounding of a reciprocal: 255.99999999999997 was 256."""
    near = float(f"{x:.12g}")
    return int(near) if near.is_integer() else near
