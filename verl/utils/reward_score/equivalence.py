"""Whether an answer is the ground truth: first as text, words and exact numbers, then part by part, then by sympy."""

import re
from functools import lru_cache, reduce

from verl.utils.reward_score import symbolic
from verl.utils.reward_score.latex import has_prose, normal_form
from verl.utils.reward_score.numerals import number
from verl.utils.reward_score.structure import (
    EQUALS,
    INEQUALITY,
    NAME,
    SET,
    SYMBOL,
    Collection,
    collection,
    depth,
    exact,
    relation,
)
from verl.utils.reward_score.units import canonical, quantity, split_unit

MAX_LENGTH = 2000  # characters of an answer
MAX_VOTE = 100  # characters of what is counted in a vote
MAX_ELEMENTS = 50  # of a collection whose order means nothing

COMPARABLE = ({"list", "set"}, {"list", "()"}, {"list", "union"})

BASE = re.compile(r"\(?([0-9A-Za-z]+)\)?_\{?(\d{1,2})\}?")
LETTERS = re.compile(r"[A-Za-z][A-Za-z\s.,'!?]*")
CHOICES = frozenset("abcdefghij")  # letters that a model may write in lower case
CHOICE = re.compile(r"\(?([A-Z])\)?")
CHOSEN = re.compile(r"(?:[Oo]ption\s|[Cc]hoice\s)?\s*(?:\(([A-Z])\)|([A-Z])(?:[.):]|$))(?:\s(.*))?", re.DOTALL)
MARK = re.compile(r"\([A-Z]\)|\b[A-Z][.):]")  # of a second choice


@lru_cache(maxsize=4096)
def form(text: str) -> str:
    return normal_form(text)


def vote(answer: str) -> str:
    """The answer as it is counted in a vote: in normal form without spaces, `x =` and unit, a number as an integer or a
    fraction."""
    text = exact(form(answer))
    value = text if collection(text) else split_unit(relation(text)[1])[0]
    read = str(number(value) or "")
    return read if 0 < len(read) <= MAX_VOTE else re.sub(r"\s", "", value)[:MAX_VOTE]


def equivalent(answer: str, ground_truth: str) -> bool:
    """Whether two answers of at most `MAX_LENGTH` characters are mathematically equal; where that is open:

    - units may be missing on one side; two known ones must agree. 50% is 1/2 and 50.
    - a decimal of six or more significant digits equals what rounds to it: 0.333333 is 1/3, 0.333 is not.
    - the order of a list or set means nothing, that of a tuple, interval or matrix does; a list may stand for a tuple
      in its order. An open interval and a pair are written alike and are not told apart.
    - `x = 5` answers 5, words are compared without case, and a single upper-case letter is a choice, as in (B).

    What nests brackets more than `symbolic.MAX_DEPTH` deep is compared as text.
    """
    gold, answer = form(ground_truth), form(answer)
    if max(depth(gold), depth(answer)) > symbolic.MAX_DEPTH:
        return gold == answer
    return _same(gold, answer)


def close(answer: str, ground_truth: str, tolerance: str) -> bool:
    """Whether the numbers of two answers differ by at most `tolerance`: one number, or one for each of a list."""
    limits = [float(limit) for limit in tolerance.split(",")]
    found, wanted = _values(answer), _values(ground_truth)
    limits = limits * len(wanted) if len(limits) == 1 else limits
    return len(found) == len(wanted) == len(limits) and all(
        x is not None and y is not None and abs(x - y) <= limit
        for x, y, limit in zip(found, wanted, limits, strict=True)
    )


def _values(answer: str) -> list[float | None]:
    text = exact(form(answer))
    parts = collection(text)
    return [_value(relation(part)[1]) for part in (parts.elements if parts else (text,))]


def _value(text: str) -> float | None:
    if read := quantity(text):
        return float(read.value)
    expression = symbolic.read(text)
    return float(expression) if expression is not None and expression.is_number and expression.is_real else None


def _same(gold: str, answer: str) -> bool:
    gold, answer = exact(gold), exact(answer)
    if not gold or not answer:
        return False
    if re.sub(r"\s", "", gold) == re.sub(r"\s", "", answer):
        return True
    x, y = number(gold), number(answer)
    if x and y:
        return x.equals(y)
    for verdict in (_same_choice, _same_collection, _same_relation, _same_words, _same_numeral, _same_quantity):
        if (same := verdict(gold, answer)) is not None:
            return same
    return symbolic.equal(gold, answer)


# Each of the following returns None where the two texts are not what it compares.


