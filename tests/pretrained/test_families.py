# SPDX-License-Identifier: Apache-2.0
"""Every family against `transformers` on tiny random models, and config.json of both kinds.

One ragged batch longer than the windows; the same tokens through the cache; export and back.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.errors import UserError
from opsd_jax.host.files import read_json
from opsd_jax.model.decoder import Decoder
from opsd_jax.model.head import head_logits, output_head
from opsd_jax.model.kv_cache import EMPTY_POSITION, KVCache
from opsd_jax.pretrained.config import config_from_hf, config_to_hf
from opsd_jax.pretrained.export import save_pretrained
from opsd_jax.pretrained.families import FAMILIES
from opsd_jax.pretrained.load import load_pretrained
from tests.representatives import representatives

TOLERANCE = 2e-5
T, WINDOW = 24, 5
LENGTHS = np.array([24, 9, 17])

SHAPE = dict(
    vocab_size=80,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
H8, H16 = {"head_dim": 8}, {"head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
MOE = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20)
GEMMA23 = H16 | {"query_pre_attn_scalar": 20, "sliding_window": WINDOW}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
GRANITE = dict(
    embedding_multiplier=3.0,
    logits_scaling=1.7,
    residual_multiplier=0.4,
    attention_multiplier=0.2,
)

# name -> (model_type, config.json values as transformers 4 writes them)
CASES = {
    "llama2": ("llama", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "llama3": ("llama", dict(rope_theta=5e5, rope_scaling=LLAMA3, **H16)),
    "llama_biased": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama_linear": ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0})),
    "smollm2": ("llama", dict(tie_word_embeddings=True, rope_theta=1e5)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2_window": ("qwen2", WINDOWED),
    "qwen3": ("qwen3", H16),
    "qwen3_tied": ("qwen3", dict(tie_word_embeddings=True, rope_theta=1e6, **H16)),
    "qwen3_bias": ("qwen3", dict(attention_bias=True, **H8)),
    "qwen3_yarn": ("qwen3", dict(rope_scaling=YARN, **H16)),
    "qwen3_moe": ("qwen3_moe", dict(norm_topk_prob=True, **H16, **MOE)),
    "qwen3_moe_raw": ("qwen3_moe", dict(norm_topk_prob=False, **H8, **MOE)),
    "mistral": ("mistral", dict(sliding_window=WINDOW)),
    "mistral_full": ("mistral", dict(sliding_window=None, **H16)),
    "gemma": ("gemma", H16),
    "gemma2": ("gemma2", GEMMA23 | SOFTCAPS),
    "gemma3": ("gemma3_text", GEMMA23 | dict(rope_theta=1e6, rope_local_base_freq=50.0)),
    "olmo2": ("olmo2", dict(rope_theta=5e5)),
    "olmo3": ("olmo3", dict(sliding_window=WINDOW, rope_scaling=YARN)),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2, pad_token_id=0)),
    "smollm3_window": (
        "smollm3",
        dict(
            no_rope_layers=[1, 0, 0, 1],
            use_sliding_window=True,
            sliding_window=WINDOW,
            pad_token_id=0,
        ),
    ),
    "phi3": ("phi3", dict(sliding_window=WINDOW, pad_token_id=0)),
    "granite": ("granite", GRANITE),
}

# Decoding is compared once per way of attending; the others differ in numbers only.
CACHED = {"llama3", "qwen2_window", "qwen3", "qwen3_moe", "mistral", "gemma2", "gemma3"}
CACHED |= {"olmo2", "olmo3", "smollm3_window", "phi3", "granite"}

# Dropping any of these must be seen: the comparison is sharp enough for each feature.
DROPS = {
    "llama3": [{"rope_scaling": None}],
    "llama_biased": [{"biases": ("q_proj", "k_proj", "v_proj", "o_proj")}, {"biases": ()}],
    "qwen2": [{"biases": ()}],
    "qwen2_window": [{"window": None}, {"window_layers": None}],
    "qwen3": [{"qk_norm": False}],
    "qwen3_yarn": [{"rope_scaling": None}],
    "qwen3_moe": [{"norm_topk_prob": False}, {"experts_per_token": 2}],
    "mistral": [{"window": None}, {"window": WINDOW + 1}],
    "gemma": [{"norm_offset": 0.0}, {"embed_scale": 1.0}, {"activation": "silu"}],
    "gemma2": [
        {"attention_softcap": None},
        {"final_softcap": None},
        {"post_norm": False},
        {"query_scale": None},
        {"window_layers": (1, 3)},
    ],
    "gemma3": [{"local_rope_theta": None}, {"qk_norm": False}],
    "olmo2": [{"post_norm": False}],
    "olmo3": [{"local_rope_theta": None}],
    "smollm3": [{"no_rope_layers": ()}],
    "smollm3_window": [{"window": None}],
    "granite": [{"query_scale": None}, {"residual_scale": 1.0}, {"output_scale": 1.0}],
}


def reference(model_type, values, directory):
    """A random transformers model, saved; with every parameter away from its initial value."""
    torch = pytest.importorskip("torch", reason="torch (test extra) is not installed")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SHAPE, **json.loads(json.dumps(values))})
    config._attn_implementation = "eager"  # the only one with soft caps
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape) * spread
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
            if "embed_tokens" in name and config.tie_word_embeddings:
                parameter.mul_(0.5)
    model.save_pretrained(directory)
    return model


def token_ids():
    return np.random.default_rng(1).integers(0, SHAPE["vocab_size"], (3, T)).astype(np.int32)


def torch_logits(model, ids):
    import torch

    mask = np.arange(T) < LENGTHS[:, None]
    with torch.no_grad():
        out = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    return out.logits.numpy()


def our_logits(config, params, ids):
    positions = jnp.broadcast_to(jnp.arange(T), ids.shape)
    with jax.disable_jit():  # small shapes shared by all families: less compilation
        hidden, _ = Decoder(config).apply({"params": params}, jnp.asarray(ids), positions)
    return np.asarray(head_logits(output_head(params, config), hidden))


def cached_logits(config, params, ids, prefill=7):
    """The first tokens at once, the others one at a time, over a read-only cache."""
    model, head = Decoder(config), output_head(params, config)
    B = len(ids)

    def step(cache, tokens, positions):
        with jax.disable_jit():
            hidden, kv = model.apply({"params": params}, tokens, positions, cache, return_kv=True)
        return head_logits(head, hidden), kv

    positions = jnp.broadcast_to(jnp.arange(prefill), (B, prefill))
    out, kv = step(None, jnp.asarray(ids[:, :prefill]), positions)
    logits = [out]
    grow = [(0, 0)] * 4 + [(0, T - prefill)]
    keys = jnp.pad(kv.keys, grow)
    values = jnp.pad(kv.values, [grow[i] for i in (0, 1, 2, 4, 3)])
    slots = jnp.pad(positions, [(0, 0), (0, T - prefill)], constant_values=EMPTY_POSITION)
    for t in range(prefill, T):
        cache = KVCache(kv=kv.replace(keys=keys, values=values), positions=slots)
        now = jnp.full((B, 1), t, jnp.int32)
        out, new = step(cache, jnp.asarray(ids[:, t : t + 1]), now)
        keys = keys.at[..., t].set(new.keys[..., 0])
        values = values.at[..., t, :].set(new.values[..., 0, :])
        slots = slots.at[:, t].set(t)
        logits.append(out)
    return np.asarray(jnp.concatenate(logits, axis=1))


@pytest.mark.parametrize("case", representatives(CASES, "qwen3_moe", "gemma3"))
def test_logits_equal_transformers(case, tmp_path, record_property):
    model_type, values = CASES[case]
    theirs = reference(model_type, values, tmp_path)
    loaded = load_pretrained(str(tmp_path))
    ids = token_ids()
    want = torch_logits(theirs, ids)
    real = np.arange(T) < LENGTHS[:, None]
    assert 0.3 < want[real].std() < 5, "logits of order 1, or the tolerance means nothing"
    full = our_logits(loaded.config, loaded.params, ids)
    difference = float(np.abs(full - want)[real].max())
    record_property("max_abs_difference", difference)
    print(f"{case}: full {difference:.1e}")
    assert difference <= TOLERANCE
    if case in CACHED:
        cached = cached_logits(loaded.config, loaded.params, ids)
        assert np.abs(cached - want)[real].max() <= TOLERANCE
    for change in DROPS.get(case, ()):
        dropped = our_logits(dataclasses.replace(loaded.config, **change), loaded.params, ids)
        assert np.abs(dropped - want)[real].max() > 50 * TOLERANCE, change


@pytest.mark.parametrize("case", CASES)
def test_config_survives_the_way_out(case):
    model_type, values = CASES[case]
    config = config_from_hf({"model_type": model_type, **SHAPE, **values})
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    "case",
    representatives(["llama3", "qwen3_moe", "gemma3", "olmo3", "smollm3", "phi3"], "gemma3"),
)
def test_export_loads_in_transformers(case, tmp_path):
    torch = pytest.importorskip("torch", reason="torch (test extra) is not installed")
    from transformers import AutoModelForCausalLM

    model_type, values = CASES[case]
    theirs = reference(model_type, values, tmp_path / "in")
    loaded = load_pretrained(str(tmp_path / "in"))
    save_pretrained(str(tmp_path / "out"), loaded.config, {"params": loaded.params})
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    ids = token_ids()
    np.testing.assert_array_equal(torch_logits(again.eval(), ids), torch_logits(theirs, ids))


def test_both_generations_of_config_agree():
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    for case, (model_type, values) in CASES.items():
        old = {"model_type": model_type, **SHAPE, **values}
        new = AutoConfig.for_model(model_type, **{**SHAPE, **json.loads(json.dumps(values))})
        new = json.loads(new.to_json_string(use_diff=False))
        assert "rope_parameters" in new and "rope_theta" not in new, case
        assert config_from_hf(new) == config_from_hf(old), case


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_mean_what_transformers_means(model_type):
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    shape = SHAPE | {"hidden_size": 64, "num_attention_heads": 32}
    del shape["num_key_value_heads"], shape["max_position_embeddings"]
    raw = AutoConfig.for_model(model_type, **shape).to_json_string(use_diff=False)
    absent = config_from_hf({"model_type": model_type, **shape})
    assert absent == config_from_hf(json.loads(raw))


BASE = {"model_type": "llama", **SHAPE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": "gemma3"}, "gemma3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "twist": 1}}, "twist"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types must be full_attention in all 4 layers"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    raw = {k: v for k, v in {**BASE, **change}.items() if v is not None}
    with pytest.raises(UserError, match=message):
        config_from_hf(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number >= 1, not 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"vocab_size": None}, "vocab_size must be a whole number >= 1, not None"),
        ({"vocab_size": "8"}, "vocab_size must be a whole number >= 1, not '8'"),
        ({"hidden_size": 8.5}, "hidden_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps.*expected float, got str .value: 'small'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": "8"}, "moe_intermediate_size"),
        ({"rope_theta": "much"}, "rope_theta"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type'='linear': {'factor'}"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "rope_parameters.factor must be a positive",
        ),
        ({"rope_scaling": ["linear"]}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": 3, "sliding_attention": {}}}, "full_attention"),
    ],
)
def test_values_that_no_model_has_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf({**BASE, **change})


def test_json_without_end_is_told(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        read_json(str(tmp_path / "config.json"))


def test_config_without_a_family_is_exported_as_the_one_that_fits():
    config = dataclasses.replace(config_from_hf({**BASE, "head_dim": 8}), family=None)
    assert config_to_hf(config)["model_type"] == "llama"
    qwen = dataclasses.replace(config, qk_norm=True)
    assert config_to_hf(qwen)["model_type"] == "qwen3"
    with pytest.raises(UserError, match="cannot express"):
        config_to_hf(dataclasses.replace(config, attention_softcap=3.0))
