# SPDX-License-Identifier: Apache-2.0
"""Rules that a prompt may set, the checker of each, and plain questions to ask under them.

    train.problems = @train/RuleQuestions()
    RuleQuestions.rule = "sentence"
    contexts.teacher = "{question} {rule}"

Questions are templates over topics. A quarter of the topics is held out, and one kind of prompt is
asked in no training: requests ("Tell me a story about clocks.").
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


def is_sentence(text: str) -> bool:
    """Three words or more that end as a sentence does, and no other sentence ends before."""
    text = text.strip()
    ends = re.fullmatch(r"[^\n]*[.!?]", text) and not re.search(r"[.!?]\s", text)
    return bool(ends) and len(text.split()) >= 3


def is_spanish(text: str) -> bool:
    """More of Spanish's small words than of English's, and two or more."""
    words = re.findall(r"\w+", text.lower())
    spanish = sum(words.count(w) for w in "el la los las de que y en un una es son por con".split())
    english = sum(words.count(w) for w in "the of and to in a is are that it for with".split())
    return spanish >= 2 and spanish > english


def is_list(text: str) -> bool:
    """Begins as a numbered list, and every line that begins with a number has the next one."""
    numbers = re.findall(r"^\s*(\d+)[.)]\s", text, re.M)
    begins = re.match(r"\s*1[.)]\s", text)
    return bool(begins) and numbers == [str(n + 1) for n in range(len(numbers))]


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
    """What the teacher is told, and whether a text keeps it."""

    words: str
    check: Callable[[str], bool]


RULES = {
    "sentence": Rule("Answer in one short sentence.", is_sentence),
    "list": Rule("Answer with a numbered list of three items.", is_list),
    "spanish": Rule("Answer in Spanish.", is_spanish),
    "greeting": Rule('Begin your answer with the words "Dear friend,"', greets),
    # Candidates that the prompted model was measured on and that no study takes.
    "upper": Rule("Write your answer in capital letters only.", is_upper),
    "json": Rule('Answer with a JSON object of the form {"answer": "..."}.', is_json),
    "marks": Rule("Write <answer> before your answer and </answer> behind it.", in_marks),
    "closing": Rule('End your answer with the words "Stay curious!"', closes),
}


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
        on other topics.
      seed: of their order.
    """

    rule: Annotated[str, tuple(RULES)]
    split: Annotated[str, tuple(SPLITS)] = "train"
    seed: int = 0

    def __post_init__(self):
        require("RuleQuestions", self)

    def load(self, cache_dir: str | None = None) -> LoadedProblems:
        heldout, templates = SPLITS[self.split]
        topics = [topic for i, topic in enumerate(TOPICS) if (i % 4 == 3) == heldout]
        problems = [
            Problem(
                id=f"{topic}-{number}",
                question=template.format(topic=topic),
                solution="",
                answer=self.rule,  # none to compare with; without any it would not be graded
                columns={"rule": RULES[self.rule].words},
            )
            for topic in topics
            for number, template in enumerate(templates)
        ]
        random.Random(self.seed).shuffle(problems)
        return LoadedProblems(tuple(problems), Keeps(self.rule))
