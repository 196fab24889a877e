# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, and the chat template that a model was trained with."""

from __future__ import annotations

import datetime
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

from opsd_jax.data.chat_template import render_template
from opsd_jax.errors import UserError
from opsd_jax.host.files import read_json
from opsd_jax.host.foreign_values import ForeignValues, shown
from opsd_jax.host.hub import model_folder

# What a model without a chat template is shown; base models continue a dialogue written so.
PLAIN_FORMAT = "User: {prompt}\nAssistant:"

_PLAIN_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}

# Stands inside what is to be no special token. A lone surrogate: no valid text has one.
_MARK = "\ud800"

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
        """The ids of the text itself, without any added start or end token.

        Special tokens in it are read as such: text of others goes through `quoted` first.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without stop and padding ids at its end."""

    def render(self, prompt: str, **template_kwargs: Any) -> list[int]:
        """The ids of a user turn that says `prompt`, up to where the model answers."""


def quoted(tokenizer: Tokenizer, text: str) -> str:
    """Text of the data, to be encoded as text whatever it says; for tokenizers that tell apart."""
    quote: Callable[[str], str] = getattr(tokenizer, "quoted", str)
    return quote(text)


def _harmless(text: str) -> str:
    """The same without the special tokens that `quoted` has broken up."""
    return re.sub(f".{_MARK}.?", "xx", text, flags=re.DOTALL)


def _plain_text(messages: Sequence[tuple[str, str]], prefill: str) -> str:
    """`PLAIN_FORMAT` of the last turn, each turn before it in a line of its own."""
    *earlier, (_, prompt) = messages
    lines = [f"{_PLAIN_NAMES[role]}: {content}\n" for role, content in earlier]
    gap = " " if prefill and not prefill[0].isspace() else ""
    return "".join([*lines, PLAIN_FORMAT.format(prompt=prompt), gap, prefill])


def _check_all_said(messages: Sequence[tuple[str, str]], text: str) -> None:
    """Raises a UserError where a dialogue's template leaves out what system or user says.

    Of what an assistant said, templates leave out the thoughts.
    """
    for number, (role, content) in enumerate(messages, start=1):
        if len(messages) > 1 and role != "assistant" and content.strip() not in text:
            raise UserError(
                f"the chat template leaves out turn {number}, of {role!r}: it has no place for "
                "one; say it in the user's turn, or let chat_template.jinja write it"
            )


