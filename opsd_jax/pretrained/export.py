# SPDX-License-Identifier: Apache-2.0
"""Parameters out again: a Hugging Face directory (adapters merged) or a PEFT adapter."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.host.files import scratch_folder
from opsd_jax.host.hub import is_hub_name
from opsd_jax.model.config import LORA_TARGETS, ModelConfig
from opsd_jax.model.projection import merge_lora
from opsd_jax.pretrained.config import config_to_hf
from opsd_jax.pretrained.tensor_names import Leaf, file_shapes, leaves, to_file

MAX_SHARD_BYTES = 5 * 10**9


def save_pretrained(
    out_dir: str,
    config: ModelConfig,
    variables: Mapping[str, Any],
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stop_ids: Sequence[int] = (),
) -> None:
    """Writes a directory that `transformers`, vLLM and `load_pretrained` read.

    config.json, generation_config.json, the tokenizer and model.safetensors, or shards with an
    index; float32 and bfloat16 parameters come back bit for bit. Every process must call it;
    process 0 writes.

    Args:
      out_dir: a new or empty folder; it has the whole model or, killed half-way, nothing.
      config: the model's.
      variables: {"params", "lora"?}; adapters are merged.
      tokenizer: an `HFTokenizer`; any other kind has no Hugging Face form and is left out.
      max_shard_bytes: a larger model is split.
      stop_ids: those of a run, besides the tokenizer's own.

    Raises:
      UserError: `out_dir` has files already, or the disk is full.
    """
    raw = config_to_hf(config)
    params = merge_lora(config, variables)
    plan = leaves(config, params)
    dtype = params["embed"].dtype
    raw["torch_dtype"] = str(dtype)
    ids = _token_ids(tokenizer, stop_ids, config.vocab_size)
    shards = _shards(
        {n: int(np.prod(s)) * dtype.itemsize for n, s in file_shapes(plan).items()}, max_shard_bytes
    )
    tensors = to_file(plan, jax.tree.map(_on_host, params))
    with _written_whole(out_dir) as scratch:
        if scratch:
            _write_json(scratch, "config.json", raw | ids)
            known = {key: value for key, value in ids.items() if value is not None}
            _write_json(scratch, "generation_config.json", known)
            if isinstance(tokenizer, HFTokenizer):
                tokenizer.save(scratch)
        weight_map, total = {}, 0
        for i, names in enumerate(shards):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            shard = {}
            for _ in names:  # `_shards` keeps the order in which `to_file` gives them
                key, value = next(tensors)
                shard[key] = value
                weight_map[key] = name
                total += value.nbytes
            if scratch:
                _save_file(os.path.join(scratch, name), shard)
        if len(shards) > 1 and scratch:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(scratch, "model.safetensors.index.json", index)


def save_adapter(
    out_dir: str, config: ModelConfig, variables: Mapping[str, Any], base: str = ""
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which `peft` loads on the base.

    Args:
      out_dir: a new or empty folder.
      config: the model's, with `lora`.
      variables: {"params", "lora"}.
      base: path of the base model, which adapter_config.json has in full, or its name on the Hub,
        whose commit becomes its "revision".

    Raises:
      UserError: no adapters, a family whose file merges the adapted projections, or `out_dir` has
        files already.
    """
    if config.lora is None or not variables.get("lora"):
        raise UserError("--format=peft: this model has no adapters; export with --format=hf")
    plan = leaves(config, variables["params"])
    tensors = dict(_adapter_tensors(plan, variables["lora"]))
    lora = config.lora
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in tensors}
    base, revision = base.split("@") if is_hub_name(base) and "@" in base else (base, None)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # PEFT looks it up from wherever it runs: a relative path would be another one there.
        "base_model_name_or_path": (os.path.abspath(base) if os.path.exists(base) else base)
        or None,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": [name for name in LORA_TARGETS if name in adapted],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with _written_whole(out_dir) as scratch:
        if scratch:
            _write_json(scratch, "adapter_config.json", settings)
            _save_file(os.path.join(scratch, "adapter_model.safetensors"), tensors)


