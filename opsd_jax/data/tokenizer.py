# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, and the chat template that a model was trained with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

from opsd_jax.errors import UserError
from opsd_jax.host.files import read_json

# What a model without a chat template is shown; base models continue a dialogue written so.
PLAIN_FORMAT = "User: {prompt}\nAssistant:"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer(Protocol):
    """All that the rest of the package asks of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]:
        """The ids of the text itself, without any added start or end token."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, with stop and padding ids removed."""

    def render(self, prompt: str, **template_kwargs: Any) -> list[int]:
        """The ids of a user turn that says `prompt`, up to where the model answers."""


class HFTokenizer:
    """A `transformers` tokenizer behind the `Tokenizer` protocol.

    Args:
      inner: any `PreTrainedTokenizerBase`.
      stop_ids: every id that ends a turn; the tokenizer's own end-of-sequence id is added.
      pad_id: the id written after the end; None takes the tokenizer's, else a stop id.
    """

    def __init__(self, inner: Any, stop_ids: Iterable[int] = (), pad_id: int | None = None):
        self.inner = inner
        own = () if inner.eos_token_id is None else (inner.eos_token_id,)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((*map(int, stop_ids), *own)))
        candidates = (pad_id, inner.pad_token_id, *self.stop_ids, 0)
        self.pad_id: int = int(next(i for i in candidates if i is not None))
        self._silent = frozenset((*self.stop_ids, self.pad_id))
        self._warned = False

    @property
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer can produce."""
        return max(len(self.inner), 1 + max(self.inner.get_vocab().values(), default=-1))

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if int(i) not in self._silent]
        return self.inner.decode(kept, clean_up_tokenization_spaces=False)

    def render(self, prompt: str, **template_kwargs: Any) -> list[int]:
        """Renders one user turn and the opening of the assistant's, with the model's template.

        Args:
          prompt: what the user says.
          **template_kwargs: switches of the template, for example `enable_thinking=False`.

        Returns:
          Exactly the ids that `apply_chat_template(..., add_generation_prompt=True)` gives;
          without a template, the ids of `PLAIN_FORMAT`, with a warning the first time.
        """
        if not self.inner.chat_template:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "this tokenizer has no chat template: prompts are rendered as "
                    f"{PLAIN_FORMAT!r}",
                    stacklevel=2,
                )
            return self.inner.encode(PLAIN_FORMAT.format(prompt=prompt))
        turns = [{"role": "user", "content": prompt}]
        rendered = self.inner.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
        )
        return list(rendered["input_ids"])

    @cached_property
    def turn_end_id(self) -> int | None:
        """The id that ends an assistant's turn: the first stop id that its template writes there.

        A model may declare several, the end of a document first. Without a template, the
        tokenizer's own, else the first declared.
        """
        if self.inner.chat_template:
            said = [{"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Answer"}]
            try:
                text = self.inner.apply_chat_template(said, tokenize=False)
            except Exception:  # templates raise what they like, and some take no such dialogue
                text = ""
            _, answer, end = text.rpartition("Answer")
            if ends := [i for i in self.encode(end) if answer and i in self.stop_ids]:
                return ends[0]
        own = self.inner.eos_token_id
        return own if own is not None else next(iter(self.stop_ids), None)

    def save(self, directory: str) -> None:
        self.inner.save_pretrained(directory)


def load_tokenizer(directory: str) -> HFTokenizer:
    """The tokenizer of a Hugging Face directory, with every end-of-turn id it declares.

    Raises:
      UserError: no tokenizer files there, or files that `transformers` cannot read.
    """
    if not any(os.path.exists(os.path.join(directory, f)) for f in TOKENIZER_FILES):
        raise UserError(
            f"{directory}: no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the tokenizer "
            "files of the model into it"
        )
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many kinds, all about these files
        raise UserError(f"{directory}: transformers cannot read the tokenizer: {error}") from error
    stop_ids, pad_id = declared_stop_ids(directory)
    return HFTokenizer(inner, stop_ids, pad_id)


def declared_stop_ids(directory: str) -> tuple[tuple[int, ...], int | None]:
    """The `eos_token_id`s and the `pad_token_id` of generation_config.json or config.json.

    generation_config.json wins: config.json often names only the end of a document.
    """
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(directory, name)
        if not os.path.exists(path):
            continue
        declared = read_json(path)
        eos = declared.get("eos_token_id")
        if eos is not None:
            stop_ids = tuple(eos) if isinstance(eos, list) else (eos,)
            return stop_ids, declared.get("pad_token_id")
    return (), None
