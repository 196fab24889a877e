# SPDX-License-Identifier: Apache-2.0
"""From a problem, and what became of it in this step, to the token ids of a context.

    problem, group --quoted--> turns, fields --templates, system, prefill--> Chat --> ids

What comes from the data or from a model is quoted: special tokens in it are text. A prompt has
those special tokens that the config and the chat template write, and no other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsd_jax.data.attempts import Group
from opsd_jax.data.contexts import ContextConfig, num_required, role_of
from opsd_jax.data.problems import Problem
from opsd_jax.data.record import Message
from opsd_jax.data.templates import AFTER, BEFORE, NothingToShow, fill
from opsd_jax.data.tokenizer import HFTokenizer, Tokenizer, quoted
from opsd_jax.data.turns import Chat, chat_ids, turns_of, with_system
from opsd_jax.errors import UserError


def quoted_problem(
    config: ContextConfig,
    tokenizer: Tokenizer,
    problem: Problem,
    columns: frozenset[str] = frozenset(),
) -> Problem:
    """The problem with special tokens in its texts made text, as `contexts.special_tokens` says.

    Args:
      columns: names of those that are shown; the others are left out.

    Raises:
      UserError: it has some and they are refused, or a text is not valid Unicode.
    """

    def quote(name: str, text: Any) -> str:
        if not isinstance(text, str):
            raise UserError(
                f"problem {problem.id!r}: its {name} must be text, not {type(text).__name__}"
            )
        try:
            harmless = quoted(tokenizer, text)
        except UserError as error:
            raise UserError(f"problem {problem.id!r}: its {name} is {error}") from None
        if config.special_tokens == "error" and harmless != text:
            raise UserError(
                f"problem {problem.id!r}: its {name} has special tokens of the tokenizer; remove "
                "them, or set contexts.special_tokens = 'text'"
            )
        return harmless

    said = tuple(
        Message(turn.role, quote("question", turn.content)) for turn in question_turns(problem)
    )
    return dataclasses.replace(
        problem,
        question=said[0].content if isinstance(problem.question, str) else said,
        solution=quote("solution", problem.solution),
        answer=quote("answer", problem.answer),
        columns={name: quote(name, problem.columns[name]) for name in columns & {*problem.columns}},
    )


def question_turns(problem: Problem) -> tuple[Message, ...]:
    """The turns of a question; a UserError that names the problem where they are none."""
    try:
        return turns_of(problem.question)
    except UserError as error:
        raise UserError(f"problem {problem.id!r}: its question {error}") from None


def chat_of(config: ContextConfig, problem: Problem, name: str, group: Group | None = None) -> Chat:
    """The turns of a context and the prefill behind them, for people: nothing is quoted.

    All placeholders are filled in a single pass: a problem that itself contains "{solution}"
    leaks nothing.

    Args:
      config: whose context.
      problem: of the row.
      name: a role, "teacher_fallback" or "views[n]".
      group: the attempts, for a context that needs them.

    Raises:
      NothingToShow: the row lacks what the context shows.
      UserError: what the context shows is nowhere, or a function's turns are no conversation.
    """
    return _chat(config, name, *_parts(config, problem, name, group), problem.id)


def asked_text(config: ContextConfig, problem: Problem, group: Group | None = None) -> str:
    """What the teacher is asked, for people: its fallback where the row lacks what it shows."""
    try:
        return chat_of(config, problem, "teacher", group).text
    except NothingToShow:
        return chat_of(config, problem, "teacher_fallback", group).text


def _parts(
    config: ContextConfig,
    problem: Problem,
    name: str,
    group: Group | None,
    tokenizer: Tokenizer | None = None,
) -> tuple[tuple[Message, ...], dict[str, str | None]]:
    """What is not the config's in a context: turns, and values of placeholders.

    With a tokenizer all of it is quoted; a function gets the data as they are, and what it returns
    is quoted.
    """
    shows, template, data = config.shows(name), config.template(name), problem
    quote: Callable[[str], str] = str
    if tokenizer is not None:
        quote = functools.partial(quoted, tokenizer)
        data = quoted_problem(config, tokenizer, problem, shows)
    turns = question_turns(data)
    fields: dict[str, str | None] = {
        **{column: data.columns[column] for column in {*data.columns} & shows},
        **{column: None for column in {*problem.columns} - shows},
        "question": turns[-1].content,
        "solution": data.solution,
        "answer": data.answer,
        "instruction": config.instruction,
    }
    if group is not None:
        if clash := {*problem.columns} & shows & {*AFTER}:
            raise UserError(
                f"the data has a column named {min(clash)!r}, as what contexts.{name} shows of a "
                "rollout is; rename the column"
            )
        known = group.fields(**_nth_siblings(config, name))
        known["verdict"] = config.verdict(group.attempts[group.number])
        fields |= {kind: text and quote(text) for kind, text in known.items()}
    if callable(template):
        own = _own_turns(template, problem, name, group)
        turns = tuple(Message(turn.role, quote(turn.content)) for turn in own)
    return turns, fields


def _chat(
    config: ContextConfig,
    name: str,
    turns: tuple[Message, ...],
    fields: Mapping[str, str | None],
    problem_id: str = "",
) -> Chat:
    """Turns with the texts of the config: a template in the place of the last, system, prefill."""
    template, owner = config.template(name), role_of(name)

    def filled(text: str, field: str) -> str:
        return fill(text, fields, f"contexts.{field}", problem_id)

    if isinstance(template, str):
        turns = (*turns[:-1], Message("user", filled(template, name)))
    system = getattr(config, f"{owner}_system")
    return Chat(
        with_system(turns, filled(system, f"{owner}_system")),
        filled(config.prefill(name), f"{owner}_prefill"),
    )


def _own_turns(
    function: Callable[..., Any], problem: Problem, name: str, group: Group | None
) -> tuple[Message, ...]:
    """What a user's function says: a text stands for the question's last turn."""
    seen = () if group is None or num_required(function) == 1 else (group.attempts, group.number)
    said = function(problem, *seen)
    if said is None:
        raise NothingToShow(f"problem {problem.id!r}: contexts.{name} returned None")
    try:
        if isinstance(said, str):
            if not said.strip():
                raise UserError("is an empty text")
            return (*question_turns(problem)[:-1], Message("user", said))
        return turns_of(said)
    except UserError as error:
        raise UserError(f"problem {problem.id!r}: what contexts.{name} returned {error}") from None


def _nth_siblings(config: ContextConfig, name: str) -> dict[str, int]:
    """How many of the teacher's contexts before this one show a sibling of each kind."""
    names = config.teachers
    before = names[: names.index(name)] if name in names else ()
    return {
        kind: sum(kind in config.shows(each) for each in before)
        for kind in ("sibling", "wrong_sibling")
    }


