# SPDX-License-Identifier: Apache-2.0
r"""One reading of numbers for all graders and votes: a number is whole or it is none.

    -1,234.50   3/2   2 3/4   .5   1.5e-07   2 \times 10^{-3}   \frac{1}{2}   $5   5\%   1{,}000

Values are exact (`fractions.Fraction`). White space between digits keeps them apart. Digits that
are a part of something else (3x, 5\pi, 2^10, 12:30, 1.2.3) are no number, and neither is 1 000,
which may be one number or two. Digits of a name (x2, a_1) are passed over. Percent and degree
signs, currencies and units are no part of the value: 5% is 5.

Reading costs one scan for the last digit, whatever the text: a window before it holds any number.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 1000  # of one number and of its exponent's value: integers are quadratic in them

_VIEW = 40  # characters that are looked at on either side of a number
_WINDOW = 4096  # characters up to the last digit, of which the last number is read

# What TeX and typography write for the same thing, in the order in which it is replaced.
_ARGUMENT = r" {0,2}(?:\{ ?([-+]?[0-9.,]{1,80}) ?\}|([0-9]))"
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_UNITS = "[kcdm]?m|[kcm]?s|km/h|in|ft|yd|mi|inch|inches|feet|met(?:er|re)s?|units?"
_THIN = "(?:\\\\[,;: ]|[~\u2009\u202f])"
_APART = r"(^(?:[\s~]|\\[,;: ])*|[=(:${] ?|[A-Za-z]{2} )"
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile("[０-９]"), lambda m: str(unicodedata.decimal(m[0]))),
    (re.compile("[\u2212\ufe63\uff0d]"), "-"),
    (re.compile("[\u2044\u2215÷]"), "/"),
    (re.compile("(?<![0-9.])10(⁻?[⁰¹²³⁴-⁹]+)"), lambda m: f"10^{{{m[1].translate(_POWERS)}}}"),
    # The power of a unit, as in 25 cm^2 and 9.8 m/s^{2}, is no part of the number.
    (
        re.compile(rf"(?<=[0-9 ~,;{{/])((?:{_UNITS})\}}?\$?) ?\^ ?(?:\{{[23]\}}|[23](?!\.?[0-9]))"),
        r"\1",
    ),
    (
        re.compile(r"\{ ?([-+]?[0-9.,]{1,80}) ?\\over(?![A-Za-z]) ?([-+]?[0-9.,]{1,80}) ?\}"),
        r"\\frac{\1}{\2}",
    ),
    (re.compile(r"\\!|\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\displaystyle(?![A-Za-z])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(rf"(?<=[0-9]){_THIN}(?=[0-9]{{3}}(?![0-9]))"), ","),
    # A sign that TeX keeps a little apart, where nothing stands before it to be taken from.
    (re.compile(rf"{_APART}([-+]){_THIN}+ *(?=\\?[$€£]?[.0-9])"), r"\1\2"),
    (re.compile("\\\\[,;: ]|\\\\quad(?![A-Za-z])|[~\u00a0\u2009\u202f]"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))"), "°"),
    (re.compile(r"\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|[×·⋅]"), "*"),
]
_FRACTION = re.compile(
    rf"(?:([0-9]) {{0,2}})?\\[dtc]?frac(?![A-Za-z]){_ARGUMENT}{_ARGUMENT}([0-9.]?)"
)
_VULGAR = {
    sign: unicodedata.normalize("NFKC", sign).replace("\u2044", "/") for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_VULGAR_SIGN = re.compile(rf"([0-9]?)([{''.join(_VULGAR)}])")

_DIGIT = re.compile(rf"[\d{''.join(_VULGAR)}]")
_OTHER_SCRIPT = re.compile(r"(?![0-9０-９])\d")  # digits that are seen and not read

# Digits and all that joins digits, so that a number is not taken out of the middle of a date.
_RUN = re.compile(
    r"((?:\.(?=[0-9]))?[0-9]+(?:[.,:'][0-9]+| ?/ ?-?\.?[0-9]+)*)"
    r"([eE][-+]?[0-9]+(?![A-Za-z])"
    r"| ?(?:[*xX] ?10|(?<=10)) ?\^ ?(?:\{ ?[-+]?[0-9]+ ?\}|[-+]?[0-9]+))?"
)
_DECIMAL = r"((?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_QUOTIENT = re.compile(rf"{_DECIMAL}(?: ?/ ?(-?){_DECIMAL})?")
_INTEGER = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+")

_FONT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox) ?\{([^{}]*)\}")
_CURRENCY = re.compile(r"[$€£¥₹] ?$")
_COMMAND = re.compile(r"\\([A-Za-z]+) ?(?:\[[^\]]{0,9}\]?)?\{? ?$")
_TAKING_COMMANDS = frozenset(
    "frac dfrac tfrac cfrac over binom sqrt overline pm mp log ln lg exp sin cos tan".split()
)
_NAME = re.compile(r"(?:[A-Za-zα-ωΑ-Ω]|_ ?\{?)$")
_TAKEN_LEFT = re.compile(
    r"(?:\^ ?\{? ?|[√±∓] ?|\}\{?|[0-9]\.|(?:[0-9)]|(?<![A-Za-z])[a-z])\*\*|[\w)}\]] ?/ ?-?"
    r"|(?<![A-Za-z])(?:(?:sqrt|log|ln|exp|sin|cos|tan)[( ] ?|[CP]\( ?))$"
)
_TAKEN_RIGHT = re.compile(
    r" ?\^| ?[⁰¹²³⁴-⁹⁻√π∞]|_| ?\\(?:pi|sqrt|[dtc]?frac|binom|infty|overline)(?![A-Za-z])"
    r"|[abceijknpqrtuvwxyz](?![A-Za-z])| [xyz](?![A-Za-z ]| ?[0-9])"
    r"| ?/ ?(?:[a-z](?![A-Za-z])|\\|\()"
)
_GOES_ON = re.compile(r" ?(?:\.\.\.|…|\\[lc]?dots)")
_UNIT = re.compile(r"(?: ?%| ?°| ?[$€£¥₹])?")
_LIST_MINUS = re.compile(r"[=≈(<>\[{:,$] *- $")


class Number(NamedTuple):
    """A number, or what has digits and is none.

    value: None for the latter; start, end: where, with sign and unit, in the rewritten text.
    """

    value: Fraction | None
    start: int
    end: int


def last_number(text: str) -> Fraction | None:
    """The value of the last number; None without one, or if the last digits are not a number."""
    last = _DIGIT.search(text[::-1])
    if last is None or _OTHER_SCRIPT.match(last[0]):
        return None
    at = len(text) - last.end()
    found = next(_numbers(_rewritten(text[max(0, at - _WINDOW) : at + 1 + _VIEW])), None)
    return found and found.value


def only_number(text: str) -> Fraction | None:
    """The value of the one number of a text, between words or not; None if it has another."""
    if len(text) > _WINDOW or _OTHER_SCRIPT.search(text):
        return None
    alone = read_number(text)
    if alone is not None:
        return alone
    found = _numbers(_rewritten(text))
    first = next(found, None)
    return first.value if first and next(found, None) is None else None


def read_number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else, `$5$` and `5.` included."""
    text = text.strip()
    if len(text) > _WINDOW:
        return None
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    text = _rewritten(without_dollars(text)).strip()
    text = re.sub(r"^([-+]) +", r"\1", text)
    found = next(_numbers(text), None)
    return found.value if found and (found.start, found.end) == (0, len(text)) else None