def _adapter_tensors(plan: list[Leaf], lora: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for leaf in plan:
        module: Any = lora
        for key in leaf.path.split("/")[:-1]:
            module = module.get(key, {})
        if not leaf.path.endswith("/kernel") or "a" not in module:
            continue
        a, b = _on_host(module["a"]), _on_host(module["b"])
        rank = a.shape[-1]
        for (layer,), (name, _) in leaf.tensors.items():
            if name.endswith(("qkv_proj.weight", "gate_up_proj.weight")):
                raise UserError(
                    "--format=peft: this family stores q, k, v (gate, up) as one matrix, which "
                    "cannot carry separate adapters; export with --format=hf"
                )
            module_name = "base_model.model." + name.removesuffix(".weight")
            yield f"{module_name}.lora_A.weight", _rows(a[layer].reshape(-1, rank))
            yield f"{module_name}.lora_B.weight", _rows(b[layer].reshape(rank, -1))


def _rows(x: np.ndarray) -> np.ndarray:
    # safetensors writes the bytes of a view in the wrong order: make the transpose real.
    return np.ascontiguousarray(x.T)


def _token_ids(tokenizer: Any, stop_ids: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """Explicit even where unknown: an absent id means the family's, maybe beyond the vocabulary.

    An id without a row in the embedding is unknown: transformers refuses such a config.json.
    """

    def known(*ids: int | None) -> list[int]:
        return [i for i in dict.fromkeys(ids) if i is not None and 0 <= i < vocab_size]

    own = tokenizer.stop_ids if tokenizer else ()
    stops = known(*own, *stop_ids)
    bos = known(getattr(getattr(tokenizer, "inner", None), "bos_token_id", None))
    pad = known(tokenizer.pad_id if tokenizer else None)
    return {
        "bos_token_id": next(iter(bos), None),
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": next(iter(pad), None),
    }


def _on_host(x: Any) -> np.ndarray:
    """All of an array as NumPy, also where this process holds only a part of it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def new_folder(out_dir: str, apart_from: str = "") -> Path:
    """Where an export goes, with links followed: a folder that is missing or empty.

    Files of another model beside those of this one would be read as part of it, and the folder of
    a run's base has files.

    Args:
      out_dir: as the user said it.
      apart_from: a folder in which it must not lie, the run's own.

    Raises:
      UserError: it is none.
    """
    target = Path(out_dir).resolve()
    if apart_from and target.is_relative_to(Path(apart_from).resolve()):
        raise UserError(f"--out={out_dir}: it lies in the run's folder {apart_from}; take another")
    try:
        found = next(target.iterdir(), None) if target.exists() else None
    except OSError as error:
        raise UserError(f"--out={out_dir}: cannot be read: {error.strerror}") from error
    if found is not None:
        raise UserError(
            f"--out={out_dir}: it must be a new or an empty folder, and has {found.name}; an "
            "export is never mixed with other files"
        )
    return target


@contextlib.contextmanager
def _written_whole(out_dir: str) -> Iterator[str | None]:
    """A folder that becomes `out_dir` once all is there; None where process 0 writes."""
    if jax.process_index() != 0:
        yield None
        return
    target = new_folder(out_dir)
    with scratch_folder(target.parent, f".{target.name}_") as scratch:
        whole = scratch / "whole"  # with the rights of any new folder; a scratch folder is private
        whole.mkdir()
        yield str(whole)
        whole.replace(target)


def _save_file(path: str, tensors: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    # transformers refuses a file that does not say which framework's layout it has.
    save_file(dict(tensors), path, metadata={"format": "pt"})
    mask = os.umask(0)  # which can only be read so
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)  # safetensors makes it its owner's alone


def _write_json(directory: str, name: str, content: Mapping[str, Any]) -> None:
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
