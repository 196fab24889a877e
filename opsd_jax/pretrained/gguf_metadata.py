# SPDX-License-Identifier: Apache-2.0
"""The metadata of a GGUF file: every value typed, every key read, known to be harmless or refused.

The names are those of llama.cpp (`gguf.constants.Keys`); what it computes from them for llama,
qwen2 and qwen3 decides which values are allowed: github.com/ggml-org/llama.cpp, src/llama-model.cpp
and src/llama-vocab.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.pretrained.gguf_header import short

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Read by gguf_file.py and gguf_tokenizer.py; {arch} stands for the file's architecture.
_READ = frozenset(
    """
    general.architecture general.alignment
    {arch}.block_count {arch}.context_length {arch}.embedding_length {arch}.feed_forward_length
    {arch}.vocab_size {arch}.rope.dimension_count {arch}.rope.freq_base
    {arch}.attention.head_count {arch}.attention.head_count_kv {arch}.attention.key_length
    {arch}.attention.value_length {arch}.attention.layer_norm_rms_epsilon
    tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.token_type
    tokenizer.ggml.merges tokenizer.ggml.add_bos_token tokenizer.chat_template
    tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id
    tokenizer.ggml.eom_token_id tokenizer.ggml.padding_token_id
    """.split()
)

# The values at which a key asks for nothing that is not computed anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),  # an adapter, a projector or a vocabulary alone is no model
    "general.quantization_version": (2,),  # blocks of version 1 had another layout
    # How Meta's files order the rows of q and k, and every GGUF file of this architecture.
    "llama.tensor_data_layout": ("Meta AI original pth",),
    "{arch}.attention.causal": (True,),
    "{arch}.attention.clamp_kqv": (0,),
    "{arch}.attention.max_alibi_bias": (0,),
    "{arch}.attention.sliding_window": (0,),
    "{arch}.embedding_scale": (1,),
    "{arch}.expert_count": (0,),
    "{arch}.expert_shared_count": (0,),
    "{arch}.expert_used_count": (0,),
    "{arch}.leading_dense_block_count": (0,),
    "{arch}.logit_scale": (1,),
    "{arch}.nextn_predict_layers": (0,),
    "{arch}.residual_scale": (1,),
    "{arch}.rope.scale_linear": (0, 1),
    "{arch}.rope.scaling.attn_factor": (1,),
    "{arch}.rope.scaling.factor": (0, 1),  # without a type, another factor means linear
    "{arch}.rope.scaling.type": ("none",),
    "{arch}.use_parallel_residual": (False,),
    "split.count": (0, 1),
    "split.no": (0,),
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.add_space_prefix": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
}

# Whatever they say, ids and logits are the same. The first match counts.
_HARMLESS = {
    # Who made the file, of what and under which licence, and sampling, which a run sets itself;
    # each tensor says its own type, whatever file_type says.
    r"general\.(?!architecture$|alignment$|type$|quantization_version$).*": "description",
    r"(quantize\.imatrix|imatrix|mradermacher)\..*": "how the numbers were rounded",
    r"split\.tensors\.count": "split.count says whether the file is whole",
    # Read only where rope.scaling.type is yarn or longrope, which is refused.
    r"\{arch\}\.rope\.scaling\.(original_context_length|finetuned)": "the training's",
    r"\{arch\}\.pooling_type": "of the vector of a whole text; logits are not pooled",
    # Byte-level BPE ranks its merges and knows every byte.
    r"tokenizer\.ggml\.(scores|unknown_token_id|token_type_count)": "of other tokenizers",
    r"tokenizer\.ggml\.(seperator|mask|cls)_token_id": "of encoders",
    r"tokenizer\.ggml\.(fim_\w+|prefix|suffix|middle)_token_id": "for filling in",
    r"tokenizer\.ggml\.add_eos_token": "a prompt never ends with the end token",
    r"tokenizer\.(huggingface\.json|chat_templates|chat_template\..*)": "copies and alternatives",
}


class Metadata:
    """The fields of one file; each method gives a value of its type or a `UserError`.

    Attributes:
      path: the file, for messages.
      fields: key -> value as the header has it.
      architecture: one of `ARCHITECTURES`.
    """

    def __init__(self, path: str, fields: Mapping[str, Any]):
        self.path, self.fields = path, fields
        self.architecture = str(fields.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{path}: GGUF architecture {short(self.architecture)} is not supported; "
                "use a llama, qwen2 or qwen3 file, or a Hugging Face directory"
            )
        for key in fields:
            self._require_known(key)

    def _require_known(self, key: str) -> None:
        own = self.architecture + "."
        general = "{arch}." + key.removeprefix(own) if key.startswith(own) else key
        if general in _READ or any(re.fullmatch(p, general, re.DOTALL) for p in _HARMLESS):
            return
        allowed = _NEUTRAL.get(general, _NEUTRAL.get(key, ()))
        value = self.fields[key]
        if any(type(value) in _like(a) and value == a for a in allowed):
            return
        if key == "split.count":
            raise UserError(
                f"{self.path}: one part of a split file ({key} = {short(value)}); join the "
                "parts with `llama-gguf-split --merge`"
            )
        wanted = f"must be {' or '.join(map(repr, allowed))}, not" if allowed else "="
        raise UserError(
            f"{self.path}: {short(key)[1:-1]} {wanted} {short(value)}: it may change "
            "the numbers and is not computed here; use the model's Hugging Face directory, or, if "
            "it has no effect, remove it with `gguf-new-metadata --remove-metadata`"
        )

    def wrong(self, key: str, wanted: str) -> UserError:
        """The error that names a key, what it must be and what it is."""
        if key not in self.fields:
            return UserError(f"{self.path}: {key} is missing; it must be {wanted}")
        return UserError(f"{self.path}: {key} must be {wanted}, not {short(self.fields[key])}")

    def whole(self, key: str, default: int | None = None, below: int = 2**31) -> int:
        """A whole number from 1 on; required without a default."""
        value = self.fields.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < below:
            raise self.wrong(key, f"a whole number from 1 to {below - 1}")
        return value

    def token_id(self, key: str, num_tokens: int) -> int | None:
        """An id of the vocabulary, None where there is none."""
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < num_tokens:
            raise self.wrong(key, f"an id of the vocabulary, from 0 to {num_tokens - 1}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; required without a default."""
        value = self.fields.get(key, default)
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not 0 < value < math.inf:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """Text, None where there is none."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def column(self, key: str, kind: type, wanted: str) -> list[Any]:
        """A list whose entries are all of one type; required."""
        value = self.fields.get(key)
        if not isinstance(value, list) or any(type(entry) is not kind for entry in value):
            raise self.wrong(key, wanted)
        return value


def _like(allowed: Any) -> tuple[type, ...]:
    """Types that may stand for an allowed value: 1.0 for 1, but neither True nor "1"."""
    return (int, float) if type(allowed) is int else (type(allowed),)
