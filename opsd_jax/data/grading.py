# SPDX-License-Identifier: Apache-2.0
"""Answers: finding them in a model's text, and comparing them.

Model output is hostile: `9**9**9**9`, megabytes of braces or deep nesting must neither hang nor
kill a run. Extraction is linear in the text. Whatever parses mathematics belongs in a
`GraderPool`, where every grade has a hard time limit and a dead worker costs one answer.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias

from opsd_jax.data.numbers import (
    last_number,
    only_number,
    plain_number,
    read_number,
    without_dollars,
)
from opsd_jax.errors import UserError

Given: TypeAlias = float | tuple[float, str]  # a grade in [0, 1], maybe with feedback
Grader: TypeAlias = Callable[[str, str], Given]  # (answer, completion) -> grade

MAX_ANSWER_LEN = 2000  # characters; parsing longer garbage would take the whole time limit
_CLOSE = Fraction(1, 10_000)  # relative; below it math-verify decides whether a number was rounded

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text, not a bracket
_BETWEEN_BOXES = re.compile(
    r"\$?\s*(?:[,;]\s*)?(?:and|or|\\text\s?\{\s*(?:and|or)\s*\})?\s*(?:\\quad\s*)?\$?\s*"
)
_SIZES = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_SPACES = re.compile(r"(?:\s|\\[,;:! ]|~|\\q?quad(?![A-Za-z]))+")


def extract_boxed(text: str) -> str | None:
    r"""The inside of the last `\boxed{...}`, braces balanced; None if there is none or it is open.

    Several boxes with nothing but `,` or "and" or "or" between them are one answer of several
    parts, joined by commas: whoever boxes two numbers has not given one of them. An unclosed last
    box is not replaced by an earlier one: the model was still answering.
    """
    parts = _last_boxes(text)
    return ", ".join(parts) if parts else None


def _last_boxes(text: str) -> list[str]:
    """The parts of the boxed answer; none where there is no box or the last one is open."""
    boxes = [(match.start(), match.end()) for match in _BOX.finditer(text)]
    end = _closing(text, boxes[-1][1], len(text)) if boxes else None
    if end is None:
        return []
    parts = [text[boxes[-1][1] : end].strip()]
    for (_, inside), (following, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        end = _closing(text, inside, following)
        between = None if end is None else text[end + 1 : following]
        if not between or len(between) > 40 or not _is_conjunction(between):
            break
        parts.append(text[inside:end].strip())
    return parts[::-1]


def _is_conjunction(between: str) -> bool:
    return bool(re.search(r"[,;]|and|or", between) and _BETWEEN_BOXES.fullmatch(between))


def _closing(text: str, start: int, stop: int) -> int | None:
    """Where the brace that is open at `start` is closed, None if that is not before `stop`."""
    depth = 1
    for match in _BRACE.finditer(text, start, stop):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def extract_last_number(text: str) -> str | None:
    """The last number in plain notation: `-1,234.50` gives "-1234.5", `1/3` itself.

    None without one, or where the last digits are a part of something else (`numbers`).
    """
    value = last_number(text)
    return None if value is None else plain_number(value)


def extract_hashes(text: str) -> str | None:
    """What follows the last `####` on its line (GSM8K's notation).

    A number at its beginning that is the only one there is taken alone, in plain notation.
    """
    _, mark, tail = text.rpartition("####")
    if not mark:
        return None
    line = tail.strip().split("\n")[0].strip()
    value = only_number(line) if re.match(r"[-+\u2212$\\.0-9]", line) else None
    return line if value is None else plain_number(value)


def extract_tagged(text: str) -> str | None:
    r"""The inside of the last `<answer>...</answer>`, without a box or dollars around it."""
    before, end_tag, _ = text.rpartition("</answer>")
    _, start_tag, inside = before.rpartition("<answer>")
    return _unwrapped(inside) if end_tag and start_tag else None


def extract_final(text: str) -> str | None:
    """The tagged answer, else the boxed one, else all of the text, of what stands behind thoughts.

    None where thinking has begun (`<think>`) and not ended.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    tagged = extract_tagged(text)
    return _unwrapped(text) if tagged is None else tagged


def _unwrapped(text: str) -> str:
    boxed = extract_boxed(text)
    return without_dollars(text.strip() if boxed is None else boxed)


EXTRACTORS: Mapping[str, Callable[[str], str | None]] = {
    "text": str.strip,
    "boxed": extract_boxed,
    "last_number": extract_last_number,
    "hashes": extract_hashes,
    "tagged": extract_tagged,
    "final": extract_final,
}


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """A grader made of two halves, which also lets answers vote.

    Attributes:
      extract: text -> its answer, None where there is none.
      same: whether two answers are one; the reference or the earlier one goes first.
      state: an answer -> a completion that states it, by which keys are checked at load
        (`key_fault`); None checks none.
    """

    extract: Callable[[str], str | None]
    same: Callable[[str, str], bool]
    state: Callable[[str], str] | None = None

    def __call__(self, answer: str, completion: str) -> float:
        """1.0 if the completion's answer is `answer`."""
        found = self.extract(completion)
        return float(found is not None and self.same(answer, found))


def same_text(answer: str, other: str) -> bool:
    """Equal, white space around them aside."""
    return answer.strip() == other.strip()


def same_number(answer: str, other: str) -> bool:
    """Both hold one number, words around it aside, and of one value."""
    number = only_number(answer)
    return number is not None and only_number(other) == number


def same_value(answer: str, other: str) -> bool:
    """Both are a number and nothing else, of one value."""
    number = read_number(answer)
    return number is not None and read_number(other) == number


def same_box(answer: str, other: str) -> bool:
    """One value or, where neither is a number, one text; white space counts between digits."""
    first, second = read_number(answer), read_number(other)
    if first is None and second is None:
        return _box_text(answer) == _box_text(other)
    return first == second  # 1, 234 and 1,234 differ in a space alone, and one is two numbers


def _box_text(text: str) -> str:
    r"""Without what changes looks alone: dollars, `\text{}` around it, `\left`, spaces.

    A space between two digits is left, TeX's as one of ours.
    """
    text = without_dollars(text.strip())
    text = _FRACTIONS.sub(r"\\frac", _SIZES.sub("", text)).replace("\u2212", "-")

    def space(match: re.Match[str]) -> str:
        neighbours = text[match.start() - 1 : match.start()] + text[match.end() : match.end() + 1]
        return " " * (len(neighbours) == 2 and neighbours.isdigit())

    return _SPACES.sub(space, text)


def same_mathematics(answer: str, other: str) -> bool:
    """Whether `other` is mathematically equal to `answer`; only for a `GraderPool`.

    Follows the official evaluation: both sides are parsed without fallback, the reference goes
    first (the comparison is not symmetric), and equal text counts whatever the parser says.
    Unlike there, both sides are parsed as LaTeX: as plain text `5\\pi` is read as 5; and two
    plain numbers are compared by `numbers`, because the parser reads `2 3/4` as 5/4 and `1e-5` as
    e - 5. It is asked where they are close (it rounds to six decimals) or one is a percentage.
    The time limits of math-verify are off: the pool's cannot be evaded.
    """
    if max(len(answer), len(other)) > MAX_ANSWER_LEN:
        return False
    if same_box(answer, other):
        return True
    first, second = read_number(answer), read_number(other)
    if first is not None and second is not None and "%" not in answer + other:
        if abs(first - second) > abs(first) * _CLOSE:
            return False
    import math_verify

    reference, prediction = (
        math_verify.parse(
            f"\\boxed{{{text.strip().strip('$')}}}",
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        for text in (answer, other)
    )
    return bool(math_verify.verify(reference, prediction, timeout_seconds=None))


def _in_box(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


GRADERS: Mapping[str, AnswerForm] = {
    "exact": AnswerForm(str.strip, same_text, str),
    "last_number": AnswerForm(extract_last_number, same_number, str),
    "boxed": AnswerForm(extract_boxed, same_box, _in_box),
    "math_verify": AnswerForm(extract_boxed, same_mathematics, _in_box),
}

_TAGGED = re.compile(r"<answer>(?:(?!<answer>|</answer>).){0,4000}</answer>", re.DOTALL)
# Lines that hold a number alone: `#### Step 1` is a heading.
_NUMBER_LINE = re.compile(r"####[ \t]*[-+$]{0,2}[0-9.][0-9.,/ ]{0,80}$", re.MULTILINE)
_MARKED = {"hashes": _NUMBER_LINE, "tagged": _TAGGED, "final": _TAGGED}
_SENTENCE = re.compile(r"\n|\banswer\s{0,3}(?:is\b|[:=])", re.I)


def is_prose(answer: str) -> bool:
    """Whether it is what nobody writes into a box: lines, a sentence, or "the answer is"."""
    answer = answer.strip()
    words = [word for word in answer.split() if word.isalpha()]
    return bool(_SENTENCE.search(answer)) or (len(words) >= 3 and answer[-1] in ".!?")


def key_fault(grader: Grader, answer: str) -> str | None:
    """What is wrong with a key that its own grader can never find in a completion, else None.

    Args:
      grader: a grader without `state`, as a function of the user's, is asked nothing.
      answer: the key.
    """
    if not isinstance(grader, AnswerForm) or grader.state is None:
        return None
    if len(answer) > MAX_ANSWER_LEN:
        return f"is longer than {MAX_ANSWER_LEN:,} characters"
    if grader.state is _in_box and is_prose(answer):
        return "is prose, which no box holds"
    if grader(answer, grader.state(answer)) == 1.0:
        return None
    if grader.same is same_number:
        return "is not one number"
    if _BOX.search(answer):
        return "has a box of its own: the answer is inside it"
    return "grades a completion that states it as wrong; are its braces balanced?"


def reference_answer(answer_from: str, text: str) -> str | None:
    r"""The answer in a reference, as `EXTRACTORS[answer_from]` finds it; None if there is none.

    Raises:
      UserError: several boxes, tags or `####` with different answers, of which all but the last
        would be lost.
    """
    parts = _last_boxes(text) if answer_from in ("boxed", "final", "tagged") else []
    if 0 < len(parts) <= 100:
        for match in list(_BOX.finditer(text))[-100:]:
            end = _closing(text, match.end(), len(text))
            box = text[match.end() : end].strip()
            if end is None or len(box) > MAX_ANSWER_LEN or _BOX.search(box):
                continue
            if not any(same_box(box, part) for part in parts):
                raise UserError(
                    f"several boxes, {box[:60]!r} and {parts[-1][:60]!r} among them; keep the one "
                    "that holds the answer"
                )
    answer = EXTRACTORS[answer_from](text)
    said = text.rpartition("</think>")[2] if answer_from == "final" else text
    for given in _MARKED[answer_from].findall(said)[-100:] if answer_from in _MARKED else ():
        other = EXTRACTORS[answer_from](given)
        if answer and other and not same_box(answer, other):
            raise UserError(
                f"several answers, {other[:60]!r} and {answer[:60]!r} among them; keep one"
            )
    return answer


def find_grader(grader: str | Grader, setting: str = "grader") -> Grader:
    """The grader of that name, or the function itself.

    Raises:
      UserError: an unknown name, or math-verify chosen without being installed.
    """
    if callable(grader):
        return grader
    if grader not in GRADERS:
        raise UserError(
            f"{setting} is {grader!r}; choose one of {', '.join(GRADERS)}, or a function "
            "(answer, completion) -> float."
        )
    if grader == "math_verify":
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise UserError(
                f"{setting} 'math_verify' needs the package math-verify: pip install '.[math]', or "
                "choose 'boxed'."
            ) from None
    return GRADERS[grader]


def group_answers(
    answers: Sequence[str | None], same: Callable[[str, str], bool]
) -> list[int | None]:
    """The number of each answer's group; None votes for nothing.

    An answer joins the first group whose first member it equals, in either order (`same` need be
    neither symmetric nor transitive), else it starts a group. Equal texts are never compared.
    """
    groups: dict[str, int] = {}
    firsts: list[str] = []
    for answer in answers:
        if answer is None or answer in groups:
            continue
        joined = (i for i, first in enumerate(firsts) if same(first, answer) or same(answer, first))
        groups[answer] = next(joined, len(firsts))
        if groups[answer] == len(firsts):
            firsts.append(answer)
    return [None if answer is None else groups[answer] for answer in answers]