class Unsafe(UserError):
    """A prompt that cannot be encoded with its texts as text."""


def prompt_ids(
    config: ContextConfig,
    tokenizer: Tokenizer,
    problem: Problem,
    name: str,
    group: Group | None = None,
) -> list[int]:
    """Token ids of one context's prompt, whatever their number.

    Args:
      name, group: as in `chat_of`.

    Raises:
      NothingToShow: the row lacks what the context shows.
      Unsafe: the tokenizer or its chat template does not take the texts.
      UserError: the problem cannot be shown; like the others, it names the problem and the context.
    """
    turns, fields = _parts(config, problem, name, group, tokenizer)
    chat = _chat(config, name, turns, fields, problem.id)
    try:
        ids = chat_ids(tokenizer, chat, **config.switches(name))
        added = False
        if isinstance(tokenizer, HFTokenizer):
            shape = tuple(turn.role for turn in turns), tuple(sorted(fields))
            added = tokenizer.controls(ids) != _own_controls(config, tokenizer, name, *shape)
    except UserError as error:
        raise Unsafe(f"problem {problem.id!r}: the {name} prompt: {error}") from None
    if added:
        raise Unsafe(
            f"problem {problem.id!r}: the {name} prompt: its texts change which special tokens are "
            "in it, joined to one another or by the tokenizer's or the chat template's rewriting; "
            "remove what makes them"
        )
    if not ids:
        raise UserError(f"problem {problem.id!r}: the {name} prompt is empty")
    return ids


@functools.lru_cache(maxsize=64)
def _own_controls(
    config: ContextConfig,
    tokenizer: HFTokenizer,
    name: str,
    roles: tuple[str, ...],
    fields: tuple[str, ...],
) -> list[int]:
    """The special tokens of a context with turns of these roles, whatever they say."""
    return tokenizer.controls(_blank_ids(config, tokenizer, name, roles, fields))


def _blank_ids(
    config: ContextConfig,
    tokenizer: Tokenizer,
    name: str,
    roles: tuple[str, ...],
    fields: tuple[str, ...],
) -> list[int]:
    """A context's prompt with a digit for all that is not the config's."""
    ones = dict.fromkeys(fields, "1") | {"instruction": config.instruction}
    chat = _chat(config, name, tuple(Message(role, "1") for role in roles), ones)
    return chat_ids(tokenizer, chat, **config.switches(name))


def opens_thought(config: ContextConfig, tokenizer: Tokenizer) -> bool:
    """Whether the student's prompt ends within a thought, which its answer then goes on with."""
    names = {*BEFORE, *config.shows("student")}
    text = tokenizer.decode(_blank_ids(config, tokenizer, "student", ("user",), tuple(names)))
    return text.rfind("<think>") > text.rfind("</think>")


def chosen_ids(
    config: ContextConfig,
    tokenizer: Tokenizer,
    problem: Problem,
    name: str,
    group: Group | None = None,
) -> tuple[str, list[int]]:
    """(context, its token ids): "teacher" is its fallback where the row lacks what it shows.

    Raises:
      NothingToShow: the row lacks what is shown, in the fallback too.
      UserError: as `prompt_ids`.
    """
    try:
        return name, prompt_ids(config, tokenizer, problem, name, group)
    except NothingToShow:
        if name != "teacher" or config.teacher_fallback is None:
            raise
    return "teacher_fallback", prompt_ids(config, tokenizer, problem, "teacher_fallback", group)


def fits(config: ContextConfig, problem: Problem, name: str, ids: Sequence[int]) -> bool:
    """Whether a prompt is within its budget; a UserError if not and `too_long` is "error"."""
    budget = config.budget(name)
    if len(ids) > budget and config.too_long == "error":
        raise UserError(
            f"problem {problem.id!r}: the {name} prompt has {len(ids)} tokens, over "
            f"contexts.{config.budget_field(name)} = {budget}; raise it, or set "
            "contexts.too_long = 'drop'"
        )
    return len(ids) <= budget


def render(
    config: ContextConfig,
    tokenizer: Tokenizer,
    problem: Problem,
    name: str,
    group: Group | None = None,
) -> list[int] | None:
    """Token ids of one context's prompt, or None when it is over budget and may be dropped.

    Raises:
      UserError: over budget with `too_long = "error"`, or it cannot be rendered.
    """
    name, ids = chosen_ids(config, tokenizer, problem, name, group)
    return ids if fits(config, problem, name, ids) else None
