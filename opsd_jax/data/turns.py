# SPDX-License-Identifier: Apache-2.0
"""Chat turns: what a role is asked, what opens its answer, and the token ids of both.

    [system] [user, assistant, ...] user | assistant: prefill
                                                            ^ the first sampled or scored token

The prefill is prompt: it is neither sampled nor scored nor graded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from opsd_jax.data.record import Message, Question, question_text
from opsd_jax.data.tokenizer import Tokenizer
from opsd_jax.errors import UserError

ROLES = ("system", "user", "assistant")


class Chat(NamedTuple):
    """What a role is asked: turns, the user's last, and text that opens the role's own answer."""

    messages: tuple[Message, ...]
    prefill: str = ""

    @property
    def text(self) -> str:
        """For people: the turns, and the prefill behind them where there is one."""
        said = question_text(self.messages)
        return f"{said}\n\nassistant: {self.prefill}" if self.prefill else said


def turns_of(question: Question | Any) -> tuple[Message, ...]:
    """The turns of a question.

    Raises:
      UserError: no conversation that a user's turn ends, in words that follow "its question".
    """
    if isinstance(question, str):
        return (Message("user", question),)
    if not isinstance(question, (tuple, list)):
        raise UserError(f"must be text, not {type(question).__name__}")
    turns = tuple(map(_message, question))
    for number, turn in enumerate(turns):
        if turn.role not in ROLES or (turn.role == "system" and number):
            raise UserError(
                f"has a turn {number + 1} of {turn.role!r}: turns are of 'user' and 'assistant', "
                "and the first may be of 'system'"
            )
        if not turn.content.strip():
            raise UserError(f"has an empty turn {number + 1}, of {turn.role!r}")
    if not turns or turns[-1].role != "user":
        raise UserError("must end with a turn of 'user'")
    return turns


def _message(given: Any) -> Message:
    if isinstance(given, Mapping):
        given = (given.get("role"), given.get("content"))
    is_pair = isinstance(given, (tuple, list)) and len(given) == 2
    if not is_pair or not all(isinstance(part, str) for part in given):
        raise UserError(
            "must be text, not a list, but of turns with a role and a content, both text"
        )
    return Message(*given)


def with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """A system text in front; behind a conversation's own, a blank line between."""
    if not system:
        return messages
    if messages[0].role == "system":
        return (Message("system", f"{messages[0].content}\n\n{system}"), *messages[1:])
    return (Message("system", system), *messages)


def chat_ids(tokenizer: Tokenizer, chat: Chat, **switches: Any) -> list[int]:
    """Token ids of a chat, up to where the role goes on.

    A tokenizer without `render_chat` knows one user turn; a prefill follows it as plain text.

    Raises:
      UserError: what the tokenizer or its chat template does not take.
    """
    render_chat = getattr(tokenizer, "render_chat", None)
    if render_chat is not None:
        return render_chat(chat.messages, chat.prefill, **switches)
    if len(chat.messages) > 1:
        raise UserError(
            "this tokenizer knows a single turn of the user's: it takes no system text and no "
            "conversation"
        )
    ids = tokenizer.render(chat.messages[0].content, **switches)
    return [*ids, *tokenizer.encode(chat.prefill)] if chat.prefill else ids
