# SPDX-License-Identifier: Apache-2.0
"""Answers: finding them in a model's text, comparing them, and doing so in worker processes.

Model output is hostile: `9**9**9**9`, megabytes of braces or deep nesting must neither hang nor
kill a run. Extraction is linear in the text. Whatever parses mathematics belongs in a
`GraderPool`, where every grade has a hard time limit and a dead worker costs one answer.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from opsd_jax.errors import UserError

Grader: TypeAlias = Callable[[str, str], float]  # (answer, completion) -> grade in [0, 1]

MAX_ANSWER_LEN = 2000  # characters; parsing longer garbage would take the whole time limit

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text, not a bracket
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
)


def extract_boxed(text: str) -> str | None:
    r"""The inside of the last `\boxed{...}`, braces balanced; None if there is none or it is open.

    An unclosed last box is not replaced by an earlier one: the model was still answering.
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth = 1
    for match in _BRACE.finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start : match.start()].strip()
    return None


def extract_last_number(text: str) -> str | None:
    """The last number in plain notation: `-1,234.50` gives "-1234.5"; None if there is none.

    Compared as text, so that a number of a million digits costs no more than its length.
    """
    number = None
    for match in _NUMBER.finditer(text):
        number = match
    if number is None:
        return None
    digits = number.group().replace(",", "").replace("\u2212", "-")
    whole, _, fraction = digits.lstrip("-").partition(".")
    sign, whole = "-" * digits.startswith("-"), whole.lstrip("0") or "0"
    fraction = fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return value if value == "0" else sign + value


def extract_hashes(text: str) -> str | None:
    """What follows the last `####` (GSM8K's notation), thousands separators removed."""
    _, mark, tail = text.rpartition("####")
    return tail.strip().replace(",", "") if mark else None


def extract_tagged(text: str) -> str | None:
    """The inside of the last `<answer>...</answer>`."""
    before, end_tag, _ = text.rpartition("</answer>")
    _, start_tag, inside = before.rpartition("<answer>")
    return inside.strip() if end_tag and start_tag else None


def extract_final(text: str) -> str:
    """The tagged answer, else the boxed one, else all of the text."""
    for extract in (extract_tagged, extract_boxed):
        found = extract(text)
        if found is not None:
            return found
    return text.strip()


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
    """

    extract: Callable[[str], str | None]
    same: Callable[[str, str], bool]

    def __call__(self, answer: str, completion: str) -> float:
        """1.0 if the completion's answer is `answer`."""
        found = self.extract(completion)
        return float(found is not None and self.same(answer, found))


def same_text(answer: str, other: str) -> bool:
    """Equal, white space around them aside."""
    return answer.strip() == other.strip()


def same_number(answer: str, other: str) -> bool:
    """The last numbers of both have one value."""
    number = extract_last_number(answer)
    return number is not None and extract_last_number(other) == number


def same_value(answer: str, other: str) -> bool:
    """Both are a number and nothing else, of one value."""
    alone = _NUMBER.fullmatch(answer.strip()) and _NUMBER.fullmatch(other.strip())
    return bool(alone) and same_number(answer, other)


def same_box(answer: str, other: str) -> bool:
    """Equal, all white space aside."""
    return "".join(answer.split()) == "".join(other.split())


def same_mathematics(answer: str, other: str) -> bool:
    """Whether `other` is mathematically equal to `answer`; only for a `GraderPool`.

    Follows the official evaluation: both sides are parsed without fallback, the reference goes
    first (the comparison is not symmetric), and equal text counts whatever the parser says.
    Unlike there, both sides are parsed as LaTeX: as plain text `5\\pi` is read as 5. The time
    limits of math-verify are off: the pool's cannot be evaded.
    """
    if max(len(answer), len(other)) > MAX_ANSWER_LEN:
        return False
    if same_box(answer, other):
        return True
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


GRADERS: Mapping[str, AnswerForm] = {
    "exact": AnswerForm(str.strip, same_text),
    "last_number": AnswerForm(extract_last_number, same_number),
    "boxed": AnswerForm(extract_boxed, same_box),
    "math_verify": AnswerForm(extract_boxed, same_mathematics),
}


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