def _same_choice(gold: str, answer: str) -> bool | None:
    choice, words = CHOICE.fullmatch(_words(gold)), _words(answer)
    if choice and words.strip("()") in CHOICES:
        words = words.upper()
    chosen = CHOSEN.fullmatch(words)
    if not chosen or MARK.search(chosen[3] or ""):
        return None
    if not choice:  # (B) 27 for 27
        return True if chosen[1] and chosen[3] and _same(gold, chosen[3]) else None
    return choice[1] == (chosen[1] or chosen[2])


def _same_collection(gold: str, answer: str) -> bool | None:
    if quantity(gold) and quantity(answer):  # 1,250 is one number
        return None
    a, b = collection(gold), collection(answer)
    if a and len(a.elements) == 1 and not a.matrix:
        return _same(a.elements[0], answer)
    if b and len(b.elements) == 1 and not b.matrix:
        return _same(gold, b.elements[0])
    if a and b:
        kinds = {a.kind, b.kind}
        if (len(kinds) == 1 or kinds in COMPARABLE) and _same_elements(a, b):
            return True
        return None if "union" in kinds else False
    single = answer if a else gold
    return False if (a or b) and not any(sign.search(single) for sign in (INEQUALITY, EQUALS, SET)) else None


def _same_elements(a: Collection, b: Collection) -> bool:
    if len(a.elements) != len(b.elements):
        return False
    names = [{name for name in (relation(element)[0] for element in c.elements) if name} for c in (a, b)]
    one_named = any(len(own) > 1 and not other for own, other in (names, names[::-1]))  # a = 1, b = 2 for 1, 2
    if "union" not in (a.kind, b.kind) and _sets(a) != _sets(b):
        return False
    if a.ordered or b.ordered or one_named:
        return all(_same(x, y) for x, y in zip(a.elements, b.elements, strict=True))
    if len(a.elements) > MAX_ELEMENTS:
        return False
    left = list(b.elements)
    for x in a.elements:
        found = next((y for y in left if _same(x, y)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _sets(a: Collection) -> int:
    return sum(element.startswith("\\{") for element in a.elements)


def _same_relation(gold: str, answer: str) -> bool | None:
    (name, value), (other_name, other_value) = relation(gold), relation(answer)
    if not name:
        return _same(gold, other_value) if other_name else None
    if not NAME.fullmatch(name):
        return None
    if not other_name:
        return None if INEQUALITY.search(answer) else _same(value, answer)
    if not NAME.fullmatch(other_name) or (
        name.lower() != other_name.lower() and SYMBOL.fullmatch(name) and SYMBOL.fullmatch(other_name)
    ):
        return None
    return _same(value, other_value)


def _words(text: str) -> str:
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return re.sub("(?<=[A-Za-z]{3})-(?=[A-Za-z]{3})", " ", text).strip()


def _same_words(gold: str, answer: str) -> bool | None:
    texts = [gold, answer]
    words = [_words(text) for text in texts]
    plain = [bool(LETTERS.fullmatch(text)) for text in words]
    prose = [has_prose(text) or text.lower() == "no" for text in words]
    if all(plain) and (any(prose) or any("\\text" in text for text in texts)):
        gold_letters, letters = (re.sub("[^a-z]", "", text.lower()) for text in words)
        return gold_letters == letters
    return False if any(p and q for p, q in zip(plain, prose, strict=True)) else None


def _same_numeral(gold: str, answer: str) -> bool | None:
    """Numerals with their base, as 1010_2; the base may be missing on one side."""
    a, b = _in_base(gold), _in_base(answer)
    if a and b:
        return a[1] == b[1]
    if a or b:
        return (a[0] if a else gold) == (b[0] if b else answer)
    return None


def _in_base(text: str) -> tuple[str, int] | None:
    """The numeral without its base, and its value; None for a variable with an index, as a_2 and x_{12}."""
    match = BASE.fullmatch(text)
    if not match:
        return None
    numeral, base = match[1], int(match[2])
    variable = not any(char.isdigit() for char in numeral) and (len(numeral) == 1 or not numeral.isupper())
    values = [int(char, 36) for char in numeral]
    if variable or base < 2 or max(values) >= base:
        return None
    return numeral, reduce(lambda value, digit: value * base + digit, values)


def _same_quantity(gold: str, answer: str) -> bool | None:
    (value, unit), (other_value, other_unit) = split_unit(gold), split_unit(answer)
    if (value, other_value) == (gold, answer):
        return None
    known, other_known = canonical(unit), canonical(other_unit)
    if known and other_known and known != other_known:
        return False
    if _same(value, other_value):
        return True
    # \sqrt{2} m may be a product, and 45 degrees are \pi/4.
    return None if any(len(u) == 1 or canonical(u) == "degree" for u in (unit, other_unit)) else False
