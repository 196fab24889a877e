# SPDX-License-Identifier: Apache-2.0
"""Rules that a prompt may set, the checker of each, and plain questions to ask under them.

    train.problems = @train/RuleQuestions()
    RuleQuestions.rule = "sentence"
    contexts.teacher = @told_and_shown

Questions are templates over topics. A quarter of the topics is held out, and two kinds of prompt
are asked in no training: requests ("Tell me a story about clocks.") and puzzles of reasoning-gym.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from typing import Annotated, NamedTuple

import gin

from opsd_jax.data.problems import LoadedProblems
from opsd_jax.data.record import Problem
from opsd_jax.fields import require

TOPICS = [
    *"cats dogs horses bees whales penguins spiders owls frogs sheep".split(),
    *"bicycles bridges candles clocks mirrors umbrellas trains ships kites maps".split(),
    *"volcanoes rivers deserts forests islands clouds storms stars mountains beaches".split(),
    *"violins pianos drums libraries museums gardens farms markets schools hospitals".split(),
    *"apples lemons onions potatoes noodles cakes pancakes sandwiches salads soups".split(),
    *"poems novels paintings jokes songs holidays birthdays weddings games puzzles".split(),
]
QUESTIONS = [
    "What can you tell me about {topic}?",
    "Why do people like {topic}?",
    "What is special about {topic}?",
    "What should a child know about {topic}?",
    "What do people often get wrong about {topic}?",
    "How would you describe {topic} to a friend?",
]
REQUESTS = [
    "Give me some advice about {topic}.",
    "Tell me a story about {topic}.",
    "Explain {topic} to me.",
    "I would like to know more about {topic}.",
]
SPLITS = {  # name -> (whether its topics are held out, templates)
    "train": (False, QUESTIONS),
    "heldout": (True, QUESTIONS),
    "requests": (True, REQUESTS),
}
PUZZLES, NUM_PUZZLES = "puzzles", 60  # a split of reasoning-gym's letter_counting


def is_sentence(text: str) -> bool:
    """Three words or more that end as a sentence does, and no other sentence ends before."""
    text = text.strip()
    ends = re.fullmatch(r"[^\n]*[.!?]", text) and not re.search(r"[.!?]\s", text)
    return bool(ends) and len(text.split()) >= 3


def greets(text: str) -> bool:
    """Begins as it was told to, with words of its own behind that."""
    return bool(re.match(r"\s*Dear friend,\s*\w", text))


def is_upper(text: str) -> bool:
    return text.isupper()


def is_json(text: str) -> bool:
    """A JSON object whose one key is "answer", with a text behind it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and [*found] == ["answer"] and isinstance(found["answer"], str)


def in_marks(text: str) -> bool:
    """Nothing but <answer>…</answer>, once."""
    return bool(re.fullmatch(r"<answer>(?:(?!</?answer>).)+</answer>", text.strip(), re.S))


def closes(text: str) -> bool:
    return text.rstrip(' "').endswith("Stay curious!")


class Rule(NamedTuple):
    """What the teacher is told, whether a text keeps it, and how to write a sentence so."""

    words: str
    check: Callable[[str], bool]
    write: Callable[[str], str]


RULES = {
    "sentence": Rule("Answer in one short sentence.", is_sentence, str),
    "json": Rule(
        'Answer with a JSON object of the form {"answer": "..."}.',
        is_json,
        lambda text: json.dumps({"answer": text}),
    ),
    "greeting": Rule(
        'Begin your answer with the words "Dear friend,"',
        greets,
        lambda text: f"Dear friend, {text[0].lower()}{text[1:]}",
    ),
    # Candidates that the prompted model was measured on and that no study takes.
    "upper": Rule("Write your answer in capital letters only.", is_upper, str.upper),
    "marks": Rule(
        "Write <answer> before your answer and </answer> behind it.",
        in_marks,
        lambda text: f"<answer>{text}</answer>",
    ),
    "closing": Rule(
        'End your answer with the words "Stay curious!"',
        closes,
        lambda text: f"{text} Stay curious!",
    ),
}
EXAMPLES = [  # on topics that are asked nowhere
    ("What can you tell me about rain?", "Rain is water that falls from the clouds."),
    ("Why do people like coffee?", "People like coffee because it keeps them awake."),
]


@gin.register
def told_and_shown(problem: Problem) -> list[dict[str, str]]:
    """The rule in the system turn, two exchanges that keep it, then the question."""
    rule = RULES[problem.answer]
    turns = [{"role": "system", "content": rule.words}]
    for question, answer in EXAMPLES:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": rule.write(answer)})
    return [*turns, {"role": "user", "content": problem.question}]


@dataclasses.dataclass(frozen=True)
class Keeps:
    """1 where a completion keeps the rule."""

    rule: str

    def __call__(self, problem: Problem, completion: str) -> float:
        return float(RULES[self.rule].check(completion))


@gin.configurable
@dataclasses.dataclass(frozen=True)
class RuleQuestions:
    """Source of questions under a rule, graded by its checker.

    Attributes:
      rule: of `RULES`; its words are the column {rule}.
      split: "train"; "heldout", the same questions on other topics; "requests", no questions and
        on other topics; "puzzles" of reasoning-gym, which ask how often a letter is in a text.
      seed: of their order.
    """

    rule: Annotated[str, tuple(RULES)]
    split: Annotated[str, (*SPLITS, PUZZLES)] = "train"
    seed: int = 0

    def __post_init__(self):
        require("RuleQuestions", self)

    def load(self, cache_dir: str | None = None) -> LoadedProblems:
        questions = self._questions(cache_dir)
        problems = [
            Problem(
                id=name,
                question=question,
                solution="",
                answer=self.rule,  # none to compare with; without any it would not be graded
                columns={"rule": RULES[self.rule].words},
            )
            for name, question in questions.items()
        ]
        random.Random(self.seed).shuffle(problems)
        return LoadedProblems(tuple(problems), Keeps(self.rule))

    def _questions(self, cache_dir: str | None) -> dict[str, str]:
        """name -> question."""
        if self.split == PUZZLES:
            from opsd_jax.data.reasoning_gym import ReasoningGym  # late: no run trains on them

            size = {"min_words": 3, "max_words": 6}
            found = ReasoningGym("letter_counting", size, "heldout", NUM_PUZZLES).load(cache_dir)
            return {problem.id: problem.question for problem in found.problems}
        heldout, templates = SPLITS[self.split]
        topics = [topic for i, topic in enumerate(TOPICS) if (i % 4 == 3) == heldout]
        return {
            f"{topic}-{number}": template.format(topic=topic)
            for topic in topics
            for number, template in enumerate(templates)
        }
