# SPDX-License-Identifier: Apache-2.0
"""Pretrained models into (sharded) parameters: Hugging Face directories and GGUF files.

Each process reads only the slices that its devices hold, tensor by tensor, so that the peak of
host memory stays near one copy of what it holds. Every tensor of the file is used exactly once
and every parameter is filled exactly once, or the error lists the names.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, Sharding

from opsd_jax.data.tokenizer import (
    TOKENIZER_FILES,
    HFTokenizer,
    declared_stop_ids,
    load_tokenizer,
)
from opsd_jax.errors import UserError
from opsd_jax.host.files import read_json
from opsd_jax.host.foreign_values import ForeignValues, shown
from opsd_jax.host.hub import model_folder
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.decoder import Decoder, init_variables
from opsd_jax.model.sharding import FULLY_SHARDED, Rules, variable_shardings
from opsd_jax.pretrained.config import config_from_hf
from opsd_jax.pretrained.gguf_file import GGUFFile
from opsd_jax.pretrained.smollm2 import smollm2_path
from opsd_jax.pretrained.tensor_names import Index, Leaf, file_shapes, leaves

# Mapped file pages count as resident memory until the mapping is closed.
_REMAP_BYTES = 32 * 2**20
# Larger tensors are read by ranges of rows of this size (counted in float32).
_CHUNK_BYTES = 16 * 2**20

# Eight-bit floats and integers mean nothing without scales, which no file names alike.
_READABLE = ("F32", "BF16", "F16", "F64")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model as it comes out of its files.

    Attributes:
      config: shape and switches; `dataclasses.replace(config, lora=...)` adds adapters.
      params: the "params" collection.
      tokenizer: None where the directory has no tokenizer files.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: HFTokenizer | None

    @property
    def model(self) -> Decoder:
        return Decoder(self.config)


class TensorSource(Protocol):
    """Named tensors of which any part can be read."""

    @property
    def path(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, index: Index) -> np.ndarray: ...


class SafetensorsDirectory:
    """The tensors of model.safetensors or else of the shards that its index names, as
    transformers chooses; names without "model." (a model saved without its head) get it."""

    def __init__(self, path: str):
        self.path = path
        self._stored_at: dict[str, tuple[str, str]] = {}  # name -> (file, name in the file)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[str, Any] = {}
        self._mapped_bytes = 0
        _refuse_odd_files(path)
        for file_name in _weight_files(path):
            self._read_header(file_name)
        if "embed_tokens.weight" in self.shapes:
            self.shapes = {_with_prefix(name): shape for name, shape in self.shapes.items()}
            self._stored_at = {_with_prefix(name): at for name, at in self._stored_at.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        file_name, stored = self._stored_at[name]
        if self._mapped_bytes > _REMAP_BYTES:
            self._open.clear()
            self._mapped_bytes = 0
        if file_name not in self._open:
            self._open[file_name] = _safe_open(os.path.join(self.path, file_name))
        values = self._open[file_name].get_slice(stored)[index]
        self._mapped_bytes += values.nbytes
        return values

    def _read_header(self, file_name: str) -> None:
        full = os.path.join(self.path, file_name)
        if not os.path.exists(full):
            raise UserError(
                f"{self.path}: missing shard {shown(file_name)}, named by "
                "model.safetensors.index.json"
            )
        handle = _safe_open(full)
        for name in handle.keys():
            if name in self._stored_at:
                raise UserError(
                    f"{full}: tensor {shown(name)} is also in {self._stored_at[name][0]}"
                )
            tensor = handle.get_slice(name)
            if tensor.get_dtype() not in _READABLE:
                raise UserError(
                    f"{full}: tensor {shown(name)} is stored as {tensor.get_dtype()}, which is "
                    f"not read ({', '.join(_READABLE)} are); use the unquantised model"
                )
            self._stored_at[name] = file_name, name
            self.shapes[name] = tuple(tensor.get_shape())


def _with_prefix(name: str) -> str:
    return name if name == "lm_head.weight" or name.startswith("model.") else f"model.{name}"


def _weight_files(path: str) -> list[str]:
    """model.safetensors, also where an index lies beside it, or the shards of the index."""
    if os.path.exists(os.path.join(path, "model.safetensors")):
        return ["model.safetensors"]
    index_path = os.path.join(path, "model.safetensors.index.json")
    if not os.path.exists(index_path):
        raise UserError(_no_safetensors(path))
    shards = ForeignValues(index_path, read_json(index_path)).object("weight_map")
    files = {shards.text(name) for name in shards.values}
    if odd := [n for n in files if os.path.basename(n) != n or not (n and n.isprintable())]:
        raise UserError(f"{index_path}: weight_map names {shown(odd[0])}, not a file beside it")
    if not files:
        raise UserError(f"{index_path}: weight_map names no shard")
    return sorted(files)


def _refuse_odd_files(path: str) -> None:
    """Adapters, which transformers would apply, and what cannot be read like a file."""
    for entry in os.scandir(path):
        if entry.name == "adapter_config.json":
            raise UserError(
                f"{path}: {entry.name} says that this is a PEFT adapter, which is not read as a "
                "model; merge it into its base (merge_and_unload of peft) and name the result, "
                "or remove its files where they only lie beside a whole model"
            )
        if os.path.exists(entry.path) and not (entry.is_file() or entry.is_dir()):
            raise UserError(f"{entry.path}: a pipe or device, not a file; remove it")


def _safe_open(path: str):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        told = shown(str(error), limit=200)
        raise UserError(f"{path}: truncated or not a safetensors file ({told})") from error


def _no_safetensors(path: str) -> str:
    pickles = [f for f in sorted(os.listdir(path)) if f.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return (
            f"{path}: only pickled weights ({pickles[0]}), which can run code when loaded and "
            "are never opened; convert them to safetensors"
        )
    return f"{path}: no model.safetensors or model.safetensors.index.json"


def load_pretrained(
    path: str, dtype: str = "float32", mesh: Mesh | None = None, rules: Rules = FULLY_SHARDED
) -> Pretrained:
    """Reads a Hugging Face directory, a GGUF file, a model of the Hub, or SmolLM2 by its name.

    Args:
      path: a directory with config.json and safetensors, a .gguf file, `owner/name[@revision]` on
        the Hub (`host/hub.py`), or "smollm2".
      dtype: "float32" or "bfloat16", of the parameters and of the computation.
      mesh: where the parameters live; None is the default device.
      rules: logical to mesh axes, with a mesh.

    Raises:
      UserError: naming the file and the key or tensor that is wrong.
    """
    if path == "smollm2":
        path = smollm2_path()
    path = model_folder(path, "path")
    source: TensorSource
    if os.path.isdir(path):
        raw = read_json(os.path.join(path, "config.json"))
        source = SafetensorsDirectory(path)
        has_tokenizer = any(os.path.exists(os.path.join(path, f)) for f in TOKENIZER_FILES)
        if has_tokenizer:  # without one no id is used
            declared_stop_ids(path, config_from_hf(raw).vocab_size)
        tokenizer = load_tokenizer(path) if has_tokenizer else None
    elif os.path.isfile(path):
        source = gguf = GGUFFile(path)
        raw, tokenizer = gguf.config, gguf.tokenizer()
    else:
        raise UserError(
            f"{path}: no such model; name a Hugging Face directory, a .gguf file, 'owner/name' on "
            "the Hub, which this is not, or 'smollm2'"
        )
    config = dataclasses.replace(config_from_hf(raw), dtype=dtype)
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids but the embedding only "
            f"{config.vocab_size} rows; they are not from the same model"
        )
    params = read_params(source, config, mesh, rules)
    return Pretrained(config, params, tokenizer)


def load_tokenizer_of(path: str) -> HFTokenizer:
    """The tokenizer of what `load_pretrained` reads; of a Hub model no weights are fetched.

    Raises:
      UserError: there is none.
    """
    path = smollm2_path() if path == "smollm2" else path
    return GGUFFile(path).tokenizer() if os.path.isfile(path) else load_tokenizer(path)


def read_params(
    source: TensorSource, config: ModelConfig, mesh: Mesh | None, rules: Rules = FULLY_SHARDED
) -> dict[str, Any]:
    """The "params" tree of `config.dtype`, each process reading what its devices hold.

    Raises:
      UserError: tensors missing, left over or of another shape, all named.
    """
    _check_counts(source, config)
    model = Decoder(dataclasses.replace(config, lora=None))
    boxed = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))["params"]
    shapes = nn.meta.unbox(boxed)
    plan = leaves(config, shapes)
    _check_tensors(source, file_shapes(plan), config)
    if mesh is None:
        shardings = [jax.sharding.SingleDeviceSharding(jax.devices()[0])] * len(plan)
    else:
        shardings = jax.tree.leaves(variable_shardings(boxed, mesh, rules))
    dtype = np.dtype(config.dtype)
    has_nan: list[str] = []
    arrays = [  # in the order of the plan, which is that of the tree
        _place(source, leaf, sharding, dtype, has_nan)
        for leaf, sharding in zip(plan, shardings, strict=True)
    ]
    if has_nan:
        warnings.warn(f"{source.path}: NaN in {_some(sorted(set(has_nan)))}", stacklevel=3)
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _place(
    source: TensorSource, leaf: Leaf, sharding: Sharding, dtype: np.dtype, has_nan: list[str]
) -> jax.Array:
    """One parameter over this process's devices; the host holds one device's part at a time."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        index = index or (slice(None),) * len(leaf.shape)
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    parts = []
    for bounds, devices in holders.items():  # replicas on several devices are read once
        values = _assemble(source, leaf, bounds, dtype, has_nan)
        parts += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


