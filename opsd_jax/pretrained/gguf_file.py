# SPDX-License-Identifier: Apache-2.0
"""A GGUF file seen as if it were a Hugging Face directory: config, tensors, tokenizer.

Names, row order and config keys are translated here, so nothing downstream knows of GGUF.
Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.pretrained.gguf_header import TensorInfo, read_header

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

# GGUF metadata key (after "{arch}.") -> config.json key.
_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}

# The two `llama3` rope scalings in use. GGUF keeps only the resulting frequency divisors.
_LLAMA3_FACTORS = (8.0, 32.0)

# Rust-regex splits of the byte-level tokenizers, by `tokenizer.ggml.pre`.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"qwen2": _SPLIT % r"\p{N}", "llama-bpe": _SPLIT % r"\p{N}{1,3}"}


class GGUFFile:
    """Tensors, config and tokenizer of one file, under their Hugging Face names.

    Attributes:
      path: the file.
      config: what config.json would say, for `config.config_from_hf`.
      shapes: Hugging Face tensor name -> shape, output axis first.
    """

    def __init__(self, path: str):
        self.path = path
        self._data = (
            np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.empty(0, np.uint8)
        )
        header = read_header(path, self._data)
        self._metadata = header.metadata
        self.architecture = self._metadata.get("general.architecture")
        if self.architecture not in ("llama", "qwen2", "qwen3"):
            raise UserError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; "
                "use a llama, qwen2 or qwen3 file, or a Hugging Face directory"
            )
        self._tensors: dict[str, TensorInfo] = {}
        rope_divisors = None
        for tensor in header.tensors:
            if tensor.name == "rope_freqs.weight":
                rope_divisors = self._expand(tensor, slice(0, tensor.shape[0]))
            else:
                self._tensors[self._hf_name(tensor.name)] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.config = self._config(rope_divisors)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The float32 values of part of a tensor; quantised rows are expanded one range at a
        time.

        Raises:
          UserError: a quantisation that the `gguf` package cannot expand.
        """
        tensor = self._tensors[name]
        start, stop, _ = index[0].indices(tensor.shape[0])
        head_rows = self._rows_per_head(name)
        if not head_rows:
            return self._expand(tensor, slice(start, stop))[(slice(None), *index[1:])]
        # The rows of a head are interleaved: expand whole heads and cut afterwards.
        first, last = start // head_rows * head_rows, -(-stop // head_rows) * head_rows
        values = _unpermute(self._expand(tensor, slice(first, last)), head_rows)
        return values[(slice(start - first, stop - first), *index[1:])]

    def _expand(self, tensor: TensorInfo, rows: slice) -> np.ndarray:
        import gguf

        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            row_bytes = math.prod(tensor.shape[1:]) * block_bytes // block
            if len(tensor.shape) == 1:  # one row of numbers, never quantised
                row_bytes = block_bytes
            begin = tensor.offset + rows.start * row_bytes
            end = tensor.offset + rows.stop * row_bytes
            if end > len(self._data):
                raise UserError(f"{self.path}: truncated; {tensor.name} ends after the file")
            data = np.asarray(self._data[begin:end]).reshape(rows.stop - rows.start, row_bytes)
            values = gguf.dequantize(data, kind) if block > 1 else _plain(gguf, data, kind)
        except (NotImplementedError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.path}: {tensor.name} has an unsupported quantisation (ggml type "
                f"{tensor.kind}: {error}); re-quantise the file to Q8_0 or F16"
            ) from error
        return np.asarray(values, np.float32).reshape(-1, *tensor.shape[1:])

    def tokenizer(self) -> HFTokenizer:
        """The byte-level BPE tokenizer, with its special tokens and chat template."""
        from tokenizers import AddedToken, processors
        from transformers import PreTrainedTokenizerFast

        kind, pre = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre")
        if kind != "gpt2" or (pre != "smollm" and pre not in _SPLITS):
            raise UserError(
                f"{self.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported "
                f"(gpt2 with smollm, {', '.join(_SPLITS)} is); use the model's Hugging Face files"
            )
        tokens = self._field("tokenizer.ggml.tokens")
        core = _byte_level_bpe(tokens, self._field("tokenizer.ggml.merges") or (), pre)
        kinds = dict(zip(tokens, self._field("tokenizer.ggml.token_type"), strict=False))
        core.add_special_tokens([AddedToken(t, special=True) for t in kinds if kinds[t] == 3])
        # One id for such as <think>, which the merges would never make.
        own = [AddedToken(t, special=False, normalized=False) for t in kinds if kinds[t] == 4]
        core.add_tokens(own)
        special = {
            f"{name}_token": tokens[i]
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
            if (i := self._field(f"tokenizer.ggml.{key}_token_id")) is not None
        }
        bos = special.get("bos_token")
        if bos and self._field("tokenizer.ggml.add_bos_token"):
            # Seen by plain text alone: a chat template writes its own.
            core.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, core.token_to_id(bos))]
            )
        inner = PreTrainedTokenizerFast(
            tokenizer_object=core,
            chat_template=self._field("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **special,
        )
        return HFTokenizer(inner, self.stop_ids())

    def stop_ids(self) -> tuple[int, ...]:
        """The end-of-sequence and end-of-turn ids."""
        ids = (self._field(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    def _field(self, key: str) -> Any:
        return self._metadata.get(key)

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if not match or match[2] not in _NAMES:
            raise UserError(f"{self.path}: unknown tensor {name!r} for {self.architecture}")
        return f"{_NAMES[match[2]].format(l=match[1])}.{match[3]}"

    def _config(self, rope_divisors: np.ndarray | None) -> dict[str, Any]:
        config: dict[str, Any] = {"model_type": self.architecture}
        for key, hf_key in _CONFIG_KEYS.items():
            value = self._field(f"{self.architecture}.{key}")
            if value is not None:
                config[hf_key] = value
        if "rms_norm_eps" in config:  # stored as float32: 1e-05 comes back as 9.99999975e-06
            config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
        for key in ("embedding_length", "attention.head_count", "block_count"):
            if not config.get(_CONFIG_KEYS[key]):
                raise UserError(f"{self.path}: {self.architecture}.{key} is missing")
        # qwen3 has another default in config.json; GGUF's is this for every architecture.
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        config["vocab_size"] = self.shapes.get("model.embed_tokens.weight", (None,))[0]
        config["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        if self.architecture == "llama":
            biased = "model.layers.0.self_attn.q_proj.bias" in self.shapes
            config["attention_bias"] = biased
        kind = self._field(f"{self.architecture}.rope.scaling.type")
        if kind not in (None, "none"):
            raise UserError(f"{self.path}: rope scaling {kind!r} in a GGUF file is not supported")
        if rope_divisors is not None:
            config["rope_scaling"] = self._llama3_scaling(config, rope_divisors)
        eos = self.stop_ids()
        config["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
        return config

    def _llama3_scaling(self, config: dict[str, Any], divisors: np.ndarray) -> dict[str, Any]:
        from opsd_jax.model.rope import rope_frequencies
        from opsd_jax.pretrained.config import rope_scaling_from_hf

        theta, half = config["rope_theta"], len(divisors)
        plain = rope_frequencies(2 * half, theta)[0]
        for factor in _LLAMA3_FACTORS:
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            scaled = rope_frequencies(2 * half, theta, rope_scaling_from_hf(scaling, {}))[0]
            if np.allclose(plain / divisors, scaled, rtol=1e-4):
                return scaling
        raise UserError(
            f"{self.path}: rope_freqs.weight is none of the llama3 scalings (factor "
            f"{_LLAMA3_FACTORS}); use the Hugging Face directory of this model"
        )

    def _rows_per_head(self, name: str) -> int:
        """Rows of one head where llama.cpp has interleaved its two halves, else 0."""
        if self.architecture != "llama":
            return 0
        for part, key in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
            if part in name:
                heads = self._field(f"llama.attention.{key}") or self._field(
                    "llama.attention.head_count"
                )
                return self.shapes[name][0] // int(heads)
        return 0


def _byte_level_bpe(tokens: list[str], merges: Sequence[str], pre: str) -> Any:
    """A `tokenizers.Tokenizer` without added tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    # Merged ids win over merge ranks for llama-bpe, as in its Hugging Face tokenizer.
    core = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        split: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    return core


def _unpermute(rows: np.ndarray, head_rows: int) -> np.ndarray:
    """llama.cpp pairs (x1, x2) of the rotation row by row; we keep the two halves apart."""
    split = rows.reshape(-1, head_rows // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _plain(gguf: Any, data: np.ndarray, kind: Any) -> np.ndarray:
    types = gguf.GGMLQuantizationType
    dtypes = {types.F32: np.float32, types.F16: np.float16, types.F64: np.float64}
    if kind == types.BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind not in dtypes:
        raise NotImplementedError(kind.name)
    return data.view(dtypes[kind])
