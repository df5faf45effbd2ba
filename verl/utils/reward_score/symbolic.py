"""Equality of two answers by math-verify and sympy, within limits that keep a hostile answer from exploding.

math-verify reads the LaTeX. Terms are then compared by their values, which takes milliseconds where simplifying may
take minutes: at two points, to more digits than any number on the way has. Relations, sets, and terms that agree at
positive points only are left to math-verify's comparison.

An answer beyond these limits is not parsed and can only be right by its text; they are far beyond the answers of the
published data sets. `MAX_LENGTH` characters, `MAX_DEPTH` nested brackets, no command outside `COMMANDS` (so no sums,
integrals, cases), nothing `UNREADABLE`, numbers of up to four digits in a binomial coefficient; then `MAX_DIGITS`
digits of any number on the way, and of what math-verify has to compare `MAX_SOLVED_DIGITS`, `MAX_NODES` of its tree and
`MAX_DEGREE` of its powers.

No call sets a time limit or a signal: a scoring process is killed from outside.
"""

import logging
import random
import re
from contextlib import suppress
from functools import lru_cache, reduce
from math import inf, lgamma, log, log10
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.parser import get_last_eq, should_treat_as_complex
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from verl.utils.reward_score.structure import closing, depth

# It warns in every process that it sets no time limit.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_LENGTH = 500
MAX_DEPTH = 12
MAX_DIGITS = 3000
MAX_SOLVED_DIGITS = 50
MAX_NODES = 80
MAX_DEGREE = 6
COMMANDS = re.compile(
    "frac|sqrt|cdot|times|div|binom|text|overline|bar|vec|hat|mathbb|emptyset|infty|pm|mp"
    "|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|arccot|sinh|cosh|tanh|log|ln|exp"
    "|leq|geq|ne|in|cup|cap|setminus|lfloor|rfloor|lceil|rceil|lvert|rvert|vert"
    "|pi|alpha|beta|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi"
    "|omega|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega"
)
UNREADABLE = re.compile(
    # math-verify evaluates while it reads: a root's index, an interval's bounds, an expression at a value, a float
    r"\\sqrt\s*\[(?!\s*(?:\d{1,3}|[a-z])\s*\])"
    r"|,[^,]*(?:!|\^[^,]*\^)|(?:!|\^[^,]*\^)[^,]*,"
    r"|\|\s*[_^]"
    r"|\d[eE][+-]?\d{4}"
    r"|\d\s+\d|:[^:]*:"  # it reads 2 3 as a mixed number and 3:2:1 as a fraction
)
BINOMIAL_ARGUMENT = re.compile(r"\s*\d{1,4}\s*|(?:\d{0,2}[a-df-hj-zA-DF-HJ-Z+\-\s])*\d{0,2}")  # no e, no i
NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
CONVERSION = ConversionConfig(lowercase_symbols=False)  # R is not r
FORMS = [
    # Read as a mixed number, too: (1)(2) as 3.
    (re.compile(r"(?<![_^\d.])(\d+(?:\.\d+)?)\s*\("), r"\1\\cdot ("),
    (re.compile(r"\)\s*\("), r")\\cdot ("),
    # It reads i as a variable, I as the imaginary unit, and I^2 as I.
    (re.compile(r"(?<![A-Za-z\\])([A-Za-z]?)i([A-Za-z]?)(?![A-Za-z])"), r"\1I\2"),
    (re.compile(r"I(?=\s*\^)"), "(I)"),
    (re.compile(r"(\d+(?:\.\d+)?)\s*\\text\{degrees?\}"), r"(\1\\cdot\\pi/180)"),
]


def readable(text: str) -> bool:
    """Whether a text is within the limits on what is parsed."""
    return (
        len(text) <= MAX_LENGTH
        and depth(text) <= MAX_DEPTH
        and not UNREADABLE.search(text)
        and all(COMMANDS.fullmatch(name) for name in re.findall(r"\\([A-Za-z]+)", text))
        and all(_small_binomial(text, match.end()) for match in re.finditer(r"\\binom\s*", text))
    )


def _small_binomial(text: str, start: int) -> bool:
    """Whether the arguments that start at `start` are small; math-verify evaluates the coefficient as it reads."""
    for _ in range(2):
        end = closing(text, start) if text[start : start + 1] == "{" else None
        if end is None or not BINOMIAL_ARGUMENT.fullmatch(text, start + 1, end):
            return False
        start = end + 1
    return True


def extract(text: str) -> str | None:
    """The answer that math-verify finds in a sentence, as text; None if it finds none."""
    if not readable(text):
        return None
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    found = parse(f"answer: {text}", configs, parsing_timeout=None)
    return next((item for item in found if isinstance(item, str)), None)


@lru_cache(maxsize=4096)
def read(text: str) -> sympy.Basic | None:
    """The expression that math-verify reads in a text in normal form; None beyond the limits, or if it reads none."""
    if not readable(text):
        return None
    text = reduce(lambda form, rule: rule[0].sub(rule[1], form), FORMS, text)
    expression = _convert(normalize_latex(text, NORMALIZATION))
    try:
        return expression if isinstance(expression, sympy.Basic) and digits(expression) <= MAX_DIGITS else None
    except RecursionError:  # 5!!!...!
        return None


def _convert(latex: str) -> Any:
    """What math-verify's own parser would make of it, but for the case of letters, which that one drops."""
    for part in dict.fromkeys([latex, get_last_eq(latex)]):  # of a = b = c the last equation
        with suppress(Exception):  # it raises many types for what is no LaTeX
            return latex2sympy(
                part,
                is_real=not should_treat_as_complex(part),
                convert_degrees=False,
                normalization_config=None,
                conversion_config=CONVERSION,
            )
    return None