def plain_number(value: Fraction) -> str:
    """The shortest way to write a value: `-1234.5` where decimals end, else `p/q`."""
    twos = (value.denominator & -value.denominator).bit_length() - 1
    rest, fives = value.denominator >> twos, 0
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    whole, fraction = digits[: len(digits) - places], digits[len(digits) - places :]
    return "-" * (value < 0) + whole + "." * (places > 0) + fraction


def without_dollars(text: str) -> str:
    r"""The inside of `$...$`, `\(...\)`, `\[...\]` or `\text{...}` where it is all of the text."""
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inside = text[len(start) : -len(end)]
        if text.startswith(start) and text.endswith(end) and inside and end not in inside:
            text = inside.strip()
            break
    font = _FONT.fullmatch(text)
    return font[1].strip() if font else text


def _rewritten(text: str) -> str:
    """The same with plain signs for those of TeX and typography."""
    for pattern, plain in _REWRITES:
        text = pattern.sub(plain, text)
    text = _FRACTION.sub(_quotient, text)
    return _VULGAR_SIGN.sub(lambda m: f"{m[1]}{' ' * bool(m[1])}{_VULGAR[m[2]]}", text)


def _quotient(match: re.Match[str]) -> str:
    r"""`2\frac{3}{4}` as `2 3/4`; a product, as `\frac{1}{2}3`, stays what it is."""
    before, top, top_digit, bottom, bottom_digit, after = match.groups()
    top, bottom = top or top_digit, bottom or bottom_digit
    if after and after != ".":
        return match.group()
    sign = "-" * ((top[0] == "-") != (bottom[0] == "-"))
    if before and sign:
        return match.group()
    before = before or ""
    return f"{before}{' ' * bool(before)}{sign}{top.lstrip('-+')}/{bottom.lstrip('-+')}{after}"


