# SPDX-License-Identifier: Apache-2.0
"""The testbed: chained arithmetic mod 10, small enough to see why self-distillation works or fails.

    question   8+6*5*2                      left to right: 8+6=4, 4*5=0, 0*2=0
    own notation  8+6=4;4*5=0;0*2=0;#0      what the student writes
    reference  #0 8+6=4 0*2=0 4*5=0         what only the teacher sees

A *step* is an operator with its right operand (`+6`), one token; a *fact* is (left digit, step).
The lemmas of the reference are keyed by fact and stand in random order: after a wrong result the
next key is not among them, so a good teacher falls back on its memory instead of jumping to the
true total, which a student cannot know.

The world also fixes what the base model is to believe: a set of *weak* facts of which the corpus
(corpus.py) is usually wrong, and wrong in a consistent way. Sharpening the base
therefore cannot repair it.

Everything fixed here comes from one integer hash, never from a random generator whose stream a
library may change, so that splits and weak facts are the same everywhere.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from opsd_jax.data.problems import Problem
from opsd_jax.errors import UserError
from opsd_jax.fields import Seed, Share, require

NUM_DIGITS = 10
STEPS = tuple(f"{op}{digit}" for op in "+*" for digit in range(NUM_DIGITS))
_PUNCTUATION = ("=", ";", "#", "|", "?")
TOKENS = (*map(str, range(NUM_DIGITS)), *STEPS, *_PUNCTUATION, "<pad>", "$")
EQUALS, SEMICOLON, HASH, BAR, QUERY, PAD, EOS = range(NUM_DIGITS + len(STEPS), len(TOKENS))

_TOKEN_ID = {token: i for i, token in enumerate(TOKENS)}
_TOKEN_PATTERN = re.compile(r"[+*][0-9]|[0-9=;#|?]")
_NOTATION_PATTERN = re.compile(r"(?:[0-9][+*][0-9]=[0-9];)+#[0-9]")
_ANSWER_PATTERN = re.compile(r"[^#]*#([0-9])(?: [^#]*)?")


class ChainTokenizer:
    """The 37 tokens of the testbed; implements `tokenizer.Tokenizer`.

    A space is no token: `encode` skips it and `decode` writes one between two adjacent digits,
    which is where the notation has them. So decode(encode(text)) == text for every well formed
    text, and encode(decode(ids)) == ids for all ids without stop and padding.
    """

    vocab_size = len(TOKENS)
    pad_id = PAD
    stop_ids = (EOS,)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; an operator and the digit after it are one token.

        Raises:
          UserError: a character that is not part of the notation.
        """
        ids, at = [], 0
        while at < len(text):
            if text[at] == " ":
                at += 1
                continue
            match = _TOKEN_PATTERN.match(text, at)
            if match is None:
                raise UserError(
                    f"The testbed notation has no token for {text[at : at + 2]!r} at position {at} "
                    f"of {text!r}; use digits, +d, *d and = ; # | ?"
                )
            ids.append(_TOKEN_ID[match.group()])
            at = match.end()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first stop token, padding left out."""
        text: list[str] = []
        previous_is_digit = False
        for token in map(int, ids):
            if token == EOS:
                break
            if token == PAD:
                continue
            is_digit = token < NUM_DIGITS
            if is_digit and previous_is_digit:
                text.append(" ")
            text.append(TOKENS[token])
            previous_is_digit = is_digit
        return "".join(text)

    def render(self, prompt: str, **template_kwargs: Any) -> list[int]:
        """Ids of `prompt` as it stands: the testbed has no chat template."""
        del template_kwargs
        return self.encode(prompt)


@dataclasses.dataclass(frozen=True)
class ChainTask:
    """The fixed world: facts, problems, their split, and the beliefs that the base is to hold.

    Attributes:
      num_ops: steps of a problem.
      seed: chooses the weak facts and their misconceptions (not the split).
      weak_fraction: share of the 200 facts that are weak.
      weak_right: probability with which the corpus states a weak fact right.
      weak_misconception: probability of its one fixed wrong result; what is left is spread
        evenly over the other eight digits.
    """

    num_ops: Annotated[int, ">= 1", "<= 4"] = 3
    seed: Seed = 7
    weak_fraction: Share = 0.35
    weak_right: Share = 0.30
    weak_misconception: Share = 0.56

    def __post_init__(self):
        require("ChainTask", self)
        if self.weak_right + self.weak_misconception > 1:
            raise UserError(
                f"ChainTask.weak_misconception must be at most 1 - ChainTask.weak_right = "
                f"{1 - self.weak_right:g}, not {self.weak_misconception}"
            )

    @property
    def num_problems(self) -> int:
        return NUM_DIGITS * len(STEPS) ** self.num_ops

    @property
    def question_len(self) -> int:
        """Tokens of `8+6*5*2`."""
        return 1 + self.num_ops

    @property
    def reference_len(self) -> int:
        """Tokens of `#0 8+6=4 0*2=0 4*5=0`."""
        return 2 + 4 * self.num_ops

    @property
    def response_len(self) -> int:
        """Tokens of `8+6=4;4*5=0;0*2=0;#0$`, the stop token included."""
        return 5 * self.num_ops + 3

    @functools.cached_property
    def is_weak(self) -> np.ndarray:
        """[10, 20] bool: the facts that the corpus mostly gets wrong."""
        order = np.argsort(_hash(self.seed, np.arange(facts().size)), kind="stable")
        weak = np.zeros(facts().size, bool)
        weak[order[: round(self.weak_fraction * weak.size)]] = True
        return weak.reshape(facts().shape)

    @functools.cached_property
    def misconceptions(self) -> np.ndarray:
        """[10, 20] int: the one wrong result that each fact is mistaken for, if it is weak."""
        draw = _hash(self.seed, np.arange(facts().size), 1) >> np.uint64(40)
        shift = 1 + (draw % np.uint64(NUM_DIGITS - 1)).astype(np.int64)
        return (facts() + shift.reshape(facts().shape)) % NUM_DIGITS

    @functools.cached_property
    def memory(self) -> np.ndarray:
        """[10, 20, 10] float: the probability that the corpus states each result of a fact."""
        right = np.eye(NUM_DIGITS)[facts()]
        mistaken = np.eye(NUM_DIGITS)[self.misconceptions]
        other = (1 - self.weak_right - self.weak_misconception) / (NUM_DIGITS - 2)
        belief = self.weak_right * right + self.weak_misconception * mistaken
        belief = belief + other * (1 - right - mistaken)
        return np.where(self.is_weak[..., None], belief, right)

    @functools.cached_property
    def heldout(self) -> np.ndarray:
        """[num_problems] bool: one problem in ten, for evaluation only."""
        lefts, steps = self.problem(np.arange(self.num_problems))
        code = _hash(lefts, *np.moveaxis(steps, -1, 0))
        return (code >> np.uint64(40)) % np.uint64(10) == 0

    def problem(self, index) -> tuple[np.ndarray, np.ndarray]:
        """Left operands [...] and steps [..., num_ops] of the problems with these numbers."""
        rest, steps = np.asarray(index), []
        for _ in range(self.num_ops):
            rest, step = np.divmod(rest, len(STEPS))
            steps.append(step)
        return rest, np.stack(steps[::-1], axis=-1)

    def record(self, index: int) -> Problem:
        """Problem number `index` as text."""
        left, steps = self.problem(index)
        results = true_results(left, steps)
        lefts = (left, *results[:-1])
        lemmas = [f"{a}{STEPS[s]}={r}" for a, s, r in zip(lefts, steps, results, strict=True)]
        order = np.argsort(_hash(index, np.arange(self.num_ops), 2), kind="stable")
        return Problem(
            id=f"chain{self.num_ops}_{index:06d}",
            question=f"{left}" + "".join(STEPS[s] for s in steps),
            solution=" ".join([f"#{results[-1]}", *(lemmas[i] for i in order)]),
            answer=str(results[-1]),
        )


def facts() -> np.ndarray:
    """[10, 20] int: the true result of every fact (left digit, step)."""
    left, operand = np.arange(NUM_DIGITS)[:, None], np.arange(NUM_DIGITS)[None]
    return np.concatenate([left + operand, left * operand], axis=1) % NUM_DIGITS


def true_results(left, steps) -> np.ndarray:
    """[..., num_ops] int: the running result after each step."""
    results = []
    for i in range(steps.shape[-1]):
        left = facts()[left, steps[..., i]]
        results.append(left)
    return np.stack(results, axis=-1)


def own_notation(question: str) -> str:
    """The right response to a question in the student's own notation, without the stop token."""
    left, lines = int(question[0]), []
    for step in re.findall(r"[+*][0-9]", question):
        result = int(facts()[left, STEPS.index(step)])
        lines.append(f"{left}{step}={result};")
        left = result
    return "".join([*lines, f"#{left}"])