class HFTokenizer:
    """A `transformers` tokenizer behind the `Tokenizer` protocol.

    Args:
      inner: any `PreTrainedTokenizerBase`.
      stop_ids: every id that ends a turn; the tokenizer's own end-of-sequence id is added.
      pad_id: the id written after the end; None takes the tokenizer's, else a stop id.

    Attributes:
      now: what templates that write the date are told, the same for all prompts.
    """

    def __init__(self, inner: Any, stop_ids: Iterable[int] = (), pad_id: int | None = None):
        self.inner = inner
        own = () if inner.eos_token_id is None else (inner.eos_token_id,)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((*map(int, stop_ids), *own)))
        candidates = (pad_id, inner.pad_token_id, *self.stop_ids, 0)
        self.pad_id: int = int(next(i for i in candidates if i is not None))
        self.now = datetime.datetime.now()
        special = {i for i, token in inner.added_tokens_decoder.items() if token.special}
        # A pad id may be an ordinary token, as 0 is "!" to some: then it is text.
        self._endings = frozenset((*self.stop_ids, *({self.pad_id} & special)))
        self._warned: set[str] = set()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer can produce."""
        return max(len(self.inner), 1 + max(self.inner.get_vocab().values(), default=-1))

    def quoted(self, text: str) -> str:
        """The text for `encode` and `render`, with special tokens broken up: to them it is text.

        Raises:
          UserError: not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text that is not valid Unicode ({error})") from None
        if self._control is None:
            return text
        found = self._control.search(text)
        if found is None:
            return text
        self._tell(
            f"special tokens in data, here {found[0]!r}, are encoded as text; "
            "contexts.special_tokens = 'error' names the problem"
        )
        return self._control.sub(lambda m: m[0][0] + _MARK + m[0][1:], text)

    def encode(self, text: str) -> list[int]:
        ids = self._encoded(text)
        if _MARK in text:
            self._check_controls(ids, self._encoded(_harmless(text)))
        return ids

    def _encoded(self, text: str) -> list[int]:
        first, *others = text.split(_MARK)
        ids = self.inner.encode(first, add_special_tokens=False)
        for piece in others:
            # Some tokenizers write a space before a text; none behind a line break.
            continued = self.inner.encode(f"\n{piece}", add_special_tokens=False)
            start = len(self._line_break)
            if tuple(continued[:start]) == self._line_break:
                ids += continued[start:]
            else:
                ids += self.inner.encode(piece, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        kept = list(map(int, ids))
        while kept and kept[-1] in self._endings:
            kept.pop()
        return self.inner.decode(kept, clean_up_tokenization_spaces=False)

    def render(self, prompt: str, **template_kwargs: Any) -> list[int]:
        """`render_chat` of one user turn."""
        return self.render_chat([("user", prompt)], **template_kwargs)

    def render_chat(
        self, messages: Sequence[tuple[str, str]], prefill: str = "", **template_kwargs: Any
    ) -> list[int]:
        """Renders turns and the opening of the assistant's, with the model's template.

        Args:
          messages: (role, content) each, the last of "user"; text of others goes through `quoted`
            first.
          prefill: text that opens the assistant's turn; it is encoded together with the template's
            opening, as a template's own think block is.
          **template_kwargs: switches of the template, for example `enable_thinking=False`.

        Returns:
          Exactly the ids that `apply_chat_template(..., add_generation_prompt=True)` gives, the
          prefill behind; without a template, the ids of `PLAIN_FORMAT` with further turns in
          lines of their own, with a warning the first time.

        Raises:
          UserError: the template fails or leaves a turn out, or special tokens that were quoted
            come out as such.
        """
        if not self.inner.chat_template:
            self._tell(
                f"this tokenizer has no chat template: prompts are rendered as {PLAIN_FORMAT!r}"
            )
            ids = [*self._prefix, *self.encode(_plain_text(messages, prefill))]
        else:
            text = self._dialogue(messages, add_generation_prompt=True, **template_kwargs)
            _check_all_said(messages, text)
            ids = self.encode(text + prefill)
        if any(_MARK in text for text in (*(content for _, content in messages), prefill)):
            harmless = [(role, _harmless(content)) for role, content in messages]
            wanted = self.render_chat(harmless, _harmless(prefill), **template_kwargs)
            self._check_controls(ids, wanted)
        return ids

    def turns(self, *said: str, answered: bool = False, **template_kwargs: Any) -> str:
        """The text of a dialogue that the user begins, by the chat template.

        Args:
          *said: by user and assistant in turn.
          answered: whether it ends there; else the assistant's next turn is opened.
          **template_kwargs: switches.
        """
        messages = list(zip(itertools.cycle(("user", "assistant")), said, strict=False))
        return self._dialogue(messages, add_generation_prompt=not answered, **template_kwargs)

    def _dialogue(self, messages: Sequence[tuple[str, str]], **values: Any) -> str:
        """What the chat template writes of (role, content) pairs."""
        return render_template(
            self.inner.get_chat_template(),
            [{"role": role, "content": content} for role, content in messages],
            self.now,
            **{**self.inner.special_tokens_map, **values},
        )

    def controls(self, ids: Iterable[int]) -> list[int]:
        """Those of the ids that are special tokens: what data must not add to a prompt."""
        return [i for i in ids if i in self._control_ids]

    def _check_controls(self, ids: Sequence[int], wanted: Sequence[int]) -> None:
        """Raises a UserError unless both have the same special tokens."""
        if self.controls(ids) != self.controls(wanted):
            raise UserError(
                "special tokens in it cannot be encoded as text with this tokenizer and chat "
                "template; remove them"
            )

    def _tell(self, text: str) -> None:
        """Warns of each kind of thing once."""
        kind = text.split(",")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=3)

    @cached_property
    def _line_break(self) -> tuple[int, ...]:
        return tuple(self.inner.encode("\n", add_special_tokens=False))

    @cached_property
    def _prefix(self) -> list[int]:
        """What the tokenizer writes before a text; what it writes behind would end a prompt."""
        bare = self.inner.encode("a", add_special_tokens=False)
        whole = self.inner.encode("a")
        at = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return whole[: at[0]] if at else []

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Special tokens, and added ones that the chat template writes around turns."""
        added = self.inner.added_tokens_decoder
        found = {i for i, token in added.items() if token.special}
        found |= set(self.stop_ids) & set(added)
        if self.inner.chat_template:
            try:
                written = self.turns("Ask", "Answer", "Ask")
            except UserError:  # Some take no such dialogue; a prompt is rendered all the same.
                written = ""
            written += str(self.inner.chat_template)  # It may write others, as of a system's turn.
            # Thoughts are a part of what models say and of many references.
            found |= {
                i
                for i, token in added.items()
                if token.content in written and "think" not in token.content
            }
        return frozenset(found)

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        """Matches what would be encoded as one of `_control_ids`."""
        added = self.inner.added_tokens_decoder
        texts = [added[i].content for i in self._control_ids if added[i].content]
        longest_first = sorted(texts, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if texts else None

    @cached_property
    def turn_end(self) -> list[int] | None:
        """The ids that the chat template writes behind an assistant's turn; None if unknown."""
        if not self.inner.chat_template:
            return None
        try:
            _, answer, end = self.turns("Ask", "Answer", answered=True).rpartition("Answer")
        except UserError:  # Some templates take no such dialogue.
            return None
        return self.encode(end) if answer else None

    @cached_property
    def turn_end_id(self) -> int | None:
        """The id that ends an assistant's turn: the first stop id that its template writes there.

        A model may declare several, the end of a document first. Without a template, the
        tokenizer's own, else the first declared.
        """
        if ends := [i for i in self.turn_end or () if i in self.stop_ids]:
            return ends[0]
        own = self.inner.eos_token_id
        return own if own is not None else next(iter(self.stop_ids), None)

    @cached_property
    def reads_thinking(self) -> bool:
        """Whether `enable_thinking` changes a prompt."""
        if not self.inner.chat_template:
            return False
        unset = self.turns("Ask")
        return any(self.turns("Ask", enable_thinking=on) != unset for on in (True, False))

    def save(self, directory: str) -> None:
        self.inner.save_pretrained(directory)


