# SPDX-License-Identifier: Apache-2.0
"""`rope_parameters` of a config.json: rotary bases and stretching, read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from opsd_jax.errors import UserError
from opsd_jax.host.foreign_values import ForeignValues, shown
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.rope import RopeScaling, rope_frequencies
from opsd_jax.pretrained.families import Family

_SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}
_NOT_READ = "rope_type type rope_theta original_max_position_embeddings finetuned truncate".split()


def rope_fields(theirs: ForeignValues, family: Family) -> dict[str, Any]:
    """Rotary bases and stretching."""
    main = theirs.object("rope_parameters")
    if not family.local_rope:
        return _one_rope(main, theirs)
    both, main = main, main.object("full_attention")
    local = both.object("sliding_attention")
    if unknown := sorted(both.values.keys() - {"full_attention", "sliding_attention"}):
        both.refuse(unknown[0], "must stand inside full_attention or sliding_attention")
    if main.flag("truncate", True) is False:  # transformers looks for it beside the two entries
        main.refuse("truncate", "must be true in this family, where transformers does not read it")
    fields = _one_rope(main, theirs)
    beside = _one_rope(local, theirs)
    if beside["rope_scaling"] is not None:
        local.refuse("rope_type", "must be default")
    return fields | {"local_rope_theta": beside["rope_theta"]}


def _one_rope(rope: ForeignValues, theirs: ForeignValues) -> dict[str, Any]:
    return {
        "rope_theta": float(rope.number("rope_theta", positive=True)),
        "rope_scaling": rope_scaling_from_hf(rope.values, theirs.values, rope.path),
    }


def rope_scaling_from_hf(
    scaling: Mapping[str, Any], raw: Mapping[str, Any], path: str = "rope_scaling."
) -> RopeScaling | None:
    """`rope_scaling`, or one entry of `rope_parameters`; None where nothing is stretched.

    Args:
      scaling: its keys.
      raw: config.json, for `max_position_embeddings`.
      path: what an error writes before its keys.
    """
    rope = ForeignValues("config.json", scaling, path)
    kind = rope.text("rope_type", None) or rope.text("type", "default")
    if kind not in _SCALING_KEYS:
        raise UserError(
            f"{rope.name('rope_type')} {shown(kind, quote=True)} is not supported; "
            f"{', '.join(_SCALING_KEYS)} are"
        )
    for key in ("partial_rotary_factor", "attn_factor"):  # the latter of YaRN's own code
        if rope.number(key, 1) != 1:
            rope.refuse(key, "must be 1: nothing else is supported")
    known = {*_SCALING_KEYS[kind], *_NOT_READ, "partial_rotary_factor", "attn_factor"}
    if unknown := sorted(k for k, v in scaling.items() if k not in known and v is not None):
        raise UserError(f"{rope.name(unknown[0])} has no meaning where rope_type is {kind}")
    if kind == "default":
        return None
    values = {key: rope.number(key, None, positive=True) for key in _SCALING_KEYS[kind]}
    fields: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    if kind != "linear":
        longest = ForeignValues("config.json", raw).count("max_position_embeddings", 0)
        fields["original_length"] = rope.count("original_max_position_embeddings", longest)
        if "factor" not in fields and longest and fields["original_length"]:
            fields["factor"] = longest / fields["original_length"]
    if "factor" not in fields:
        raise UserError(f"{rope.name('factor')} is missing, which rope_type {kind} needs")
    if kind == "yarn":
        fields["truncate"] = rope.flag("truncate", True)
        fields |= _yarn_attention(fields, fields.pop("mscale", 0), fields.pop("mscale_all_dim", 0))
    return RopeScaling(kind=kind, **fields)


def _yarn_attention(fields: Mapping[str, Any], above: float, below: float) -> dict[str, float]:
    """(1 + 0.1 mscale ln s) / (1 + 0.1 mscale_all_dim ln s) for a factor s > 1, where both are
    given and no `attention_factor` is."""
    if "attention_factor" in fields or not above or not below:
        return {}
    log = max(0.0, math.log(fields["factor"]))
    return {"attention_factor": (1 + 0.1 * above * log) / (1 + 0.1 * below * log)}


def check_rotation(config: ModelConfig) -> None:
    """The frequencies exist and are finite, which no single key can tell."""
    pairs = [(config.rope_theta, config.rope_scaling), (config.local_rope_theta, None)]
    for theta, scaling in pairs:
        if theta is None:
            continue
        try:
            frequency, factor = rope_frequencies(min(config.head_dim, 4096), theta, scaling)
            fine = bool(np.isfinite(frequency).all()) and math.isfinite(factor)
        except (ArithmeticError, ValueError):
            fine = False
        if not fine:
            raise UserError(
                "config.json: the rope parameters give no finite frequencies; check rope_theta "
                f"{theta:g} and {scaling}"
            )


def write_rope(config: ModelConfig, model_type: str) -> dict[str, Any]:
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