def _assemble(
    source: TensorSource,
    leaf: Leaf,
    bounds: tuple[tuple[int, int], ...],
    dtype: np.dtype,
    has_nan: list[str],
) -> np.ndarray:
    """One device's part of a parameter: the stack of its slices of the tensors."""
    out = _aligned([stop - start for start, stop in bounds], dtype)
    lead, rest = bounds[: leaf.num_leading], list(bounds[leaf.num_leading :])
    rows = leaf.ours.index(leaf.theirs[0][0])  # our axis along which a file's rows run
    first, last = rest[rows]
    row_bytes = 4 * math.prod(stop - start for start, stop in rest) // max(1, last - first)
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(first, last, step):
        rest[rows] = start, min(start + step, last)
        read, keep = leaf.file_index(tuple(slice(*b) for b in rest))
        here = (slice(None),) * rows + (slice(start - first, rest[rows][1] - first),)
        for at in np.ndindex(*(stop - start for start, stop in lead)):
            name, block = leaf.tensors[tuple(i + b[0] for i, b in zip(at, lead, strict=True))]
            cut = slice(read[0].start + block, read[0].stop + block)
            values = source.read(name, (cut, *read[1:]))
            if _any_nan(values):
                has_nan.append(name)
            out[at][here] = leaf.from_file(values)[keep]
    return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary, which JAX on a CPU takes over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _any_nan(values: np.ndarray) -> bool:
    # Integer comparison: NumPy has no fast float arithmetic for bfloat16.
    infinities = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
    if values.dtype.name not in infinities:
        return bool(np.isnan(values.astype(np.float32)).any())
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    bits = np.ascontiguousarray(values).view(unsigned)
    magnitude = bits & unsigned.type((1 << (8 * unsigned.itemsize - 1)) - 1)
    return bool((magnitude > infinities[values.dtype.name]).any())