def _numbers(text: str) -> Iterator[Number]:
    """From the last to the first."""
    runs = [(match.start(), match.end(1), match.end()) for match in _RUN.finditer(text)]
    at = len(runs) - 1
    while at >= 0:
        start, core_end, end = runs[at]
        at -= 1
        left = text[max(0, start - _VIEW) : start]
        value = _value(text[start:core_end], text[core_end:end])
        if at >= 0 and value is not None and runs[at][1] == runs[at][2]:
            before = text[runs[at][0] : runs[at][1]]
            gap = text[runs[at][2] : start]
            whole = bool(_INTEGER.fullmatch(before)) and gap in (" ", "  ")
            if whole and "/" in text[start:core_end] and end == core_end and 0 < value < 1:
                value += int(before.replace(",", "")) if len(before) <= MAX_DIGITS else 0
                start = runs[at][0]
                at -= 1
            elif whole and len(before) <= 3 and re.match(r"[0-9]{3}(?!,)", text[start:end]):
                value = None  # 1 000: one number or two
            left = text[max(0, start - _VIEW) : start]
        number = _in_context(text, value, start, end, left)
        if number is not None:
            yield number


def _in_context(
    text: str, value: Fraction | None, start: int, end: int, left: str
) -> Number | None:
    """The number with its sign and unit; None for the digits of a name."""
    stripped = _CURRENCY.sub("", left)
    negative = False
    if stripped.endswith(("-", "+")) and not re.search(r"(?:[\w.)\]}]|--)[-+]?$", stripped[:-1]):
        negative, stripped = stripped[-1] == "-", stripped[:-1]
        stripped = _CURRENCY.sub("", stripped)
    elif _LIST_MINUS.search(stripped):
        negative, stripped = True, stripped[:-2]
    start -= len(left) - len(stripped)
    right = text[end : end + _VIEW]
    command = _COMMAND.search(stripped)
    if command is None and stripped[-1:] == left[-1:] and _NAME.search(stripped):
        return None
    taken = bool(_TAKEN_LEFT.search(stripped) or _TAKEN_RIGHT.match(right))
    taken |= command is not None and command[1] in _TAKING_COMMANDS
    taken |= "." in text[start:end] and _GOES_ON.match(right) is not None
    unit = _UNIT.match(right)
    end += unit.end() if unit else 0
    if taken or value is None:
        return Number(None, start, end)
    return Number(-value if negative else value, start, end)


def _value(core: str, power: str) -> Fraction | None:
    """`1,234.5`, `3/2` and a power of ten behind it; None if that is not what it is."""
    match = _QUOTIENT.fullmatch(core)
    if match is None or len(core) > MAX_DIGITS:
        return None
    top, sign, bottom = match.groups()
    value = Fraction(top.replace(",", ""))
    if bottom is not None:
        divisor = Fraction(sign + bottom.replace(",", ""))
        if not divisor:
            return None
        value /= divisor
    if not power:
        return value
    exponent = re.search(r"[-+]?[0-9]+(?=[ }]*$)", power)
    assert exponent is not None
    if len(exponent[0]) > 6 or abs(int(exponent[0])) > MAX_DIGITS:
        return None
    is_power_alone = re.match(r"[ ^]+", power) and "10" not in power.split("^")[0]
    if is_power_alone and core != "10":
        return None
    scale = Fraction(10) ** int(exponent[0])
    return scale if is_power_alone else value * scale
