# SPDX-License-Identifier: Apache-2.0
"""A GGUF file seen as if it were a Hugging Face directory: config, tensors, tokenizer.

Names, row order and config keys are translated here, so nothing downstream knows of GGUF.
Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import numpy as np

from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.model.rope import rope_frequencies
from opsd_jax.pretrained.gguf_header import Header, TensorInfo, read_header, short
from opsd_jax.pretrained.gguf_metadata import Metadata
from opsd_jax.pretrained.gguf_tokenizer import gguf_tokenizer, stop_ids
from opsd_jax.pretrained.rope_parameters import rope_scaling_from_hf

# GGUF tensor name -> Hugging Face name; {l} is the layer.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{l}.input_layernorm",
    "attn_q": "model.layers.{l}.self_attn.q_proj",
    "attn_k": "model.layers.{l}.self_attn.k_proj",
    "attn_v": "model.layers.{l}.self_attn.v_proj",
    "attn_output": "model.layers.{l}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{l}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{l}.self_attn.k_norm",
    "ffn_norm": "model.layers.{l}.post_attention_layernorm",
    "ffn_gate": "model.layers.{l}.mlp.gate_proj",
    "ffn_up": "model.layers.{l}.mlp.up_proj",
    "ffn_down": "model.layers.{l}.mlp.down_proj",
}

# ggml types that are no quantisation.
_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}

# The two `llama3` rope scalings in use. GGUF keeps only the resulting frequency divisors.
_LLAMA3_FACTORS = (8.0, 32.0)


class GGUFFile:
    """Tensors, config and tokenizer of one file, under their Hugging Face names.

    Attributes:
      path: the file.
      config: what config.json would say, for `config.config_from_hf`.
      shapes: Hugging Face tensor name -> shape, output axis first.

    Raises:
      UserError: not a whole GGUF file, or one with a field, a tensor or a quantisation that is not
        read.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            size = os.path.getsize(path)
            self._data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        header = read_header(path, self._data)
        self._metadata = Metadata(path, header.metadata)
        self._check_table(header)
        self._rope_divisors: TensorInfo | None = None
        self._tensors: dict[str, TensorInfo] = {}
        for tensor in header.tensors:
            if tensor.name == "rope_freqs.weight" and self._metadata.architecture == "llama":
                self._rope_divisors = tensor
            else:
                self._tensors[self._hf_name(tensor.name)] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.config = self._config()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The float32 values of part of a tensor; quantised rows are expanded one range at a
        time."""
        tensor = self._tensors[name]
        start, stop, _ = index[0].indices(tensor.shape[0])
        head_rows = self._rows_per_head(name)
        if not head_rows:
            return self._expand(tensor, slice(start, stop))[(slice(None), *index[1:])]
        # The rows of a head are interleaved: expand whole heads and cut afterwards.
        first, last = start // head_rows * head_rows, -(-stop // head_rows) * head_rows
        values = _unpermute(self._expand(tensor, slice(first, last)), head_rows)
        return values[(slice(start - first, stop - first), *index[1:])]

    def _check_table(self, header: Header) -> None:
        """Sizes before anything is read: tensors follow one another up to the end of the file."""
        at = header.start
        for tensor in header.tensors:
            rows, row_bytes = self._layout(tensor)
            if tensor.offset != at:
                raise UserError(
                    f"{self.path}: damaged GGUF file: {tensor.name} starts at byte "
                    f"{tensor.offset}, not at {at}"
                )
            end = at + rows * row_bytes
            at = end + -(end - header.start) % header.alignment
            if end > len(self._data):
                raise UserError(f"{self.path}: truncated; {tensor.name} ends after the file")
        if header.tensors and len(self._data) not in (end, at):
            raise UserError(f"{self.path}: damaged GGUF file: it goes on after its last tensor")

    def _layout(self, tensor: TensorInfo) -> tuple[int, int]:
        """(rows, bytes of a row); the one axis of a vector counts as rows.

        Raises:
          UserError: a quantisation or a shape that is not read.
        """
        block, block_bytes = _block(tensor.kind)
        if not block:
            raise UserError(
                f"{self.path}: {tensor.name} has an unsupported quantisation (ggml type "
                f"{tensor.kind}); re-quantise the file to Q8_0 or F16"
            )
        width = tensor.shape[1] if len(tensor.shape) == 2 else 1
        if len(tensor.shape) not in (1, 2) or 0 in tensor.shape or width % block:
            raise UserError(
                f"{self.path}: {tensor.name} has shape {tensor.shape}; a vector or a matrix whose "
                f"rows are a multiple of {block} is read"
            )
        return tensor.shape[0], width // block * block_bytes

    def _expand(self, tensor: TensorInfo, rows: slice) -> np.ndarray:
        _, row_bytes = self._layout(tensor)
        begin, end = (tensor.offset + row * row_bytes for row in (rows.start, rows.stop))
        data = np.asarray(self._data[begin:end]).reshape(rows.stop - rows.start, row_bytes)
        return _values(data, tensor.kind).reshape(-1, *tensor.shape[1:])

    def tokenizer(self) -> HFTokenizer:
        """The tokenizer of the file, see `gguf_tokenizer`."""
        return gguf_tokenizer(self._metadata)

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d{1,5})\.)?(\w+)\.(weight|bias)", name)
        if not match or match[2] not in _NAMES or (match[1] is None) == ("{l}" in _NAMES[match[2]]):
            raise UserError(
                f"{self.path}: unknown tensor {short(name)} for {self._metadata.architecture}"
            )
        return f"{_NAMES[match[2]].format(l=match[1])}.{match[3]}"

    def _config(self) -> dict[str, Any]:
        """config.json of the model: every size is that of a tensor in the file."""
        arch, read = self._metadata.architecture, self._metadata
        vocab_size, width = self._matrix("model.embed_tokens")
        num_heads = read.whole(f"{arch}.attention.head_count")
        hidden_size = read.whole(f"{arch}.embedding_length")
        # qwen3 has another default in config.json; GGUF's is this for every architecture.
        head_dim = read.whole(f"{arch}.attention.key_length", max(1, hidden_size // num_heads))
        config = {
            "model_type": arch,
            "vocab_size": read.whole(f"{arch}.vocab_size", vocab_size),
            "num_hidden_layers": read.whole(f"{arch}.block_count"),
            "hidden_size": hidden_size,
            "intermediate_size": read.whole(f"{arch}.feed_forward_length"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": read.whole(f"{arch}.attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": read.whole(f"{arch}.context_length"),
            # Stored as float32: 1e-05 comes back as 9.99999975e-06.
            "rms_norm_eps": float(f"{read.number(f'{arch}.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": read.number(f"{arch}.rope.freq_base", 10_000.0),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
        }
        self._check_sizes(config, vocab_size, width)
        if arch == "llama":
            config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.shapes
        if self._rope_divisors is not None:
            config["rope_scaling"] = self._llama3_scaling(config, self._rope_divisors)
        eos = stop_ids(read)
        config["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
        return config

    def _check_sizes(self, config: dict[str, Any], vocab_size: int, width: int) -> None:
        """Raises a UserError for the first size that is not the one of the tensors."""
        arch, head_dim = self._metadata.architecture, config["head_dim"]
        layer = "model.layers.0."
        q_rows, _ = self._matrix(layer + "self_attn.q_proj")
        k_rows, _ = self._matrix(layer + "self_attn.k_proj")
        mlp_rows, _ = self._matrix(layer + "mlp.gate_proj")
        num_layers = len({n.split(".")[2] for n in self.shapes if n.startswith("model.layers.")})
        wanted = {
            "vocab_size": (config["vocab_size"], vocab_size),
            "block_count": (config["num_hidden_layers"], num_layers),
            "embedding_length": (config["hidden_size"], width),
            "feed_forward_length": (config["intermediate_size"], mlp_rows),
            "attention.head_count": (config["num_attention_heads"] * head_dim, q_rows),
            "attention.head_count_kv": (config["num_key_value_heads"] * head_dim, k_rows),
            "attention.value_length": (self._length("attention.value_length", head_dim), head_dim),
            "rope.dimension_count": (self._length("rope.dimension_count", head_dim), head_dim),
            "attention.key_length": (head_dim % 2, 0),
        }
        for key, (said, found) in wanted.items():
            if said != found:
                raise UserError(
                    f"{self.path}: {arch}.{key} does not fit the tensors or is not computed here: "
                    f"it says {said} where {found} is wanted"
                )

    def _length(self, key: str, default: int) -> int:
        return self._metadata.whole(f"{self._metadata.architecture}.{key}", default)

    def _matrix(self, name: str) -> tuple[int, int]:
        shape = self.shapes.get(f"{name}.weight", ())
        if len(shape) != 2:
            raise UserError(f"{self.path}: the matrix {name} is missing")
        return shape[0], shape[1]

    def _llama3_scaling(self, config: dict[str, Any], tensor: TensorInfo) -> dict[str, Any]:
        head_dim, theta = config["head_dim"], config["rope_theta"]
        plain = rope_frequencies(head_dim, theta)[0]
        divisors = self._expand(tensor, slice(0, tensor.shape[0]))
        for factor in _LLAMA3_FACTORS:
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            scaled = rope_frequencies(head_dim, theta, rope_scaling_from_hf(scaling, {}))[0]
            wanted = plain / scaled
            if divisors.shape == wanted.shape and np.allclose(divisors, wanted, rtol=1e-4, atol=0):
                return scaling
        raise UserError(
            f"{self.path}: rope_freqs.weight is none of the llama3 scalings (factor "
            f"{_LLAMA3_FACTORS}); use the Hugging Face directory of this model"
        )

    def _rows_per_head(self, name: str) -> int:
        """Rows of one head where llama.cpp has interleaved its two halves, else 0."""
        permuted = self._metadata.architecture == "llama" and ("q_proj" in name or "k_proj" in name)
        return self.config["head_dim"] if permuted else 0


def _unpermute(rows: np.ndarray, head_rows: int) -> np.ndarray:
    """llama.cpp pairs (x1, x2) of the rotation row by row; we keep the two halves apart."""
    split = rows.reshape(-1, head_rows // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _values(data: np.ndarray, kind: int) -> np.ndarray:
    """The float32 numbers in the bytes of whole blocks, [rows, bytes].

    Raises:
      NotImplementedError: the `gguf` package does not expand this type.
    """
    import gguf

    known = gguf.GGMLQuantizationType(kind)
    if known.name == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    plain = _PLAIN.get(known.name)
    values = gguf.dequantize(data, known) if plain is None else data.view(plain)
    return np.asarray(values, np.float32)


@functools.cache
def _block(kind: int) -> tuple[int, int]:
    """(numbers, bytes) of a block of a ggml type, zeros for one that cannot be expanded."""
    import gguf

    try:
        block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        _values(np.zeros((1, num_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return 0, 0
    return block, num_bytes