def _check_counts(source: TensorSource, config: ModelConfig) -> None:
    """Before anything is laid out: each layer, and each expert of it, has tensors of its own."""
    needed = config.num_layers * max(1, config.num_experts)
    if needed > len(source.shapes):
        experts = f" with {config.num_experts} experts" if config.num_experts else ""
        raise UserError(
            f"{source.path}: num_hidden_layers {config.num_layers}{experts} does not fit the "
            f"files, which have {len(source.shapes)} tensors"
        )


def _check_tensors(
    source: TensorSource, expected: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> None:
    """Every tensor used exactly once, every parameter filled exactly once, shapes equal."""
    # Without the buffers that old checkpoints carry, which are computed from the config.
    found = {n: s for n, s in source.shapes.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "lm_head.weight" in found:
        _check_tied(source)
        del found["lm_head.weight"]
    missing, extra = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing or extra:
        parts = [f"missing {_some(missing)}"] if missing else []
        parts += [f"unexpected {_some(extra)}"] if extra else []
        raise UserError(f"{source.path}: the tensors do not fit config.json: {'; '.join(parts)}")
    wrong = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in expected.items()
        if tuple(found[name]) != shape
    ]
    if wrong:
        raise UserError(f"{source.path}: shapes do not fit config.json: {_some(wrong)}")


def _check_tied(source: TensorSource, rows: int = 4096) -> None:
    """A tied model may carry its head too, if it is the embedding."""
    name = "model.embed_tokens.weight"
    count, width = source.shapes[name]
    same = source.shapes["lm_head.weight"] == (count, width)
    for start in range(0, count, rows) if same else ():
        index = (slice(start, min(start + rows, count)), slice(0, width))
        same &= bool(np.array_equal(source.read(name, index), source.read("lm_head.weight", index)))
    if not same:
        raise UserError(
            f"{source.path}: tie_word_embeddings is true but lm_head.weight is not the "
            "embedding; set tie_word_embeddings to false in config.json"
        )


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name, limit=120) for name in names[:limit]) + more
