# SPDX-License-Identifier: Apache-2.0
"""The byte-level BPE tokenizer inside a GGUF file."""

from __future__ import annotations

from typing import Any

from opsd_jax.data.tokenizer import HFTokenizer
from opsd_jax.errors import UserError
from opsd_jax.pretrained.gguf_header import short
from opsd_jax.pretrained.gguf_metadata import Metadata

# Rust-regex splits of the byte-level tokenizers, by `tokenizer.ggml.pre`.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"qwen2": _SPLIT % r"\p{N}", "llama-bpe": _SPLIT % r"\p{N}{1,3}"}

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type


def gguf_tokenizer(metadata: Metadata) -> HFTokenizer:
    """The tokenizer, with its special tokens and chat template.

    Raises:
      UserError: another kind of tokenizer, or fields that are missing, damaged or do not fit.
    """
    from transformers import PreTrainedTokenizerFast

    kind, pre = metadata.text("tokenizer.ggml.model"), metadata.text("tokenizer.ggml.pre")
    if kind != "gpt2" or (pre != "smollm" and pre not in _SPLITS):
        raise UserError(
            f"{metadata.path}: tokenizer {short(kind)} with pre-tokenizer {short(pre)} is not "
            f"supported (gpt2 with smollm, {', '.join(_SPLITS)} is); use the model's Hugging Face "
            "files"
        )
    tokens = vocabulary(metadata)
    kinds = _token_types(metadata, len(tokens))
    merges = _merges(metadata, tokens, kinds)
    names = {
        f"{name}_token": tokens[i]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if (i := metadata.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))) is not None
    }
    template = metadata.text("tokenizer.chat_template")
    # llama.cpp starts text of this kind with <bos> unless the file says no.
    add_bos = metadata.flag("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    bos = names.get("bos_token") if add_bos else None
    try:
        core = _byte_level_bpe(tokens, kinds, merges, str(pre), bos)
        inner = PreTrainedTokenizerFast(
            tokenizer_object=core,
            chat_template=template,
            clean_up_tokenization_spaces=False,
            **names,
        )
    except Exception as error:  # `tokenizers` raises bare exceptions, all about these fields
        raise UserError(
            f"{metadata.path}: tokenizer.ggml.tokens and merges do not fit: {error}"
        ) from error
    return HFTokenizer(inner, stop_ids(metadata))


def stop_ids(metadata: Metadata) -> tuple[int, ...]:
    """The ids that end a sequence, a turn or a message."""
    size = len(vocabulary(metadata))
    keys = (f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom"))
    ids = [metadata.token_id(key, size) for key in keys]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def vocabulary(metadata: Metadata) -> list[str]:
    """The tokens by id, all different."""
    key = "tokenizer.ggml.tokens"
    tokens: list[str] = metadata.column(key, str, "a list of texts")
    if not tokens or "" in tokens or len(set(tokens)) < len(tokens):
        raise metadata.wrong(key, "a list of texts that are all different and not empty")
    return tokens


def _token_types(metadata: Metadata, size: int) -> list[int]:
    """A type per token: without them `<|im_end|>` would be encoded as any other text."""
    key = "tokenizer.ggml.token_type"
    wanted = f"a list of {size:,} numbers from 0 to 6, one for each token"
    kinds: list[int] = metadata.column(key, int, wanted)
    if len(kinds) != size or not all(0 <= kind <= 6 for kind in kinds):
        raise metadata.wrong(key, wanted)
    return kinds


def _merges(metadata: Metadata, tokens: list[str], kinds: list[int]) -> list[tuple[str, str]]:
    """The pairs in the order of their ranks.

    Raises:
      UserError: many words of the vocabulary come from no pair: the list is missing or cut, and
        text would be encoded letter by letter.
    """
    key, wanted = "tokenizer.ggml.merges", "a list of texts, two tokens with a space between"
    lines = metadata.column(key, str, wanted) if key in metadata.fields else []
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    made = {left + right for left, right in pairs}
    words = [t for t, k in zip(tokens, kinds, strict=True) if k == _NORMAL and len(t) > 1]
    if sum(word not in made for word in words) > len(words) / 10:
        raise metadata.wrong(key, f"the pairs that make the {len(words):,} words of tokens")
    return pairs


def _byte_level_bpe(
    tokens: list[str], kinds: list[int], merges: list[tuple[str, str]], pre: str, bos: str | None
) -> Any:
    """A `tokenizers.Tokenizer`; plain text starts with `bos`, if there is one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    # Merged ids win over merge ranks for llama-bpe, as in its Hugging Face tokenizer.
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        split: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    by_kind = list(zip(tokens, kinds, strict=True))
    core.add_special_tokens([AddedToken(t, special=True) for t, k in by_kind if k == _CONTROL])
    # One id for such as <think>, which the merges would never make.
    own = [AddedToken(t, special=False, normalized=False) for t, k in by_kind if k == _USER_DEFINED]
    core.add_tokens(own)
    if bos is not None:  # Seen by plain text alone: a chat template writes its own.
        core.post_processor = TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, core.token_to_id(bos))]
        )
    return core