def digits(expression: sympy.Basic) -> float:
    """An estimate from above of the decimal digits of the largest number that evaluating `expression` meets, symbols
    being between 1/2 and 2."""
    if isinstance(expression, sympy.Rational):
        return log10(max(abs(expression.p), expression.q))
    if isinstance(expression, sympy.Float):
        return abs(log10(abs(expression))) if expression else 0.0
    if not expression.args:
        return log10(4)  # of pi
    args = [digits(argument) for argument in expression.args]
    if isinstance(expression, sympy.Pow):
        return args[0] * _power(args[1])
    if isinstance(expression, sympy.exp | sympy.cosh | sympy.sinh):
        return log10(4) * _power(args[0])
    if isinstance(expression, sympy.factorial):
        return lgamma(_power(args[0]) + 1) / log(10) if args[0] < 6 else inf
    if isinstance(expression, sympy.binomial):
        return log10(2) * _power(max(args))
    if isinstance(expression, sympy.Mul):
        return sum(args)
    return max(args) + log10(len(args))


def _power(exponent: float) -> float:
    return 10**exponent if exponent < 9 else inf


def equal(gold: str, answer: str) -> bool:
    """Whether two texts in normal form are the same term, relation or set."""
    a, b = read(gold), read(answer)
    if a is None or b is None:
        return False
    if _has_gamma(a, b) and max(digits(a), digits(b)) > MAX_SOLVED_DIGITS:
        return False
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        positive = _agree(a, b, 1)
        if positive is False:
            return False
        if positive and _agree(a, b, -1) is not False:
            return True
    if isinstance(a, Relational) and isinstance(b, Relational) and _proportional(a, b):
        return True
    if any(_too_hard(expression) for expression in (a, b)):
        return False
    return verify(a, b, allow_set_relation_comp=True, timeout_seconds=None)


def _has_gamma(*expressions: sympy.Basic) -> bool:
    """Whether a factorial or binomial coefficient has to be worked out as a gamma function, slow with many digits."""
    found = [term for expression in expressions for term in expression.atoms(sympy.factorial, sympy.binomial)]
    return any(not argument.is_Integer for term in found for argument in term.args)


def _agree(a: sympy.Expr, b: sympy.Expr, sign: int) -> bool | None:
    """Whether two terms have the same value at a point with coordinates of one sign; None if one has none there, or
    only one a real value, as the point is then not in the domain of both."""
    size = int(max(digits(a), digits(b)))
    decimal = a.has(sympy.Float) or b.has(sympy.Float)
    precision = 30 if decimal else 2 * size + 30
    x, y = (_value(expression, sign, precision) for expression in (a, b))
    if x is None or y is None or bool(x.is_real) != bool(y.is_real):
        return None
    distance = max(abs(part) for part in (x - y).as_real_imag())
    scale = max(abs(part) for value in (x, y) for part in value.as_real_imag())
    return bool(distance <= (scale * 1e-6 if decimal else sympy.Float(10) ** -(size + 20)))


def _proportional(a: Relational, b: Relational) -> bool:
    """Whether two equations or inequalities of one direction differ by a factor only, as 3x > 6 and x > 2."""
    if not all(isinstance(side, sympy.Expr) for side in (*a.args, *b.args)):
        return False
    (kind, f), (other_kind, g) = _standard(a), _standard(b)
    size = int(max(digits(f), digits(g)))
    precision = 3 * size + 40
    values = [_value(term, sign, precision) for term in (f, g) for sign in (1, -1)]
    real = [value for value in values if value is not None and value.is_real and value != 0]
    if kind is not other_kind or len(real) < 4:
        return False
    first, second = real[0] / real[2], real[1] / real[3]
    decimal = f.has(sympy.Float) or g.has(sympy.Float)
    tolerance = sympy.Float(10) ** (-12 if decimal else -2 * size - 20)
    return bool(abs(first - second) <= abs(first) * tolerance and (first > 0 or kind in (sympy.Eq, sympy.Ne)))


def _standard(relation: Relational) -> tuple[type[Relational], sympy.Expr]:
    """Kind and left side of `relation` as `term = 0`, `term != 0`, `term < 0` or `term <= 0`."""
    relation = relation.reversed if isinstance(relation, sympy.Gt | sympy.Ge) else relation
    return type(relation), sympy.Add(relation.lhs, sympy.Mul(-1, relation.rhs, evaluate=False), evaluate=False)


def _value(expression: sympy.Expr, sign: int, precision: int) -> sympy.Expr | None:
    point = {symbol: sympy.Float(_coordinate(symbol.name, sign), precision) for symbol in expression.free_symbols}
    try:
        value = expression.evalf(precision, subs=point)
        return value if value.is_number and value.is_finite and not value.has(AppliedUndef) else None
    except Exception:  # sympy raises many types for a term that has no value
        return None


def _coordinate(name: str, sign: int) -> float:
    return sign * random.Random(f"{name} {sign}").uniform(0.5, 2)


def _too_hard(expression: sympy.Basic) -> bool:
    return (
        digits(expression) > MAX_SOLVED_DIGITS
        or sum(1 for _ in sympy.preorder_traversal(expression)) > MAX_NODES
        or expression.has(sympy.Derivative)
        or any(power.exp.is_Integer and abs(power.exp) > MAX_DEGREE for power in expression.atoms(sympy.Pow))
    )
