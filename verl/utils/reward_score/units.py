"""Units after a number. They are optional, as the question names them, but a wrong one makes the answer wrong."""

import re

from verl.utils.reward_score.latex import has_prose
from verl.utils.reward_score.numerals import Number, number

NAMES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram",
    "kg": "kilogram",
    "oz": "ounce",
    "lb": "pound",
    "ml": "milliliter millilitre",
    "l": "liter litre",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr",
    "dollar": "\\$ usd",
    "euro": "€",
    "cent": "",
    "degree": "deg",
    "celsius": "degreec degreescelsius",
    "fahrenheit": "degreef degreesfahrenheit",
    "radian": "rad",
    "mi/h": "mph",
    "km/h": "kph kmh",
    "n": "newton",
    "j": "joule",
    "w": "watt",
    "v": "volt",
    "k": "kelvin",
    "hz": "hertz",
    "pa": "pascal",
    "mol": "mole",
    "am": "a.m",
    "pm": "p.m",
}
CANONICAL = {name: unit for unit, names in NAMES.items() for name in [unit, *names.split()]}
POWERS = [(r"^(?:square|sq\.?)(?=[a-z])", "2"), (r"^(?:cubic|cu\.?)(?=[a-z])", "3"), ("squared$", "2"), ("cubed$", "3")]
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

WRAPPED = re.compile(
    r"(.*?)\s*(\\text\{(?:[^{}\d]|\^\d)*\}(?:\\text\{(?:[^{}\d]|\^\d)*\}|\\cdot|\^\{?-?\d\}?|[A-Za-z\s/.])*)", re.DOTALL
)
BARE = re.compile(r"(.*?(?:[\d})%]|\\pi))(\s*)([A-Za-z][A-Za-z ./]*(?:\^\{?\d\}?)?)", re.DOTALL)
ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")  # degrees are its argument's
BEFORE_CURRENCY = re.compile(r"(-?[\d.,]*\d)\s*(\\\$|€|£)")
CURRENCY = re.compile(r"(-?)\s*(\\\$|€|£)\s*([^\\€£].*|\\[^$].*)", re.DOTALL)


def split_unit(text: str) -> tuple[str, str]:
    """Value and unit of a text in normal form, the unit empty if there is none. Letters that are not in `\\text{}` are
    a unit if it is known, or after a number if they are words; a single one only after a space, as 5m is a product."""
    if match := BEFORE_CURRENCY.fullmatch(text):
        return match[1], match[2]
    if match := CURRENCY.fullmatch(text):
        return split_unit(match[1] + match[3])[0], match[2]
    if (match := WRAPPED.fullmatch(text)) and match[1] and not ANGLE_FUNCTION.search(match[1]):
        return _scaled(match[1], match[2])
    if match := BARE.fullmatch(text):
        value, space, unit = match.groups()
        known = canonical(unit) is not None and (space or len(unit) > 1)
        if known or (number(value) and has_prose(unit)):
            return _scaled(value, unit)
    return text, ""


def quantity(text: str) -> Number | None:
    """The number of a text in normal form, with or without a unit; None if there is more or less than that."""
    return number(split_unit(text)[0])


def _scaled(value: str, unit: str) -> tuple[str, str]:
    """A word such as "million" is part of the value."""
    if not unit and (match := BARE.fullmatch(value)):
        value, unit = match[1], match[3]
    first, _, rest = re.sub(r"\\text|[{}]", " ", unit).strip().partition(" ")
    factor, read = SCALES.get(first.lower()), number(value)
    return (str(read.value * factor), rest.strip()) if factor and read else (value, unit)


def canonical(unit: str) -> str | None:
    """The symbol of a unit with its power, as cm^2 or m/s; None if it is not known."""
    unit = re.sub(r"\\text|\\cdot|[{}\s]", "", unit).lower().rstrip(".")
    quotient = re.split(r"/|(?<=[a-z])per(?=[a-z])", unit)
    if len(quotient) == 2 and unit not in CANONICAL:
        top, bottom = canonical(quotient[0]), canonical(quotient[1])
        return f"{top}/{bottom}" if top and bottom else None
    unit, _, power = unit.partition("^")
    for pattern, exponent in POWERS:
        shorter = re.sub(pattern, "", unit)
        if shorter != unit:
            unit, power = shorter, exponent
    name = CANONICAL.get(unit) or CANONICAL.get(unit.removesuffix("s"))
    return f"{name}^{power}" if name and power else name
