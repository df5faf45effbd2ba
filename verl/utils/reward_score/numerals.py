"""Numbers as answers write them, read exactly: no binary floating point in between."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 1000  # characters of a number
MAX_EXPONENT = 1000  # of ten
MIN_DIGITS = 6  # significant ones of a rounded number that is taken for the exact one

DECIMAL = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+|(?=\.\d))(?:\.\d*)?"
EXPONENT = r"(?:\{\s*([+-]?\d+)\s*\}|(\d)(?!\d))"
SIGN = r"\s*(-?)\s*"
PERCENT = r"\s*(%?)"
AS_FRACTION = re.compile(rf"{SIGN}(\d+)?\s*\\frac\{{\s*(-?{DECIMAL})\s*\}}\{{\s*(-?{DECIMAL})\s*\}}{PERCENT}")
AS_QUOTIENT = re.compile(rf"{SIGN}(?:(\d+) )?({DECIMAL})\s*/\s*({DECIMAL}){PERCENT}")
AS_DECIMAL = re.compile(rf"{SIGN}({DECIMAL})(?:\\overline\{{(\d+)\}})?{PERCENT}")
AS_SCIENTIFIC = re.compile(rf"{SIGN}(?:({DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^{EXPONENT}{PERCENT}")
AS_E_NOTATION = re.compile(rf"{SIGN}({DECIMAL})[eE]([+-]?\d+){PERCENT}")


@dataclass(frozen=True)
class Number:
    """`value` as written, so 50 for 50%. `place` is the value of the last digit of a decimal or power of ten, thus of a
    number that may be rounded; None of an exact one."""

    value: Fraction
    place: Fraction | None = None
    percent: bool = False

    def __str__(self) -> str:
        return f"{self.value}{'%' * self.percent}"

    def equals(self, other: "Number") -> bool:
        """Equal values, or one is the other, no integer, rounded to six or more digits: 0.333333 is 1/3, 0.333 is not.
        A percentage also equals the number without the sign: 50% is 1/2 and, asked for per cent, 50."""
        if self.percent == other.percent:
            return self._rounds(other.value) or other._rounds(self.value)
        part, whole = (self, other) if self.percent else (other, self)
        return any(
            scaled._rounds(whole.value) or whole._rounds(scaled.value) for scaled in (part.scaled(1), part.scaled(100))
        )

    def scaled(self, divisor: int) -> "Number":
        return Number(self.value / divisor, self.place and self.place / divisor)

    def _rounds(self, exact: Fraction) -> bool:
        if self.value == exact or self.place is None or exact.denominator == 1:
            return self.value == exact
        return abs(self.value) >= self.place * 10 ** (MIN_DIGITS - 1) and abs(self.value - exact) <= self.place / 2


def number(text: str) -> Number | None:
    """The number that a text in normal form is: integer, decimal (also repeating, with \\overline), fraction, mixed
    number or power of ten, perhaps in per cent; None if it is none."""
    if len(text) > MAX_LENGTH:
        return None
    if match := AS_FRACTION.fullmatch(text) or AS_QUOTIENT.fullmatch(text):
        sign, whole, top, bottom, percent = match.groups()
        if not _exact(bottom):
            return None
        value = Fraction(whole or 0) + _exact(top) / _exact(bottom)
        return Number(-value if sign else value, percent=bool(percent))
    if match := AS_DECIMAL.fullmatch(text):
        sign, digits, period, percent = match.groups()
        value = _exact(digits)
        if period:
            places = len(digits.partition(".")[2])
            value += Fraction(int(period), (10 ** len(period) - 1) * 10**places)
        return Number(-value if sign else value, None if period else _place(digits), bool(percent))
    if match := AS_SCIENTIFIC.fullmatch(text):
        sign, digits, braced, bare, percent = match.groups()
        exponent = int(braced or bare)
    elif match := AS_E_NOTATION.fullmatch(text):
        sign, digits, power, percent = match.groups()
        exponent = int(power)
    else:
        return None
    if abs(exponent) > MAX_EXPONENT:
        return None
    scale = Fraction(10) ** exponent
    value = _exact(digits or "1") * scale
    place = scale * (_place(digits) or 1) if digits else None
    return Number(-value if sign else value, place, bool(percent))


def _exact(digits: str) -> Fraction:
    return Fraction(re.sub(r"[\s,]", "", digits).rstrip("."))


def _place(digits: str) -> Fraction | None:
    return Fraction(1, 10 ** len(digits.partition(".")[2])) if "." in digits else None
