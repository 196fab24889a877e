# SPDX-License-Identifier: Apache-2.0
"""What is told once at the start: settings without effect, turns that do not end, texts too long.

Whether a chat template reads a switch or ends a turn is found by rendering, not by reading it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from opsd_jax.data.contexts import ContextConfig
from opsd_jax.data.tokenizer import Tokenizer


def unended_turns(tokenizer: Tokenizer, stop_ids: Collection[int]) -> list[str]:
    """Told where the chat template ends an assistant's turn with nothing that stops a rollout.

    Args:
      tokenizer: one that has no `turn_end` is asked nothing.
      stop_ids: of the rollouts, those of the run included.
    """
    end: Sequence[int] | None = getattr(tokenizer, "turn_end", None)
    if end is None or any(i in stop_ids for i in end):
        return []
    added: Mapping[int, object] = tokenizer.inner.added_tokens_decoder  # type: ignore[attr-defined]
    stops = f"none of the stop ids {tuple(sorted(stop_ids))}"
    token = next((i for i in end if i in added), None)
    if token is None:
        return [
            f"the chat template ends an assistant's turn with no token of its own and {stops}: "
            "answers may run on to the length limit (rollout/truncated_fraction); a stop id would "
            "have to be set in rollout.stop_ids"
        ]
    return [
        f"the chat template ends an assistant's turn with '{added[token]}' (id {token}), {stops}: "
        f"answers will run on to the length limit; set rollout.stop_ids = ({token},)"
    ]


def idle_switches(contexts: ContextConfig, tokenizer: Tokenizer, roles: Iterable[str]) -> list[str]:
    """Told of each thinking switch that is set and changes nothing in this chat template.

    Args:
      roles: of `contexts`, those that are asked anything. The default for the analysis, False, is
        told of no more than None is.
    """
    if getattr(tokenizer, "reads_thinking", False):
        return []
    told = []
    for role in dict.fromkeys(roles):
        thinking = contexts.switches(role).get("enable_thinking")
        if thinking is None or (role == "analysis" and not thinking):
            continue
        told.append(
            f"contexts.{role}_thinking = {thinking} has no effect: this chat template renders one "
            "prompt whether enable_thinking is True, False or unset; set it to None, or let the "
            "template (chat_template.jinja) read enable_thinking"
        )
    return told


def told_answers(contexts: ContextConfig, roles: Iterable[str]) -> list[str]:
    """Told of a student that is shown what only the teacher should know.

    Args:
      roles: of `contexts`, those that are asked anything.
    """
    told = []
    for role in dict.fromkeys(roles):
        names = contexts.shows(role)
        shown = [f"{{{name}}}" for name in ("solution", "answer") if name in names]
        if role not in ("teacher", "analysis") and shown:
            told.append(
                f"contexts.{role} shows {' and '.join(shown)}: the student is told what it is "
                "graded on; leave it to contexts.teacher"
            )
    return told


def equal_prompts(prompts: Mapping[str, Sequence[Sequence[int]]]) -> list[str]:
    """Told of evaluated roles of one model that are asked the very same.

    Args:
      prompts: role -> token ids of its prompts, in order; "student" and "student_thinking" are of
        one model.
    """
    told = []
    roles = list(prompts)
    for at, role in enumerate(roles):
        for other in roles[:at]:
            same_model = role.split("_")[0] == other.split("_")[0]
            if same_model and list(map(list, prompts[role])) == list(map(list, prompts[other])):
                told.append(
                    f"evaluate.roles: {other!r} and {role!r} are asked the same prompts, and their "
                    "columns are one measurement; leave one out"
                )
    return told


def beyond_positions(
    role: str, longest: int, num_new: int, max_positions: int, settings: str
) -> list[str]:
    """Told where the longest prompt of a role and its completion exceed the model's positions.

    Args:
      longest: tokens of the prompt.
      num_new: tokens that may follow.
      max_positions: that the model was trained for.
      settings: what to lower.
    """
    if longest + num_new <= max_positions:
        return []
    return [
        f"the {role}'s longest prompt has {longest:,} tokens, with {num_new:,} to follow: beyond "
        f"the {max_positions:,} positions that the model was trained for; lower {settings}"
    ]


def asked_after(contexts: ContextConfig, roles: Iterable[str]) -> list[str]:
    """Told of an evaluated teacher that training asks only after a rollout.

    Args:
      roles: evaluated, such as "teacher" and "teacher_thinking".
    """
    teachers = [role for role in roles if role.startswith("teacher")]
    if not teachers or not contexts.is_after("teacher"):
        return []
    names = ", ".join(f"eval/{role}/*" for role in teachers)
    if contexts.evaluated("teacher"):
        return [
            f"{names}: the teacher is asked contexts.teacher_fallback, as there are no attempts to "
            "show it"
        ]
    return [
        f"{names} are left out: contexts.teacher shows what a rollout gives, and "
        "contexts.teacher_fallback is no template that does without"
    ]