def load_tokenizer(directory: str) -> HFTokenizer:
    """The tokenizer of a Hugging Face directory, with every end-of-turn id it declares.

    Args:
      directory: or `owner/name[@revision]` on the Hub, of which no weights are fetched.

    Raises:
      UserError: no tokenizer files there, or files that `transformers` cannot read.
    """
    directory = model_folder(directory, "the tokenizer", weights=False)
    if not any(os.path.exists(os.path.join(directory, f)) for f in TOKENIZER_FILES):
        raise UserError(
            f"{directory}: no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the tokenizer "
            "files of the model into it"
        )
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        inner.decode(inner.encode("a"))  # where settings of another type than theirs show
    except Exception as error:  # transformers raises many kinds, all about these files
        if own_code := _names_own_code(directory):
            raise UserError(
                f"{directory}: {own_code} names Python code of its own (auto_map), which is "
                "never run; use a tokenizer that transformers knows"
            ) from error
        told = shown(" ".join(str(error).split()), limit=300)
        raise UserError(f"{directory}: transformers cannot read the tokenizer: {told}") from error
    stop_ids, pad_id = declared_stop_ids(directory)
    return HFTokenizer(inner, stop_ids, pad_id)


def _names_own_code(directory: str) -> str | None:
    """The first file of a tokenizer that asks for code beside it."""
    for name in ("tokenizer_config.json", "config.json"):
        path = os.path.join(directory, name)
        if os.path.isfile(path) and "auto_map" in read_json(path):
            return name
    return None


def declared_stop_ids(
    directory: str, vocab_size: int | None = None
) -> tuple[tuple[int, ...], int | None]:
    """The `eos_token_id`s and the `pad_token_id` of generation_config.json or config.json.

    generation_config.json wins: config.json often names only the end of a document.

    Raises:
      UserError: they are no ids, or not below `vocab_size` where that is given.
    """
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(directory, name)
        if not os.path.exists(path):
            continue
        declared = ForeignValues(path, read_json(path))
        if stop_ids := declared.ids("eos_token_id", vocab_size):
            return stop_ids, next(iter(declared.ids("pad_token_id", vocab_size)), None)
    return (), None