def own_solution(problem: Problem) -> str:
    """A problem's right response in the student's own notation, for `References.template`."""
    return own_notation(problem.question_text)


def grade(problem: Problem, completion: str) -> float:
    """1.0 if the completion states the problem's answer once and in place, else 0.0.

    There must be exactly one `#`, the digit after it must be the answer, and it must end the text
    (own notation) or stand before a space (reference notation). Text that goes on in any other
    way is wrong: that is how a response without its stop token looks once decoded.
    """
    return float(extract_answer(completion) == problem.answer)


def extract_answer(completion: str) -> str | None:
    """The digit that a well-formed completion states as its answer."""
    match = _ANSWER_PATTERN.fullmatch(completion)
    return match and match.group(1)


def correction(question: str, completion: str) -> str:
    """What the first wrong line of an answer should have been, `4*5=0`.

    Returns:
      A line of the right answer, "" where no line is wrong or it is not in the own notation.
    """
    if _NOTATION_PATTERN.fullmatch(completion) is None:
        return ""
    pairs = zip(own_notation(question).split(";")[:-1], completion.split(";")[:-1], strict=False)
    return next((right for right, said in pairs if right != said), "")


def _hash(*parts) -> np.ndarray:
    """64-bit hash of integers (broadcast): a congruential generator step for each part.

    The shift between two steps breaks the generator's linearity (without it only three of the
    six orders of three lemmas would ever occur). Only the upper bits are good.
    """
    code = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in (*parts, 0, 0):
            code = (code + np.asarray(part).astype(np.uint64) + np.uint64(1)) * np.uint64(
                6364136223846793005
            ) + np.uint64(1442695040888963407)
            code = code ^ (code >> np.uint64(29))
    return code
